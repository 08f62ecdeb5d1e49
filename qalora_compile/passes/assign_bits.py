"""assign-bits: write the width of each weight's codes into the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from qalora_compile.config import SUPPORTED_BITS
from qalora_compile.errors import PostconditionError, UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.ir.stages import ANNOTATED
from qalora_compile.passes.analysis.select_sites import check_paths, parse_choices
from qalora_compile.passes.framework.base import Change, Pass, PassResult


@dataclass(frozen=True, kw_only=True)
class AssignBits(Pass):
    """Set the bits and the group size of planned weights, for quantize-groups to follow.

    Before:  fc  quantize
    After:   fc  quantize  3 bits  groups of 64

    Fires on: the rows of the weights named in `choices`; all rows of a weight get the same.
    Leaves alone: other rows, and the graph.
    Exactness: exact; nothing is quantized yet.

    Options:
        choices: `path=bits/group_size` for each weight (`Site.path`).
    """

    name: ClassVar[str] = "assign-bits"
    consumes: ClassVar[tuple[str, ...]] = (ANNOTATED,)
    produces: ClassVar[str | None] = None

    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parse_bits(self.choices)

    def requires(self, program: Program) -> None:
        """Check that every path is of a weight that the plan quantizes.

        Raises:
            UserInputError: one is not.
        """
        check_paths(parse_bits(self.choices), program.plan, "choices")

    def call(self, program: Program) -> PassResult:
        """Write the plan."""
        choices = parse_bits(self.choices)
        rows = [site for site in program.plan.to_quantize() if site.path in choices]
        fields = {
            site.name: dict(zip(("chosen_bits", "chosen_group"), choices[site.path], strict=True))
            for site in rows
        }
        changes = tuple(
            Change(path, f"{bits} bits in groups of {group}")
            for path, (bits, group) in choices.items()
        )
        return PassResult(program.evolve(plan=program.plan.update(fields)), changes)

    def ensures(self, before: Program, after: Program) -> None:
        """The rows hold the choices."""
        choices = parse_bits(self.choices)
        for site in after.plan.to_quantize():
            if choices.get(site.path, found := (site.chosen_bits, site.chosen_group)) != found:
                raise PostconditionError("the plan has other bits", where=site.name)


def parse_bits(texts: tuple[str, ...]) -> Mapping[str, tuple[int, int]]:
    """(bits, group size) by path.

    Raises:
        UserInputError: a text is not of the form `path=bits/group_size`.
    """
    found = {}
    for path, value in parse_choices(texts, "choices").items():
        bits, _, group = value.partition("/")
        fits = bits.isdecimal() and int(bits) in SUPPORTED_BITS and group.isdecimal()
        if not fits or int(group) < 1:
            raise UserInputError(
                f"choices gives {path} {value!r}",
                hint=f"write bits/group_size; bits: one of {', '.join(map(str, SUPPORTED_BITS))}",
            )
        found[path] = int(bits), int(group)
    return found
