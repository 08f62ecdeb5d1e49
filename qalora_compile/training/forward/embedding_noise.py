"""NEFTune: noise on the embeddings of the input tokens in training (arXiv 2310.05914).

The noise is uniform in ±alpha / √(L · d) for embeddings `[B, L, d]`, where L includes padding, as
in transformers and TRL. It is drawn from torch's generator, which `fit` seeds for each micro-batch,
so that a resumed training draws the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.module import ProgramModule, build_module, copy_graph, program_tensors
from qalora_compile.ir.ops.views import argument
from qalora_compile.ir.spec import GROUP_EMBEDDING

_ATEN = torch.ops.aten
_RESHAPED = frozenset(
    {
        _ATEN.view.default,
        _ATEN.reshape.default,
        _ATEN.alias.default,
        _ATEN.contiguous.default,
        _ATEN.to.dtype,
    }
)
"""What may stand between the tokens and their lookup."""
_INDICES: dict[object, str] = {_ATEN.embedding.default: "indices", GROUP_EMBEDDING: "ids"}
"""Lookup → the operand that holds the rows to look up."""
_NAME = "embedding_noise"


class EmbeddingNoise(nn.Module):
    """Adds the noise in training mode, and nothing in evaluation."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        """The embeddings `[B, L, d]` with noise."""
        if not self.training:
            return x
        size = self.alpha / math.sqrt(x.shape[-2] * x.shape[-1])
        return x + torch.empty_like(x).uniform_(-size, size)


def add_embedding_noise(module: ProgramModule, alpha: float) -> ProgramModule:
    """An equivalent module on the same tensors with noise on its input embeddings in training.

    Before:  %1 = aten.embedding(@embed_tokens.weight, %input_ids)
    After:   %2 = embedding_noise(%1), read by all that read %1

    Lookups of positions and of segments stay as they are. A model with an encoder gets noise on
    the tokens of both its halves.

    Raises:
        UnsupportedError: the graph looks no token up.
    """
    graph = copy_graph(module.graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    tokens = {*inputs[:1], *(node for node in inputs if node.name == "decoder_input_ids")}
    found = [node for node in graph.nodes if _looked_up(node) in tokens]
    if not found:
        raise UnsupportedError(
            "neftune_alpha is set, and the model has no lookup of its input tokens",
            hint="set it to 0",
        )
    holder = nn.Module()
    for name, child in module.named_children():
        holder.add_module(name, child)
    holder.add_module(_NAME, EmbeddingNoise(alpha))
    for node in found:
        with graph.inserting_after(node):
            noisy = graph.call_module(_NAME, (node,))
        node.replace_all_uses_with(noisy, delete_user_cb=lambda user, own=noisy: user is not own)
    tensors = program_tensors(module)
    return build_module(graph, tensors, submodules=holder, training=module.training)


def _looked_up(node: fx.Node) -> fx.Node | None:
    """The value of which a node looks the elements up in a table; None for other nodes."""
    operand = _INDICES.get(node.target)
    if operand is None:
        return None
    source: fx.Node = argument(node, operand)
    while source.target in _RESHAPED:
        source = source.all_input_nodes[0]
    return source
