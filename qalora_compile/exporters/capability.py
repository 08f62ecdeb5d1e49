"""What every exporter declares and reports."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class Capability:
    """What a format does to one property of a program.

    Attributes:
        kind: `exact`, `rounds` or `unsupported`.
        detail: For `rounds`, the dtype it rounds to; else a remark.
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
"""Of a program, in a checkpoint: what each of its formats declares."""


def unsupported(why: str) -> Capability:
    """The format cannot hold the property."""
    return Capability("unsupported", why)


def rounds(dtype: str) -> Capability:
    """The format stores the property rounded to `dtype`."""
    return Capability("rounds", dtype)


def partly(fits: str, floats: Capability) -> Capability:
    """A property that the format has in part; the rest is written as floats, as exact as these."""
    if floats.kind == EXACT.kind:
        return Capability(EXACT.kind, f"{fits}; others as floats")
    return rounds(f"{floats.detail}, but for {fits}")


NO_ORDER = unsupported("refused on codes")
"""Of columns whose groups lie apart, in formats that have no place for their order."""


@dataclass(frozen=True)
class StoredTensor:
    """How a checkpoint holds one tensor.

    Attributes:
        name: In the checkpoint.
        source: Of the module or parameter in the model.
        form: As the format calls it, for example `Q4_1`.
        max_abs_error: Largest difference between a stored weight and the program's.
        relative_error: The same as a part of the tensor's largest weight.
        remark: Why it is not stored as its plan says; else empty.
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
        nodes: Number of nodes in the exported graph; 0 for a checkpoint, which has none.
        quantized_layers: Number of quantized linear layers in it.
        capabilities: What happened to codes, scale, zero-point and float tensors.
        kept: Number of weights that an interrupted run had written already.
        stored: Of a checkpoint: how each tensor is stored.
        notes: Of a checkpoint: what it leaves out or says otherwise. Of an ONNX model: what was not
            fused, the first node of each reason.
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
        """One report on two files of one model, which lie in `path`."""
        return replace(
            self,
            path=path,
            files=self.files | other.files,
            nodes=self.nodes + other.nodes,
            quantized_layers=self.quantized_layers + other.quantized_layers,
            kept=self.kept + other.kept,
            notes=(*self.notes, *other.notes),
        )
