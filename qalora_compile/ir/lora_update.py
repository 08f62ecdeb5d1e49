"""Low-rank updates of linear layers, pooled or plain: the common form of trained adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qalora_compile.errors import PreconditionError, UserInputError
from qalora_compile.ir.affine import expand_groups, group_count


@dataclass(frozen=True)
class LowRankUpdate:
    """`y += factor · B A P(x)`, where P sums x inside each group, or leaves it as it is.

    Attributes:
        a: `[r, L]`; `[r, K]` where nothing is pooled.
        b: `[N, r]`.
        factor: The product of scaling, pooling factor and weight in a sum of several updates.
        pool: Width of a pooling group; None: plain LoRA.
    """

    a: Tensor
    b: Tensor
    factor: float
    pool: int | None

    @property
    def rank(self) -> int:
        """R."""
        return int(self.a.shape[0])

    def matrix(self, k: int) -> Tensor:
        """The matrix that it adds to the weight, `[N, K]` float64."""
        update = self.factor * (self.b.double() @ self.a.double())
        return update if self.pool is None else expand_groups(update, self.pool, k)

    def folds_into(self, group_size: int) -> bool:
        """Whether it is constant inside every quantization group, so that it folds."""
        return self.pool is not None and self.pool % group_size == 0

    def per_group(self, k: int, group_size: int) -> LowRankUpdate:
        """The nearest update, in the sum of squares, that is constant inside each group.

        It has the same rank, as the mean of B A over a group is B times the mean of A. An update
        that folds already comes back unchanged.
        """
        wide = self.a.double()
        if self.pool is not None:
            wide = expand_groups(wide, self.pool, k)
        groups = group_count(k, group_size)
        padded = torch.nn.functional.pad(wide, (0, groups * group_size - k))
        sums = padded.reshape(self.rank, groups, group_size).sum(-1)
        widths = torch.full((groups,), group_size, dtype=torch.float64)
        widths[-1] = k - (groups - 1) * group_size
        return LowRankUpdate(sums / widths, self.b, self.factor, group_size)


def concatenate(updates: Sequence[LowRankUpdate]) -> LowRankUpdate:
    """The exact sum of several updates that pool alike: their ranks are concatenated.

    Raises:
        PreconditionError: they pool groups of different widths.
    """
    pools = {update.pool for update in updates}
    if len(pools) != 1:
        raise PreconditionError(f"updates of different pooling: {sorted(map(str, pools))}")
    a = torch.cat([update.a.double() for update in updates])
    b = torch.cat([update.b.double() * update.factor for update in updates], dim=1)
    return LowRankUpdate(a, b, 1.0, pools.pop())


def check_pools(update: LowRankUpdate, k: int, path: str) -> None:
    """Check that an update that claims to be pooled is.

    Args:
        update: The update of one layer.
        k: K, the number of inputs of the layer.
        path: Path of the layer.

    Raises:
        UserInputError: its A has a column for each input.
    """
    if update.pool is not None and update.pool > 1 and update.a.shape[1] == k:
        raise UserInputError(
            "the settings say use_qalora, and lora_A has a column for each input: PEFT pools only "
            "on GPTQ layers: this is plain LoRA",
            where=path,
            hint='set "use_qalora": false in adapter_config.json, and it is read as PEFT uses it',
        )
