"""Linear layers as GPTQ and AWQ checkpoints store them, read to codes, scale and offset.

Codes are never touched: only the order of their bits is ours. GPTQ (AutoGPTQ, GPTQModel):

=========  ============================  ======================================================
`qweight`  int32 `[K·bits/32, N]`        the codes of a column as one little-endian bit stream
`qzeros`   int32 `[L, N·bits/32]`        whole zero-points, likewise along N; less 1 in format v1
`scales`   float16 `[L, N]`
`g_idx`    int32 `[K]`                   the group of each input; sorted unless `desc_act` moved it
=========  ============================  ======================================================

AWQ (4 bits): `qweight` int32 `[K, N/8]` and `qzeros` `[L, N/8]`, eight columns a word, in the order
0 2 4 6 1 3 5 7 from the lowest bits up. `W = scales · (codes − zero)` in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qalora_compile.config import SUPPORTED_BITS
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.affine import group_count
from qalora_compile.ir.packing import pack_codes, unpack_codes
from qalora_compile.ir.stored import StoredWeight

PARTS = ("qweight", "qzeros", "scales")
V1, V2 = "v1", "v2"
_FORMATS = {"gptq": V1, "gptq_v2": V2}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class StoredFormat:
    """What a checkpoint's `quantization_config` says.

    Attributes:
        method: `gptq` or `awq`.
        bits: Width of a code; of most layers where `varies`.
        group_size: g; −1 is a whole row.
        symmetric: All zero-points are the middle code.
        tag: `v1` or `v2`, of GPTQ's zero-points.
        varies: Layers have settings of their own.
    """

    method: str
    bits: int
    group_size: int
    symmetric: bool
    tag: str
    varies: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> StoredFormat:
        """Read the settings.

        Raises:
            UnsupportedError: the method or one of its versions is not known.
            UserInputError: bits or group size are missing or out of range.
        """
        method = str(config.get("quant_method"))
        if method not in ("gptq", "awq"):
            raise UnsupportedError(
                f"the checkpoint is quantized by {method!r}",
                where=where,
                hint="gptq and awq can be read as they are; others have to be saved in float",
            )
        bits = config.get("bits", config.get("w_bit"))
        group = config.get("group_size", config.get("q_group_size"))
        fits = bits in ((4,) if method == "awq" else SUPPORTED_BITS)
        if not fits or not isinstance(group, int) or not (group == -1 or group > 0):
            raise UserInputError(f"bits are {bits!r} in groups of {group!r}", where=where)
        known = {"gptq": tuple(_FORMATS), "awq": ("gemm",)}[method]
        key = "checkpoint_format" if method == "gptq" else "version"
        version = str(config.get(key) or config.get("format") or known[0]).lower()
        if version not in known:
            raise UnsupportedError(
                f"the {method} checkpoint is of version {version!r}",
                where=where,
                hint=f"known: {', '.join(known)}",
            )
        return cls(
            method=method,
            bits=int(bits),
            group_size=group,
            symmetric=bool(config.get("sym")),
            tag=_FORMATS.get(version, V2),
            varies=bool(config.get("dynamic")),
        )


def read_layer(
    parts: Mapping[str, Tensor], k: int, n: int, stored: StoredFormat, zeros: str, where: str
) -> StoredWeight:
    """A linear layer.

    Args:
        parts: `qweight`, `qzeros`, `scales`, and `g_idx` where there is one.
        k: Inputs of the layer.
        n: Its outputs.
        stored: See `StoredFormat`.
        zeros: `v1` or `v2`: how GPTQ's zero-points are stored.
        where: The layer's path.

    Raises:
        UserInputError: a tensor is missing, or has another shape than the others ask for.
        UnsupportedError: the codes are not in the order of the inputs (`desc_act`).
    """
    missing = [name for name in PARTS if name not in parts]
    if missing:
        raise UserInputError(f"{missing[0]} is missing", where=where)
    bits = _bits_of(parts["qweight"], k, n, stored, where)
    groups = int(parts["scales"].shape[0])
    group = k if stored.group_size == -1 else stored.group_size
    if stored.varies and groups and k % groups == 0:
        group = k // groups
    wanted = {
        "scales": (group_count(k, group), n),
        "qzeros": (group_count(k, group), n * bits // 32),
    }
    for name, shape in wanted.items():
        if tuple(parts[name].shape) != shape:
            raise UserInputError(
                f"{name} is {list(parts[name].shape)}, a layer of {k}×{n} in groups of {group} has "
                f"{list(shape)}",
                where=where,
            )
    _check_order(parts.get("g_idx"), k, group, where)
    if stored.method == "awq":
        codes = _unpack_awq(parts["qweight"]).T.contiguous()
        qweight, zero = pack_codes(codes, bits), _unpack_awq(parts["qzeros"])
    else:
        qweight = parts["qweight"].T.contiguous().view(torch.uint8)
        zero = unpack_codes(parts["qzeros"].contiguous().view(torch.uint8), bits, n)
        if zeros == V1:  # 0 was stored as −1, so as the largest code
            zero = (zero + 1) & (2**bits - 1)
    scale = parts["scales"].float().T.contiguous()
    if not bool(torch.isfinite(scale).all()):
        raise UserInputError("scales hold NaN or infinite values", where=where)
    return StoredWeight(qweight, scale, -scale * zero.T.float(), bits, group, k)


def tell_zeros(
    layers: Mapping[str, Mapping[str, Tensor]], stored: StoredFormat
) -> tuple[str, str | None]:
    """How GPTQ's zero-points are stored, and what to warn of.

    The tag is believed, but not against the numbers: of a symmetric checkpoint all zero-points are
    2^(bits−1), so stored as that (v2) or as one less (v1).

    Args:
        layers: The tensors of each layer.
        stored: What the checkpoint says.
    """
    if stored.method != "gptq" or not stored.symmetric or stored.varies:
        return stored.tag, None
    half, found = 2 ** (stored.bits - 1), set[int]()
    for parts in layers.values():
        packed = parts["qzeros"].contiguous().view(torch.uint8)
        width = packed.shape[1] * 8 // stored.bits
        found |= set(unpack_codes(packed, stored.bits, width).unique().tolist())
    shown = {frozenset({half - 1}): V1, frozenset({half}): V2}.get(frozenset(found))
    if shown is None or shown == stored.tag:
        return stored.tag, None
    return shown, (
        f"the checkpoint says that its zero-points are of format {stored.tag}, but they are all "
        f"{min(found)}, which is format {shown} of a symmetric one: read as {shown}; say "
        f"zero_points={stored.tag!r} if that is wrong"
    )


def _bits_of(qweight: Tensor, k: int, n: int, stored: StoredFormat, where: str) -> int:
    """Width of a code, from the shape of the codes."""
    if stored.method == "awq":
        rows, width, bits = k, n // 8, 4
    else:
        bits = qweight.shape[0] * 32 // k if stored.varies else stored.bits
        rows, width = k * bits // 32, n
    fits = bits in SUPPORTED_BITS and (k * bits) % 32 == 0 and (n * bits) % 32 == 0
    if qweight.dtype != torch.int32 or tuple(qweight.shape) != (rows, width) or not fits:
        raise UserInputError(
            f"qweight is {qweight.dtype} {list(qweight.shape)}, a layer of {k}×{n} at {bits} bits "
            f"has int32 {[rows, width]}",
            where=where,
        )
    return bits


def _check_order(g_idx: Tensor | None, k: int, group: int, where: str) -> None:
    if g_idx is None or bool((g_idx == torch.arange(k) // group).all()):
        return
    raise UnsupportedError(
        "the inputs of a group do not lie side by side (desc_act, act-order): they would have to "
        "be put in another order before the layer",
        where=where,
        hint="take a checkpoint without desc_act, or quantize the float model",
    )


def _unpack_awq(packed: Tensor) -> Tensor:
    """Codes `[R, N]` uint8 of words `[R, N/8]`."""
    shifts = torch.tensor([4 * _AWQ_ORDER.index(column) for column in range(8)])
    codes: Tensor = (packed[:, :, None] >> shifts) & 15
    return codes.to(torch.uint8).flatten(1)
