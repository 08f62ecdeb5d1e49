"""Whether a program in its packed form keeps examples apart, tried out."""

from __future__ import annotations

import torch
from torch import Tensor

from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.program import Program
from qalora_compile.training.evaluate import program_forward

_PARTS = (5, 3, 7)
_MAX_REL = 1e-3
_MAX_REL_HALF = 5e-2


def check_packed(program: Program, packed: Program) -> None:
    """Compare a packed row with its examples alone, and see that none reaches another.

    Args:
        program: A language model that takes one example a row.
        packed: The same in its packed form.

    Raises:
        UnsupportedError: the logits of an example differ from those that it has alone, or change
            with the tokens of another example by any bit.
    """
    generator = torch.Generator().manual_seed(0)
    owners = torch.tensor([[n for n, size in enumerate(_PARTS, start=1) for _ in range(size)]])
    known = int(program.example[1]["input_ids"].max()) + 1
    row = torch.randint(0, known, owners.shape, generator=generator)
    with program.evaluating(), packed.evaluating():
        together = program_forward(packed)(row, owners)
        for number in range(1, len(_PARTS) + 1):
            own = owners[0] == number
            _compare_alone(program, row[:, own], together[:, own])
            other = torch.where(own, (row + 1) % known, row)
            changed = program_forward(packed)(other, owners)
            if not torch.equal(changed[:, ~own], together[:, ~own]):
                raise UnsupportedError(
                    "a token of one packed example sees another example",
                    where=f"example {number} of a row",
                    hint="the model looks across rows by more than its mask: do not pack",
                )


def _compare_alone(program: Program, tokens: Tensor, together: Tensor) -> None:
    alone = program_forward(program)(tokens, torch.ones_like(tokens))
    error = float((alone - together).abs().max()) / max(float(alone.abs().max()), 1e-30)
    limit = _MAX_REL if alone.dtype in (torch.float32, torch.float64) else _MAX_REL_HALF
    if not error <= limit:
        raise UnsupportedError(
            f"packed, an example has other logits than alone: they differ by {error:.2g} of their "
            f"largest (at most {limit:g} is rounding)",
            hint="the model looks across rows by more than its mask and positions: do not pack",
        )
