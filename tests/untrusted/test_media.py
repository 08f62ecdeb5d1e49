"""Images and recordings of unknown origin: what is read, and what is refused with a reason."""

from __future__ import annotations

import os
import struct
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.untrusted import media
from qalora_compile.untrusted.media import (
    check_image,
    check_recording,
    read_image,
    read_recording,
)
from tests.media import RATE, write_tone


def bomb(path: Path, width: int, height: int) -> Path:
    """A PNG of a few bytes whose header promises many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 64)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_an_image_of_any_mode_is_rgb(mode: str, tmp_path: Path) -> None:
    suffix = "tiff" if mode == "CMYK" else "png"
    Image.new("RGB", (4, 3), (250, 10, 10)).convert(mode).save(tmp_path / f"a.{suffix}")
    found = read_image(tmp_path / f"a.{suffix}")
    assert (found.mode, found.size) == ("RGB", (4, 3))


def test_an_image_is_upright_as_its_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (20, 40)


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (9_400, 9_400), (9_000, 9_000)])
def test_too_many_pixels_are_refused_before_they_are_decoded(
    width: int, height: int, tmp_path: Path
) -> None:
    path = bomb(tmp_path / "a.png", width, height)
    for read in (check_image, read_image):
        with pytest.raises(UserInputError, match="more than 80,000,000 pixels") as caught:
            read(path)
        assert caught.value.hint == "scale it down"


def test_a_very_long_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="the image has 1000 × 10 pixels"):
        check_image(bomb(tmp_path / "a.png", 1000, 10))


@pytest.mark.parametrize(
    "data", [b"", b"words", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_image_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(UserInputError, match="the file is not a readable image"):
        check_image(tmp_path / "a.png")


def test_a_damaged_image_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    check_image(path)
    with pytest.raises(UserInputError, match="the file is not a readable image"):
        read_image(path)


@pytest.mark.parametrize("read", [read_image, lambda path: read_recording(path, RATE)])
def test_what_is_no_regular_file_is_refused(read: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("pipe", "is not a regular file"),
        (".", "is not a regular file"),
        ("none", "the file none is missing"),
    ):
        with pytest.raises(UserInputError, match=message):
            read(tmp_path / name)


@pytest.mark.parametrize(("width", "error"), [(1, 0.01), (2, 1e-4), (3, 1e-6), (4, 1e-6)])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_of_any_width_are_numbers_from_minus_1_to_1(
    width: int, error: float, channels: int, tmp_path: Path
) -> None:
    path = write_tone(tmp_path / "a.wav", 200, 300, width=width, channels=channels)
    found = read_recording(path, RATE)
    wanted = np.sin(2 * np.pi * 200 * np.arange(300) / RATE) / 2
    assert found.dtype == np.float32
    assert found.shape == (300,)
    assert np.abs(found - wanted).max() < error


def test_a_long_recording_is_read_for_30_seconds(tmp_path: Path) -> None:
    path = write_tone(tmp_path / "a.wav", 200, 31 * 100, rate=100)
    assert check_recording(path, 100).samples == 3100
    assert len(read_recording(path, 100)) == 3000


def test_a_header_that_promises_more_is_not_believed(tmp_path: Path) -> None:
    path = write_tone(tmp_path / "a.wav", 200, 500)
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = struct.pack("<I", 2**32 - 9)  # sizes of the file and of its data
    path.write_bytes(data)
    assert check_recording(path, RATE).samples < 600
    assert len(read_recording(path, RATE)) == 500


def test_short_recordings_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"has 99 samples, less than 0\.05 seconds"):
        check_recording(write_tone(tmp_path / "a.wav", 200, 99), RATE)
    (tmp_path / "b.wav").write_bytes(b"words")
    with pytest.raises(UserInputError, match="not a recording of a known form"):
        check_recording(tmp_path / "b.wav", RATE)


def test_other_forms_need_soundfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "a.flac").write_bytes(b"fLaC" + bytes(99))
    with pytest.raises(UnsupportedError, match="only WAV files of integers are read") as caught:
        check_recording(tmp_path / "a.flac", RATE)
    assert caught.value.hint == "pip install 'qalora-compile[audio]'"


class _SoundFile:
    """What is used of `soundfile.SoundFile`."""

    samplerate, frames = RATE, 300

    def __init__(self, path: Path) -> None:
        if b"bad" in path.read_bytes():
            raise RuntimeError("Error opening: unknown format.")

    def __enter__(self) -> _SoundFile:
        return self

    def __exit__(self, *_: object) -> None: ...

    def read(self, *, frames: int, dtype: str, always_2d: bool) -> Any:
        assert (dtype, always_2d) == ("float32", True)
        return np.stack([np.zeros(frames, np.float32), np.ones(frames, np.float32)], 1)


def test_soundfile_reads_the_other_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("soundfile")
    fake.SoundFile = _SoundFile  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "soundfile", fake)
    (tmp_path / "a.ogg").write_bytes(b"OggS")
    assert read_recording(tmp_path / "a.ogg", RATE).tolist() == [0.5] * 300
    (tmp_path / "b.ogg").write_bytes(b"OggS bad")
    with pytest.raises(UserInputError, match="not a readable recording: .*unknown format"):
        read_recording(tmp_path / "b.ogg", RATE)
    monkeypatch.setattr(media, "MOST_SECONDS", 0.1)
    assert len(read_recording(tmp_path / "a.ogg", RATE)) == 200
