"""Declarations and reports of exporters."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class Capability:
    """How exactly a format keeps one property of a program.

    Attributes:
        kind: `exact`, `rounds` or `unsupported`.
        detail: For `rounds`, the dtype that it rounds to; otherwise a remark.
    """

    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}({self.detail})" if self.detail else self.kind


EXACT = Capability("exact")

PROPERTIES = (
    *("codes of 4, 3 and 2 bits", "codes of 8 bits", "scale", "real zero-point", "groups"),
    *("tail groups", "activation order", "matrices of floats", "vectors", "tied weights"),
    "other architectures",
)
"""The properties of a program for which every checkpoint format declares a capability."""


def unsupported(why: str) -> Capability:
    """A capability: the format cannot hold the property."""
    return Capability("unsupported", why)


def rounds(dtype: str) -> Capability:
    """A capability: the format stores the property rounded to `dtype`."""
    return Capability("rounds", dtype)


def partly(fits: str, floats: Capability) -> Capability:
    """A capability: the format holds part of the property, and the rest is written as `floats`."""
    if floats.kind == EXACT.kind:
        return Capability(EXACT.kind, f"{fits}; others as floats")
    return rounds(f"{floats.detail}, but for {fits}")


NO_ORDER = unsupported("refused on codes")
"""The capability for activation order of formats that cannot store the order."""


@dataclass(frozen=True)
class StoredTensor:
    """How a checkpoint holds one tensor.

    Attributes:
        name: Name of the tensor in the checkpoint.
        source: Name of the module or parameter in the model.
        form: The format's name for the type, for example `Q4_1`.
        max_abs_error: Largest difference between a stored weight and the program's.
        relative_error: That difference divided by the tensor's largest absolute weight.
        remark: Why it is not stored as planned; empty if it is.
    """

    name: str
    source: str
    form: str
    max_abs_error: float = 0.0
    relative_error: float = 0.0
    remark: str = ""


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: The main file.
        files: Every file with its size in bytes.
        target: The export target.
        nodes: Number of nodes in the exported graph; 0 for a checkpoint, which has no graph.
        quantized_layers: Number of quantized linear layers.
        capabilities: What happened to codes, scale, zero-point and float tensors.
        kept: Number of weights that an interrupted run had already written.
        stored: For a checkpoint: how each tensor is stored.
        notes: For a checkpoint: what it leaves out or states differently. For an ONNX model: what
            was not fused, with the first node for each reason.
    """

    path: Path
    files: dict[str, int]
    target: str
    nodes: int
    quantized_layers: int
    capabilities: dict[str, Capability] = field(default_factory=dict)
    kept: int = 0
    stored: tuple[StoredTensor, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Size of all files together."""
        return sum(self.files.values())

    def joined(self, other: ExportReport, path: Path) -> ExportReport:
        """Combine the reports on two files of one model, which are in the folder `path`."""
        return replace(
            self,
            path=path,
            files=self.files | other.files,
            nodes=self.nodes + other.nodes,
            quantized_layers=self.quantized_layers + other.quantized_layers,
            kept=self.kept + other.kept,
            notes=(*self.notes, *other.notes),
        )
