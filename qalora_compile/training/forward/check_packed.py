"""A check, by execution, that the packed form of a program keeps examples apart."""

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
    """Compare a packed row with its separate examples, and check that none affects another.

    Args:
        program: A language model that takes one example per row.
        packed: Its packed form.

    Raises:
        UnsupportedError: the logits of an example differ from those of the separate example, or
            change in any bit with the tokens of another example.
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
                    "a token of one packed example attends to another example",
                    where=f"example {number} of a row",
                    hint="do not pack: the model relates tokens not only by its mask",
                )


def _compare_alone(program: Program, tokens: Tensor, together: Tensor) -> None:
    alone = program_forward(program)(tokens, torch.ones_like(tokens))
    error = float((alone - together).abs().max()) / max(float(alone.abs().max()), 1e-30)
    limit = _MAX_REL if alone.dtype in (torch.float32, torch.float64) else _MAX_REL_HALF
    if not error <= limit:
        raise UnsupportedError(
            f"packing changes the logits of an example by {error:.2g} of their largest value, and "
            f"rounding explains at most {limit:g}",
            hint="do not pack: the model relates tokens not only by its mask and positions",
        )
