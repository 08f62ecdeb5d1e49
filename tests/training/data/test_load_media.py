"""Rows that name images and recordings: their files are checked before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qalora_compile.errors import UserInputError
from qalora_compile.training.data.example import lengths_of
from qalora_compile.training.data.load_examples import find_classes, first_labelled
from qalora_compile.training.data.load_media import load_media
from qalora_compile.untrusted.media_processor import IMAGE, MediaProcessor, load_preprocessor
from tests.media import (
    COLOURS,
    write_audio_model,
    write_image_model,
    write_images,
    write_recordings,
    write_rows,
    write_tone,
)

CLASSES = tuple(sorted(COLOURS))


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> MediaProcessor:
    found = load_preprocessor(write_image_model(tmp_path_factory.mktemp("vit")))
    assert isinstance(found, MediaProcessor)
    return found


def test_paths_start_at_the_data_file(processor: MediaProcessor, tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", 6)
    assert first_labelled(data) == IMAGE
    assert find_classes(data) == CLASSES
    found = load_media(data, processor, CLASSES)
    assert found.labels() == {0: 2, 1: 2, 2: 2}
    assert (found.unit, found.is_lazy, found.truncated) == ("examples", False, 0)
    example = found.examples[4]
    assert example.media is not None
    assert example.media.path == tmp_path / "data" / "images" / "4.jpg"
    assert (example.label, example.length, example.learns) == (1, 1, True)


def test_columns_of_other_names_are_mapped(processor: MediaProcessor, tmp_path: Path) -> None:
    write_images(tmp_path / "data", 2)
    table = tmp_path / "data" / "table.csv"
    table.write_text("file_name,kind\nimages/0.png,red\nimages/1.jpg,green\n", "utf-8")
    mapping = {"image": "file_name", "label": "kind"}
    assert first_labelled(table, mapping) == IMAGE
    assert len(load_media(table, processor, CLASSES, mapping).examples) == 2


def test_a_text_with_a_picture_is_a_text(tmp_path: Path) -> None:
    row = {"text": "a", "image": "a.png", "label": "b"}
    assert first_labelled(write_rows(tmp_path / "a.jsonl", [row])) == "text"
    assert first_labelled(write_rows(tmp_path / "a.jsonl", [{"image": "a.png"}])) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("none.png", "the file none.png is missing"),
        (".", "is not a regular file"),
        ("data.jsonl", "the file is not a readable image"),
        ("http://example.org/a.png", "is a web address, and nothing is fetched"),
        ("a\0b.png", "the field 'image' is not a path"),
        ("", "the field 'image' is not a path"),
        (7, "the field 'image' is missing or not a text"),
        ("/dev/zero", "zero is not a regular file"),
    ],
)
def test_a_bad_file_is_named_with_its_row(
    value: Any, message: str, processor: MediaProcessor, tmp_path: Path
) -> None:
    write_images(tmp_path / "images", 1)
    rows = [{"image": "images/images/0.png", "label": "red"}, {"image": value, "label": "blue"}]
    data = write_rows(tmp_path / "data.jsonl", rows)
    with pytest.raises(UserInputError, match=message) as caught:
        load_media(data, processor, CLASSES)
    assert str(caught.value.where).startswith(f"{data}:2")


def test_an_unknown_label_is_refused(processor: MediaProcessor, tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", 3)
    with pytest.raises(UserInputError, match="the label 'blue' does not occur") as caught:
        load_media(data, processor, ("green", "red"))
    assert caught.value.where == f"{data}:3"


def test_long_recordings_are_counted_as_cut(tmp_path: Path) -> None:
    processor = load_preprocessor(write_audio_model(tmp_path / "wav2vec2"))
    data = write_recordings(tmp_path / "data", 2)
    write_tone(tmp_path / "data" / "sounds" / "0.wav", 200, 61_000)
    found = load_media(data, processor, ("high", "low"))
    assert (found.truncated, lengths_of(found.examples).tolist()) == (1, [60_000, 440])
