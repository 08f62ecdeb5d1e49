"""The processor of a model of images or audio: how a file becomes the numbers that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.optional import require
from qalora_compile.untrusted.artifacts import PREPROCESSOR_FILE
from qalora_compile.untrusted.fields import quoted
from qalora_compile.untrusted.json_text import read_object
from qalora_compile.untrusted.media import (
    MOST_SECONDS,
    check_image,
    check_recording,
    read_image,
    read_recording,
)
from qalora_compile.untrusted.paths import check_folder
from qalora_compile.untrusted.tokenizer import has_tokenizer, load_tokenizer

IMAGE, AUDIO = "image", "audio"
MEDIA = (IMAGE, AUDIO)
_MASK = "attention_mask"
_LARGEST = 2048
"""The limit of sizes in pixels, and of frames and bins of a spectrogram: arrays of some 50 MB."""
_MOST_FRAMES = 8192
_MOST_RATE = 400_000
_LIMITS = {
    **dict.fromkeys(("size", "crop_size", "pad_size", "size_divisor"), _LARGEST),
    **dict.fromkeys(("num_mel_bins", "feature_size", "n_fft", "hop_length"), _LARGEST),
    **dict.fromkeys(("max_length", "nb_max_frames", "chunk_length"), _MOST_FRAMES),
    "sampling_rate": _MOST_RATE,
}
"""Setting of a processor → the largest number in it."""

Features = dict[str, NDArray[Any]]
"""Input of the model → its value for one file, without a batch dimension."""


@dataclass(frozen=True)
class MediaProcessor:
    """Reads images or recordings as a model takes them.

    Attributes:
        medium: `image` or `audio`.
        processor: The image processor or feature extractor of transformers.
    """

    medium: str
    processor: Any

    @property
    def rate(self) -> int:
        """Samples a second, of audio."""
        return int(self.processor.sampling_rate)

    def check(self, path: Path) -> tuple[int, bool]:
        """Check a file by its header; returns its length, and whether it will be cut.

        The length is the number of samples that are read of a recording, and 1 for an image.

        Raises:
            UserInputError: see `read_image` and `read_recording`.
            UnsupportedError: a library that reads it is missing.
        """
        if self.medium == IMAGE:
            check_image(path)
            return 1, False
        samples, most = check_recording(path, self.rate).samples, int(MOST_SECONDS * self.rate)
        return min(samples, most), samples > most

    def read(self, path: Path) -> Features:
        """The numbers of a file, as float32, and an attention mask if the processor gives one.

        Raises:
            UserInputError: the file cannot be read; see `read_image` and `read_recording`.
            UnsupportedError: a library that reads it is missing, or the processor gives something
                else.
        """
        if self.medium == IMAGE:
            return self._process(read_image(path), str(path))
        return self._process(read_recording(path, self.rate), str(path))

    def example(self) -> Features:
        """The numbers of an image or a second of noise, from which a model is captured."""
        noise = np.random.default_rng(0)
        if self.medium == IMAGE:
            pillow = require("PIL.Image", extra="image", purpose="read images")
            pixels = noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            return self._process(pillow.fromarray(pixels), "an example image")
        samples = noise.standard_normal(self.rate, dtype=np.float32) / 8
        return self._process(samples, "an example recording")

    def _process(self, value: Any, where: str) -> Features:
        given = {"images": [value]} if self.medium == IMAGE else {"sampling_rate": self.rate}
        words = () if self.medium == IMAGE else ([value],)
        try:
            found = dict(self.processor(*words, return_tensors="np", **given))
        except Exception as error:  # processors raise many types
            raise UserInputError(
                f"the model's processor cannot read the {self.medium}: {quoted(str(error), 200)}",
                where=where,
            ) from error
        names = [name for name in found if name != _MASK]
        first = np.asarray(found[names[0]]) if len(names) == 1 else np.empty(0)
        wanted = (4,) if self.medium == IMAGE else (2, 3)
        if first.ndim not in wanted or len(first) != 1 or not np.isfinite(first).all():
            raise UnsupportedError(
                f"{type(self.processor).__name__} gives {', '.join(found)}, not one array a file",
                where=where,
                hint="train the model with a loop of your own: qc.capture_model(model, (), inputs)",
            )
        values: Features = {names[0]: first[0].astype(np.float32)}
        if _MASK in found:
            values[_MASK] = np.asarray(found[_MASK])[0].astype(np.int64)
        return values

    def save_pretrained(self, folder: Path) -> None:
        """Write `preprocessor_config.json`."""
        self.processor.save_pretrained(folder)


def load_media_processor(folder: Path, medium: str) -> MediaProcessor:
    """The processor in a model's folder. Code in the folder is never run.

    Args:
        folder: With `preprocessor_config.json`.
        medium: `image` or `audio`.

    Raises:
        UserInputError: its file is missing, broken or hostile.
        UnsupportedError: transformers or Pillow is not installed.
    """
    transformers = require("transformers", extra="hf", purpose=f"read {medium} data")
    check_folder(folder)
    if not (folder / PREPROCESSOR_FILE).is_file():
        raise UserInputError(
            f"the folder holds no {PREPROCESSOR_FILE}, which says how the model reads {medium} "
            "data",
            where=str(folder),
            hint="give the complete folder of the model",
        )
    settings = read_object(folder / PREPROCESSOR_FILE)
    _check_sizes(settings, folder)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if medium == IMAGE:
        require("PIL.Image", extra="image", purpose="read images")
        options["backend"] = "pil"  # the same numbers whether or not torchvision is installed
    kind = transformers.AutoImageProcessor if medium == IMAGE else transformers.AutoFeatureExtractor
    transformers.logging.set_verbosity_error()
    try:
        return MediaProcessor(medium, kind.from_pretrained(folder, **options))
    except Exception as error:  # transformers raises exceptions of many types
        raise UserInputError(
            f"cannot load the {medium} processor: {type(error).__name__}: "
            f"{quoted(str(error), 200)}",
            where=str(folder / PREPROCESSOR_FILE),
            hint="its file may be damaged, or it may need its own code, which is never run",
        ) from error


def load_preprocessor(folder: Path) -> Any:
    """What reads the inputs of the model in a folder: a tokenizer, a `MediaProcessor`, or None.

    Raises:
        UserInputError: its files are broken or hostile.
    """
    if has_tokenizer(folder) or not (folder / PREPROCESSOR_FILE).is_file():
        return load_tokenizer(folder)
    is_image = "image_processor_type" in read_object(folder / PREPROCESSOR_FILE)
    return load_media_processor(folder, IMAGE if is_image else AUDIO)


def _check_sizes(settings: dict[str, Any], folder: Path) -> None:
    """Refuse a processor that would enlarge every file beyond any use."""
    for name, most in _LIMITS.items():
        if any(not 0 < number <= most for number in _numbers(settings.get(name))):
            raise UserInputError(
                f"{PREPROCESSOR_FILE} has {name} {quoted(settings[name])}; known are 1 to {most}",
                where=str(folder / PREPROCESSOR_FILE),
                hint="fetch the file again, from a source that you trust",
            )


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a setting of sizes: one, or several by name or in a list."""
    if isinstance(value, dict):
        value = list(value.values())
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, (int, float)) and not isinstance(each, bool):
            yield each
