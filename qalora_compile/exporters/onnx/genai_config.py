"""`genai_config.json`: what ONNX Runtime GenAI needs to know about an exported language model.

The keys are those of ONNX Runtime GenAI 0.18. `past_present_share_buffer` is false because the
model's cache grows with every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.end_tokens import end_tokens
from qalora_compile.ir.meta import PAST
from qalora_compile.ir.signature import InputLeaf, Signature

CONFIG_FILE = "genai_config.json"
_KNOWN_TYPES = frozenset(
    {
        *("chatglm", "ernie4_5", "gemma", "gemma2", "gemma3_text", "gpt2", "gptoss", "granite"),
        *("internlm2", "llama", "mistral", "nemotron", "olmo", "phi", "phi3", "phi3small"),
        *("phimoe", "qwen2", "qwen3", "smollm3"),
    }
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ANY_DECODER = "decoder"
_DEFAULT_CONTEXT = 2048
_CROSS_NAMES = {
    "cross_present_key_names": "present.%d.encoder.key",
    "cross_present_value_names": "present.%d.encoder.value",
}
_OWN_PAST_NAMES = {
    "input_ids": "input_ids",
    "past_key_names": f"{PAST}%d.decoder.key",
    "past_value_names": f"{PAST}%d.decoder.value",
    "cross_past_key_names": f"{PAST}%d.encoder.key",
    "cross_past_value_names": f"{PAST}%d.encoder.value",
}
_OWN_PRESENT_NAMES = {
    "logits": "logits",
    "present_key_names": "present.%d.decoder.key",
    "present_value_names": "present.%d.decoder.value",
}
_WHISPER, _WHISPER_FRAMES = "whisper", 3000


def context_length(model: Mapping[str, Any]) -> int:
    """The context length of a model in tokens, from its `config.json`."""
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if isinstance(model.get(name), int):
            return int(model[name])
    return _DEFAULT_CONTEXT


def decoder_length(model: Mapping[str, Any]) -> int | None:
    """The largest number of tokens of an encoder-decoder model's decoder; None if unlimited.

    T5 uses relative positions and so takes any number of tokens.
    """
    for name in ("max_target_positions", "max_position_embeddings"):
        if isinstance(model.get(name), int):
            return int(model[name])
    return None


def decoder_start(model: Mapping[str, Any], generation: Mapping[str, Any]) -> list[int]:
    """The tokens that the decoder of an encoder-decoder model begins with; empty if none is named.

    They include a token that generation is forced to begin with (BART).
    """
    known = {**model, **{k: v for k, v in generation.items() if v is not None}}
    names = ("decoder_start_token_id", "bos_token_id")
    start = next((known[n] for n in names if isinstance(known.get(n), int)), None)
    forced = known.get("forced_bos_token_id")
    return (
        [token for token in (start, forced) if isinstance(token, int)] if start is not None else []
    )


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
        model: The contents of `config.json`.
        generation: The contents of `generation_config.json`; may be empty.
        filename: Path of the model's file from the folder of the configuration.
        library: Name of the operator library's file, if it is in the same folder.

    Raises:
        UnsupportedError: the caches of the layers differ in shape.
    """
    shapes = {leaf.shape[1:] for leaf in signature.cache}
    if len(shapes) != 1:
        raise UnsupportedError(
            "ONNX Runtime GenAI takes one shape of key-value cache, and the layers of this model "
            f"have {len(shapes)}",
            hint="export for plain ONNX Runtime: qalora-compile generate runs it",
        )
    decoder = _decoder(signature, model)
    options = _session_options(library)
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


def genai_whisper_config(
    encoder: Signature,
    decoder: Signature,
    model: Mapping[str, Any],
    generation: Mapping[str, Any],
    *,
    files: tuple[str, str],
    library: str | None = None,
) -> dict[str, Any]:
    """The configuration of an encoder-decoder model; GenAI runs Whisper only.

    Args:
        encoder: Of the exported encoder, see `capture.encoder_decoder`.
        decoder: Of the exported decoder.
        model: See `genai_config`.
        generation: See `genai_config`.
        files: Paths of encoder and decoder from the folder of the configuration.
        library: See `genai_config`.

    Raises:
        UnsupportedError: the model is not Whisper, or takes another number of frames than GenAI's.
    """
    _check_whisper(encoder, model)
    options = _session_options(library)
    own, cross = decoder.own_cache, decoder.cross_cache
    sizes = {"hidden_size": model["d_model"], "num_hidden_layers": len(own) // 2}
    length = model["max_target_positions"]
    return {
        "model": {
            "type": _WHISPER,
            **_special_tokens(model, generation),
            "context_length": length,
            "vocab_size": model["vocab_size"],
            "encoder": {
                "filename": files[0],
                "session_options": options,
                **sizes,
                **_heads(cross[0]),
                # GenAI finds the input under this name only, whatever is written here.
                "inputs": {"audio_features": encoder.inputs[0].name},
                "outputs": _CROSS_NAMES | {"encoder_hidden_states": encoder.outputs[0]},
            },
            "decoder": {
                "filename": files[1],
                "session_options": options,
                **sizes,
                **_heads(own[0]),
                "inputs": _OWN_PAST_NAMES,
                "outputs": _OWN_PRESENT_NAMES,
            },
        },
        "search": _search(generation, length),
    }


def _check_whisper(encoder: Signature, model: Mapping[str, Any]) -> None:
    """Check that GenAI runs the model.

    Raises:
        UnsupportedError: see `genai_whisper_config`.
    """
    kind = model.get("model_type")
    if kind != _WHISPER:
        raise UnsupportedError(
            f"among encoder-decoder models, ONNX Runtime GenAI runs only Whisper; this is {kind}",
            hint="qalora-compile generate runs it, on plain ONNX Runtime",
        )
    frames = encoder.inputs[0].shape[2]
    if frames != _WHISPER_FRAMES:
        raise UnsupportedError(
            f"ONNX Runtime GenAI gives Whisper {_WHISPER_FRAMES} frames, and this model takes "
            f"{frames}"
        )


def _heads(cache: InputLeaf) -> dict[str, Any]:
    """Number and width of the heads of a cache input."""
    _, heads, _, width = cache.shape
    return {"num_attention_heads": heads, "num_key_value_heads": heads, "head_size": width}


def _session_options(library: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    return options if library is None else options | {"custom_ops_library": library}


def _decoder(signature: Signature, model: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of the decoder, and the names of its inputs and outputs."""
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
    """Tokens of begin, end and padding; generation settings win, and padding defaults to an end."""
    found = {
        name: generation.get(name, model.get(name)) for name in (*_TOKENS, "decoder_start_token_id")
    }
    if found["pad_token_id"] is None:
        found["pad_token_id"] = next(iter(end_tokens(model, generation)), 0)
    return {name: value for name, value in found.items() if value is not None}


def _search(generation: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The search settings: greedy unless the model's own settings say otherwise."""
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
