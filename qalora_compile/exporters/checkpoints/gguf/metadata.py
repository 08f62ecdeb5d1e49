"""The metadata of a GGUF file: from the file that a model came from, or from its description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.exporters.checkpoints.gguf.tokenizers import write_tokenizer
from qalora_compile.files.marks import GGUF_KEY
from qalora_compile.ir.model_description import Description
from qalora_compile.optional import require
from qalora_compile.untrusted.gguf_header import check_gguf
from qalora_compile.untrusted.gguf_reader import open_gguf

_PURPOSE = "write GGUF files"
_OWN = (
    *("general.architecture", "general.file_type", "general.quantization_version"),
    GGUF_KEY,
)
"""Keys that depend on what is written, not on the model."""
_READER_PREFIX = "GGUF."  # what the reader calls fields of the header


@dataclass(frozen=True)
class Architecture:
    """A kind of model that llama.cpp runs.

    Attributes:
        name: The name of the architecture in llama.cpp.
        interleaved: Whether its rotary embedding rotates neighbouring rows of q and k, where
            transformers rotates a row and the one half a head away. The rows are then permuted.
    """

    name: str
    interleaved: bool


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", True),
    "MistralForCausalLM": Architecture("llama", True),
    "Qwen2ForCausalLM": Architecture("qwen2", False),
    "Qwen3ForCausalLM": Architecture("qwen3", False),
}


def architecture_of(description: Description) -> Architecture:
    """The architecture of llama.cpp that computes the model.

    Raises:
        UnsupportedError: no known architecture does, or the model has a part that is not known.
    """
    found = ARCHITECTURES.get(description.architecture)
    if found is None:
        raise UnsupportedError(
            f"{description.architecture} is not written as GGUF",
            where="config.json",
            hint=f"known: {', '.join(ARCHITECTURES)}; target mlx or float takes any architecture",
        )
    activation = description.settings.get("hidden_act")
    if activation != "silu":
        raise UnsupportedError(
            f"llama.cpp computes {found.name} with silu, and the model has {activation}",
            where="config.json: hidden_act",
            hint="targets mlx and float take any activation",
        )
    _rope_type(description.settings)
    return found


def _rope_type(settings: Mapping[str, Any]) -> str:
    """The type of the rotary embedding.

    Raises:
        UnsupportedError: the frequencies of this type are not fixed numbers.
    """
    kind = (settings.get("rope_parameters") or {}).get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedError(
            f"rotary embeddings of type {kind} are not written as GGUF",
            where="config.json: rope_parameters",
            hint="known: default, linear, llama3; targets mlx and float take any",
        )
    return str(kind)


def has_frequency_factors(settings: Mapping[str, Any]) -> bool:
    """Whether the frequencies of the rotary embedding need a tensor of factors."""
    return _rope_type(settings) == "llama3"


def copy_metadata(path: Path, writer: Any) -> None:
    """Copy the keys of another GGUF file, except those that depend on the weights.

    Raises:
        UserInputError: it is not a GGUF file, or is of another architecture.
    """
    reader, known = _open(path)
    if known != writer.arch:
        raise UserInputError(
            f"{path.name} describes a model of kind {known}, the program is {writer.arch}",
            where=str(path),
        )
    for name, field in reader.fields.items():
        if name in _OWN or name.startswith(_READER_PREFIX):
            continue
        kind, inner = field.types[0], (field.types[-1] if len(field.types) > 1 else None)
        writer.add_key_value(name, field.contents(), kind, inner)


def _open(path: Path) -> tuple[Any, str]:
    """Open a GGUF file; returns a reader and the architecture that the file names.

    Raises:
        UserInputError: it is not a GGUF file, or names no architecture.
    """
    require("gguf", extra="hf", purpose=_PURPOSE)
    check_gguf(path)
    try:
        reader = open_gguf(path)
        known = reader.fields["general.architecture"].contents()
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserInputError(
            f"{path.name} cannot be read as a GGUF file: {error}", where=str(path)
        ) from error
    if not isinstance(known, str):
        raise UserInputError(f"{path.name} names no architecture", where=str(path))
    return reader, known


def write_metadata_file(source: Path, target: Path) -> None:
    """Write a GGUF file that holds the metadata of another file and no tensors.

    Raises:
        UserInputError: see `copy_metadata`.
    """
    gguf = require("gguf", extra="hf", purpose=_PURPOSE)
    _, architecture = _open(source)
    writer = gguf.GGUFWriter(target, architecture)
    copy_metadata(source, writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def write_described(description: Description, parameters: int, writer: Any) -> None:
    """Write the keys that `config.json` and the tokenizer's files determine.

    Args:
        description: Of the model; without a tokenizer, the file says that it has none.
        parameters: How many weights the model has.
        writer: A GGUFWriter.

    Raises:
        UnsupportedError: see `write_tokenizer`, or there is no `tokenizer.json`.
        UserInputError: see `write_tokenizer`.
    """
    gguf = require("gguf", extra="hf", purpose=_PURPOSE)
    settings = description.settings
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(settings.get("_name_or_path") or description.architecture)
    writer.add_size_label(gguf.size_label(parameters, 0, 0, 0))
    _write_shape(settings, writer)
    if description.tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    elif (description.tokenizer / "tokenizer.json").is_file():
        write_tokenizer(description.tokenizer, int(settings["vocab_size"]), writer)
    else:
        raise UnsupportedError(
            "the tokenizer has no tokenizer.json",
            where=str(description.tokenizer),
            hint="load it with transformers and save it again, which writes one",
        )


def write_turn_end(description: Description, writer: Any) -> None:
    """Name the token that ends an answer, if it is not the one that ends a text.

    llama.cpp has a key for the end of a turn. The token that training taught is the last one that
    the generation settings name (`ir.end_tokens`).
    """
    gguf = require("gguf", extra="hf", purpose=_PURPOSE)
    keys = gguf.Keys.Tokenizer
    known = {name: value.value for part in writer.kv_data for name, value in part.items()}
    end = known.get(keys.EOS_ID)
    named = (description.generation or {}).get("eos_token_id")
    others = [token for token in (named if isinstance(named, list) else [named]) if token != end]
    if end is not None and others and others[-1] is not None and keys.EOT_ID not in known:
        writer.add_eot_token_id(int(others[-1]))


def _write_shape(settings: Mapping[str, Any], writer: Any) -> None:
    """Write the model's sizes."""
    heads, head = settings["num_attention_heads"], settings.get("head_dim")
    kv_heads = settings.get("num_key_value_heads") or heads
    head = head or settings["hidden_size"] // heads
    rope = settings.get("rope_parameters") or {}
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_context_length(context_of(settings))
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if _rope_type(settings) == "linear":
        gguf = require("gguf", extra="hf", purpose=_PURPOSE)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_layer_norm_rms_eps(float(settings["rms_norm_eps"]))
    writer.add_vocab_size(settings["vocab_size"])
    writer.add_rope_dimension_count(head)
    if head * heads != settings["hidden_size"]:
        writer.add_key_length(head)
        writer.add_value_length(head)


def context_of(settings: Mapping[str, Any]) -> int:
    """The context length; a sliding window limits it, since llama.cpp has no window here."""
    longest = int(settings["max_position_embeddings"])
    window = settings.get("sliding_window")
    used = bool(settings.get("use_sliding_window", True))
    return min(longest, int(window)) if window and used else longest
