"""`Pipeline`: passes in order. A wrong order is refused before any pass runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qalora_compile.errors import PassError, PreconditionError, UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.pipeline_text import parse_passes
from qalora_compile.passes.framework.registry import get_pass

Observer = Callable[[Pass, PassResult], None]
"""Called after each pass, for printing, timing or checking."""


@dataclass(frozen=True)
class Pipeline:
    """A sequence of passes, run as one; prints and parses as text.

    Raises (at construction):
        PreconditionError: a pass cannot take what the passes before it produce.
    """

    passes: tuple[Pass, ...]

    def __init__(self, passes: Sequence[Pass]) -> None:
        object.__setattr__(self, "passes", tuple(passes))
        self._check_order()

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read `"quantize-groups{bits=4,group-size=32},insert-adapters{rank=16}"`.

        Raises:
            UserInputError: the text is malformed, or names an unknown pass or option.
            PreconditionError: the order is impossible.
        """
        if not text.strip():
            raise UserInputError("the pipeline is empty", hint="name at least one pass")
        return cls([get_pass(name, options) for name, options in parse_passes(text)])

    def __call__(self, program: Program, observer: Observer | None = None) -> PassResult:
        """Run every pass; the result carries the changes and skips of all.

        Raises:
            PassError: a pass failed; the names of the passes that had run are added.
        """
        changes: list[Change] = []
        skips: list[Change] = []
        done: list[str] = []
        for step in self.passes:
            try:
                result = step(program)
            except PassError as error:
                error.already_run = tuple(done)
                raise
            if observer is not None:
                observer(step, result)
            program = result.program
            changes += result.changes
            skips += result.skips
            done.append(step.name)
        return PassResult(program, tuple(changes), tuple(skips))

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def _check_order(self) -> None:
        possible: set[str] | None = None
        for index, step in enumerate(self.passes):
            fitting = set(step.consumes) if possible is None else possible & set(step.consumes)
            if not fitting:
                before = self.passes[index - 1].name
                raise PreconditionError(
                    f"{step.name} cannot follow {before}: it takes "
                    f"{' or '.join(step.consumes)}, not {' or '.join(sorted(possible or ()))}",
                    where=str(self),
                    pass_name=step.name,
                )
            possible = {step.produces} if step.produces is not None else fitting
