"""Compares on samples what structure does not prove, with the graphs cut at their sites.

Both graphs get the same random values for their inputs and for the output of every site, whatever
the sites compute, and return the inputs of each site and the outputs of the model. A difference is
therefore found where it occurs, and no layer hides it from the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from qalora_compile.errors import UserInputError
from qalora_compile.ir.interpret import WatchingInterpreter
from qalora_compile.ir.signature import widened
from qalora_compile.optional import require
from qalora_compile.progress import track
from qalora_compile.verify.compare import compare
from qalora_compile.verify.inputs import padded_inputs, sample_inputs
from qalora_compile.verify.padding import counted, padding_of
from qalora_compile.verify.proof.cut_openvino import CutOpenvino
from qalora_compile.verify.proof.graphs.graph import ONNX, Graph, Ref, reachable
from qalora_compile.verify.proof.graphs.onnx_subgraphs import captured
from qalora_compile.verify.runners.onnx_session import explain_refusal, open_model, run_session
from qalora_compile.verify.runners.open_runner import ProgramRunner

if TYPE_CHECKING:
    from qalora_compile.ir.program import Program

Values = Mapping[str, Tensor]


class CutProgram:
    """Runs a program between its sites."""

    def __init__(
        self, program: Program, graph: Graph, sites: Sequence[str], targets: Sequence[Any]
    ) -> None:
        self._program, self._targets = program, targets
        self._cuts = {graph.site_values[name]: name for name in sites}
        self._wanted = reachable(graph, list(targets), frozenset(self._cuts))

    def run(self, leaves: Sequence[Any], sites: Values) -> list[Tensor]:
        """The targets, given flat inputs and the outputs of sites."""
        fed = {value: sites[name] for value, name in self._cuts.items()}
        names = {ref.name for ref in self._targets if isinstance(ref, Ref)}
        recorder = _CutInterpreter(self._program.module, fed, self._wanted, names)
        with self._program.evaluating():
            recorder.run_leaves(leaves)
        return [recorder.values[ref.name] for ref in self._targets]


class _CutInterpreter(WatchingInterpreter):
    """Computes only the wanted nodes and uses given values for the cut ones."""

    def __init__(
        self, module: fx.GraphModule, fed: Values, wanted: set[str], names: set[str]
    ) -> None:
        super().__init__(module, names)
        self._fed, self._wanted = fed, wanted

    def compute(self, node: fx.Node) -> Any:
        if node.name in self._fed:
            return self._fed[node.name]
        unwanted = node.op == "call_function" and node.name not in self._wanted
        return None if unwanted else super().compute(node)


class CutModel:
    """Runs an exported model between its sites, in ONNX Runtime."""

    def __init__(self, graph: Graph, sites: Sequence[str], targets: Sequence[Any]) -> None:
        self._graph, self._targets = graph, [ref.name for ref in targets]
        self._cuts = {graph.site_values[name]: name for name in sites}
        given = self._cuts.keys() | graph.inputs.keys()
        self._computed = list(dict.fromkeys(n for n in self._targets if n not in given))
        self._session = self._open() if self._computed else None

    def run(self, inputs: Values, sites: Values) -> list[Tensor]:
        """The targets, given inputs by name and the outputs of sites."""
        feed = {**inputs, **{value: sites[name] for value, name in self._cuts.items()}}
        found = dict(feed)
        if self._session is not None:
            arrays = {n: v.numpy() for n, v in feed.items() if isinstance(v, Tensor)}
            with explain_refusal("run the model between its layers", self._graph.label):
                values = run_session(self._session, self._computed, arrays)
            found |= dict(zip(self._computed, map(torch.from_numpy, values), strict=True))
        return [found[name] for name in self._targets]

    def _open(self) -> Any:
        model = self._cut_model().SerializeToString()
        with explain_refusal("load the model between its layers", self._graph.label):
            return open_model(model, Path(self._graph.label).parent)

    def _cut_model(self) -> Any:
        """The model without the nodes that compute its sites."""
        onnx = require("onnx", extra="onnx", purpose="cut an ONNX model")
        source = self._graph.extra
        makers = {name: node for node in source.graph.node for name in node.output if name}
        known = {*makers, *(i.name for i in source.graph.input)}
        lost = [name for name in (*self._cuts, *self._computed) if name not in known]
        if lost:
            raise UserInputError(
                "a part is run without its layers, and the file does not compute this layer alone",
                where=self._cuts.get(lost[0], lost[0]),
                hint="a tool merged it with others: compare outputs, verify A B --max-rel 1e-4",
            )
        wanted, waiting = dict[str, Any](), list(self._computed)
        while waiting:
            name = waiting.pop()
            node = makers.get(name)
            if node is None or name in self._cuts or node.output[0] in wanted:
                continue
            wanted[node.output[0]] = node
            waiting += [*node.input, *captured(node)]
        nodes = [n for n in source.graph.node if n.output[0] in wanted]
        read = {name for node in nodes for name in (*node.input, *captured(node))}
        cut = [name for name in self._cuts if name in read]
        inputs = [i for i in source.graph.input if i.name in read]
        inputs += [onnx.helper.make_tensor_value_info(n, 1, None) for n in cut]
        model = onnx.ModelProto(ir_version=source.ir_version)
        model.opset_import.extend(source.opset_import)
        model.functions.extend(source.functions)
        outputs = [onnx.ValueInfoProto(name=name) for name in self._computed]
        stored = [t for t in source.graph.initializer if t.name in read]
        model.graph.CopyFrom(onnx.helper.make_graph(nodes, "cut", inputs, outputs, stored))
        return model


def sample(
    graphs: tuple[Graph, Graph],
    programs: tuple[Program | None, Program | None],
    sites: Sequence[str],
    targets: Sequence[tuple[Any, Any]],
    count: int,
    seed: int,
) -> list[float]:
    """Largest difference of each target over `count` samples, relative to its largest value.

    If the program has masks, two more calls have padding, whose positions are not compared.

    Args:
        graphs: The graphs.
        programs: Their programs, at least one of which is needed for inputs and shapes.
        sites: Where the graphs are cut.
        targets: The values to compare, in both graphs.
        count: How many samples.
        seed: Seed of the samples.

    Raises:
        UserInputError: there is no program, or ONNX Runtime fails to run the model.
    """
    program = next((p for p in programs if p is not None), None)
    if program is None:
        raise UserInputError("neither graph is of a program, from which samples are drawn")
    cut = [
        _cut_model(graph)(graph, sites, [pair[i] for pair in targets])
        if owner is None
        else CutProgram(owner, graph, sites, [pair[i] for pair in targets])
        for i, (graph, owner) in enumerate(zip(graphs, programs, strict=True))
    ]
    worst = [0.0] * len(targets)
    generator = torch.Generator().manual_seed(seed)
    calls = sample_inputs(program, count, seed=seed) + padded_inputs(program, seed=seed)
    for call in track(calls, "sample"):
        leaves = program.leaves((), call)
        padding = padding_of(program.signature, leaves)
        shown = ProgramRunner(program).run(leaves).sites
        values = {name: _like(shown[name], generator) for name in sites}
        found = [
            _run(part, owner, program, leaves, values)
            for part, owner in zip(cut, programs, strict=True)
        ]
        for index, (one, other) in enumerate(zip(*found, strict=True)):
            compared = compare("", counted(one, padding), counted(other, padding))
            bad = bool(compared.problem)
            worst[index] = max(worst[index], float("inf") if bad else compared.max_rel)
    return worst


def _cut_model(graph: Graph) -> type[CutModel] | type[CutOpenvino]:
    return CutModel if graph.dialect == ONNX else CutOpenvino


def _run(
    part: CutProgram | CutModel | CutOpenvino,
    owner: Program | None,
    program: Program,
    leaves: Sequence[Any],
    values: Values,
) -> list[Tensor]:
    if isinstance(part, CutProgram):
        assert owner is not None
        return part.run(owner.signature.widen(leaves), values)
    names = [leaf.name for leaf in program.signature.inputs]
    wide = dict(zip(names, map(widened, leaves), strict=True))
    return part.run(wide, {n: v.float() for n, v in values.items()})


def _like(value: Tensor, generator: torch.Generator) -> Tensor:
    """Random values with the shape and the standard deviation of a site's output."""
    deviation = float(value.double().std()) if value.numel() > 1 else 1.0
    drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return (drawn * (deviation or 1.0)).to(value.dtype)
