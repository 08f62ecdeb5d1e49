"""The data of a program, which storing and printing read; `ir.program` adds the behaviour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from qalora_compile.brief import Brief, megabytes
from qalora_compile.ir.module import ProgramModule, program_tensors
from qalora_compile.ir.signature import Signature, bind, flatten_inputs
from qalora_compile.ir.site_plan import SitePlan
from qalora_compile.ir.stages import TRAINED_NAMES


@dataclass(frozen=True, repr=False)
class ProgramParts(Brief):
    """A torch.fx graph with its tensors, its stage, its site plan and its history.

    Attributes:
        module: The graph as a callable, trainable `nn.Module`.
        stage: `float`, `annotated`, `quantized`, `adapted`, `folded` or `legalized:<target>`.
        plan: One row for every weight: decision and reason.
        signature: Names, dtypes and shapes of inputs and outputs.
        example: (args, kwargs) of the capture; exporters trace with them.
        history: The passes run, as text that `Pipeline.parse` reads.
        notes: Remarks of capture, for example on a dimension that it could not keep dynamic.
        trained: Names of float parameters, such as a head's, that train with the adapters.
    """

    module: ProgramModule
    stage: str
    plan: SitePlan
    signature: Signature
    example: tuple[tuple[Any, ...], Mapping[str, Any]]
    history: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    trained: tuple[str, ...] = ()

    def brief(self) -> dict[str, object]:
        """Stage, layers, size and inputs."""
        leaves = (leaf for leaf in self.signature.inputs if leaf.dtype is not None)
        size = sum(t.numel() * t.element_size() for t in self.tensors().values())
        return {
            "stage": self.stage,
            **self.plan.brief(),
            "size": megabytes(size),
            "inputs": ", ".join(
                f"{leaf.name} {leaf.dtype}[{', '.join(map(str, leaf.shape))}]" for leaf in leaves
            ),
            "passes": len(self.history),
        }

    @property
    def graph(self) -> fx.Graph:
        """The graph of `module`; passes work on a copy of it."""
        return self.module.graph

    def leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The checked flat inputs of a call, in placeholder order."""
        leaves = flatten_inputs(self.graph, bind(self.graph, args, kwargs))
        self.signature.check(leaves)
        return leaves

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the graph reads, by name, in graph order."""
        return program_tensors(self.module)

    def named_adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters by name, in graph order.

        `lora_A` [r, L] and `lora_B` [N, r] of each adapted weight, `adapter_gain` [N, L] and
        `adapter_shift` [N, K] where its scales and codes train, and those in `trained`.
        """
        for name, parameter in self.module.named_parameters():
            if name.rpartition(".")[2] in TRAINED_NAMES or name in self.trained:
                yield name, parameter
