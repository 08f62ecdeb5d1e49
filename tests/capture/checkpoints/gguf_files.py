"""Small GGUF files of a llama, quantized by the package gguf itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize

HIDDEN, MLP, HEADS, LAYERS, VOCABULARY = 64, 96, 4, 2, 256
_HALVES = {"Q4_K": (0, 2), "Q6_K": (208,)}
"""Where the halves of a block are, of forms that the package gguf reads and cannot write."""


def write_llama(
    path: Path,
    form: str = "Q4_1",
    *,
    embedding: str = "F32",
    hidden: int = HIDDEN,
    mlp: int = MLP,
    without: str = "",
    more: dict[str, np.ndarray] | None = None,
) -> Path:
    """A llama of random weights: all linear layers in one form, rows as llama.cpp orders them.

    Without the tensor of one name, and with more in float32.
    """
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_rope_dimension_count(hidden // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    _add_tokenizer(writer)

    def add(name: str, n: int, k: int, kind: str = form) -> None:
        if name == without:
            return
        values = random.standard_normal((n, k)).astype(np.float32) * k**-0.5
        _add(writer, name, nested(random, n, k, kind) if kind in _HALVES else values, kind)

    add("token_embd.weight", VOCABULARY, hidden, embedding)
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(hidden, np.float32))
        for part, n, k in (
            ("attn_q", hidden, hidden),
            ("attn_k", hidden // 2, hidden),
            ("attn_v", hidden // 2, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", mlp, hidden),
            ("ffn_up", mlp, hidden),
            ("ffn_down", hidden, mlp),
        ):
            add(f"blk.{layer}.{part}.weight", n, k)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for name, values in (more or {}).items():
        writer.add_tensor(name, values.astype(np.float32))
    finish(writer)
    return path


def nested(random: np.random.Generator, n: int, k: int, form: str) -> np.ndarray:
    """Bytes of a K-quant, `[n, bytes of k]`: all random but its halves, which are small."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]]
    raw = random.integers(0, 256, (n * k // values, size), dtype=np.uint8)
    for place in _HALVES[form]:
        halves = random.uniform(1e-3, 2e-3, len(raw)).astype(np.float16)
        raw[:, place : place + 2] = halves[:, None].view(np.uint8)
    return raw.reshape(n, -1)


def finish(writer: Any) -> None:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tensors(path: Path, tensors: dict[str, tuple[np.ndarray, str]]) -> Path:
    """A file of nothing but tensors: values and form by name; uint8 values are taken as bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (values, form) in tensors.items():
        _add(writer, name, values, form)
    finish(writer)
    return path


def _add(writer: Any, name: str, values: np.ndarray, form: str) -> None:
    kind = gguf.GGMLQuantizationType[form]
    raw = values if values.dtype == np.uint8 or form == "F32" else quantize(values, kind)
    writer.add_tensor(name, raw, raw_dtype=kind)


def _add_tokenizer(writer: Any) -> None:
    """A byte-level vocabulary with one merge."""
    alphabet = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    rest = [chr(256 + n) for n in range(VOCABULARY - len(alphabet) - 1)]
    tokens = ["<end>", *alphabet, *rest[:-1], "an"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (len(tokens) - 1)])
    writer.add_token_merges(["a n"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def example_ids() -> torch.Tensor:
    """Two rows of tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, VOCABULARY, (2, 12), generator=generator)
