"""The metadata of an exported ONNX model: which program it was made from. Needs no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.ir.meta import ONNX_METADATA_KEY
from qalora_compile.untrusted import check_fields, parse_json
from qalora_compile.untrusted.ort_file import check_model

OF_SITES = (
    *("kind", "weight", "decision", "reason", "why_bits"),
    *("bits", "group_size", "k", "n", "experts"),
)
"""Fields that a layer copies from its `Site`."""


@dataclass(frozen=True, kw_only=True)
class OnnxLayer:
    """A row of the site plan, as exported; the fields `OF_SITES` are as in `Site`.

    Attributes:
        site: Name of the site.
        shape: Shape of a weight that is kept in float.
        bytes: Size of the layer's tensors in the file.
    """

    site: str
    kind: str
    weight: str
    decision: str
    reason: str
    bits: int | None
    group_size: int | None
    k: int
    n: int
    bytes: int
    experts: int | None = None
    shape: tuple[int, ...] | None = None
    why_bits: str = ""


@dataclass(frozen=True, kw_only=True)
class OnnxMetadata:
    """The metadata of an exported model.

    Attributes:
        version: Version of the package that wrote it.
        target: The export target.
        stage, history: Stage and history of the program.
        signature: Input of `Signature.from_json`; empty if the file has none.
        layers: Every row of the site plan.
        site_values: Name of each site → name of the value that it gives.
    """

    version: str
    target: str
    stage: str
    history: tuple[str, ...]
    signature: Mapping[str, Any]
    layers: tuple[OnnxLayer, ...]
    site_values: Mapping[str, str]

    def to_text(self) -> str:
        """As it is stored under `ONNX_METADATA_KEY`, JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def read_onnx_metadata(path: Path) -> OnnxMetadata:
    """The metadata of an exported model.

    Raises:
        UserInputError: the file is missing or no ONNX model (`check_model`), was not exported by
            this package, or its metadata are malformed.
    """
    text = check_model(path).metadata.get(ONNX_METADATA_KEY)
    if text is None:
        raise UserInputError(f"{path.name} was not exported by this package", where=str(path))
    return metadata_of(text, path)


def metadata_of(text: str, path: Path) -> OnnxMetadata:
    """The metadata in a text of `OnnxMetadata.to_text`.

    Raises:
        UserInputError: they are malformed.
    """
    value = parse_json(text, path, what=f"the metadata of {path.name}", finite=True)
    with explain_metadata(path):
        return OnnxMetadata(
            version=str(value.get("version", "")),
            target=str(value["target"]),
            stage=str(value["stage"]),
            history=tuple(map(str, value["history"])),
            signature=value.get("signature", {}),
            layers=tuple(map(_layer, value["layers"])),
            site_values={str(site): str(name) for site, name in value["site_values"].items()},
        )


def _layer(row: Mapping[str, Any]) -> OnnxLayer:
    """A layer; fields of later versions are dropped."""
    known = {f.name: row[f.name] for f in dataclasses.fields(OnnxLayer) if f.name in row}
    return OnnxLayer(**check_fields(OnnxLayer, known, "a layer"))


@contextmanager
def explain_metadata(path: Path) -> Iterator[None]:
    """Turn errors in reading metadata into one that names the file and the reason.

    Raises:
        UserInputError: the block raised an error that malformed JSON leads to.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserInputError(
            f"the metadata of {path.name} is incomplete: {type(error).__name__} {error}",
            where=str(path),
            hint="it comes from another version of this package, or was changed: export again",
        ) from error
