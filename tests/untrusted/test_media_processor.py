"""Processors of unknown origin: loaded without code, within limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.untrusted.media_processor import (
    AUDIO,
    IMAGE,
    MediaProcessor,
    load_media_processor,
    load_preprocessor,
)
from tests.media import RATE, write_audio_model, write_image_model, write_images, write_tone

CONFIG = "preprocessor_config.json"


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_model(tmp_path_factory.mktemp("vit"))


def change(folder: Path, target: Path, **settings: Any) -> Path:
    """A folder that holds the processor of another one, with other settings."""
    value = json.loads((folder / CONFIG).read_text("utf-8")) | settings
    (target / CONFIG).write_text(json.dumps(value), "utf-8")
    return target


def test_an_image_is_what_the_processor_makes_of_it(vision: Path, tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", 1)
    found = load_media_processor(vision, IMAGE).read(data.parent / "images" / "0.png")
    assert list(found) == ["pixel_values"]
    assert found["pixel_values"].shape == (3, 16, 16)
    assert found["pixel_values"].dtype == np.float32
    assert found["pixel_values"].mean((1, 2))[0] > 0.5  # red, from -1 to 1


@pytest.mark.parametrize("mask", [False, True])
def test_a_recording_has_a_mask_where_the_model_takes_one(mask: bool, tmp_path: Path) -> None:
    processor = load_preprocessor(write_audio_model(tmp_path / "wav2vec2", mask=mask))
    assert (processor.medium, processor.rate) == (AUDIO, RATE)
    path = write_tone(tmp_path / "a.wav", 200, 31 * RATE)
    assert processor.check(path) == (30 * RATE, True)
    found = processor.read(path)
    assert found["input_values"].shape == (30 * RATE,)
    assert ("attention_mask" in found) == mask


def test_it_is_stored_and_read_again(vision: Path, tmp_path: Path) -> None:
    processor = load_preprocessor(vision)
    processor.save_pretrained(tmp_path)
    again = load_preprocessor(tmp_path)
    assert again.medium == IMAGE
    assert all(
        np.array_equal(value, again.example()[name]) for name, value in processor.example().items()
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"size": {"height": 10**6, "width": 10**6}}, "has size "),
        ({"size": {"shortest_edge": 10**9}}, "has size "),
        ({"crop_size": -3}, "has crop_size -3"),
        ({"size_divisor": 10**7}, "has size_divisor"),
        ({"sampling_rate": 10**9}, "has sampling_rate"),
        ({"max_length": 10**9}, "has max_length"),
    ],
)
def test_a_processor_of_endless_sizes_is_refused(
    settings: dict[str, Any], named: str, vision: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserInputError, match=named):
        load_media_processor(change(vision, tmp_path, **settings), IMAGE)


def test_a_processor_with_code_of_its_own_is_not_run(vision: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("raise SystemExit('code was run')", "utf-8")
    folder = change(
        vision,
        tmp_path,
        image_processor_type="OwnProcessor",
        auto_map={"AutoImageProcessor": "own.OwnProcessor"},
    )
    with pytest.raises(UserInputError, match="cannot load the image processor"):
        load_media_processor(folder, IMAGE)


class _Odd:
    """A processor whose arrays are not one a file."""

    sampling_rate = RATE

    def __call__(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"pixel_values": np.zeros((1, 3, 4, 4)), "pixel_mask": np.ones((1, 4, 4))}


def test_arrays_that_are_not_one_a_file_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="_Odd gives pixel_values, pixel_mask, not one"):
        MediaProcessor(IMAGE, _Odd()).example()
