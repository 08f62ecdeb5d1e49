"""The pass contract: `requires` sees the input, `call` makes a new program, `ensures` sees both."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, final

from qalora_compile.errors import InternalError, PassError, PreconditionError, QaloraError
from qalora_compile.ir.program import Program
from qalora_compile.ir.spec import validate
from qalora_compile.ir.torch_internals import write_count

_validating: ContextVar[bool] = ContextVar("qalora_validating", default=False)


@contextmanager
def validating(on: bool = True) -> Iterator[None]:
    """In the block, validate the program of every pass before and after it."""
    token = _validating.set(on)
    try:
        yield
    finally:
        _validating.reset(token)


@dataclass(frozen=True)
class Change:
    """One thing that a pass changed, or one that it skipped.

    Attributes:
        path: Site or module path.
        what: What was done, or not.
        why: The reason.
        at: The node at which a pattern did not match.
    """

    path: str
    what: str
    why: str = ""
    at: str = ""


@dataclass(frozen=True)
class PassResult:
    """A new program, with the changes that were made and the skips."""

    program: Program
    changes: tuple[Change, ...] = ()
    skips: tuple[Change, ...] = ()

    @property
    def modified(self) -> bool:
        """Whether the pass changed anything."""
        return bool(self.changes)


_DATA = "qalora_data"


def data_field(default: Any) -> Any:
    """A field of a pass that is not an option: it is neither printed nor compared."""
    return dataclasses.field(default=default, repr=False, compare=False, metadata={_DATA: True})


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """A pure function from program to program. Subclasses are frozen dataclasses.

    The fields of a subclass are its options: simple values that print as `name{option=value}` and
    parse back (`Pipeline.parse`). A field made by `data_field` is not an option: it holds data that
    text cannot carry, and without which the pass can be run again.

    Class attributes:
        name: Kebab-case name.
        consumes: Stages that the pass accepts.
        produces: Stage of the result, or None to keep the input's.
        lossy: The pass changes the function on purpose, as it rounds weights.
    """

    name: ClassVar[str]
    consumes: ClassVar[tuple[str, ...]]
    produces: ClassVar[str | None]
    lossy: ClassVar[bool] = False

    def requires(self, program: Program) -> None:
        """Raise `PreconditionError` or `UserInputError` where the pass cannot run."""

    @abstractmethod
    def call(self, program: Program) -> PassResult:
        """Transform a copy of the program; the input stays unchanged."""

    def ensures(self, before: Program, after: Program) -> None:
        """Raise `PostconditionError` where the result breaks the contract of the pass."""

    @final
    def __call__(self, program: Program) -> PassResult:
        """Check the input, run the pass, check the result.

        Raises:
            PreconditionError: the program is at another stage, or breaks what `requires` checks.
            PostconditionError: the result breaks what `ensures` checks.
            InternalError: the pass changed its input, or raised another exception.
        """
        try:
            return self._run(program)
        except PassError as error:
            error.pass_name = error.pass_name or self.name
            raise
        except QaloraError:
            raise
        except Exception as error:
            raise InternalError(
                f"the pass {self.name} failed: {type(error).__name__}: {error}",
                hint="this is a bug of qalora-compile; please report it with the model",
            ) from error

    def _run(self, program: Program) -> PassResult:
        if program.stage not in self.consumes:
            raise PreconditionError(
                f"{self.name} takes a program at stage {' or '.join(self.consumes)}, "
                f"this one is {program.stage}",
                hint=_STAGE_HINTS.get(program.stage),
            )
        if _validating.get():
            validate(program)
        self.requires(program)
        fingerprint = _fingerprint(program)
        result = self.call(program)
        if _fingerprint(program) != fingerprint or result.program is program:
            raise InternalError(f"the pass {self.name} changed its input")
        after = result.program.with_history(str(self))
        if self.produces is not None:
            after = dataclasses.replace(after, stage=self.produces)
        self.ensures(program, after)
        if _validating.get():
            validate(after)
        return dataclasses.replace(result, program=after)

    def options(self) -> dict[str, Any]:
        """The option values by field name."""
        return {name: getattr(self, name) for name in self.option_names()}

    @classmethod
    def option_names(cls) -> list[str]:
        """The names of the options."""
        return [f.name for f in dataclasses.fields(cls) if not f.metadata.get(_DATA)]

    def __str__(self) -> str:
        from qalora_compile.passes.framework.pipeline_text import format_pass

        return format_pass(self.name, self.options())


_STAGE_HINTS = {
    "float": "quantize first: qc.quantize_groups(program, qc.QuantSpec())",
    "annotated": "quantize first: qc.quantize_groups(program, qc.QuantSpec())",
    "quantized": "insert adapters first: qc.insert_adapters(program, qc.AdapterSpec())",
    "adapted": "fold the adapters first: qc.fold_adapters(program), or `qalora-compile fold RUN`",
    "folded": "the adapters are folded already: export the program, or start again from `float`",
}


def _fingerprint(program: Program) -> list[tuple[object, ...]]:
    """A state that differs once a pass has edited the graph or a tensor of its input in place.

    Arguments of nodes are immutable: a node that is edited holds others.
    """
    nodes = [(n, n.name, n.target, n.args, n.kwargs) for n in program.graph.nodes]
    named = program.tensors().items()
    tensors = [(name, id(t), write_count(t), t.requires_grad) for name, t in named]
    return [*nodes, *tensors]
