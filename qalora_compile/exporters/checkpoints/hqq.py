"""`write_hqq`: layers as the library HQQ stores them, `(W_q − zero) · scale` per group of a row.

The groups of all rows form a matrix `[N · L, g]`, whose rows are packed by halves (4 bits),
quarters (2 bits), tenths (3 bits, in words) or not at all (8 bits). The library's settings are
stored next to it, in tensors of one number or text each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qalora_compile.config import ExportSpec
from qalora_compile.exporters.capability import Capability, StoredTensor, partly, rounds
from qalora_compile.exporters.checkpoints.named_tensors import Layer, stored_error
from qalora_compile.exporters.checkpoints.packed_folder import (
    PackedFormat,
    exactness,
    most_common,
    packed_capabilities,
)
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.site_plan import EMBEDDING

_LANES = {8: 1, 4: 2, 3: 10, 2: 4}
"""Bits → how many rows share an element."""
_HEAD = "lm_head"
_PACKING = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8"}


def capabilities(spec: ExportSpec) -> dict[str, Capability]:
    """How exactly the format keeps each property of a program."""
    exact = exactness(spec)
    own = {
        "real zero-point": rounds(spec.parameter_dtype),
        "groups": partly("numbers of groups that can be packed", exact),
        "tail groups": partly("groups cut to gcd(g, K)", exact),
    }
    return packed_capabilities(spec, own)


def quantization_config(layers: tuple[Layer, ...]) -> dict[str, Any]:
    """The entry of `config.json`: the most common bits and group size, and the exceptions."""
    bits, group_size = most_common((la.bits, la.unit) for la in layers if not _misfit(la))
    weights = {"nbits": bits, "group_size": group_size, "axis": 1} | _FIXED
    others = dict.fromkeys(("scale_quant_params", "zero_quant_params"))
    return {
        "quant_method": "hqq",
        "quant_config": {"weight_quant_params": weights, "offload_meta": False, **others},
        "skip_modules": _skipped(layers),
    }


def _skipped(layers: tuple[Layer, ...]) -> list[str]:
    """The linear layers that stay in float: those that cannot be packed, and the head."""
    odd = [layer.name for layer in layers if _misfit(layer)]
    return odd if any(layer.name == _HEAD for layer in layers) else [*odd, _HEAD]


_FIXED = {"channel_wise": True, "optimize": False, "round_zero": False, "view_as_float": False}


def _misfit(layer: Layer) -> str:
    if layer.site.kind == EMBEDDING:
        return "an embedding table: HQQ has codes for linear layers only"
    rows = layer.site.n * (layer.site.k // layer.unit)
    if layer.bits != 3 and rows % _LANES[layer.bits]:
        return f"{rows} groups cannot be packed by {_LANES[layer.bits]}"
    return ""


def zero_form(affine: GroupAffine, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[N, K]`, scale and zero `[N, L]` with `W = (codes − zero) · scale`.

    A group of equal weights has scale 0, so no zero can represent it. It is stored as code 0,
    zero −1 and its value as the scale.
    """
    scale, offset = affine.scale, affine.offset
    zero = -offset.double() / scale.double()
    flat = ~torch.isfinite(zero.to(dtype))
    zero = torch.where(flat, -torch.ones_like(zero), zero).to(dtype)
    scale = torch.where(flat, offset, scale).to(dtype)
    flat_codes = flat.repeat_interleave(affine.group_size, dim=1)
    return torch.where(flat_codes, torch.zeros_like(affine.codes), affine.codes), scale, zero


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack a matrix of codes `[R, g]` by rows; the first rows take the highest bits."""
    lanes, count = _LANES[bits], codes.shape[0]
    words = torch.int32 if bits == 3 else torch.uint8
    padded = functional.pad(codes, (0, 0, 0, -count % lanes)).to(words)
    packed = torch.zeros(padded.shape[0] // lanes, codes.shape[1], dtype=words)
    for part in padded.chunk(lanes):
        packed = packed << bits | part if lanes > 1 else part
    return packed


def _pack(layer: Layer, dtype: torch.dtype) -> tuple[dict[str, Tensor], StoredTensor]:
    affine = layer.cut(layer.unit)
    codes, scale, zero = zero_form(affine, dtype)
    size = affine.group_size
    packed = pack_rows(codes.reshape(-1, size), layer.bits)
    numbers = {"nbits": layer.bits, "group_size": size, "axis": 1}
    flags = {"quant_scale": False, "quant_zero": False, "offload_meta": False, **_FIXED}
    flags |= {"encoded_state_dict": True, "stores_quant_config": True}
    texts = {"packing": _PACKING[layer.bits], "unpack_view_dtype": packed.dtype}
    texts |= {"compute_dtype": dtype}
    tensors = {
        "W_q": packed,
        "scale": scale.reshape(-1, 1),
        "zero": zero.reshape(-1, 1),
        "shape": torch.tensor(codes.shape),
        **{name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()},
        **{name: torch.tensor(value, dtype=torch.uint8) for name, value in flags.items()},
        **{name: torch.tensor(list(str(value).encode("ascii")), dtype=torch.uint8)
           for name, value in texts.items()},
    }  # fmt: skip
    stored = (codes.double().unflatten(1, (-1, size)) - zero.double()[..., None]) * (
        scale.double()[..., None]
    )
    form = f"{_PACKING[layer.bits]}, groups of {size}"
    row = stored_error(layer.name, layer.name, form, stored.flatten(1), affine.dequantize())
    return {f".{name}": tensor for name, tensor in tensors.items()}, row


write_hqq = PackedFormat(
    reader="HQQ",
    misfit=_misfit,
    pack=_pack,
    config=lambda layers: {"quantization_config": quantization_config(layers)},
).write
"""Write a folder whose layers `HQQLinear.load_state_dict` takes."""
