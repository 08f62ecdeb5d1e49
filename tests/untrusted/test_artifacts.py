"""What a path names."""

from __future__ import annotations

from pathlib import Path

import pytest

from qalora_compile.untrusted.artifacts import Artifact, ArtifactKind, find_artifact

FOLDERS = {
    ("program.json", "quantized.safetensors"): (ArtifactKind.PROGRAM, ""),
    ("encoder_model.onnx", "decoder_model.onnx"): (ArtifactKind.ENCODER_DECODER, ""),
    ("decoder_model.onnx",): (ArtifactKind.ENCODER_DECODER, ""),
    ("model.onnx", "config.json"): (ArtifactKind.ONNX, "model.onnx"),
    ("model.gguf",): (ArtifactKind.GGUF, "model.gguf"),
    ("part-1.safetensors",): (ArtifactKind.CHECKPOINT, ""),
    ("config.json",): (ArtifactKind.CHECKPOINT, ""),
}


@pytest.mark.parametrize("files", FOLDERS, ids="+".join)
def test_a_folder_is_known_by_its_files(files: tuple[str, ...], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    kind, file = FOLDERS[files]
    assert find_artifact(str(tmp_path)) == Artifact(kind, tmp_path / file)


def test_a_file_is_known_by_its_suffix_if_it_is_there(tmp_path: Path) -> None:
    assert find_artifact(tmp_path / "a.onnx") is None
    (tmp_path / "a.onnx").touch()
    (tmp_path / "a.gguf").touch()
    (tmp_path / "a.txt").touch()
    assert find_artifact(tmp_path / "a.onnx") == Artifact(ArtifactKind.ONNX, tmp_path / "a.onnx")
    assert find_artifact(tmp_path / "a.gguf") == Artifact(ArtifactKind.GGUF, tmp_path / "a.gguf")
    assert find_artifact(tmp_path / "a.txt") is None


def test_an_empty_folder_is_nothing(tmp_path: Path) -> None:
    assert find_artifact(tmp_path) is None
