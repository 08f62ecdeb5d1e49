"""Runs programs at a precision other than their own and returns the values of chosen nodes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qalora_compile.errors import UserInputError
from qalora_compile.ir.interpret import WatchingInterpreter
from qalora_compile.ir.ops.views import output_value
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import dtype_name
from qalora_compile.ir.torch_internals import pytree
from qalora_compile.untrusted import quoted
from qalora_compile.verify.numeric.error_bound import SENSITIVITY, UNITS

Values = dict[str, Tensor]
_ROUNDINGS = 2
"""Evaluations of the reference in which every result is rounded up or down at random."""
_DISTURBED = 4
"""Evaluations in which every result is off by `SENSITIVITY` roundings."""


def run_reference(
    program: Program, leaves: Sequence[Any], names: Collection[str], working: torch.dtype
) -> tuple[Values, Values]:
    """Exact values of nodes and the effect of rounding: (T, max |Aᵢ − T|), see `check_bound`.

    Args:
        program: The reference.
        leaves: Checked flat inputs, in signature order.
        names: The nodes whose values are wanted.
        working: The precision at which the candidate computes.
    """
    exact = run_nodes(program, leaves, names, torch.float64)
    noises = (None, *((UNITS[working], seed) for seed in range(_ROUNDINGS)))
    return exact, _largest_errors(program, leaves, working, exact, noises)


def run_sensitivity(
    program: Program,
    leaves: Sequence[Any],
    names: Collection[str],
    working: torch.dtype,
    exact: Values,
) -> Values:
    """The largest |Aᵢ − T| where every result of Aᵢ is off by `SENSITIVITY` roundings, up or down.

    An operator that sums many products may round that often inside, in an order of its own.

    Args:
        program: The reference.
        leaves: Checked flat inputs, in signature order.
        names: The nodes whose values are wanted.
        working: The precision at which the candidate computes.
        exact: T, of `run_reference`.
    """
    unit = SENSITIVITY * UNITS[working]
    wanted = {name: exact[name] for name in names if name in exact}
    noises = [(unit, _ROUNDINGS + seed) for seed in range(_DISTURBED)]
    return _largest_errors(program, leaves, working, wanted, noises)


def _largest_errors(
    program: Program,
    leaves: Sequence[Any],
    working: torch.dtype,
    exact: Values,
    noises: Iterable[tuple[float, int] | None],
) -> Values:
    """The largest |Aᵢ − T| over evaluations with the given noises (`run_nodes`)."""
    own = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in exact.items()}
    narrow = torch.float32 if working is torch.float32 else None
    for noise in noises:
        for name, value in run_nodes(program, leaves, exact, narrow, noise=noise).items():
            error = (value.double() - exact[name].double()).abs()
            own[name] = torch.maximum(own[name], error)  # NaN stays
    return own


def working_dtype(program: Program) -> torch.dtype:
    """The precision at which a program computes: half precision if any of its tensors is."""
    dtypes = {t.dtype for t in program.tensors().values()}
    halves = [dtype for dtype in UNITS if dtype is not torch.float32 and dtype in dtypes]
    return halves[0] if halves else torch.float32


def run_nodes(
    program: Program,
    leaves: Sequence[Any],
    names: Collection[str],
    dtype: torch.dtype | None = None,
    *,
    noise: tuple[float, int] | None = None,
) -> Values:
    """Values of nodes, in evaluation mode and without gradients.

    Args:
        program: What to run.
        leaves: Checked flat inputs, in signature order.
        names: The nodes whose values are wanted, without those that are not tensors. Without names
            the program runs to its outputs.
        dtype: The dtype to which every floating tensor and dtype in the graph is converted. With
            `float64` the result is exact up to 2⁻⁵³ for the stored weights. None runs the program
            as it is.
        noise: (u, seed): multiply each floating result by 1 + u or 1 − u at random, as if it had
            been rounded differently (Monte Carlo arithmetic).

    Raises:
        UserInputError: the program does not run on these inputs.
    """
    runner = _At(program.module, names or None, dtype, noise)
    previous = torch.get_default_dtype()
    with program.evaluating():
        if dtype is not None:
            torch.set_default_dtype(dtype)  # for factories without a dtype
        try:
            runner.run_leaves([runner.cast(leaf) for leaf in leaves])
        except (RuntimeError, IndexError) as error:  # sizes that depend on values
            raise UserInputError(
                f"the program fails when it runs: {quoted(str(error), 200)}",
                where=f"in {dtype_name(dtype or torch.float32)}",
            ) from error
        finally:
            torch.set_default_dtype(previous)
    return {name: value for name, value in runner.values.items() if isinstance(value, Tensor)}


def output_nodes(program: Program) -> dict[str, str]:
    """Name of each computed output → the node that computes it."""
    value = output_value(program.graph)
    values = value if isinstance(value, (tuple, list)) else (value,)
    pairs = zip(program.signature.outputs, values, strict=True)
    return {name: value.name for name, value in pairs if isinstance(value, fx.Node)}


class _At(WatchingInterpreter):
    """Runs a graph with floating tensors of one dtype."""

    def __init__(
        self,
        module: fx.GraphModule,
        names: Collection[str] | None,
        dtype: torch.dtype | None,
        noise: tuple[float, int] | None = None,
    ) -> None:
        super().__init__(module, names)
        self._dtype, self._noise = dtype, noise
        self._generator = torch.Generator().manual_seed(0 if noise is None else noise[1])

    def cast(self, value: Any) -> Any:
        """Floating tensors and dtypes converted to the wanted dtype; other values unchanged."""
        if self._dtype is None:
            return value
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self._dtype)
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return self._dtype
        if isinstance(value, fx.GraphModule):
            return _At(value, None, self._dtype).run
        return value

    def fetch_attr(self, target: str) -> Any:
        return self.cast(super().fetch_attr(target))

    def call_function(self, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        args, kwargs = pytree.tree_map(self.cast, (args, kwargs))
        # Operators of single targets return float32 for any input.
        result = pytree.tree_map(self.cast, super().call_function(target, args, kwargs))
        return result if self._noise is None else pytree.tree_map(self._rounded, result)

    def _rounded(self, value: Any) -> Any:
        """A floating tensor with each element larger or smaller by one rounding."""
        if self._noise is None or not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        up = torch.randint(0, 2, value.shape, generator=self._generator, dtype=torch.int8)
        factor = 1 + (2.0 * up.double() - 1) * self._noise[0]
        return (value.double() * factor).to(value.dtype)
