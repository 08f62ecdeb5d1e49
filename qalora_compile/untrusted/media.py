"""Images and recordings of unknown origin: decoded within limits, from formats that run no code.

Pillow decodes images, of the formats in `_FORMATS` only: others start programs (EPS) or are rarely
fuzzed. WAV files of integers are read here; soundfile (libsndfile) decodes other recordings.
"""

from __future__ import annotations

import os
import shlex
import warnings
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.optional import require
from qalora_compile.untrusted.fields import quoted
from qalora_compile.untrusted.paths import check_regular

MOST_PIXELS = 80_000_000
"""Decoded, such an image takes 240 MB; Pillow warns of more than 89 million."""
_LONGEST = 50
"""The limit of width to height or height to width: processors scale the smaller one to a size."""
MOST_SECONDS = 30.0
"""Recordings are read up to here."""
LEAST_SECONDS = 0.05
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_SIGNS = (b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2", b"FORM", b"RIFF")
"""How FLAC, Ogg, MP3, AIFF and WAV files begin."""
_WIDTHS: dict[int, str] = {1: "u1", 2: "<i2", 4: "<i4"}
"""Bytes of a sample → its dtype."""


def check_image(path: Path) -> None:
    """Read the header of an image; its pixels are not decoded.

    Raises:
        UserInputError: see `read_image`.
    """
    with _opened_image(path):
        pass


def read_image(path: Path) -> Any:
    """A `PIL.Image` in RGB, upright as its EXIF data say; of an animation, the first picture.

    Raises:
        UserInputError: the file is missing, is not a regular file, is no image of a known format,
            is damaged, has more than 80 million pixels, or is 50 times as long as wide.
        UnsupportedError: Pillow is not installed.
    """
    with _opened_image(path) as image:
        upright = require("PIL.ImageOps", extra="image", purpose="read images").exif_transpose
        return upright(image).convert("RGB")


@contextmanager
def _opened_image(path: Path) -> Iterator[Any]:
    """An image whose header was checked."""
    pillow = require("PIL.Image", extra="image", purpose="read images")
    check_regular(path)
    too_large = UserInputError(
        f"the image has more than {MOST_PIXELS:,} pixels", where=str(path), hint="scale it down"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(path, formats=_FORMATS) as image:
                small, large = sorted(image.size)
                if small * large > MOST_PIXELS:
                    raise too_large
                if large > _LONGEST * small:
                    raise UserInputError(
                        f"the image has {image.width} × {image.height} pixels",
                        where=str(path),
                        hint=f"crop it: it may be {_LONGEST} times as long as wide",
                    )
                yield image
    except (pillow.DecompressionBombWarning, pillow.DecompressionBombError) as error:
        raise too_large from error
    except UserInputError:
        raise
    except Exception as error:  # decoders raise many types
        raise UserInputError(
            f"the file is not a readable image: {quoted(str(error), 120)}",
            where=str(path),
            hint=f"known formats: {', '.join(_FORMATS)}",
        ) from error


@dataclass(frozen=True)
class Sound:
    """The header of a recording.

    Attributes:
        rate: Samples per second.
        samples: Number of samples of a channel.
    """

    rate: int
    samples: int


def check_recording(path: Path, rate: int) -> Sound:
    """Read the header of a recording.

    Args:
        path: The file.
        rate: The sampling rate that the model takes.

    Raises:
        UserInputError: see `read_recording`.
        UnsupportedError: see `read_recording`.
    """
    found = _wave_header(path)
    if found is None:
        with _sound_file(path) as file:
            found = Sound(int(file.samplerate), max(0, int(file.frames)))
    if found.rate != rate:
        new = path.with_name(f"{path.stem}_{rate}.wav")
        command = shlex.join(["ffmpeg", "-i", str(path), "-ar", str(rate), str(new)])
        raise UserInputError(
            f"the recording has {found.rate} samples a second, and the model takes {rate}",
            where=str(path),
            hint=f"resample it: {command}",
        )
    if found.samples < LEAST_SECONDS * rate:
        raise UserInputError(
            f"the recording has {found.samples} samples, less than {LEAST_SECONDS} seconds",
            where=str(path),
            hint="leave the line out",
        )
    return found


def read_recording(path: Path, rate: int) -> NDArray[np.float32]:
    """The first 30 seconds of a recording, the mean of its channels, from -1 to 1, `[samples]`.

    Args:
        path: The file.
        rate: The sampling rate that the model takes.

    Raises:
        UserInputError: the file is missing, is not a regular file, is no recording, is damaged, is
            shorter than 0.05 seconds, or has another sampling rate.
        UnsupportedError: the file is not a WAV file of integers, and soundfile is not installed.
    """
    sound = check_recording(path, rate)
    count = min(sound.samples, int(MOST_SECONDS * rate))
    if _wave_header(path) is not None:
        found = _wave_samples(path, count)
    else:
        with _sound_file(path) as file:
            found = file.read(frames=count, dtype="float32", always_2d=True)
    if not len(found) or not np.isfinite(found).all():
        raise UserInputError("the recording is damaged", where=str(path), hint="leave it out")
    mean: NDArray[np.float32] = found.mean(1, dtype=np.float32)
    return mean


def _wave_header(path: Path) -> Sound | None:
    """The header of a WAV file of integers; None for other files."""
    check_regular(path)
    try:
        with wave.open(str(path), "rb") as file:
            bytes_each = file.getsampwidth() * file.getnchannels()
            if file.getsampwidth() not in (*_WIDTHS, 3) or not bytes_each:
                return None
            present = os.path.getsize(path) // bytes_each  # a header may promise more
            return Sound(file.getframerate(), min(file.getnframes(), present))
    except (wave.Error, EOFError, ValueError):
        return None


def _wave_samples(path: Path, count: int) -> NDArray[np.float32]:
    """The first samples of a WAV file of integers, `[samples, channels]`."""
    with wave.open(str(path), "rb") as file:
        width, channels = file.getsampwidth(), file.getnchannels()
        data = file.readframes(count)
    data = data[: len(data) // (width * channels) * width * channels]
    if width == 3:  # the upper three bytes of four
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        data, width = wide.tobytes(), 4
    values: NDArray[np.float32] = np.frombuffer(data, np.dtype(_WIDTHS[width])).astype(np.float32)
    if width == 1:  # unsigned
        values -= 128
    values /= 2 ** (8 * width - 1)
    return values.reshape(-1, channels)


@contextmanager
def _sound_file(path: Path) -> Iterator[Any]:
    """A recording that soundfile decodes."""
    with path.open("rb") as file:
        head = file.read(4)
    if not head.startswith(_SIGNS):
        raise UserInputError(
            "the file is not a recording of a known form",
            where=str(path),
            hint="known forms: WAV, FLAC, Ogg, MP3, AIFF",
        )
    try:
        soundfile = require("soundfile", extra="audio", purpose="read recordings")
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{error.what}; without it, only WAV files of integers are read",
            where=str(path),
            hint=error.hint,
        ) from error
    try:
        with soundfile.SoundFile(path) as opened:
            yield opened
    except UserInputError:
        raise
    except Exception as error:  # libsndfile's errors, and those of damaged headers
        raise UserInputError(
            f"the file is not a readable recording: {quoted(str(error), 120)}", where=str(path)
        ) from error
