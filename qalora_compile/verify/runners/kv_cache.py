"""Exported language models with a key-value cache, compared on complete sequences.

A sequence is run in steps, as on a device: a prompt, several tokens, two tokens, and then one token
at a time, each with the cache of the steps before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.ir.meta import PAST
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import InputLeaf, Signature
from qalora_compile.verify.inputs import draw_leaves
from qalora_compile.verify.runners.run import Runner

_PRESENT = "present."
_PROBE, _PADDING, _SAME = 9, 3, 1e-3
"""Tokens of a probe, including padding; how many of them are padding; and the tolerance."""
MASK = "attention_mask"
_LOGITS, _TOKENS, _POSITIONS = "logits", "input_ids", "position_ids"


def without_cache(signature: Signature, names: Collection[str]) -> Signature:
    """The signature of the same model on complete sequences: tokens in, logits out.

    Args:
        signature: Signature of the model with its cache.
        names: Inputs of the model that it is compared with. Without a mask, it is left out.
    """
    kept = {leaf.name: leaf for leaf in signature.inputs if leaf.name == _TOKENS}
    if MASK in names:
        mask = next(leaf for leaf in signature.inputs if leaf.name == MASK)
        kept[MASK] = replace(mask, shape=kept[_TOKENS].shape)
    return Signature(tuple(kept.values()), (_LOGITS,), ())


def counts_padding(program: Program, model: Runner) -> bool:
    """Whether a model without a position input counts padding tokens as positions.

    OPT and BioGPT count the ones of the mask, so that padding before a text changes nothing. The
    same holds for relative positions, for which both counts are correct.

    Args:
        program: The model.
        model: The runner of the model.
    """
    generator = torch.Generator().manual_seed(0)
    leaves = draw_leaves(program, {"batch": 2, "sequence": _PROBE}, generator)
    padded, alone = list(leaves), list(leaves)
    for index, leaf in enumerate(program.signature.inputs):
        if leaf.name == MASK:
            padded[index] = (torch.arange(_PROBE) >= _PADDING).long().repeat(2, 1)
            alone[index] = torch.ones(2, _PROBE - _PADDING, dtype=torch.int64)
        elif leaf.name == _TOKENS:
            alone[index] = leaves[index][:, _PADDING:]
    try:
        one, other = (model.run(each).outputs[_LOGITS] for each in (padded, alone))
    except (KeyError, UserInputError):  # no logits, or a length that the model does not accept
        return True
    scale = float(other.abs().max())
    return float((one[:, _PADDING:] - other).abs().max()) > _SAME * scale


_BACKWARD = (5, 3, 2, 1, 0)
"""Where the steps after the prompt end, counted from the end of the sequence."""


def stops_of(length: int) -> list[int]:
    """Where the steps of a sequence end: half of it, several tokens, two, and single ones."""
    prompt = (length + 1) // 2
    return sorted({prompt, *(length - back for back in _BACKWARD if length - back > prompt)})


def empty_cache(leaves: Iterable[InputLeaf], batch: int) -> dict[str, Any]:
    """Empty past keys and values, by the name of their input."""
    past = {}
    for leaf in leaves:
        shape = [batch, int(leaf.shape[1]), 0, int(leaf.shape[3])]
        past[leaf.name] = torch.zeros(shape, dtype=getattr(torch, str(leaf.dtype))).numpy()
    return past


class Session(Protocol):
    """An exported graph with a runtime."""

    signature: Signature

    def outputs(self, feed: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every output by name; inputs that the graph does not have are ignored."""

    def sites(self, feed: Mapping[str, Any]) -> dict[str, Tensor]:
        """The output of every site, by its name, in graph order."""

    def width(self, output: str) -> int | None:
        """The size of an output along axis 1, if it is fixed."""


class CachedSteps:
    """Runs a session on complete sequences in the steps of `stops_of`, with its cache."""

    def __init__(self, graph: Session) -> None:
        self._graph = graph
        self.signature = graph.signature
        # A model that returns only the last logits runs token by token to return them all.
        self.last_only = graph.width(_LOGITS) == 1
        """Whether the model outputs the logits of the last token alone."""
        self.counts_padding = True
        """Whether padding tokens count as positions, as in most models without a position input."""

    def full_feed(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of one run on the complete sequence, with an empty past."""
        return self._step(feed, 0, feed[_TOKENS].shape[1], self._empty(feed))

    def logits(self, feed: Mapping[str, Any]) -> Tensor:
        """Logits of every token."""
        length = feed[_TOKENS].shape[1]
        if not self.last_only:
            return torch.cat(self._run_steps(feed, stops_of(length)), dim=1)
        parts = self._run_steps(feed, range(1, length + 1))
        for stop, last in zip(
            stops_of(length), self._run_steps(feed, stops_of(length)), strict=True
        ):
            parts[stop - 1] = last  # of a step of several tokens
        return torch.cat(parts, dim=1)

    def _run_steps(self, feed: Mapping[str, Any], stops: Iterable[int]) -> list[Tensor]:
        """The logits of each step."""
        past, begin, parts = self._empty(feed), 0, []
        for stop in stops:
            values = self._graph.outputs(self._step(feed, begin, stop, past))
            parts.append(values.pop(_LOGITS))
            past = {n.replace(_PRESENT, PAST): v.numpy() for n, v in values.items()}
            begin = stop
        return parts

    def _empty(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        return empty_cache(self.signature.cache, len(feed[_TOKENS]))

    def _step(
        self, feed: Mapping[str, Any], begin: int, stop: int, past: Mapping[str, Any]
    ) -> dict[str, Any]:
        tokens = feed[_TOKENS][:, begin:stop]
        mask = (
            feed[MASK][:, :stop] if MASK in feed else torch.ones(len(tokens), stop).long().numpy()
        )
        positions = torch.arange(stop).repeat(len(tokens), 1)
        if not self.counts_padding:
            positions = (torch.from_numpy(mask).long().cumsum(1) - 1).clamp(min=0)
        return {_TOKENS: tokens, MASK: mask, _POSITIONS: positions[:, begin:].numpy(), **past}
