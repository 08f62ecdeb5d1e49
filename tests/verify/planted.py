"""The model that faults are planted in, what a fault is, and how it is tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import qalora_compile as qc
from qalora_compile.api import lower
from qalora_compile.errors import UserInputError
from qalora_compile.verdict import Verdict
from qalora_compile.verify import Certificate, compare_nodes, named_inputs, sample_inputs
from qalora_compile.verify.debug.bisect import Culprit, Step, bisect
from tests.models import randomize_adapters

WIDTH, INNER, WORDS = 48, 64, 40
"""Groups of 32: one full group and a tail in layers of 48 columns, two groups in those of 64."""
TOLERANCE = qc.Tolerance(max_rel=2e-5)
SPECS = {
    "ort": qc.ExportSpec(),
    "ort-stock": qc.ExportSpec(target="ort-stock"),
    "digits": qc.ExportSpec(target="ort-stock", correction="digits"),
    "onnx": qc.ExportSpec(target="onnx"),
}


class Block(nn.Module):
    """A gated layer and a small network, with residuals, norms, dropout and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        h = self.embed(ids)
        n = self.norm(h)
        h = h + self.dropout(self.q(n) * torch.sigmoid(self.k(n)) + self.v(n))
        h = h + self.down(functional.silu(self.up(self.norm2(h))))
        logits: Tensor = self.lm_head(h)
        return logits


@cache
def program(kind: str) -> qc.Program:
    """`adapted`, `folded`, `quantized`, or `lowered:<spec>`; do not change it.

    `adapted+qat` and `folded+qat` have adapters of that kind.
    """
    if kind.startswith("lowered:"):
        return lower(program("folded"), SPECS[kind.partition(":")[2]])
    if kind.startswith("folded"):
        return qc.fold_adapters(program(kind.replace("folded", "adapted")))
    torch.manual_seed(3)
    model = Block().eval()
    captured = qc.capture_model(model, (torch.randint(0, WORDS, (2, 6)),))
    quantized = qc.quantize_groups(captured, qc.QuantSpec(bits=4, group_size=32))
    if kind == "quantized":
        return quantized
    form = kind.partition("+")[2] or "lora"
    adapters = qc.AdapterSpec(rank=3, alpha=6.0, pooling="mean", kind=form)
    return randomize_adapters(qc.insert_adapters(quantized, adapters), size=0.3)


@dataclass(frozen=True)
class Fault:
    """A mistake, planted in a program or in an exported model.

    Attributes:
        name: What is wrong.
        on: `program <kind>`, or the key of an export in `SPECS`.
        plant: Makes the faulty program from the right one, or changes the ONNX model in place.
        site: What the certificate's first difference begins with.
        numeric: The site that the numeric check names first; "" for that of the certificate.
        unseen: Why a check cannot see it: `{"proof": …}`, `{"numeric": …}`, `{"nodes": …}`.
        node: What the comparison along the graph names first; "" for that of the certificate.
    """

    name: str
    on: str
    plant: Callable[[Any], Any]
    site: str
    numeric: str = ""
    unseen: tuple[tuple[str, str], ...] = ()
    node: str = ""


@dataclass(frozen=True)
class Found:
    """What the three checks said of a fault; and of one in a pass, step and place by `bisect`."""

    fault: Fault
    proof: bool
    difference: str
    numeric: bool
    named: str
    nodes: Verdict
    node: str
    bisected: str = ""


def examine(fault: Fault, models: Path, scratch: Path) -> Found:
    """Plant a fault and run the checks.

    Args:
        fault: The fault.
        models: Where `export_all` has written the exports.
        scratch: Where to write the faulty one.
    """
    candidate: qc.Program | Path
    if fault.on.startswith("program "):
        kind = fault.on.partition(" ")[2]
        reference = program("folded")
        if kind.startswith("folded"):
            reference = program(kind.replace("folded", "adapted"))
        elif kind.startswith("adapted"):
            reference = program(kind.replace("adapted", "folded"))
        candidate = fault.plant(program(kind))
    else:
        reference = program("folded")
        model = onnx.load(models / f"{fault.on}.onnx")
        fault.plant(model)
        candidate = scratch / "faulty.onnx"
        onnx.save(model, candidate)
    try:
        certificate = prove(reference, candidate)
    except UserInputError as error:
        return _refused(fault, error)
    difference = "" if certificate is None else certificate.difference or ""
    proof = certificate is None or not certificate.passes(allow_sampled=True)
    along = along_the_graph(reference, candidate)
    found = bisected(fault) if is_in_a_pass(fault) else None
    named = "" if found is None else f"{found.step}: {found.row and found.row.name}"
    return Found(fault, proof, difference, *compare(reference, candidate), *along, named)


def _refused(fault: Fault, error: UserInputError) -> Found:
    """What is found of a file that is refused before it is used; the tensor is named."""
    site = fault.site if f"'{fault.site.removesuffix(':')}." in error.what else ""
    return Found(fault, True, site, True, f"does not run: {error.what}", Verdict.DIFFERENT, site)


def prove(reference: qc.Program, candidate: qc.Program | Path) -> Certificate | None:
    """The certificate; None where there is none because the candidate is refused."""
    return qc.prove_equivalence(reference, candidate, samples=1)


def compare(reference: qc.Program, candidate: qc.Program | Path) -> tuple[bool, str]:
    """Whether the numeric check refuses the candidate, and the site that it names first."""
    calls = sample_inputs(program("folded"), 2, seed=1)
    try:
        report = qc.verify_equivalence(reference, candidate, calls, TOLERANCE)
    except UserInputError as error:
        return True, f"does not run: {error.what}"
    return not report.passed, report.first_divergence or ""


def is_in_a_pass(fault: Fault) -> bool:
    """Whether a fault is one of folding or lowering, which a pipeline can have."""
    return fault.on.startswith(("program folded", "program lowered"))


def bisected(fault: Fault) -> Culprit | None:
    """What `bisect` finds in a pipeline of folding and lowering with the fault in one of them."""
    kind = fault.on.partition(" ")[2]
    first, folded, spec = "adapted", program("folded"), SPECS[kind.partition(":")[2] or "ort-stock"]
    if kind.startswith("folded"):
        first, folded = kind.replace("folded", "adapted"), fault.plant(program(kind))
        lowered = lower(folded, spec)
    else:
        lowered = fault.plant(program(kind))
    calls = named_inputs(program("folded"), 1, seed=1)
    return bisect(program(first), [Step("fold", folded), Step("lower", lowered)], calls)


def along_the_graph(reference: qc.Program, candidate: qc.Program | Path) -> tuple[Verdict, str]:
    """The verdict of the comparison along the graph, and what it names first."""
    calls = named_inputs(program("folded"), 1, seed=1)
    report = compare_nodes(reference, candidate, calls, levels=("all",))
    return report.verdict, report.difference or ""


def export_all(folder: Path) -> None:
    """Write the right exports."""
    for name, spec in SPECS.items():
        qc.export_model(program("folded"), folder / f"{name}.onnx", spec)


def with_tensors(source: qc.Program, changes: dict[str, Callable[[Tensor], Tensor]]) -> qc.Program:
    """A program with other values of some tensors, by name."""
    tensors = source.tensors()
    for name, change in changes.items():
        changed = change(tensors[name].detach().clone())
        kept = isinstance(tensors[name], nn.Parameter)
        made = nn.Parameter(changed, requires_grad=tensors[name].requires_grad) if kept else changed
        tensors[name] = made
    return source.evolve(graph=source.copy_graph(), tensors=tensors)


def with_graph(source: qc.Program, change: Callable[[fx.Graph], None]) -> qc.Program:
    """A program with a changed graph."""
    graph = source.copy_graph()
    change(graph)
    return source.evolve(graph=graph)


def find(graph: fx.Graph, target: str, index: int = 0) -> fx.Node:
    """A node by what it calls, the `index`-th of them."""
    return [n for n in graph.nodes if str(n.target).startswith(target)][index]
