"""`Program`: a captured model at some stage of its way to an exported one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qalora_compile.ir.module import ProgramModule, copy_graph, program_tensors
from qalora_compile.ir.signature import Signature, bind, flatten_inputs
from qalora_compile.ir.site_plan import SitePlan
from qalora_compile.ir.stages import ADAPTER_NAMES


@dataclass(frozen=True)
class Program:
    """A torch.fx graph with its tensors, its stage, its site plan and its history.

    A program is a value: passes return a new one, which shares the tensors they left alone. Only
    training changes a program in place, through its adapter parameters, `train()`/`eval()` through
    its mode, and `to()` through the device of its tensors.

    Attributes:
        module: The graph as a callable, trainable `nn.Module`.
        stage: `float`, `annotated`, `quantized`, `adapted`, `folded` or `legalized:<target>`.
        plan: One row for every weight: decision and reason.
        signature: Names, dtypes and shapes of inputs and outputs.
        example: (args, kwargs) of the capture; exporters trace with them.
        history: The passes run, as text that `Pipeline.parse` reads.
        notes: What capture had to say, for example a dimension it could not keep dynamic.
        trained: Names of the float parameters that train beside the adapters, such as a head's.
    """

    module: ProgramModule
    stage: str
    plan: SitePlan
    signature: Signature
    example: tuple[tuple[Any, ...], Mapping[str, Any]]
    history: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    trained: tuple[str, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        """The graph of `module`; passes work on a copy of it."""
        return self.module.graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program with the arguments of the captured model, by position or by name.

        Raises:
            UserInputError: an argument is missing, unknown, or differs from the signature.
        """
        values = bind(self.graph, args, kwargs)
        self.signature.check(flatten_inputs(self.graph, values))
        return self.module(*values)

    def leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The checked flat inputs of a call, in placeholder order."""
        leaves = flatten_inputs(self.graph, bind(self.graph, args, kwargs))
        self.signature.check(leaves)
        return leaves

    def train(self) -> Program:
        """Switch to training mode: dropout, attention dropout and batch norm; returns self."""
        self.module.train(True)
        return self

    def eval(self) -> Program:
        """Switch to evaluation mode; returns self."""
        self.module.train(False)
        return self

    def to(self, device: torch.device | str) -> Program:
        """Move to a device: the tensors, and what the graph makes itself; returns self.

        Parameters stay the same objects, so an optimizer that has them keeps them. Programs made
        from this one before share its parameters, and are not to be run any more: move first, then
        apply passes. Exporters take programs on the CPU.
        """
        self.module.to(device)
        return self

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, and no gradients, in the block; the mode is restored after it."""
        training = self.module.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train(training)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the graph reads, by name, in graph order."""
        return program_tensors(self.module)

    def named_adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters by name, in graph order.

        `lora_A` [r, L] and `lora_B` [N, r] of each adapted weight, and what is in `trained`.
        """
        for name, parameter in self.module.named_parameters():
            if name.rpartition(".")[2] in ADAPTER_NAMES or name in self.trained:
                yield name, parameter

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
        from qalora_compile.ir.printer import print_program

        return print_program(self)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a folder of JSON and safetensors, atomically; see `Program.load`.

        Raises:
            UserInputError: the folder exists and `overwrite` is false, or is not one that this
                package wrote; see `files.check_output`.
            OutputError: it cannot be written.
            UnsupportedError: a node of the graph has no stored form.
        """
        from qalora_compile.files import atomic_folder
        from qalora_compile.ir.storage import write_program

        with atomic_folder(Path(path), overwrite=overwrite) as folder:
            write_program(self, folder)

    @classmethod
    def load(cls, path: str | Path) -> Program:
        """Read a folder written by `save`. No pickle is read and no code of the model is run.

        Raises:
            UserInputError: the folder is missing, incomplete, malformed or of a later version.
        """
        from qalora_compile.ir.storage import read_program

        return read_program(Path(path))
