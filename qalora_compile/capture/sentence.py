"""Folders of sentence-transformers: the encoder and the pooling of its tokens.

`modules.json` lists the parts, each in a folder of its own: the encoder (`""` or `0_Transformer`),
the pooling (`1_Pooling/config.json`) and, if there is one, the division by the norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.untrusted import quoted, read_json, read_object

MODULES_FILE = "modules.json"
SETTINGS_FILES = ("sentence_bert_config.json", "config_sentence_transformers.json")
_ENCODER, _POOLING, _NORMALIZE = "Transformer", "Pooling", "Normalize"
_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_PREFIX = "pooling_mode_"


@dataclass(frozen=True)
class SentenceParts:
    """The contents of a sentence-transformers folder.

    Attributes:
        encoder: Folder of the encoder.
        pooling: `mean`, `cls`, or another value as given in the folder; None without pooling.
        normalize: Whether embeddings are divided by their norm.
        others: Kinds of further parts, such as `Dense`.
    """

    encoder: Path
    pooling: str | None = None
    normalize: bool = False
    others: tuple[str, ...] = ()


def read_sentence_parts(folder: Path) -> SentenceParts | None:
    """The parts of a sentence-transformers folder; None for other folders.

    Raises:
        UserInputError: `modules.json` is malformed, or names something outside the folder.
    """
    if not (folder / MODULES_FILE).is_file():
        return None
    kinds: dict[str, Path] = {}
    for kind, path in _modules(folder):
        kinds.setdefault(kind, path)
    if _ENCODER not in kinds:
        raise UserInputError(
            f"{MODULES_FILE} names no {_ENCODER}, only {quoted(', '.join(kinds))}",
            where=str(folder / MODULES_FILE),
        )
    pooling = _pooling_of(kinds[_POOLING]) if _POOLING in kinds else None
    others = tuple(k for k in kinds if k not in (_ENCODER, _POOLING, _NORMALIZE))
    return SentenceParts(kinds[_ENCODER], pooling, _NORMALIZE in kinds, others)


def encoder_folder(folder: Path) -> Path:
    """The encoder's folder inside a sentence-transformers folder; any other folder unchanged.

    Raises:
        UserInputError: see `read_sentence_parts`.
    """
    if (folder / "config.json").is_file():
        return folder
    parts = read_sentence_parts(folder)
    return folder if parts is None else parts.encoder


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """Kind and folder of each part."""
    rows = read_json(folder / MODULES_FILE)
    found = []
    for row in rows if isinstance(rows, list) else [None]:
        kind, path = (row.get("type"), row.get("path")) if isinstance(row, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str):
            raise UserInputError(
                f"{MODULES_FILE} is not a list of parts with type and path", where=str(folder)
            )
        place = folder / path
        if not place.resolve().is_relative_to(folder.resolve()):
            raise UserInputError(
                f"{MODULES_FILE} names {quoted(path)}, which is outside the folder",
                where=str(folder),
            )
        found.append((kind.rpartition(".")[2], place))
    return found


def _pooling_of(folder: Path) -> str:
    """The pooling of a configuration: one setting since version 6, one per mode before."""
    config = read_object(folder / "config.json")
    mode: Any = config.get("pooling_mode")
    if mode is None:
        chosen = [name for name, on in config.items() if name.startswith(_PREFIX) and on is True]
        mode = _MODES.get(chosen[0], chosen[0]) if len(chosen) == 1 else chosen
    return mode if isinstance(mode, str) else quoted(mode)
