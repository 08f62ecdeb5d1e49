"""Exported language models with a key-value cache, compared as whole-sequence models.

A sequence is given in the steps in which devices give it: a prompt, several tokens, two, and then
one token at a time, each on the cache of those before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qalora_compile.ir.signature import PAST, Signature
from qalora_compile.verify.onnx_session import OnnxSession

_PRESENT = "present."
_LOGITS, _TOKENS, _MASK, _POSITIONS = "logits", "input_ids", "attention_mask", "position_ids"


def without_cache(signature: Signature, names: Collection[str]) -> Signature:
    """The signature of the same model on whole sequences: tokens in, logits out.

    Args:
        signature: Of the model with its cache.
        names: Inputs of the model that it is compared with; the mask is left out if it has none.
    """
    kept = {leaf.name: leaf for leaf in signature.inputs if leaf.name == _TOKENS}
    if _MASK in names:
        mask = next(leaf for leaf in signature.inputs if leaf.name == _MASK)
        kept[_MASK] = replace(mask, shape=kept[_TOKENS].shape)
    return Signature(tuple(kept.values()), (_LOGITS,), ())


_BACKWARD = (5, 3, 2, 1, 0)
"""Where steps behind the prompt end, counted from the end of the sequence."""


def stops_of(length: int) -> list[int]:
    """Where the steps of a sequence end: half of it, several tokens, two, and single ones."""
    prompt = (length + 1) // 2
    return sorted({prompt, *(length - back for back in _BACKWARD if length - back > prompt)})


class CachedSteps:
    """Runs a session on whole sequences in steps, each on the cache of those before; `stops_of`."""

    def __init__(self, graph: OnnxSession) -> None:
        self._graph = graph
        self.signature = graph.signature
        # Where a model gives the last logits alone, it goes token by token to give them all.
        logits = next(out for out in graph.session.get_outputs() if out.name == _LOGITS)
        self._last_only = logits.shape[1] == 1

    def whole(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of one run on the whole sequence, after an empty past."""
        return self._step(feed, 0, feed[_TOKENS].shape[1], self._empty(feed))

    def logits(self, feed: Mapping[str, Any]) -> Tensor:
        """Logits of every token."""
        length = feed[_TOKENS].shape[1]
        stops = range(1, length + 1) if self._last_only else stops_of(length)
        past, begin, parts = self._empty(feed), 0, []
        for stop in stops:
            values = self._graph.outputs(self._step(feed, begin, stop, past))
            parts.append(values.pop(_LOGITS))
            past = {n.replace(_PRESENT, PAST): v.numpy() for n, v in values.items()}
            begin = stop
        return torch.cat(parts, dim=1)

    def _empty(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        batch = feed[_TOKENS].shape[0]
        past = {}
        for leaf in self.signature.cache:
            shape = [batch, int(leaf.shape[1]), 0, int(leaf.shape[3])]
            past[leaf.name] = torch.zeros(shape, dtype=getattr(torch, str(leaf.dtype))).numpy()
        return past

    def _step(
        self, feed: Mapping[str, Any], begin: int, stop: int, past: Mapping[str, Any]
    ) -> dict[str, Any]:
        tokens = feed[_TOKENS][:, begin:stop]
        mask = (
            feed[_MASK][:, :stop] if _MASK in feed else torch.ones(len(tokens), stop).long().numpy()
        )
        positions = torch.arange(begin, stop).repeat(len(tokens), 1).numpy()
        return {_TOKENS: tokens, _MASK: mask, _POSITIONS: positions, **past}
