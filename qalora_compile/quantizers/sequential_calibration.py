"""Calibrates each layer with the preceding layers already replaced, in one pass.

All calibration calls advance through the graph together, from one layer's input to the next. When
every call has reached a layer's input, its statistics are complete, the layer is replaced, and the
calls continue through the replacement. Calibration thus accounts for the errors so far, the model
runs once, and only one layer's statistics are in memory.
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
"""Returns the new weight `[N, K]` of the layer at a path."""


def replace_in_order(program: Program, calls: Iterable[Call], replace: Replace) -> None:
    """Call `replace` for each planned layer in graph order with statistics of its input.

    The statistics are taken after the preceding layers were replaced. Weights that are used in
    several places are replaced before all others, with the statistics of all their uses in the
    original model. Stacked experts are left out.

    Memory holds one moment `[K, K]` and, for every call, the values that are still needed: about
    `rows · hidden size · 4` bytes, and attention masks.

    Args:
        program: At stage `annotated`.
        calls: As for `collect_statistics`.
        replace: Called once for each path.

    Raises:
        UserInputError: as for `collect_statistics`.
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
                del weights[path]  # every call has passed it
            statistics = moments.statistics()
            weights |= {path: replace(path, statistics) for path in paths}


def _steps(program: Program, due: Mapping[fx.Node, object]) -> list[list[fx.Node]]:
    """The nodes in graph order, split after each layer input, up to the last one."""
    steps: list[list[fx.Node]] = [[]]
    for node in program.graph.nodes:
        steps[-1].append(node)
        if node in due:
            steps.append([])
    return steps[:-1]


def _linears(program: Program, paths: Iterable[str]) -> dict[fx.Node, tuple[str, LinearMap]]:
    """The planned linear maps by node, with their paths."""
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
    """One call in progress; layers that have a new weight compute with it.

    Args:
        module: The graph and its tensors.
        leaves: Flat inputs.
        linears: Linear maps by node, with their paths.
        weights: New weights by path; grows during the run.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        leaves: Sequence[Any],
        linears: Mapping[fx.Node, tuple[str, LinearMap]],
        weights: Mapping[str, Tensor],
    ) -> None:
        super().__init__(module)  # records the last reader of each value
        self.args_iter = iter(leaves)
        self._linears, self._weights = linears, weights

    def advance(self, nodes: Sequence[fx.Node]) -> Tensor:
        """Compute some nodes and release values without later readers; returns the last value."""
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
