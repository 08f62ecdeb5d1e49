"""GPTQ checkpoints: `w = scale · (q − zero_point)` (AutoGPTQ, GPTQModel; format `gptq`, `gptq_v2`).

`qweight` is int32 `[K · bits / 32, N]`, a little-endian stream of codes along K; `qzeros` int32
`[L, N · bits / 32]`, a stream along N; `scales` `[L, N]`; `g_idx` `[K]` names the group of each
column of the weight, which is in any order after quantization in activation order. If `config.json`
states that (`desc_act`) and a layer has none, the order is lost, and the checkpoint is refused.

Version 1 stores zero-points minus one, modulo 2^bits; version 2 stores them unchanged. The tag in
`config.json` states the version, but is wrong in some checkpoints. The QA-LoRA authors' script and
a fork of it store zero-points in floating point, `[L, N]`: as zero-points (`w = scale · (q − z)`),
or as offsets (`w = scale · q + z`). `gptq_zeros` decides for each layer; if tag, numbers and
weights are inconclusive, the user has to state `zero_points`.

GPTQModel can give single layers other options: `dynamic` in `quantization_config` has regular
expressions that match the beginning of a module's name, and the first match decides. With the
prefix `+:` or none, their options replace the general ones; `-:` marks layers left in float.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qalora_compile.capture.checkpoints.base import (
    CONFIG,
    ONE_GROUP_A_ROW,
    Decoded,
    Tensors,
    affine_of,
    check_matrix,
    check_shapes,
    code_width,
    column_order,
    missing_order,
    read_count,
    section,
    take,
    unpack_stream,
)
from qalora_compile.capture.checkpoints.gptq_zeros import StoredLayer, zero_forms
from qalora_compile.config.choices import V1, V2
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.checkpoint_codes import CheckpointWeight
from qalora_compile.untrusted import quoted
from qalora_compile.untrusted.patterns import matches

_TAGS = {"gptq": V1, "gptq_v2": V2, "": V1}
_PARTS = ("qweight", "qzeros", "scales")
_FLOAT, _OTHERWISE = "-:", "+:"
_DYNAMIC, _ORDERED = "dynamic", "desc_act"


@dataclass(frozen=True)
class _Form:
    """How to read a checkpoint or a module, according to `config.json`."""

    bits: int
    group_size: int
    symmetric: bool
    ordered: bool
    tag: str

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> _Form:
        """Read `quantization_config`.

        Raises:
            UserInputError: bits or group size are missing.
            UnsupportedError: the checkpoint is of another format than GPTQ's own.
        """
        tag = str(options.get("checkpoint_format") or "")
        if tag not in _TAGS:
            raise UnsupportedError(
                f"the GPTQ checkpoint is packed as {tag!r}",
                where=CONFIG,
                hint=f"save it as {' or '.join(filter(None, _TAGS))}",
            )
        bits = code_width(options, "bits", CONFIG)
        group = read_count(options, "group_size", CONFIG, rows=True)
        ordered = bool(options.get(_ORDERED))
        return cls(bits, group, bool(options.get("sym")), ordered, _TAGS[tag])

    def of_module(self, module: str, dynamic: Mapping[str, Any]) -> _Form:
        """How to read one module, according to the first rule that matches its name.

        Raises:
            UserInputError: a rule is malformed, or states that the module is in float.
        """
        for rule in dynamic:
            pattern = rule.removeprefix(_FLOAT).removeprefix(_OTHERWISE)
            try:
                if not matches(pattern, module, full=False):
                    continue
            except UserInputError as error:
                raise UserInputError(
                    f"the rule {quoted(rule)} of quantization_config.dynamic cannot be read: "
                    f"{error.what}",
                    where=module,
                    hint=error.hint,
                ) from None
            if rule.startswith(_FLOAT):
                raise UserInputError(
                    f"{module} is quantized, but the rule {rule!r} says that it is not",
                    where=module,
                )
            where = f"{CONFIG}: {_DYNAMIC}: {rule}"
            own = section(dynamic, rule, f"{CONFIG}: {_DYNAMIC}")
            options = {"bits": self.bits, "group_size": self.group_size, **own}
            return replace(
                self,
                bits=code_width(options, "bits", where),
                group_size=read_count(options, "group_size", where, rows=True),
                symmetric=bool(options.get("sym", self.symmetric)),
                ordered=bool(options.get(_ORDERED, self.ordered)),
            )
        return self


def decode_gptq(
    tensors: Tensors, config: Mapping[str, Any], *, zero_points: str | None = None
) -> Decoded:
    """Every weight that has `qweight`.

    Args:
        tensors: Tensors by name.
        config: `config.json`.
        zero_points: How zero-points are stored, one of `STORED_ZERO_POINTS`; None decides by
            tag, numbers and weights.

    Raises:
        UserInputError: a tensor is missing, its shape does not fit the others, or the meaning of
            its zero-points cannot be determined.
        UnsupportedError: the packing is not supported.
    """
    options = section(config, "quantization_config", CONFIG)
    general, dynamic = _Form.of(options), section(options, _DYNAMIC, CONFIG)
    modules = [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]
    layers: dict[str, StoredLayer] = {}
    orders: dict[str, Tensor | None] = {}
    used = set[str]()
    for module in modules:
        form, parts = general.of_module(module, dynamic), take(tensors, module, _PARTS)
        _check(module, parts, form)
        layer = _unpack(module, parts, form)
        order = _order(module, tensors.get(f"{module}.g_idx"), layer, form.ordered)
        layers[module] = layer if order is None else replace(layer, codes=layer.codes[:, order])
        orders[module] = order
        used |= {f"{module}.{part}" for part in (*_PARTS, "g_idx")} & set(tensors)
    _check_orders(orders, layers, tensors)
    read, notes = zero_forms(layers, general.tag, zero_points)
    weights = {m: _decode(m, layer, orders[m], read[m]) for m, layer in layers.items()}
    return Decoded(weights, frozenset(used), notes)


def _check(module: str, parts: Mapping[str, Tensor], form: _Form) -> None:
    """Check that the tensors of a layer fit together.

    Raises:
        UserInputError: a dtype or shape does not fit the bits or the other tensors.
    """
    packed, scales, zeros = (parts[part] for part in ("qweight", "scales", "qzeros"))
    check_matrix(module, "qweight", packed, torch.int32, f"[K · {form.bits} / 32, N]")
    if packed.shape[0] * 32 % form.bits:
        raise UserInputError(
            f"{module}.qweight is {list(packed.shape)}, and its rows are not a multiple of "
            f"{form.bits} bits per code",
            where=f"{module}.qweight",
        )
    check_matrix(module, "scales", scales, None, "[L, N]")
    groups, n = scales.shape
    if packed.shape[1] != n:
        raise UserInputError(
            f"{module}.scales is {list(scales.shape)}, and its codes are for {packed.shape[1]} "
            "outputs",
            where=f"{module}.scales",
        )
    floating = zeros.is_floating_point()
    wanted = [groups, n if floating else -(-n * form.bits // 32)]
    if list(zeros.shape) != wanted or not (floating or zeros.dtype == torch.int32):
        raise UserInputError(
            f"{module}.qzeros is {zeros.dtype} {list(zeros.shape)}, but scales of "
            f"{[groups, n]} need {wanted}",
            where=f"{module}.qzeros",
            hint="integer zero-points are int32, packed along the outputs, floating ones are not",
        )


def _unpack(module: str, parts: Mapping[str, Tensor], form: _Form) -> StoredLayer:
    """A layer's codes, columns as they are stored, with its scales and zero-points.

    Raises:
        UserInputError: the scales do not fit its groups.
    """
    packed, zeros = parts["qweight"], parts["qzeros"]
    k, n = packed.shape[0] * 32 // form.bits, packed.shape[1]
    group = k if form.group_size == ONE_GROUP_A_ROW else form.group_size
    codes = unpack_stream(packed.t().contiguous().view(torch.uint8), form.bits, k)
    scale, floating = parts["scales"].t().float(), zeros.is_floating_point()
    check_shapes(module, codes, group, scale=scale)
    if not floating:
        zeros = unpack_stream(zeros.contiguous().view(torch.uint8), form.bits, n)
    return StoredLayer(codes, scale, zeros.t().float(), floating, form.bits, group, form.symmetric)


def _order(module: str, g_idx: Tensor | None, layer: StoredLayer, ordered: bool) -> Tensor | None:
    """The order of a layer's columns in which groups are contiguous; see `column_order`.

    Raises:
        UserInputError: the configuration states an order, but there is none.
    """
    name, k = f"{module}.g_idx", layer.codes.shape[1]
    if g_idx is None and ordered and k > layer.group_size:
        raise missing_order(name, f"{_ORDERED}: true")
    return column_order(name, g_idx, k, layer.group_size)


def _check_orders(
    orders: Mapping[str, Tensor | None], layers: Mapping[str, StoredLayer], tensors: Tensors
) -> None:
    """Check that no layer lacks its order if others have one.

    Raises:
        UserInputError: a layer lacks it.
    """
    ordered = next((module for module, order in orders.items() if order is not None), None)
    grouped = [m for m, layer in layers.items() if layer.codes.shape[1] > layer.group_size]
    without = next((module for module in grouped if f"{module}.g_idx" not in tensors), None)
    if ordered is not None and without is not None:
        raise UserInputError(
            f"the checkpoint has no tensor {without}.g_idx, and {ordered}.g_idx puts columns in "
            "another order",
            where=f"{without}.g_idx",
            hint="fetch the checkpoint again: the order of the columns is not known",
        )


def _decode(module: str, layer: StoredLayer, order: Tensor | None, form: str) -> CheckpointWeight:
    bits, offset = layer.bits, layer.offset(form)
    affine = affine_of(module, layer.codes, layer.scale, offset, bits, layer.group_size)
    act = ", act-order" if order is not None else ""
    return CheckpointWeight(affine, f"GPTQ {bits} bits{act}", order)
