"""GPTQ checkpoints: `w = scale · (q − zero_point)` (AutoGPTQ, GPTQModel; format `gptq`, `gptq_v2`).

`qweight` is int32 `[K · bits / 32, N]`, a little-endian stream of codes along K; `qzeros` int32
`[L, N · bits / 32]`, a stream along N; `scales` `[L, N]`; `g_idx` `[K]` names the group of each
column of the weight, in any order where it was quantized by activation order.

Version 1 stores zero-points less one, modulo 2^bits; version 2 as they are. The tag in
`config.json` says which, but is wrong in some checkpoints: symmetric ones show it, since their
zero-points are all 2^(bits − 1). The QA-LoRA authors' script and a fork of it store zero-points in
floating point, `[L, N]`: as zero-points (`w = scale · (q − z)`), or as offsets
(`w = scale · q + z`). What the numbers do not tell, `zero_points` has to.

GPTQModel gives single layers other options: `dynamic` in `quantization_config` has regular
expressions that match the beginning of a module's name, and the first that does decides. Behind
`+:`, or nothing, stand options that replace the general ones; `-:` marks layers left in float.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qalora_compile.capture.stored.base import (
    Decoded,
    Tensors,
    affine_of,
    take,
    unpack_stream,
)
from qalora_compile.config import one_of
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.stored_codes import StoredWeight

V1, V2, FLOAT_ZERO, FLOAT_OFFSET = "v1", "v2", "float", "offset"
ZERO_POINTS = (V1, V2, FLOAT_ZERO, FLOAT_OFFSET)
_TAGS = {"gptq": V1, "gptq_v2": V2, "": V1}
_PARTS = ("qweight", "qzeros", "scales")
_FLOAT, _OTHERWISE = "-:", "+:"


@dataclass(frozen=True)
class _Form:
    """How a checkpoint is to be read, by `config.json`, and by the caller where he says so."""

    bits: int
    group_size: int
    symmetric: bool
    zero_points: str
    told: bool

    @classmethod
    def of(cls, options: Mapping[str, Any], zero_points: str | None) -> _Form:
        """Read `quantization_config`.

        Raises:
            UserInputError: bits or group size are missing, or the caller's word is none there is.
            UnsupportedError: the checkpoint is of another format than GPTQ's own.
        """
        tag = str(options.get("checkpoint_format") or "")
        if tag not in _TAGS:
            raise UnsupportedError(
                f"the GPTQ checkpoint is packed as {tag!r}",
                hint=f"save it as {' or '.join(filter(None, _TAGS))}",
            )
        if zero_points is not None:
            one_of("zero_points", zero_points, ZERO_POINTS)
        try:
            bits, group = int(options["bits"]), int(options["group_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserInputError(
                "quantization_config does not say bits and group_size", hint="add them"
            ) from error
        told = zero_points is not None
        return cls(bits, group, bool(options.get("sym")), zero_points or _TAGS[tag], told)

    def of_module(self, module: str, dynamic: Mapping[str, Any]) -> _Form:
        """How one module is to be read, by the first rule that matches its name.

        Raises:
            UserInputError: a rule is no regular expression or gives no numbers, or says that the
                module is in float.
        """
        for rule, options in dynamic.items():
            pattern = rule.removeprefix(_FLOAT).removeprefix(_OTHERWISE)
            try:
                if not re.match(pattern, module):
                    continue
                if rule.startswith(_FLOAT):
                    raise UserInputError(
                        f"{module} is quantized, and the rule {rule!r} says that it is not",
                        where=module,
                    )
                return replace(
                    self,
                    bits=int(options.get("bits", self.bits)),
                    group_size=int(options.get("group_size", self.group_size)),
                    symmetric=bool(options.get("sym", self.symmetric)),
                )
            except (re.error, AttributeError, TypeError, ValueError) as error:
                raise UserInputError(
                    f"the rule {rule!r} of quantization_config.dynamic cannot be read: {error}",
                    where=module,
                ) from error
        return self


def decode_gptq(
    tensors: Tensors, config: Mapping[str, Any], *, zero_points: str | None = None
) -> Decoded:
    """Every weight that has `qweight`.

    Args:
        tensors: By name.
        config: `config.json`.
        zero_points: How zero-points are stored, one of `ZERO_POINTS`; None: by tag and numbers.

    Raises:
        UserInputError: a tensor is missing or of another shape than the others say, or what its
            zero-points are cannot be told.
        UnsupportedError: the format is packed in another way.
    """
    options = config["quantization_config"]
    general, dynamic = _Form.of(options, zero_points), options.get("dynamic") or {}
    modules = [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]
    forms = {module: general.of_module(module, dynamic) for module in modules}
    zeros = [(forms[m], t) for m in modules if (t := tensors.get(f"{m}.qzeros")) is not None]
    stored_as, notes = _zero_form(general, zeros)
    weights, used = {}, set[str]()
    for module, form in forms.items():
        parts = take(tensors, module, _PARTS)
        g_idx = tensors.get(f"{module}.g_idx")
        weights[module] = _decode(module, parts, g_idx, form, stored_as)
        used |= {f"{module}.{part}" for part in (*_PARTS, "g_idx")} & set(tensors)
    return Decoded(weights, frozenset(used), notes)


def _decode(
    module: str, parts: Mapping[str, Tensor], g_idx: Tensor | None, form: _Form, stored_as: str
) -> StoredWeight:
    packed, scales = parts["qweight"], parts["scales"]
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[0] * 32 % form.bits:
        raise UserInputError(
            f"{module}.qweight is {packed.dtype} {list(packed.shape)}, not int32 "
            f"[K · {form.bits} / 32, N]",
            where=module,
        )
    k, n = packed.shape[0] * 32 // form.bits, packed.shape[1]
    group = k if form.group_size == -1 else form.group_size
    codes = unpack_stream(packed.t().contiguous().view(torch.uint8), form.bits, k)
    scale = scales.t().float()
    zeros = _zeros(module, parts["qzeros"], scales, form, stored_as).t()
    offset = zeros if stored_as == FLOAT_OFFSET else -scale * zeros
    order = _order(module, g_idx, k, group)
    if order is not None:
        codes = codes[:, order]
    if codes.shape[0] != n or scale.shape[0] != n:
        raise UserInputError(
            f"{module}.scales is {list(scales.shape)}, and its codes are for {n} outputs",
            where=f"{module}.scales",
        )
    affine = affine_of(module, codes, scale, offset, form.bits, group)
    act = ", act-order" if order is not None else ""
    return StoredWeight(affine, f"GPTQ {form.bits} bits{act}", order)


def _zeros(module: str, stored: Tensor, scales: Tensor, form: _Form, stored_as: str) -> Tensor:
    """Zero-points, or offsets, `[L, N]` float32.

    Raises:
        UserInputError: they are of another shape than the scales say.
    """
    groups, n = scales.shape
    wanted = [groups, n] if stored.is_floating_point() else [groups, n * form.bits // 32]
    if list(stored.shape) != wanted:
        raise UserInputError(
            f"{module}.qzeros is {stored.dtype} {list(stored.shape)}, and scales of "
            f"{[groups, n]} want {wanted}",
            where=f"{module}.qzeros",
            hint="integer zero-points are packed along the outputs, floating ones are not",
        )
    if stored.is_floating_point():
        return stored.float()
    values = unpack_stream(stored.contiguous().view(torch.uint8), form.bits, n).to(torch.int32)
    step = 1 if stored_as == V1 else 0
    zeros: Tensor = ((values + step) % 2**form.bits).float()
    return zeros


def _order(module: str, g_idx: Tensor | None, k: int, group: int) -> Tensor | None:
    """The order of columns in which groups are contiguous; None where they are as they stand.

    Raises:
        UserInputError: `g_idx` is of another length.
        UnsupportedError: its groups are not all of one size, the last excepted.
    """
    if g_idx is None or torch.equal(g_idx.long(), torch.arange(k) // group):
        return None
    if g_idx.shape != (k,):
        raise UserInputError(
            f"{module}.g_idx is {list(g_idx.shape)}, and there are {k} columns", where=module
        )
    order = torch.argsort(g_idx.long(), stable=True)
    if not torch.equal(g_idx.long()[order], torch.arange(k) // group):
        raise UnsupportedError(
            f"the groups of {module}.g_idx are not of {group} columns each",
            where=module,
            hint="adapters fold into groups of one size",
        )
    return order


def _zero_form(general: _Form, stored: list[tuple[_Form, Tensor]]) -> tuple[str, tuple[str, ...]]:
    """What the stored zero-points are, and notes where tag and numbers disagree.

    Raises:
        UserInputError: floating zero-points are neither plainly zero-points nor plainly offsets.
    """
    if not stored:
        return general.zero_points, ()
    if stored[0][1].is_floating_point():
        bits = max(form.bits for form, _ in stored)
        return _float_form(general, bits, torch.cat([t.float().flatten() for _, t in stored])), ()
    if general.told and general.zero_points not in (V1, V2):
        raise UserInputError(
            f"zero_points is {general.zero_points!r}, and they are stored as integers",
            hint=f"use {V1!r} or {V2!r}",
        )
    symmetric = [] if general.told else [each for each in stored if each[0].symmetric]
    middles = {form.bits: 2 ** (form.bits - 1) for form, _ in symmetric}
    steps = {v - middles[form.bits] for form, t in symmetric for v in _distinct(t, form.bits)}
    by_numbers = {frozenset({-1}): V1, frozenset({0}): V2}.get(frozenset(steps))
    if by_numbers in (None, general.zero_points):
        return general.zero_points, ()
    first = next(iter(middles.values()))
    return by_numbers, (
        f"config.json says that zero-points are stored as {general.zero_points}, and symmetric "
        f"ones, {first}, are stored as {first + min(steps)}: read as {by_numbers} "
        "(zero_points, --stored-zero-points, overrides that)",
    )


def _distinct(packed: Tensor, bits: int) -> list[int]:
    count = packed.shape[1] * 32 // bits
    values: list[int] = (
        unpack_stream(packed.contiguous().view(torch.uint8), bits, count).unique().tolist()
    )
    return values


def _float_form(form: _Form, bits: int, zeros: Tensor) -> str:
    """Zero-points lie from 0 to 2^bits − 1, mostly above 1/2; offsets are mostly below 0.

    Raises:
        UserInputError: neither holds, or the caller says that they are integers.
    """
    if form.told:
        if form.zero_points in (V1, V2):
            raise UserInputError(
                f"zero_points is {form.zero_points!r}, and they are stored in floating point",
                hint=f"use {FLOAT_ZERO!r} or {FLOAT_OFFSET!r}",
            )
        return form.zero_points
    median = float(zeros.median())
    if 0.5 < median < 2**bits:
        return FLOAT_ZERO
    if median < 0:
        return FLOAT_OFFSET
    raise UserInputError(
        f"floating zero-points with a median of {median:.3g} may be zero-points or offsets",
        hint=f"say which: zero_points={FLOAT_ZERO!r}, for scale · (q − z), or {FLOAT_OFFSET!r}, "
        "for scale · q + z",
    )
