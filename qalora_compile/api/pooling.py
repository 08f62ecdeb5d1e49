"""Sentence embeddings in the graph, and the files that describe them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qalora_compile.capture.describe_model import CONFIG_FILE
from qalora_compile.capture.sentence import SETTINGS_FILES, SentenceParts, read_sentence_parts
from qalora_compile.config.choices import TOKEN_POOLINGS
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.exporters.onnx.sentence_transformers import write_sentence_files
from qalora_compile.ir.program import Program
from qalora_compile.passes.pool_tokens import PoolTokens
from qalora_compile.untrusted import quoted, read_object


@dataclass(frozen=True)
class Pooling:
    """How the token states of a text are pooled to one vector.

    Attributes:
        pooling: `mean` or `cls`; None if neither known nor requested.
        normalize: Whether the vector is divided by its norm.
        in_graph: Whether the exported graph pools; otherwise sentence-transformers does.
        settings: File name → content of the files of sentence-transformers.
    """

    pooling: str | None = None
    normalize: bool = False
    in_graph: bool = False
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def apply(self, program: Program) -> Program:
        """The program, with the output `sentence_embedding` if the graph is to have it.

        Raises:
            UnsupportedError: the program does not output token states.
        """
        if not self.in_graph:
            return program
        result = PoolTokens(pooling=str(self.pooling), normalize=self.normalize)(program)
        if result.skips:
            raise UnsupportedError(
                f"the model cannot be pooled: {result.skips[0].why}",
                hint="--pooling of quantize and export is for encoders without a head, like BERT",
            )
        return result.program

    def record(self) -> dict[str, Any] | None:
        """The entry of `qalora.json`."""
        if self.pooling is None:
            return None
        return {
            "pooling": self.pooling,
            "normalize": self.normalize,
            "in_graph": self.in_graph,
        }

    def write(self, folder: Path, config: Mapping[str, Any]) -> bool:
        """Write the files of sentence-transformers; False if no pooling is known."""
        if self.pooling is None:
            return False
        write_sentence_files(
            folder,
            config,
            pooling=self.pooling,
            normalize=self.normalize,
            settings=self.settings,
        )
        return True


def chosen_pooling(asked: str | None, normalize: bool, folder: Path) -> Pooling:
    """The requested pooling, or else the one in a folder of sentence-transformers.

    Args:
        asked: `mean`, `cls`, or None.
        normalize: Whether to divide the vector by its norm.
        folder: The model's folder.

    Raises:
        UserInputError: `--normalize` is given alone, or the folder contradicts the request.
    """
    known = stored_pooling(folder)
    if asked is None:
        if normalize:
            raise UserInputError(
                "--normalize has no effect without --pooling",
                hint="give quantize or export --pooling mean or --pooling cls too",
            )
        return known
    if known.pooling is not None and (asked, normalize) != (known.pooling, known.normalize):
        said = f"--pooling {known.pooling}" + " --normalize" * known.normalize
        raise UserInputError(
            f"the model was trained for {said}, according to its modules.json",
            where=str(folder),
            hint=f"give {said}, or remove modules.json",
        )
    return Pooling(asked, normalize, in_graph=True, settings=known.settings)


def stored_pooling(folder: Path) -> Pooling:
    """The pooling in a folder of sentence-transformers; unknown if it cannot be written again."""
    parts = read_sentence_parts(folder)
    if parts is None or parts.others or parts.pooling not in TOKEN_POOLINGS:
        return Pooling()
    return Pooling(parts.pooling, parts.normalize, settings=_settings(folder, parts))


def keep_pooling(source: Path, target: Path) -> None:
    """Write the pooling of `source`, if any, next to the `config.json` of `target`, if any."""
    if (target / CONFIG_FILE).is_file():
        stored_pooling(source).write(target, read_object(target / CONFIG_FILE))


def recorded_pooling(record: Mapping[str, Any]) -> Pooling:
    """The pooling of an exported model, from its `qalora.json`.

    Raises:
        UserInputError: the record is malformed.
    """
    found = record.get("pooling")
    if found is None:
        return Pooling()
    kinds = {"pooling": str, "normalize": bool, "in_graph": bool}
    if not isinstance(found, dict) or {k: type(v) for k, v in found.items()} != kinds:
        raise UserInputError(f"the pooling in the record is malformed: {quoted(found)}")
    return Pooling(**found)


def _settings(folder: Path, parts: SentenceParts) -> dict[str, Mapping[str, Any]]:
    """The settings, which are next to `modules.json` or next to the encoder."""
    places = (folder, parts.encoder)
    found = {name: [p / name for p in places if (p / name).is_file()] for name in SETTINGS_FILES}
    return {name: read_object(paths[0]) for name, paths in found.items() if paths}
