"""What a path names."""

from __future__ import annotations

from pathlib import Path

import pytest

from qalora_compile.untrusted.artifacts import (
    Artifact,
    ArtifactKind,
    encoder_decoder_files,
    find_artifact,
    onnx_parts,
)

FOLDERS = {
    ("program.json", "quantized.safetensors"): (ArtifactKind.PROGRAM, ""),
    ("onnx/encoder_model_q4.onnx", "onnx/decoder_model_q4.onnx"): (
        ArtifactKind.ENCODER_DECODER,
        "",
    ),
    ("onnx/encoder_model_q4.onnx", "onnx/decoder_model_merged_q4.onnx"): (
        ArtifactKind.ENCODER_DECODER,
        "",
    ),
    ("openvino_encoder_model.xml", "openvino_decoder_model.xml"): (
        ArtifactKind.ENCODER_DECODER,
        "",
    ),
    ("encoder_model.onnx", "decoder_model.onnx"): (ArtifactKind.ENCODER_DECODER, ""),
    ("decoder_model.onnx",): (ArtifactKind.ENCODER_DECODER, ""),
    ("onnx/model_q4.onnx", "config.json"): (ArtifactKind.ONNX, "onnx/model_q4.onnx"),
    ("onnx/model.onnx", "config.json"): (ArtifactKind.ONNX, "onnx/model.onnx"),
    ("onnx/model_q4.onnx", "model.onnx"): (ArtifactKind.ONNX, "onnx/model_q4.onnx"),
    ("model.onnx", "config.json"): (ArtifactKind.ONNX, "model.onnx"),
    ("openvino_model.xml", "openvino_model.bin", "config.json"): (
        ArtifactKind.OPENVINO,
        "openvino_model.xml",
    ),
    ("model.pt2", "model_aot.pt2", "config.json"): (ArtifactKind.TORCH, "model.pt2"),
    ("model.gguf",): (ArtifactKind.GGUF, "model.gguf"),
    ("part-1.safetensors",): (ArtifactKind.CHECKPOINT, ""),
    ("config.json",): (ArtifactKind.CHECKPOINT, ""),
}


@pytest.mark.parametrize("files", FOLDERS, ids="+".join)
def test_a_folder_is_known_by_its_files(files: tuple[str, ...], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
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


def test_parts_of_a_model_are_found_under_names_of_every_version(tmp_path: Path) -> None:
    for name in ("a.onnx", "a.onnx_data", "b.onnx", "b.onnx.data", "c.onnx"):
        (tmp_path / name).touch()
    found = {n: [f.name for f in onnx_parts(tmp_path / f"{n}.onnx")] for n in "abcd"}
    assert found == {
        "a": ["a.onnx", "a.onnx_data"],
        "b": ["b.onnx", "b.onnx.data"],
        "c": ["c.onnx"],
        "d": [],
    }


def test_the_decoder_that_is_there_goes_with_the_encoder(tmp_path: Path) -> None:
    for encoder, decoder in (
        ("onnx/encoder_model_q4.onnx", "onnx/decoder_model_merged_q4.onnx"),
        ("onnx/encoder_model_q4.ort", "onnx/decoder_model_q4.ort"),
    ):
        folder = tmp_path / encoder.rpartition(".")[2]
        (folder / "onnx").mkdir(parents=True)
        for name in (encoder, decoder):
            (folder / name).touch()
        assert encoder_decoder_files(folder) == (folder / encoder, folder / decoder)
    assert encoder_decoder_files(tmp_path) is None


def test_an_empty_folder_is_nothing(tmp_path: Path) -> None:
    assert find_artifact(tmp_path) is None
