"""How weights are quantized."""

from __future__ import annotations

from dataclasses import dataclass

from qalora_compile.config.base import AUTO, Spec, check_int, is_positive, one_of
from qalora_compile.errors import UserInputError
from qalora_compile.registry import QUANTIZERS

SUPPORTED_BITS = (2, 3, 4, 8)
METHODS = QUANTIZERS.builtin
"""The built-in methods; `extend.register_quantizer` adds others."""
ZERO_POINTS = ("real", "integer")
BUDGET_UNITS = ("bits", "stored-bits", "megabytes")
AUTO_GROUPS = (32, 64, 128)
"""The group sizes that `"auto"` chooses from."""


@dataclass(frozen=True, kw_only=True)
class QuantSpec(Spec):
    """How weights are quantized in groups along the reduction axis.

    Attributes:
        bits: Width of a code: 2, 3, 4 or 8; or `"auto"`, a width for each layer by its loss, within
            `budget`.
        group_size: Weights that share one scale and offset; the last group of a row may be shorter.
            With bits `"auto"` it may be `"auto"` too: 32, 64 or 128 for each layer, to lose least
            within the budget.
        method: How scale, offset and codes are chosen. `"minmax"` rounds to the nearest of 2^bits
            levels between the group's smallest and largest weight (arXiv 2309.14717, Eq. 1);
            `"mse"` searches for the range that loses least; `"hqq"` fits it half-quadratically, and
            with calibration data keeps no row of a weight whose outputs lose more than with
            `"mse"`; `"gptq"` (arXiv 2210.17323) needs calibration data; `"learned"` starts from
            `"gptq"` and trains the scales and offsets of all layers together, so that the model
            predicts what it does in float: minutes of training, and the best result at 2 and 3
            bits.
        refine_offsets: With calibration data, move the offsets to the least output error, given the
            codes and the scale; with few calibration rows they move less. This costs nothing at run
            time, and leaves nothing to correct for init `"svd"` and rank `"auto"`.
        learn_steps: For `"learned"`: the most steps of about 1,024 tokens; it stops earlier once
            texts that are held out say so.
        learn_rate: For `"learned"`: the peak rate, as a fraction of a layer's mean scale.
        act_order: For `"gptq"` and `"learned"`: round the most active columns first; groups do not
            change. False: from left to right.
        damping: For `"gptq"` and `"learned"`: the fraction of the mean diagonal of the second
            moments that is added to their diagonal; more is added if calibration rows are few.
        budget: Largest size of the weights with bits `"auto"`, in `budget_unit`.
        budget_unit: `"bits"`: the mean width of a code, over all weights that are quantized;
            `"stored-bits"`: the mean of what a weight takes, scales and offsets included;
            `"megabytes"`: 10⁶ bytes of codes, scales and offsets, as this package stores them.
        zero_point: `"integer"`: zero-points are integers from 0 to 2^bits − 1, for runtimes that
            take no others; with method `"minmax"`. Offsets are then never refined.
    """

    bits: int | str = 4
    group_size: int | str = 32
    method: str = "minmax"
    refine_offsets: bool = True
    act_order: bool = True
    damping: float = 0.01
    budget: float | None = None
    budget_unit: str = "bits"
    zero_point: str = "real"
    learn_steps: int = 48
    learn_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.bits != AUTO:
            one_of("bits", self.bits, SUPPORTED_BITS)
        if not (is_positive(self.budget) if self.bits == AUTO else self.budget is None):
            raise UserInputError(
                f"budget is {self.budget!r} with bits {self.bits!r}",
                hint="bits 'auto' takes a budget, a number above 0; other bits take none",
            )
        one_of("budget_unit", self.budget_unit, BUDGET_UNITS)
        self._check_group_size()
        if self.method not in QUANTIZERS:
            one_of("method", self.method, QUANTIZERS.names())
        one_of("zero_point", self.zero_point, ZERO_POINTS)
        if self.zero_point == "integer" and self.method != "minmax":
            raise UserInputError(
                f"zero_point is 'integer' with method {self.method!r}",
                hint="method 'minmax' can round to levels whose zero-points are integers",
            )
        one_of("refine_offsets", self.refine_offsets, (True, False))
        one_of("act_order", self.act_order, (True, False))
        check_int("learn_steps", self.learn_steps, least=1)
        if not (isinstance(self.learn_rate, float) and 0 < self.learn_rate <= 1):
            raise UserInputError(
                f"learn_rate is {self.learn_rate!r}", hint="use e.g. 1e-3, 1.0 at most"
            )
        if not (isinstance(self.damping, float) and 0 < self.damping <= 1):
            raise UserInputError(f"damping is {self.damping!r}", hint="use e.g. 0.01, 1 at most")

    def _check_group_size(self) -> None:
        if self.group_size != AUTO:
            return check_int("group_size", self.group_size, least=1)
        if self.bits != AUTO:
            raise UserInputError(
                f"group_size is 'auto' with bits {self.bits!r}",
                hint="group sizes are chosen together with bits 'auto', within one budget",
            )
        if self.budget_unit == "bits":
            raise UserInputError(
                "the mean width of a code does not limit group_size 'auto': the smallest is best",
                hint="give a budget that counts scales and offsets: budget_unit 'stored-bits', "
                "or 'megabytes'",
            )
        return None

    @property
    def width(self) -> int:
        """Bits, if all weights have the same.

        Raises:
            UserInputError: the bits are `"auto"`.
        """
        if not isinstance(self.bits, int):
            raise UserInputError(f"bits are {self.bits!r}", hint="assign-bits chooses them")
        return self.bits

    @property
    def group(self) -> int:
        """Group size, if all weights have the same.

        Raises:
            UserInputError: the group size is `"auto"`.
        """
        if not isinstance(self.group_size, int):
            raise UserInputError(
                f"group_size is {self.group_size!r}", hint="assign-bits chooses it"
            )
        return self.group_size
