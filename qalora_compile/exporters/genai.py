"""`genai_config.json`: what ONNX Runtime GenAI needs to know of an exported language model.

Keys and meanings: ONNX Runtime GenAI 0.18. The cache is a growing one (`past_present_share_buffer`
false), as the model's inputs and outputs are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.signature import PAST, Signature

CONFIG_FILE = "genai_config.json"
_KNOWN_TYPES = frozenset(
    "chatglm ernie4_5 gemma gemma2 gemma3_text gpt2 gptoss granite internlm2 llama mistral nemotron "
    "olmo phi phi3 phi3small phimoe qwen2 qwen3 smollm3".split()
)
_ANY_DECODER = "decoder"
_DEFAULT_CONTEXT = 2048


def context_length(model: Mapping[str, Any]) -> int:
    """Tokens that a model was made for, from its `config.json`."""
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if isinstance(model.get(name), int):
            return int(model[name])
    return _DEFAULT_CONTEXT


def genai_config(
    signature: Signature,
    model: Mapping[str, Any],
    generation: Mapping[str, Any],
    *,
    filename: str = "model.onnx",
    library: str | None = None,
) -> dict[str, Any]:
    """The configuration of a causal language model with a key-value cache.

    Args:
        signature: Of the exported program, see `capture.causal_lm`.
        model: The model's `config.json`.
        generation: Its `generation_config.json`, or nothing.
        filename: Of the model, in the same folder.
        library: File name of the operator library, if it lies in the same folder.

    Raises:
        UnsupportedError: the layers' caches differ in shape.
    """
    shapes = {leaf.shape[1:] for leaf in signature.cache}
    if len(shapes) != 1:
        raise UnsupportedError(
            "ONNX Runtime GenAI takes one shape of key-value cache, the layers of this model have "
            f"{len(shapes)}",
            hint="export for plain ONNX Runtime: qalora-compile generate runs it",
        )
    decoder = _decoder(signature, model)
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if library is not None:
        options["custom_ops_library"] = library
    kind, length = model.get("model_type"), context_length(model)
    return {
        "model": {
            "type": kind if kind in _KNOWN_TYPES else _ANY_DECODER,
            **_special_tokens(model, generation),
            "context_length": length,
            "vocab_size": model["vocab_size"],
            "decoder": {"filename": filename, "session_options": options, **decoder},
        },
        "search": _search(generation, length),
    }


def _decoder(signature: Signature, model: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes, and the names of inputs and outputs."""
    _, heads, _, width = signature.cache[0].shape
    names = {leaf.name for leaf in signature.inputs if leaf.dtype is not None}
    inputs = {n: n for n in ("input_ids", "attention_mask", "position_ids") if n in names}
    return {
        "head_size": width,
        "hidden_size": model.get("hidden_size", model.get("n_embd")),
        "num_attention_heads": model.get("num_attention_heads", model.get("n_head")),
        "num_key_value_heads": heads,
        "num_hidden_layers": len(signature.cache) // 2,
        "inputs": {
            **inputs,
            "past_key_names": f"{PAST}%d.key",
            "past_value_names": f"{PAST}%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


def _special_tokens(model: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """Begin, end and padding; generation settings win, and padding falls back to an end token."""
    found = {
        name: generation.get(name, model.get(name))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    end = found["eos_token_id"]
    first = end[0] if isinstance(end, list) and end else end
    if found["pad_token_id"] is None:
        found["pad_token_id"] = first if isinstance(first, int) else 0
    return {name: value for name, value in found.items() if value is not None}


def _search(generation: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Greedy unless the model's own settings say otherwise."""
    return {
        "do_sample": bool(generation.get("do_sample", False)),
        "temperature": generation.get("temperature") or 1.0,
        "top_k": generation.get("top_k") or 50,
        "top_p": generation.get("top_p") or 1.0,
        "repetition_penalty": generation.get("repetition_penalty") or 1.0,
        "length_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "diversity_penalty": 0.0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "early_stopping": True,
        "min_length": 0,
        "max_length": length,
        "past_present_share_buffer": False,
    }
