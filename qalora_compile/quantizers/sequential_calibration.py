"""One pass over a model's layers in which each sees the layers before it as they were replaced.

All calibration calls go through the graph together, from one layer's input to the next: when every
call has reached the tensor that a layer reads, its statistics are complete, the layer is replaced,
and the calls go on through what replaced it. Thus the errors made so far are calibrated for, the
model is run once, and there is one layer's statistics at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.nn import functional

from qalora_compile.ir.interpret import WatchingInterpreter
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.pattern import LinearMap, match_linear
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Call
from qalora_compile.progress import track
from qalora_compile.quantizers.calibrate import (
    InputMoments,
    as_calls,
    check_calls,
    collect_statistics,
    layer_inputs,
    real_rows,
)
from qalora_compile.quantizers.statistics import ActivationStatistics

Replace = Callable[[str, ActivationStatistics], Tensor]
"""Gives the weight `[N, K]` that the layer at a path has from now on."""


def replace_in_order(program: Program, calls: Iterable[Call], replace: Replace) -> None:
    """Call `replace` for each planned layer, in graph order, with statistics of its input.

    The statistics are those after the layers before it were replaced. A weight that is used at
    several places is replaced first of all, by the statistics of all its uses in the model as it
    is. Stacked experts are left out.

    What is kept in memory is one moment `[K, K]` and, for every call, the values that are still
    needed where the calls stand: about `rows · hidden size · 4` bytes, and attention masks.

    Args:
        program: At stage `annotated`.
        calls: As for `collect_statistics`.
        replace: Called once for each path.

    Raises:
        UserInputError: as `collect_statistics`.
    """
    calls = as_calls(calls)
    leaves = check_calls(program, calls)
    inputs = layer_inputs(program)
    weights: dict[str, Tensor] = {}
    due: dict[fx.Node, list[str]] = defaultdict(list)
    shared = [path for path, xs in inputs.items() if len(xs) > 1]
    if shared:
        for path, statistics in collect_statistics(program, calls, shared).items():
            weights[path] = replace(path, statistics)
    for path, xs in inputs.items():
        if len(xs) == 1:
            due[xs[0]].append(path)
    steps = _steps(program, due)
    linears = _linears(program, inputs)
    last = {linears[n][0]: i for i, nodes in enumerate(steps) for n in nodes if n in linears}
    with program.evaluating():
        runs = [_Run(program.module, each, linears, weights) for each in leaves]
        keeps = [real_rows(program, each) for each in leaves]
        for index, nodes in enumerate(track(steps, "calibrate")):
            paths = due[nodes[-1]]
            moments = InputMoments(paths[0])
            for run, keep in zip(runs, keeps, strict=True):
                moments.add(run.advance(nodes), keep.of(nodes[-1]))
            for path in [path for path in weights if last.get(path) == index]:
                del weights[path]  # every call is past it
            statistics = moments.statistics()
            weights |= {path: replace(path, statistics) for path in paths}


def _steps(program: Program, due: Mapping[fx.Node, object]) -> list[list[fx.Node]]:
    """The nodes of the graph in order, cut behind each that a layer reads; none after the last."""
    steps: list[list[fx.Node]] = [[]]
    for node in program.graph.nodes:
        steps[-1].append(node)
        if node in due:
            steps.append([])
    return steps[:-1]


def _linears(program: Program, paths: Iterable[str]) -> dict[fx.Node, tuple[str, LinearMap]]:
    """The planned linear maps, by node, with their paths."""
    rows = {site.name: site.path for site in program.plan.to_quantize()}
    wanted = set(paths)
    found = {}
    for node in program.graph.nodes:
        path = rows.get(site_of(node) or "")
        linear = match_linear(node) if path in wanted else None
        if path is not None and linear is not None:
            found[node] = (path, linear)
    return found


class _Run(WatchingInterpreter):
    """One call on its way through the graph; layers that have a new weight compute with it.

    Args:
        module: The graph and its tensors.
        leaves: Flat inputs.
        linears: Linear maps by node, with their paths.
        weights: New weights by path; it grows while the run goes on.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        leaves: Sequence[Any],
        linears: Mapping[fx.Node, tuple[str, LinearMap]],
        weights: Mapping[str, Tensor],
    ) -> None:
        super().__init__(module)  # it knows the last reader of each value
        self.args_iter = iter(leaves)
        self._linears, self._weights = linears, weights

    def advance(self, nodes: Sequence[fx.Node]) -> Tensor:
        """Compute some nodes, and let go what none after them reads; the value of the last."""
        for node in nodes:
            self.env[node] = self.run_node(node)
            for done in self.user_to_last_uses.get(node, ()):
                del self.env[done]
        value = self.env[nodes[-1]]
        assert isinstance(value, Tensor), "a linear map reads a tensor"
        return value

    def compute(self, node: fx.Node) -> Any:
        path, linear = self._linears.get(node, ("", None))
        if linear is None or path not in self._weights:
            return super().compute(node)
        x = self.env[linear.x]
        bias = None if linear.bias is None else self.env[linear.bias]
        return functional.linear(x, self._weights[path].to(x.dtype), bias)
