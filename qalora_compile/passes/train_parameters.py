"""train-parameters: let float parameters, such as a new head's, train with the adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from qalora_compile.errors import PostconditionError, PreconditionError, UserInputError
from qalora_compile.ir.lazy_tensor import is_lazy
from qalora_compile.ir.program import Program
from qalora_compile.ir.stages import ADAPTED, CODE_NAMES, TRAINED_NAMES
from qalora_compile.ir.tensor_identity import memory_key
from qalora_compile.passes.analysis.select_sites import as_patterns, match_patterns
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.rewrite import set_free


@dataclass(frozen=True, kw_only=True)
class TrainParameters(Pass):
    """Let parameters that are kept in float take gradients; fold-adapters freezes them again.

    Before:  %1 = aten.linear(%x, @classifier.weight, @classifier.bias)
    After:   the same; both parameters are trainable, copies of their own, and in
             `Program.trained`

    Fires on: the parameters named. They are copied, so the user's model is not trained with them.
    Leaves alone: the graph, and every other tensor.
    Exactness: exact; the function does not change.

    Options:
        names: Names of parameters or of modules that hold them (`classifier`), dotted suffixes,
            globs or `re:` patterns.
    """

    name: ClassVar[str] = "train-parameters"
    consumes: ClassVar[tuple[str, ...]] = (ADAPTED,)
    produces: ClassVar[str | None] = None

    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", as_patterns(self.names, "names"))

    def requires(self, program: Program) -> None:
        """Check that the named parameters are in float and do not share parts of their memory.

        Raises:
            UserInputError: a pattern matches nothing; near names are listed.
            PreconditionError: a parameter belongs to a quantized weight, or shares a part of its
                memory with another parameter.
        """
        tensors = program.tensors()
        for name in self._chosen(program):
            if is_lazy(tensors[name]):
                continue  # it has no memory; its source was checked
            same = {n for n, t in tensors.items() if t is tensors[name]}
            shared = {n for n, t in tensors.items() if memory_key(t) == memory_key(tensors[name])}
            if shared != same:
                raise PreconditionError(
                    f"the parameter shares memory with another, {min(shared - same)}",
                    where=name,
                    hint="give the module that is to train a weight of its own",
                )

    def call(self, program: Program) -> PassResult:
        """Set free."""
        chosen = self._chosen(program)
        before = program.tensors()
        tied = {id(before[name]) for name in chosen}
        names = [n for n, t in before.items() if id(t) in tied or n in program.trained]
        after = program.evolve(
            graph=program.copy_graph(),
            tensors=set_free(before, chosen),
            trained=tuple(names),
        )
        done = "trains, in float"
        return PassResult(after, tuple(Change(name, done) for name in sorted(chosen)))

    def ensures(self, before: Program, after: Program) -> None:
        """The named parameters train, and are new tensors."""
        own = {id(tensor) for tensor in before.tensors().values()}
        parameters = dict(after.named_adapter_parameters())
        for name in self._chosen(before):
            found = parameters.get(name)
            if found is None or not found.requires_grad or id(found) in own:
                raise PostconditionError("the parameter does not train", where=name)

    def _chosen(self, program: Program) -> set[str]:
        """The names of the parameters that match."""
        known = {n: t for n, t in program.tensors().items() if isinstance(t, nn.Parameter)}
        aliases = {name: _aliases(name) for name in known}
        chosen = match_patterns(self.names, aliases, "names", "parameter") if self.names else set()
        for name in sorted(chosen):
            _check_float(name, known[name])
        if not chosen:
            raise UserInputError("there is no parameter to train", hint="give names")
        return chosen


def _aliases(name: str) -> tuple[str, ...]:
    """A parameter's name, and the names of all modules that contain it."""
    parts = name.split(".")
    return tuple(".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _check_float(name: str, parameter: Tensor) -> None:
    path, _, last = name.rpartition(".")
    if last in (*CODE_NAMES, *TRAINED_NAMES) or not parameter.is_floating_point():
        raise PreconditionError(
            "the weight is quantized, so it trains through its adapter",
            where=path,
            hint=f"to train it in float, keep it: exclude={path!r} when quantizing",
        )
