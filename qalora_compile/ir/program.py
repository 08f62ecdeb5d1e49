"""`Program`: a captured model at some stage of compilation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qalora_compile.files import atomic_folder
from qalora_compile.ir.module import copy_graph
from qalora_compile.ir.printer import print_program
from qalora_compile.ir.program_parts import ProgramParts
from qalora_compile.ir.signature import bind, flatten_inputs
from qalora_compile.ir.site_plan import SitePlan
from qalora_compile.ir.storage import read_parts, write_program


@dataclass(frozen=True, repr=False)
class Program(ProgramParts):
    """A captured model at some stage of compilation.

    A program is a value: passes return a new one, which shares all unchanged tensors. Only training
    (adapter parameters), `train()` and `eval()` (the mode), and `to()` (the device of the tensors)
    change a program in place. For its attributes see `ProgramParts`.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program with the arguments of the captured model, by position or by name.

        Raises:
            UserInputError: an argument is missing, unknown, or differs from the signature.
        """
        values = bind(self.graph, args, kwargs)
        self.signature.check(flatten_inputs(self.graph, values))
        return self.module(*values)

    def train(self) -> Program:
        """Switch to training mode: dropout, attention dropout and batch norm; returns self."""
        self.module.train(True)
        return self

    def eval(self) -> Program:
        """Switch to evaluation mode; returns self."""
        self.module.train(False)
        return self

    def to(self, device: torch.device | str) -> Program:
        """Move the tensors, and those that the graph creates, to a device; returns self.

        Parameters stay the same objects, so an optimizer keeps them. Programs made from this one
        before share its parameters and must not be run any more: move first, then apply passes.
        Exporters take programs on the CPU.
        """
        self.module.to(device)
        return self

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients in the block; the mode is restored after it."""
        training = self.module.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train(training)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, for an optimizer."""
        return [parameter for _, parameter in self.named_adapter_parameters()]

    def copy_graph(self) -> fx.Graph:
        """A copy of the graph for a pass to rewrite, metadata included."""
        return copy_graph(self.graph)

    def evolve(
        self,
        *,
        graph: fx.Graph | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        stage: str | None = None,
        plan: SitePlan | None = None,
        trained: tuple[str, ...] | None = None,
    ) -> Program:
        """A new program that differs in the given parts; the graph is linted."""
        module = self.module
        if graph is not None:
            graph.lint()
            module = module.rebuild(graph, self.tensors() if tensors is None else tensors)
        return dataclasses.replace(
            self,
            module=module,
            stage=self.stage if stage is None else stage,
            plan=self.plan if plan is None else plan,
            trained=self.trained if trained is None else trained,
        )

    def with_history(self, entry: str) -> Program:
        """A new program with one more pass in its history."""
        return dataclasses.replace(self, history=(*self.history, entry))

    def __str__(self) -> str:
        return print_program(self)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a folder of JSON and safetensors, atomically; see `Program.load`.

        Raises:
            UserInputError: the folder exists and `overwrite` is false, or is not one that this
                package wrote; see `files.check_output`.
            OutputError: it cannot be written.
            UnsupportedError: a node of the graph has no stored form.
        """
        with atomic_folder(Path(path), overwrite=overwrite) as folder:
            write_program(self, folder)

    @classmethod
    def load(cls, path: str | Path, *, lazy: bool = False) -> Program:
        """Read a folder written by `save`. No pickle is read and no code of the model is run.

        Args:
            path: Of the folder.
            lazy: Leave the values of large tensors in their file until they are asked for.

        Raises:
            UserInputError: the folder is missing, incomplete, malformed or of a later version.
        """
        return cls(**read_parts(Path(path), lazy=lazy))
