"""`write_gguf`: llama.cpp's format, with quantized weights as Q4_1.

A block of Q4_1 holds 32 weights of a row as `d · q + m`, which is our form with d and m in float16.
The codes are kept unchanged; a group of 64 becomes two blocks with the same d and m.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qalora_compile._version import __version__
from qalora_compile.config import ExportSpec
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.exporters.capability import (
    EXACT,
    NO_ORDER,
    Capability,
    StoredTensor,
    partly,
    rounds,
    unsupported,
)
from qalora_compile.exporters.checkpoints.gguf.metadata import (
    Architecture,
    architecture_of,
    copy_metadata,
    has_frequency_factors,
    write_described,
    write_turn_end,
)
from qalora_compile.exporters.checkpoints.gguf.tokenizers import tokenizer_notes
from qalora_compile.exporters.checkpoints.named_tensors import (
    FLOAT16_MAX,
    WEIGHT,
    Checkpoint,
    Layer,
    check_half_range,
    refuse_if_none_fits,
    refuse_sorted,
    stored_error,
)
from qalora_compile.files.marks import GGUF_KEY
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.lazy_tensor import materialize
from qalora_compile.ir.model_description import Description
from qalora_compile.optional import require
from qalora_compile.progress import track

BLOCK = 32
_BLOCK_BYTES = 20
_MOST_BITS = 4
_FREQUENCIES = "rotary_emb.inv_freq"
_FACTORS = "rope_freqs.weight"
_TABLES = ("token_embd", "output")
"""Tensors that llama.cpp's own quantizer treats separately from the layers."""


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file: its name there, its ggml type, and the source of its values."""

    name: str
    source: str
    form: str
    shape: tuple[int, ...]
    values: Layer | Tensor
    heads: int = 0
    remark: str = ""


def capabilities(spec: ExportSpec) -> dict[str, Capability]:
    """How exactly the format keeps each property of a program."""
    exact = spec.float_type in (None, "f32")
    floats = EXACT if exact else rounds(str(spec.float_type).upper())
    wide = Capability("exact", "as floats, not on codes") if exact else floats
    return {
        "codes of 4, 3 and 2 bits": Capability("exact", "as 4-bit codes of Q4_1"),
        "codes of 8 bits": wide,
        "scale": rounds("float16"),
        "real zero-point": rounds("float16 minimum"),
        "groups": partly("blocks of 32: groups of 64, 96 … are cut", floats),
        "tail groups": partly("tails of a multiple of 32", floats),
        "activation order": NO_ORDER,
        "matrices of floats": floats,
        "vectors": Capability("exact", "F32"),
        "tied weights": EXACT,
        "other architectures": unsupported("Llama, Mistral, Qwen 2, Qwen 3 only"),
        "activations": rounds("int8, by llama.cpp as it computes on a CPU"),
    }


def notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Notes for the report: on the weights, and on the tokenizer if it is translated."""
    found, description = checkpoint.notes(), checkpoint.description
    if description is None or description.gguf is not None or description.tokenizer is None:
        return found
    if not (description.tokenizer / "tokenizer.json").is_file():
        return found  # writing it will be refused
    return (*found, *tokenizer_notes(description.tokenizer))


def write_gguf(checkpoint: Checkpoint, path: Path, spec: ExportSpec) -> list[StoredTensor]:
    """Write one `.gguf` file, and measure the rounding error of every tensor.

    Values that float16 cannot hold, and whatever the format does not support, are refused before
    anything is written.

    Raises:
        UserInputError: the model is not described, or a scale or offset exceeds float16.
        UnsupportedError: the architecture, one of its tensors or the tokenizer is not known, a
            weight was quantized in activation order, or no layer has groups that fit.
    """
    gguf = require("gguf", extra="hf", purpose="write GGUF files")
    description = checkpoint.description
    if description is None:
        raise UserInputError(
            "a GGUF file holds the model's configuration, and this program has none",
            hint="give the model: export_model(…, model=…), its folder or its .gguf file",
        )
    architecture = architecture_of(description)
    refuse_if_none_fits(checkpoint.layers, _misfit)
    refuse_sorted(checkpoint.layers, _misfit, "Q4_1")
    entries = list(_entries(checkpoint, description, architecture, spec))
    parameters = sum(entry.shape[0] * max(1, _columns(entry.shape)) for entry in entries)
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_string(GGUF_KEY, f"qalora-compile {__version__}")
    try:
        if description.gguf is not None:
            copy_metadata(description.gguf, writer)
        else:
            write_described(description, parameters, writer)
        write_turn_end(description, writer)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for entry in entries:
            _announce(entry, writer, gguf)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return [_write(entry, writer, gguf) for entry in track(entries, "write GGUF")]
    finally:
        writer.close()


def _columns(shape: tuple[int, ...]) -> int:
    return shape[1] if len(shape) > 1 else 1


def _entries(
    checkpoint: Checkpoint,
    description: Description,
    architecture: Architecture,
    spec: ExportSpec,
) -> Iterator[_Entry]:
    """Every tensor with its name and type in the file; checks that float16 holds the values."""
    settings = description.settings
    heads = {"attn_q": int(settings["num_attention_heads"])}
    heads["attn_k"] = int(settings.get("num_key_value_heads") or heads["attn_q"])
    if not architecture.interleaved:
        heads = {}
    names = _Names(architecture, int(settings["num_hidden_layers"]))
    for layer in track(checkpoint.layers, "choose GGUF types"):
        source = f"{layer.name}{WEIGHT}"
        name = names.of(source)
        shape, remark = (layer.site.n, layer.site.k), _misfit(layer)
        form = "q4_1"
        if remark:
            form = _float_form(source, layer.weight(), spec, table=False)
        else:
            for what, values in zip(("scale", "offset"), layer.parameters(), strict=True):
                check_half_range(layer.name, what, values)
        yield _Entry(name, layer.name, form, shape, layer, heads.get(_kind(name), 0), remark)
    for source, tensor in track(list(checkpoint.floats.items()), "choose GGUF types"):
        name = names.of(source)
        form = "f32"
        if tensor.dim() > 1:
            values, table = materialize(tensor).detach(), _kind(name) in _TABLES
            form = _float_form(source, values, spec, table=table)
        count = heads.get(_kind(name), 0)
        yield _Entry(name, source, form, tuple(tensor.shape), tensor, count)
    if has_frequency_factors(settings):
        factors = _frequency_factors(description)
        yield _Entry(_FACTORS, _FREQUENCIES, "f32", tuple(factors.shape), factors)


def _kind(name: str) -> str:
    """`attn_q` of `blk.0.attn_q.weight`."""
    return name.split(".")[-2]


class _Names:
    """llama.cpp's tensor names, from the table of the gguf package."""

    def __init__(self, architecture: Architecture, blocks: int) -> None:
        gguf = require("gguf", extra="hf", purpose="write GGUF files")
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        self._map = gguf.get_tensor_name_map(numbers[architecture.name], blocks)
        self._architecture = architecture.name

    def of(self, source: str) -> str:
        """llama.cpp's name for a parameter.

        Raises:
            UnsupportedError: the architecture has no such tensor.
        """
        found = self._map.get_name(source, try_suffixes=(WEIGHT, ".bias"))
        if found is None:
            raise UnsupportedError(
                f"llama.cpp's {self._architecture} has no tensor for {source}",
                where=source,
                hint="targets mlx and float take any tensor",
            )
        return str(found)


def _misfit(layer: Layer) -> str:
    """Why a layer cannot be stored as Q4_1; empty if it can."""
    if layer.bits > _MOST_BITS:
        return f"codes of {layer.bits} bits"
    if layer.unit % BLOCK:
        return f"groups of {layer.group_size} in rows of {layer.site.k} are not blocks of {BLOCK}"
    return ""


def _float_form(source: str, values: Tensor, spec: ExportSpec, *, table: bool) -> str:
    """The type of a matrix that is not quantized: as asked for, or the smallest that is exact.

    Unless asked for, Q8_0 is used only for tables; if its blocks do not divide a row, F32 is used.

    Raises:
        UserInputError: F16 is asked for and cannot hold a value.
    """
    blocks = values.shape[-1] % BLOCK == 0
    if spec.float_type is not None:
        if spec.float_type == "f16":
            check_half_range(source, "weight", values)
        return spec.float_type if blocks or spec.float_type != "q8_0" else "f32"
    small = float(values.abs().max()) <= FLOAT16_MAX
    possible = {"q8_0": table and blocks, "f16": small, "bf16": True}
    array = values.float().numpy()
    return next((f for f, can in possible.items() if can and _keeps(f, array)), "f32")


def _keeps(form: str, values: NDArray[np.float32]) -> bool:
    """Whether a type holds every value exactly."""
    gguf = require("gguf", extra="hf", purpose="write GGUF files")
    kind = gguf.GGMLQuantizationType[form.upper()]
    return all(
        np.array_equal(gguf.quants.dequantize(gguf.quants.quantize(part, kind), kind), part)
        for part in np.array_split(values, max(1, values.size >> 22))
    )


def _announce(entry: _Entry, writer: Any, gguf: Any) -> None:
    """Put an entry into the file's tensor table."""
    kind = gguf.GGMLQuantizationType[entry.form.upper()]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = entry.shape[0] * _columns(entry.shape)
    writer.add_tensor_info(
        entry.name, entry.shape, np.dtype(np.float32), count // block * size, raw_dtype=kind
    )


def _write(entry: _Entry, writer: Any, gguf: Any) -> StoredTensor:
    """Write the data of an entry; returns its row of the report."""
    kind = gguf.GGMLQuantizationType[entry.form.upper()]
    if isinstance(entry.values, Layer) and entry.form == "q4_1":
        affine = interleave_affine(entry.values.cut(BLOCK), entry.heads)
        wanted = affine.dequantize()
        data = pack_q4_1(affine)
    else:
        values = entry.values
        made = values.weight() if isinstance(values, Layer) else materialize(values)
        wanted = interleave_rows(made.detach(), entry.heads)
        data = gguf.quants.quantize(wanted.float().contiguous().numpy(), kind)
    writer.write_tensor_data(data)
    stored = torch.from_numpy(gguf.quants.dequantize(data, kind))
    return stored_error(entry.name, entry.source, entry.form.upper(), stored, wanted, entry.remark)


def pack_q4_1(affine: GroupAffine) -> NDArray[np.uint8]:
    """Blocks of Q4_1: `[N, K / 32 · 20]` bytes, each block d, m (float16) and 16 bytes of codes.

    Byte j of a block's codes holds code j in its low half, code j + 16 in its high half.

    Args:
        affine: In groups of 32 that divide K, codes below 16, scale and offset within float16.
    """
    n, blocks = affine.scale.shape
    codes = affine.codes.numpy().reshape(n, blocks, 2, BLOCK // 2)
    data = np.empty((n, blocks, _BLOCK_BYTES), dtype=np.uint8)
    for start, values in ((0, affine.scale), (2, affine.offset)):
        halves = values.to(torch.float16).contiguous().numpy()
        data[:, :, start : start + 2] = halves.view(np.uint8).reshape(n, blocks, 2)
    data[:, :, 4:] = codes[:, :, 0] | codes[:, :, 1] << 4
    return data.reshape(n, blocks * _BLOCK_BYTES)


def interleave_rows(values: Tensor, heads: int) -> Tensor:
    """Permute the rows of q or k so that the two halves of each head alternate.

    Row i of a head's first half is followed by row i of its second half; `heads` 0 changes nothing.
    """
    if not heads:
        return values
    halves = values.unflatten(0, (heads, 2, values.shape[0] // heads // 2))
    permuted: Tensor = halves.transpose(1, 2).reshape(values.shape)
    return permuted


def interleave_affine(affine: GroupAffine, heads: int) -> GroupAffine:
    """`interleave_rows` of a quantized weight; groups lie along a row, so they stay intact."""
    codes, scale, offset = (
        interleave_rows(part, heads) for part in (affine.codes, affine.scale, affine.offset)
    )
    return replace(affine, codes=codes, scale=scale, offset=offset)


def _frequency_factors(description: Description) -> Tensor:
    """The divisor of each frequency of the rotary embedding (rope type `llama3`), `[head/2]`.

    The frequencies are those that transformers computes from the same configuration.
    """
    frequencies = torch.tensor(description.rotary_frequencies, dtype=torch.float64)
    settings = description.settings
    head = int(settings.get("head_dim") or 2 * frequencies.numel())
    steps = torch.arange(0, head, 2, dtype=torch.float64) / head
    plain = float(settings["rope_parameters"]["rope_theta"]) ** -steps
    factors: Tensor = (plain / frequencies).float()
    return factors
