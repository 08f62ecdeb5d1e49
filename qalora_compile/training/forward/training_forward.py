"""Execution of a program in training: fused layers, recomputed activations, chunked logits.

A program's own graph is made to be read and rewritten. `TrainingForward` computes the same function
on the same parameters, so training it trains the program.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qalora_compile.errors import PreconditionError
from qalora_compile.ir.module import ProgramModule
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import bind, flatten_inputs
from qalora_compile.ir.stages import ADAPTED
from qalora_compile.training.data.example import Batch
from qalora_compile.training.evaluate import label_loss, model_inputs, rows_of
from qalora_compile.training.forward.chunked_loss import (
    Head,
    mean_loss,
    split_head,
    token_log_probs,
)
from qalora_compile.training.forward.embedding_noise import add_embedding_noise
from qalora_compile.training.forward.fuse_adapters import fuse_adapters
from qalora_compile.training.forward.layer_checkpointing import checkpoint_graph
from qalora_compile.training.forward.recompute_activations import recompute_activations


class TrainingForward:
    """An adapted program in a form that trains fast and in little memory.

    Every layer and its adapter become one operator (`fuse_adapters`). A call with the program's
    arguments gives the program's outputs; `loss` computes the loss of a language model without
    holding the logits of all tokens (`chunked_loss`). Activations between two layers are recomputed
    in the backward pass (`recompute_activations`). The mode, training or evaluation, is that of the
    program.

    Args:
        program: A program at stage `adapted`; the parameters are shared with it.
        fused: False keeps layers and adapters separate: under autocast, a fused update would be
            rounded together with the weight.
        gradient_checkpointing: Keep only the inputs of each layer and recompute the rest in the
            backward pass: about a third more time, and the memory of one layer instead of all.
        neftune_alpha: Size of the noise on input embeddings in training, see `embedding_noise`.

    Raises:
        PreconditionError: the program has no adapters.
        UnsupportedError: checkpointing is asked for, and no layers are found; or noise, and the
            program looks no token up.
    """

    def __init__(
        self,
        program: Program,
        *,
        fused: bool = True,
        gradient_checkpointing: bool = False,
        neftune_alpha: float = 0.0,
    ) -> None:
        if program.stage != ADAPTED:
            raise PreconditionError(
                f"training takes a program at stage {ADAPTED}, and this one is {program.stage}",
                hint="insert adapters first: qc.insert_adapters(program, qc.AdapterSpec())",
            )
        self.program = program
        self._checkpointed = gradient_checkpointing
        graph = fuse_adapters(program) if fused else program.copy_graph()
        self._fused = program.module.rebuild(graph, program.tensors())
        if neftune_alpha:
            self._fused = add_embedding_noise(self._fused, neftune_alpha)
        self._whole: ProgramModule | None = None
        self._parts: tuple[ProgramModule, Head] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run with the arguments of the program.

        Raises:
            UserInputError: an argument is missing, unknown, or differs from the signature.
        """
        if self._whole is None:
            self._whole = self._runnable(self._fused)
        return self._run(self._whole, args, kwargs)

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats over the tokens of a batch that carry loss; a scalar.

        It equals the loss of the full logits up to the order of summation. If the logits are not a
        row-wise function of hidden states, the full logits are computed.

        Raises:
            UnsupportedError: the program gives no logits.
        """
        return mean_loss(*self._hidden(batch))

    def log_probs(self, batch: Batch) -> Tensor:
        """The summed log-probability, in nats, of the tokens of each row that carry loss, `[B]`.

        Raises:
            UnsupportedError: the program gives no logits.
        """
        found = token_log_probs(*self._hidden(batch))
        return torch.stack([row.sum() for row in found.split(batch.targets.tolist())])

    def _hidden(self, batch: Batch) -> tuple[Tensor, Tensor, Head]:
        """Hidden states and targets of the positions that carry loss, and the head for them."""
        inputs = model_inputs(self.program, batch.input_ids, batch.attention_mask, *batch.source)
        if self._parts is None:
            body, head = split_head(self._fused)
            self._parts = self._runnable(body), head
        body, head = self._parts
        output = self._run(body, (), inputs)
        if head.module is not None:
            head.module.train(self.program.module.training)
        return *label_loss(rows_of(output), batch), head

    def _runnable(self, module: ProgramModule) -> ProgramModule:
        return checkpoint_graph(module) if self._checkpointed else recompute_activations(module)

    def _run(self, module: ProgramModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module on checked arguments, in the mode of the program."""
        values = bind(self.program.graph, args, kwargs)
        self.program.signature.check(flatten_inputs(self.program.graph, values))
        if module.training != self.program.module.training:
            module.train(self.program.module.training)
        return module(*values)
