"""Identify a path: a program folder, an exported model, or a checkpoint of another library."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from qalora_compile.errors import UserInputError

SHARED_CACHE_KEY = "qalora_shared_cache"
"""Key of an ONNX model's metadata whose past and present caches may be the same buffers."""
PROGRAM_FILE = "program.json"
RUN_CONFIG = "run.yaml"
"""The options of a run, with which it can be repeated."""
MODEL_FILE = "onnx/model_q4.onnx"
ENCODER_FILE, DECODER_FILE = "onnx/encoder_model_q4.onnx", "onnx/decoder_model_q4.onnx"
MERGED_FILE = "onnx/decoder_model_merged_q4.onnx"
"""Where an edge folder has its graphs: transformers.js, optimum and sentence-transformers look
there. `q4` is how transformers.js calls a graph on codes of few bits."""
OPENVINO_FILE = "openvino_model.xml"
OPENVINO_ENCODER_FILE = "openvino_encoder_model.xml"
OPENVINO_DECODER_FILE = "openvino_decoder_model.xml"
"""The names that OpenVINO GenAI and Optimum look for; the weights are in a `.bin` file."""
ORT_SUFFIX = ".ort"
ORT_FILE, ORT_ENCODER_FILE, ORT_DECODER_FILE, ORT_MERGED_FILE = (
    f"{file.removesuffix('.onnx')}{ORT_SUFFIX}"
    for file in (MODEL_FILE, ENCODER_FILE, DECODER_FILE, MERGED_FILE)
)
"""The same in ONNX Runtime's own format."""
_MODELS = (MODEL_FILE, "model.onnx", "onnx/model.onnx", ORT_FILE, "model.ort")
_HALVES = (
    (ENCODER_FILE, DECODER_FILE),
    (ENCODER_FILE, MERGED_FILE),
    ("encoder_model.onnx", "decoder_model.onnx"),
    (ORT_ENCODER_FILE, ORT_DECODER_FILE),
    (ORT_ENCODER_FILE, ORT_MERGED_FILE),
    (OPENVINO_ENCODER_FILE, OPENVINO_DECODER_FILE),
)
"""Also the places of earlier versions, and of optimum."""
_DATA_SUFFIXES = ("_data", ".data")
CONFIG_FILE, GGUF_FILE = "config.json", "model.gguf"
PREPROCESSOR_FILE = "preprocessor_config.json"
TORCH_FILE = "model.pt2"
COREML_FILE = "model.mlpackage"
"""A folder."""

_TOKENIZER_FILES = (
    *("tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "spiece.model", "sentencepiece*.model", "chat_template*"),
)


class ArtifactKind(Enum):
    """The kinds of artifacts that can be opened by their path."""

    PROGRAM = "program folder"
    ENCODER_DECODER = "exported encoder-decoder model"
    ONNX = "ONNX model"
    OPENVINO = "OpenVINO model"
    TORCH = "torch export"
    COREML = "Core ML package"
    GGUF = "GGUF file"
    CHECKPOINT = "checkpoint folder"


@dataclass(frozen=True)
class Artifact:
    """An artifact that can be opened.

    Attributes:
        kind: Its kind.
        path: The `.onnx`, `.ort`, `.xml`, `.pt2` or `.gguf` file, or the `.mlpackage` folder; for
            the other kinds, the folder.
    """

    kind: ArtifactKind
    path: Path


def model_file(folder: Path) -> Path:
    """The graph of an export folder with one graph, which may be missing."""
    return next(
        (folder / file for file in _MODELS if (folder / file).exists()), folder / MODEL_FILE
    )


def encoder_decoder_files(folder: Path) -> tuple[Path, Path] | None:
    """Encoder and decoder of an export folder, one of which may be missing; None without both."""
    pairs = [(folder / encoder, folder / decoder) for encoder, decoder in _HALVES]
    best = max(pairs, key=lambda pair: sum(file.exists() for file in pair))
    return best if any(file.exists() for file in best) else None


def data_file(model: Path) -> Path:
    """Where the exporter writes the weights of an ONNX model that are not inside its file."""
    return model.with_name(f"{model.name}{_DATA_SUFFIXES[0]}")


def onnx_parts(model: Path) -> list[Path]:
    """The files of an ONNX model that are there: the graph, and its weights if they are apart."""
    data = [model.with_name(f"{model.name}{suffix}") for suffix in _DATA_SUFFIXES]
    return [file for file in (model, *data) if file.is_file()]


def find_artifact(path: str | Path) -> Artifact | None:
    """Identify an artifact by the files that are there; None if the path names nothing known.

    A folder is a program if it holds `program.json`, otherwise an encoder-decoder model if it holds
    at least one of the two graphs. Otherwise `onnx/model_q4.onnx` (`model.onnx`),
    `openvino_model.xml`, `model.pt2`, `model.mlpackage`, `model.gguf`, safetensors or `config.json`
    decide. No file is read.
    """
    path = Path(path)
    if not path.is_dir():
        kinds = {
            ".onnx": ArtifactKind.ONNX,
            ORT_SUFFIX: ArtifactKind.ONNX,
            ".xml": ArtifactKind.OPENVINO,
            ".pt2": ArtifactKind.TORCH,
            ".gguf": ArtifactKind.GGUF,
        }
        kind = kinds.get(path.suffix) if path.exists() else None
        return None if kind is None else Artifact(kind, path)
    if path.suffix == Path(COREML_FILE).suffix:
        return Artifact(ArtifactKind.COREML, path)
    if (path / PROGRAM_FILE).exists():
        return Artifact(ArtifactKind.PROGRAM, path)
    if encoder_decoder_files(path) is not None:
        return Artifact(ArtifactKind.ENCODER_DECODER, path)
    for kind, file in (
        (ArtifactKind.ONNX, model_file(path)),
        (ArtifactKind.OPENVINO, path / OPENVINO_FILE),
        (ArtifactKind.TORCH, path / TORCH_FILE),
        (ArtifactKind.COREML, path / COREML_FILE),
        (ArtifactKind.GGUF, path / GGUF_FILE),
    ):
        if file.exists():
            return Artifact(kind, file)
    if (path / CONFIG_FILE).exists() or any(path.glob("*.safetensors")):
        return Artifact(ArtifactKind.CHECKPOINT, path)
    return None


def ort_files(path: str | Path) -> list[Path]:
    """The files in ONNX Runtime's own format that a path names; none for anything else."""
    found = find_artifact(path)
    if found is None:
        return []
    halves = found.kind is ArtifactKind.ENCODER_DECODER and encoder_decoder_files(found.path)
    return [file for file in halves or (found.path,) if file.suffix == ORT_SUFFIX]


def unknown_artifact(path: str | Path) -> UserInputError:
    """The error for a path that names neither a program nor an ONNX model."""
    return UserInputError(
        f"{path} is neither a program folder nor an ONNX model",
        where=str(path),
        hint="give a folder written by Program.save, finetune, fold or export, or a .onnx file",
    )


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in a folder, chat templates included, each once and in order."""
    found = {file for name in _TOKENIZER_FILES for file in folder.glob(name) if file.is_file()}
    return sorted(found)
