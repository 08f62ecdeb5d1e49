"""Every private or undocumented name of transformers that this package uses, once each.

If an upgrade changes one of them, only this file needs a fix; `make test-newest` finds it. "Wish"
names the public interface that would make a private name unnecessary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qalora_compile.ir.torch_internals import with_buffer
from qalora_compile.optional import require
from qalora_compile.untrusted.gguf_reader import open_gguf

_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"


def new_model(kind: Any, config: Any, dtype: torch.dtype | None) -> Any:
    """A model of a class with starting values. Wish: `PreTrainedModel.from_config`."""
    return kind._from_config(config, **({} if dtype is None else {"dtype": dtype}))


def kept_in_float32(model: Any, dtype: torch.dtype | None) -> Iterable[str]:
    """Names, with `*`, of what is kept in float32 under `dtype`. Wish: the same, public."""
    plan: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)
    return plan


def ignored_keys(model: Any) -> Iterable[str]:
    """Patterns of names that a model ignores on purpose. Wish: in the loading report."""
    return getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()


def untied_weights(model: Any) -> dict[str, str]:
    """Name → owner of tensors tied by config.json, and not in the files. Wish: in the report."""
    expected = model.get_expanded_tied_weights_keys(all_submodels=True)
    tied = model.all_tied_weights_keys
    return {name: owner for name, owner in expected.items() if name not in tied}


def gguf_names(model: Any) -> set[str]:
    """Names of the tensors of a GGUF file that a model reads. Wish: in the loading report."""
    files = require(
        "transformers.modeling_gguf_pytorch_utils", extra="hf", purpose="read GGUF files"
    )
    processor = files.TENSOR_PROCESSORS.get(model.config.model_type, files.TensorProcessor)
    return set(files.get_gguf_hf_weights_map(model, processor(config=model.config.to_dict())))


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Parse a GGUF file, and make an architecture's names, once. Wish: that `from_pretrained` does.

    It parses the file three times, and makes the table of names for each module of the model: that
    took three quarters of the time in which SmolLM2-135M was loaded.
    """
    gguf = require("gguf", extra="hf", purpose="read GGUF files")
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(open_gguf), cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


@contextmanager
def load_in_one_thread() -> Iterator[None]:
    """Make `from_pretrained` read files in the calling thread. Wish: an argument for it."""
    before = os.environ.get(_NO_THREADS)
    os.environ[_NO_THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_THREADS]
        else:
            os.environ[_NO_THREADS] = before


@contextmanager
def batched_experts(model: Any) -> Iterator[None]:
    """Run experts, if any, independently of values and dtypes.

    Wish: a `set_experts_implementation` that reaches classes derived outside of transformers.
    """
    before = getattr(model.config, "_experts_implementation", None)
    if before is not None:
        model.config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        if before is not None:
            model.config._experts_implementation = before


@contextmanager
def replaced_attention(
    name: str, replace: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Replace each attention f by `replace(f)`. Wish: `AttentionInterface.unregister`."""
    utilities = require("transformers.modeling_utils", extra="hf", purpose="capture with a cache")
    functions = utilities.ALL_ATTENTION_FUNCTIONS
    before = functions[name]
    functions[name] = replace(before)
    try:
        yield
    finally:
        del functions[name]  # this uncovers the library's own
        if functions[name] is not before:
            functions[name] = before


def filled_cache(past: Iterable[Mapping[str, Tensor]]) -> Any:
    """A cache of each layer's `key` and `value`, without windows. Wish: `DynamicCache(tensors)`."""
    caches = _caches()
    cache = caches.DynamicCache()
    for tensors in past:
        layer = caches.DynamicLayer()
        layer.lazy_initialization(tensors["key"], tensors["value"])
        layer.keys, layer.values = tensors["key"], tensors["value"]
        cache.layers.append(layer)
    return cache


def filled_pair(past: Sequence[Mapping[str, Mapping[str, Tensor]]], *, grows: bool = False) -> Any:
    """The caches of a decoder's own and of its encoder's tokens, from each layer's of both.

    Args:
        past: For each layer `decoder` and `encoder`, each with `key` and `value`. Without
            `encoder`, cross-attention keeps what it computes from the encoder's states.
        grows: Cross-attention appends what it computes from the encoder's states, but for the
            last one of them, to its cache, instead of taking the cache for complete.

    Wish: the argument `is_updated` for the constructor.
    """
    own = filled_cache([layer["decoder"] for layer in past])
    if "encoder" not in past[0]:
        cross = recording_cache(len(past)).cross_attention_cache
        return _caches().EncoderDecoderCache(own, cross)
    cross = filled_cache([layer["encoder"] for layer in past])
    if grows:
        kind = _but_for_the_last()
        for layer in cross.layers:
            layer.__class__ = kind
    made = _caches().EncoderDecoderCache(own, cross)
    if grows:
        made.is_updated = dict.fromkeys(made.is_updated, False)
    return made


def _but_for_the_last() -> Any:
    """A layer of a cache that appends all but the last of the keys and values it is given."""

    class Append(_caches().DynamicLayer):  # type: ignore[misc]
        keys: Tensor
        values: Tensor

        def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self.keys, self.values = (
                torch.cat([old, new[:, :, :-1]], -2)
                for old, new in ((self.keys, keys), (self.values, values))
            )
            return self.keys, self.values

    return Append


def recording_cache(layers: int) -> Any:
    """A cache that keeps the first keys and values unchanged. Wish: a public class of layers."""
    caches = _caches()

    class Keep(caches.DynamicLayer):  # type: ignore[misc, name-defined]
        def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self.keys, self.values, self.is_initialized = keys, values, True
            return keys, values

    made = []
    for _ in range(2):
        made.append(caches.DynamicCache())
        made[-1].layers += [Keep() for _ in range(layers)]
    return caches.EncoderDecoderCache(*made)


def _caches() -> Any:
    return require("transformers.cache_utils", extra="hf", purpose="capture with a cache")


def rope_types(module: nn.Module) -> dict[str | None, str]:
    """Layer type (or None) → kind of a rotary embedding. Wish: a base class of such modules."""
    kinds = getattr(module, "rope_type", None)
    if not type(module).__module__.startswith("transformers.") or kinds is None:
        return {}
    return kinds if isinstance(kinds, dict) else {None: kinds}


def rope_frequencies(config: Any, kind: str, device: torch.device, **options: Any) -> Tensor:
    """The frequencies of a kind of rotary embedding, `[head / 2]`. Wish: the same, documented."""
    utilities = require(
        "transformers.modeling_rope_utils", extra="hf", purpose="compute rotary frequencies"
    )
    found: Tensor = utilities.ROPE_INIT_FUNCTIONS[kind](config, device, **options)[0]
    return found


def first_frequencies(module: nn.Module, layer_type: str | None) -> Tensor:
    """The original frequencies of a rotary embedding. Wish: as for `rope_types`."""
    found: Tensor = getattr(module, f"{_prefix(layer_type)}original_inv_freq")
    return found


def with_frequencies(module: nn.Module, layer_type: str | None, frequencies: Tensor) -> nn.Module:
    """A copy of a rotary embedding with other frequencies. Wish: as for `rope_types`."""
    return with_buffer(module, f"{_prefix(layer_type)}inv_freq", frequencies)


def _prefix(layer_type: str | None) -> str:
    return "" if layer_type is None else f"{layer_type}_"
