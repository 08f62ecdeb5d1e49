"""`capture_causal_lm`: a causal language model with its key-value cache as inputs and outputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from qalora_compile.capture.export import export_model_graph
from qalora_compile.capture.model import make_program, to_module
from qalora_compile.capture.transformers_internals import (
    batched_experts,
    filled_cache,
    replaced_attention,
)
from qalora_compile.errors import CaptureError, UnsupportedError
from qalora_compile.ir.program import Program
from qalora_compile.ir.torch_internals import pytree
from qalora_compile.untrusted import quoted

BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past_sequence", "total_sequence"
_SDPA = "sdpa"
_BATCH_SIZE, _SEQUENCE_SIZE, _PAST_SIZE = 2, 3, 5


def capture_causal_lm(model: nn.Module, *, last_logits: bool | None = False) -> Program:
    """Capture a transformers decoder-only model with its cache to a program at stage `float`.

    One graph runs the prompt and each step after it:

    =============================  ===========================================================
    `input_ids`                    int64 `[batch, sequence]`
    `attention_mask`               int64 `[batch, past_sequence + sequence]`, 0 where padding
    `position_ids`                 int64 `[batch, sequence]`; only if the model reads it
    `past_key_values.N.key/value`  `[batch, heads, past_sequence, head]`; may be empty
    `logits`                       `[batch, sequence, vocabulary]`
    `present.N.key/value`          `[batch, heads, past_sequence + sequence, head]`
    =============================  ===========================================================

    Tensors have the same names as with `capture_model`. The model's weights may be fake tensors,
    since no value is read.

    Args:
        model: A transformers model in evaluation mode.
        last_logits: Return logits of the last position only, `[batch, 1, vocabulary]`; None: if the
            model can leave out the others.

    Raises:
        UnsupportedError: the model's cache holds something other than keys and values.
        CaptureError: `torch.export` refused the model.
    """
    layers = _cache_shapes(model)
    can = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    if last_logits and not can:
        raise UnsupportedError(f"{type(model).__name__} cannot return only the last logits")
    cached = _with_cache(model, can if last_logits is None else last_logits)
    kwargs = _example(model, layers)
    axes = _axes(kwargs)
    shapes = pytree.tree_map_with_path(
        lambda path, _: dict.fromkeys(axes[leaf_path(path)], Dim.DYNAMIC), kwargs
    )
    with torch.no_grad(), replaced_attention(_SDPA, _grouped_heads):
        exported = export_model_graph(cached, (), kwargs, shapes, [])
    module = to_module(exported, training=False)
    return make_program(model, module, (), kwargs, axes=axes)


def _with_cache(model: nn.Module, last_logits: bool) -> nn.Module:
    """The same model, with shared parameters under their names, and the cache as tensors."""
    base = type(model)
    keep = {"logits_to_keep": 1} if last_logits else {}
    argument = cache_argument(model)

    def forward(
        self: Any,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: list[dict[str, Tensor]],
    ) -> dict[str, Any]:
        positions = {} if position_ids is None else {"position_ids": position_ids}
        output = base.forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=True,
            **{argument: filled_cache(past_key_values)},
            **positions,
            **keep,
        )
        present = [{"key": layer.keys, "value": layer.values} for layer in output[argument].layers]
        return {"logits": output.logits, "present": present}

    cached = copy.copy(model)
    cached.__class__ = type(base.__name__, (base,), {"forward": forward})
    return cached


def cache_argument(model: nn.Module) -> str:
    """The names of the cache as an input and an output in this release of transformers."""
    parameters = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _cache_shapes(model: nn.Module) -> list[tuple[int, int, int]]:
    """Heads, width of a key and width of a value of each layer, from a run on one token.

    Raises:
        UnsupportedError: the model returns no such cache.
        CaptureError: it does not run.
    """
    with torch.no_grad(), batched_experts(model):
        try:
            output = model(input_ids=ones((1, 1)), use_cache=True)
            layers = output[cache_argument(model)].layers
            pairs = [(layer.keys.shape, layer.values.shape) for layer in layers]
        except Exception as error:  # the model's own code
            _check_runs(model)
            raise no_cache(model, error) from error
    return [(key[1], key[3], value[3]) for key, value in pairs]


def no_cache(model: nn.Module, error: Exception) -> UnsupportedError:
    """The error for a model whose cache does not consist of keys and values."""
    return UnsupportedError(
        f"{type(model).__name__} has no key-value cache that can be an input of a graph",
        where=quoted(str(error).partition("\n")[0]),
        hint="write it without one: export or quantize with --no-kv-cache",
    )


def _check_runs(model: nn.Module) -> None:
    """Check that a model runs on one token.

    Raises:
        CaptureError: it does not run, even without a cache.
    """
    try:
        model(input_ids=ones((1, 1)), use_cache=False)
    except Exception as error:  # the model's own code
        raise CaptureError(
            f"{type(model).__name__} fails on one token: {type(error).__name__}: {error}",
            where=type(model).__name__,
            hint="its configuration may be inconsistent: run the model with transformers; or its "
            "code depends on values, which capture does not have",
        ) from error


def _grouped_heads(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Attention that reads keys and values of grouped heads without repeating them.

    transformers repeats them for each head of q if there is a mask. The repeats take a third of
    capture's time, since each of their sizes is a symbol, and fuse-attention removes them again.
    """

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        odd = any(options.get(name) is not None for name in ("softcap", "position_bias"))
        if odd or attention_mask is None or query.shape[1] == key.shape[1]:
            given = {"dropout": dropout, "scaling": scaling, **options}
            output: tuple[Tensor, None] = plain(module, query, key, value, attention_mask, **given)
            return output
        y = functional.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True
        )
        return y.transpose(1, 2).contiguous(), None

    return attend


def ones(shape: tuple[int, ...]) -> Tensor:
    """Example token ids or an example mask."""
    return torch.ones(shape, dtype=torch.int64)


def _example(model: nn.Module, layers: list[tuple[int, int, int]]) -> dict[str, Any]:
    """Inputs of three tokens after five past ones; torch treats sizes 0 and 1 as constants."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    past = [
        {
            name: torch.zeros(_BATCH_SIZE, heads, _PAST_SIZE, width, dtype=dtype)
            for name, width in (("key", key), ("value", value))
        }
        for heads, key, value in layers
    ]
    positions = torch.arange(_PAST_SIZE, _PAST_SIZE + _SEQUENCE_SIZE).repeat(_BATCH_SIZE, 1)
    takes = "position_ids" in inspect.signature(type(model).forward).parameters
    return {
        "input_ids": ones((_BATCH_SIZE, _SEQUENCE_SIZE)),
        "attention_mask": ones((_BATCH_SIZE, _PAST_SIZE + _SEQUENCE_SIZE)),
        **({"position_ids": positions} if takes else {}),  # ALiBi counts the ones of the mask
        "past_key_values": past,
    }


def _axes(inputs: dict[str, Any]) -> dict[str, dict[int, str]]:
    """The dynamic axes of each input, by name."""
    named = {
        "input_ids": {0: BATCH, 1: SEQUENCE},
        "attention_mask": {0: BATCH, 1: TOTAL},
        "position_ids": {0: BATCH, 1: SEQUENCE},
    }
    for layer in range(len(inputs["past_key_values"])):
        for part in ("key", "value"):
            named[f"past_key_values.{layer}.{part}"] = {0: BATCH, 2: PAST}
    return {name: axes for name, axes in named.items() if name.partition(".")[0] in inputs}


def leaf_path(path: tuple[Any, ...]) -> str:
    """The name of an input from its path in the keyword arguments."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path)
