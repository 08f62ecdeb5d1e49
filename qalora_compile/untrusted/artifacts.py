"""Identify a path: a program folder, an exported model, or a checkpoint of another library."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from qalora_compile.errors import UserInputError

PROGRAM_FILE = "program.json"
MODEL_FILE, ENCODER_FILE, DECODER_FILE = "model.onnx", "encoder_model.onnx", "decoder_model.onnx"
CONFIG_FILE, GGUF_FILE = "config.json", "model.gguf"


class ArtifactKind(Enum):
    """The kinds of artifacts that can be opened by their path."""

    PROGRAM = "program folder"
    ENCODER_DECODER = "exported encoder-decoder model"
    ONNX = "ONNX model"
    GGUF = "GGUF file"
    CHECKPOINT = "checkpoint folder"


@dataclass(frozen=True)
class Artifact:
    """An artifact that can be opened.

    Attributes:
        kind: Its kind.
        path: The `.onnx` or `.gguf` file; for the other kinds, the folder.
    """

    kind: ArtifactKind
    path: Path


def find_artifact(path: str | Path) -> Artifact | None:
    """Identify an artifact by the files that are there; None if the path names nothing known.

    A folder is a program if it holds `program.json`, otherwise an encoder-decoder model if it holds
    at least one of the two graphs. Otherwise `model.onnx`, `model.gguf`, safetensors or
    `config.json` decide. No file is read.
    """
    path = Path(path)
    if not path.is_dir():
        kinds = {".onnx": ArtifactKind.ONNX, ".gguf": ArtifactKind.GGUF}
        kind = kinds.get(path.suffix) if path.exists() else None
        return None if kind is None else Artifact(kind, path)
    if (path / PROGRAM_FILE).exists():
        return Artifact(ArtifactKind.PROGRAM, path)
    if any((path / file).exists() for file in (ENCODER_FILE, DECODER_FILE)):
        return Artifact(ArtifactKind.ENCODER_DECODER, path)
    for kind, file in ((ArtifactKind.ONNX, MODEL_FILE), (ArtifactKind.GGUF, GGUF_FILE)):
        if (path / file).exists():
            return Artifact(kind, path / file)
    if (path / CONFIG_FILE).exists() or any(path.glob("*.safetensors")):
        return Artifact(ArtifactKind.CHECKPOINT, path)
    return None


def unknown_artifact(path: str | Path) -> UserInputError:
    """The error for a path that names neither a program nor an ONNX model."""
    return UserInputError(
        f"{path} is neither a program folder nor an ONNX model",
        where=str(path),
        hint="give a folder written by Program.save, finetune, fold or export, or a .onnx file",
    )
