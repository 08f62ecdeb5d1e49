"""The sensitivity of a program's outputs to changes of its layers' outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qalora_compile.errors import UserInputError
from qalora_compile.ir.interpret import WatchingInterpreter
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.ops.views import output_value
from qalora_compile.ir.pattern import match_linear
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Call
from qalora_compile.ir.site_plan import Site
from qalora_compile.ir.torch_internals import pytree
from qalora_compile.progress import track
from qalora_compile.quantizers.calibrate import RealRows, check_calls, real_rows


@dataclass
class Sensitivity:
    """Sensitivity of the program's outputs to one layer, summed over calls.

    Attributes:
        gain: Expected squared change of all outputs for a squared change of 1 of each output
            element of the layer.
        power: Sum of the squares of the layer's inputs.
        inputs: Number of input elements.
    """

    gain: float = 0.0
    power: float = 0.0
    inputs: int = 0


def measure_sensitivities(
    program: Program, calls: Iterable[Call], *, seed: int = 0
) -> dict[str, Sensitivity]:
    """Sensitivities of a program at stage `annotated`, by `Site.path`.

    With J the Jacobian of all outputs with respect to a layer's output, and v random, independent,
    of variance 1, `‖Jᵀ v‖²` has the expectation `‖J‖²` (Hutchinson's estimator), so one backward
    pass per call serves all layers. No labels are needed. For logits, the resulting order is nearly
    that of the Fisher information (figures in docs/design/adapters.md).

    Args:
        program: A program whose weights have values.
        calls: Arguments of a few typical calls. Outputs at positions that an `attention_mask` marks
            as padding do not count.
        seed: Seed of v.

    Raises:
        UserInputError: there is no call, one does not fit, no output depends on a layer, or a
            layer's input or gradient is NaN or infinite; the error names the layer.
    """
    rows = {site.name: site for site in program.plan.to_quantize()}
    nodes = {node: rows[name] for node in program.graph.nodes if (name := site_of(node)) in rows}
    found = {site.path: Sensitivity() for site in nodes.values()}
    generator = torch.Generator().manual_seed(seed)
    last = program.graph.output_node()
    with program.evaluating(), torch.enable_grad():
        for leaves in track(check_calls(program, calls), "sensitivity"):
            watcher = _Watcher(program.module, nodes, found)
            watcher.run_leaves(leaves)
            outputs = watcher.values[last.name]
            watcher.take(_projection(last, outputs, real_rows(program, leaves), generator))
    return found


def _projection(last: fx.Node, outputs: Any, keep: RealRows, generator: torch.Generator) -> Tensor:
    """Σ v · output over all outputs that depend on a layer; `last` is the output node."""
    total = torch.zeros((), dtype=torch.float64)
    nodes = pytree.tree_leaves(output_value(last.graph))
    for node, leaf in zip(nodes, pytree.tree_leaves(outputs), strict=True):
        if not isinstance(leaf, Tensor) or not leaf.requires_grad:
            continue
        random = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        real = keep.of(node)
        if real is not None and leaf.shape[:2] == real.shape:
            random[~real] = 0
        total = total + (leaf * random).sum()
    return total


class _Watcher(WatchingInterpreter):
    """Keeps the outputs of the planned layers for their gradients, and those of the graph."""

    def __init__(
        self, module: fx.GraphModule, nodes: Mapping[fx.Node, Site], found: dict[str, Sensitivity]
    ) -> None:
        super().__init__(module, [*(node.name for node in nodes), module.graph.output_node().name])
        self._nodes, self._found = nodes, found
        self._values: list[tuple[Site, Tensor]] = []

    def watch(self, node: fx.Node, value: Any) -> Any:
        if node not in self._nodes:
            return super().watch(node, value)
        site = self._nodes[node]
        linear = match_linear(node)
        assert linear is not None, "the plan was made from this graph"
        x = self.env[linear.x].detach()
        power = float(x.double().square().sum())
        if not math.isfinite(power):
            raise UserInputError(
                "a layer's input on the calibration data is NaN or infinite", where=site.path
            )
        self._found[site.path].power += power
        self._found[site.path].inputs += x.numel()
        value = value if value.requires_grad else value.detach().requires_grad_()
        self._values.append((site, value))
        return value

    def take(self, total: Tensor) -> None:
        """Add the squared gradients of the watched outputs.

        Raises:
            UserInputError: no output depends on a layer, or a gradient is NaN or infinite.
        """
        values = [value for _, value in self._values]
        gradients: tuple[Tensor | None, ...] = ()
        if values and total.requires_grad:
            gradients = torch.autograd.grad(total, values, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise UserInputError("no output of the model depends on a layer to quantize")
        for (site, value), gradient in zip(self._values, gradients, strict=True):
            if gradient is None:
                continue
            squares = float(gradient.double().square().sum())
            if not math.isfinite(squares):
                raise UserInputError(
                    "the gradient of the model's outputs by a layer is NaN or infinite",
                    where=site.path,
                    hint="leave out the calibration rows that cause it, such as rows of zeros that "
                    "the model divides by their length, or give bits as a number",
                )
            self._found[site.path].gain += squares / value.shape[-1]
