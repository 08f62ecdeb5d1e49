"""GPTQ checkpoints: `w = scale · (q − zero_point)` (AutoGPTQ, GPTQModel; format `gptq`, `gptq_v2`).

`qweight` is int32 `[K · bits / 32, N]`, a little-endian stream of codes along K; `qzeros` int32
`[L, N · bits / 32]`, a stream along N; `scales` `[L, N]`; `g_idx` `[K]` names the group of each
column of the weight, in any order where it was quantized by activation order.

Version 1 stores zero-points less one, modulo 2^bits; version 2 as they are. The tag in
`config.json` says which, but is wrong in some checkpoints: symmetric ones show it, since their
zero-points are all 2^(bits − 1), and where all those of a layer are stored as that, or as one less,
the numbers are believed. The QA-LoRA authors' script and a fork of it store zero-points in
floating point, `[L, N]`: as zero-points (`w = scale · (q − z)`), or as offsets
(`w = scale · q + z`). What the numbers do not tell, `zero_points` has to.

GPTQModel gives single layers other options: `dynamic` in `quantization_config` has regular
expressions that match the beginning of a module's name, and the first that does decides. Behind
`+:`, or nothing, stand options that replace the general ones; `-:` marks layers left in float.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qalora_compile.capture.stored.base import (
    CONFIG,
    WHOLE_ROWS,
    Decoded,
    Tensors,
    affine_of,
    check_matrix,
    code_width,
    section,
    take,
    unpack_stream,
    whole_number,
)
from qalora_compile.config import one_of
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.stored_codes import StoredWeight
from qalora_compile.untrusted import quoted
from qalora_compile.untrusted.patterns import matches

V1, V2, FLOAT_ZERO, FLOAT_OFFSET = "v1", "v2", "float", "offset"
ZERO_POINTS = (V1, V2, FLOAT_ZERO, FLOAT_OFFSET)
_TAGS = {"gptq": V1, "gptq_v2": V2, "": V1}
_PARTS = ("qweight", "qzeros", "scales")
_FLOAT, _OTHERWISE = "-:", "+:"
_DYNAMIC = "dynamic"


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
                where=CONFIG,
                hint=f"save it as {' or '.join(filter(None, _TAGS))}",
            )
        if zero_points is not None:
            one_of("zero_points", zero_points, ZERO_POINTS)
        bits = code_width(options, "bits", CONFIG)
        group = whole_number(options, "group_size", CONFIG, rows=True)
        told = zero_points is not None
        return cls(bits, group, bool(options.get("sym")), zero_points or _TAGS[tag], told)

    def of_module(self, module: str, dynamic: Mapping[str, Any]) -> _Form:
        """How one module is to be read, by the first rule that matches its name.

        Raises:
            UserInputError: a rule is no regular expression or gives no numbers, or says that the
                module is in float.
        """
        for rule in dynamic:
            pattern = rule.removeprefix(_FLOAT).removeprefix(_OTHERWISE)
            try:
                if not matches(pattern, module, whole=False):
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
                    f"{module} is quantized, and the rule {rule!r} says that it is not",
                    where=module,
                )
            where = f"{CONFIG}: {_DYNAMIC}: {rule}"
            own = section(dynamic, rule, f"{CONFIG}: {_DYNAMIC}")
            options = {"bits": self.bits, "group_size": self.group_size, **own}
            return replace(
                self,
                bits=code_width(options, "bits", where),
                group_size=whole_number(options, "group_size", where, rows=True),
                symmetric=bool(options.get("sym", self.symmetric)),
            )
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
    options = section(config, "quantization_config", CONFIG)
    general, dynamic = _Form.of(options, zero_points), section(options, _DYNAMIC, CONFIG)
    modules = [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]
    forms = {module: general.of_module(module, dynamic) for module in modules}
    parts = {module: take(tensors, module, _PARTS) for module in modules}
    for module, form in forms.items():
        _check(module, parts[module], form)
    zeros = {module: (form, parts[module]["qzeros"]) for module, form in forms.items()}
    stored_as, notes = _zero_form(general, zeros)
    weights, used = {}, set[str]()
    for module, form in forms.items():
        g_idx = tensors.get(f"{module}.g_idx")
        weights[module] = _decode(module, parts[module], g_idx, form, stored_as)
        used |= {f"{module}.{part}" for part in (*_PARTS, "g_idx")} & set(tensors)
    return Decoded(weights, frozenset(used), notes)


def _check(module: str, parts: Mapping[str, Tensor], form: _Form) -> None:
    """See that the tensors of a layer fit together.

    Raises:
        UserInputError: one is of another dtype or shape than the others, or the bits, say.
    """
    packed, scales, zeros = (parts[part] for part in ("qweight", "scales", "qzeros"))
    check_matrix(module, "qweight", packed, torch.int32, f"[K · {form.bits} / 32, N]")
    if packed.shape[0] * 32 % form.bits:
        raise UserInputError(
            f"{module}.qweight is {list(packed.shape)}, and its rows are no whole codes of "
            f"{form.bits} bits",
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
            f"{module}.qzeros is {zeros.dtype} {list(zeros.shape)}, and scales of "
            f"{[groups, n]} want {wanted}",
            where=f"{module}.qzeros",
            hint="integer zero-points are int32, packed along the outputs, floating ones are not",
        )


def _decode(
    module: str, parts: Mapping[str, Tensor], g_idx: Tensor | None, form: _Form, stored_as: str
) -> StoredWeight:
    packed = parts["qweight"]
    k, n = packed.shape[0] * 32 // form.bits, packed.shape[1]
    group = k if form.group_size == WHOLE_ROWS else form.group_size
    codes = unpack_stream(packed.t().contiguous().view(torch.uint8), form.bits, k)
    scale = parts["scales"].t().float()
    zeros = _zeros(parts["qzeros"], n, form, stored_as).t()
    offset = zeros if stored_as == FLOAT_OFFSET else -scale * zeros
    order = _order(module, g_idx, k, group)
    if order is not None:
        codes = codes[:, order]
    affine = affine_of(module, codes, scale, offset, form.bits, group)
    act = ", act-order" if order is not None else ""
    return StoredWeight(affine, f"GPTQ {form.bits} bits{act}", order)


def _zeros(stored: Tensor, n: int, form: _Form, stored_as: str) -> Tensor:
    """Zero-points, or offsets, `[L, N]` float32."""
    if stored.is_floating_point():
        return stored.float()
    values = _unpacked(stored, form.bits, n).to(torch.int32)
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


def _zero_form(
    general: _Form, stored: Mapping[str, tuple[_Form, Tensor]]
) -> tuple[str, tuple[str, ...]]:
    """What the stored zero-points are, and notes where tag and numbers disagree.

    Raises:
        UserInputError: some layers have floating ones and others do not, or floating ones are
            neither plainly zero-points nor plainly offsets.
    """
    if not stored:
        return general.zero_points, ()
    first = next(iter(stored))
    floating = stored[first][1].is_floating_point()
    odd = next((m for m, (_, t) in stored.items() if t.is_floating_point() != floating), None)
    if odd is not None:
        raise UserInputError(
            f"{odd}.qzeros is {stored[odd][1].dtype}, and {first}.qzeros {stored[first][1].dtype}",
            where=f"{odd}.qzeros",
            hint="store those of all layers packed, or those of all in floating point",
        )
    if floating:
        bits = max(form.bits for form, _ in stored.values())
        zeros = torch.cat([t.float().flatten() for _, t in stored.values()])
        return _float_form(general, bits, zeros), ()
    if general.told and general.zero_points not in (V1, V2):
        raise UserInputError(
            f"zero_points is {general.zero_points!r}, and they are stored as integers",
            where=f"{first}.qzeros",
            hint=f"use {V1!r} or {V2!r}",
        )
    return (general.zero_points, ()) if general.told else _by_numbers(general.zero_points, stored)


def _by_numbers(
    tag: str, stored: Mapping[str, tuple[_Form, Tensor]]
) -> tuple[str, tuple[str, ...]]:
    """The version that layers show whose zero-points are all the middle code; else the tag's."""
    shown: dict[str, list[str]] = {V1: [], V2: []}
    unclear = []
    for module, (form, zeros) in stored.items():
        middle = 2 ** (form.bits - 1)
        version = {middle - 1: V1, middle: V2}.get(_only_value(zeros, form.bits))
        if version is not None:
            shown[version].append(f"{module}, {middle}, are stored as {middle - (version == V1)}")
        elif form.symmetric:
            unclear.append(module)
    found = [version for version, layers in shown.items() if layers]
    read = found[0] if len(found) == 1 else tag
    notes = [
        f"zero-points are stored as {tag} by config.json, and those of {layers[0]} "
        f"({len(layers)} layers): read as {read} (zero_points, --stored-zero-points, overrides "
        "that)"
        for version, layers in shown.items()
        if layers and version != tag
    ]
    if unclear:
        notes.append(
            f"{len(unclear)} layers are symmetric by config.json, first {unclear[0]}, and their "
            f"zero-points are not: read as {read} (zero_points, --stored-zero-points, overrides "
            "that)"
        )
    return read, tuple(notes)


def _only_value(packed: Tensor, bits: int) -> int | None:
    """What all values are, or None where they differ."""
    values = _unpacked(packed, bits, packed.shape[1] * 32 // bits)
    first = values[0, 0]
    return int(first) if bool((values == first).all()) else None


def _unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    return unpack_stream(packed.contiguous().view(torch.uint8), bits, count)


def _float_form(form: _Form, bits: int, zeros: Tensor) -> str:
    """Zero-points lie from 0 to 2^bits − 1, mostly above 1/2; offsets are mostly below 0.

    Raises:
        UserInputError: neither holds, or the caller says that they are integers.
    """
    if form.told:
        if form.zero_points in (V1, V2):
            raise UserInputError(
                f"zero_points is {form.zero_points!r}, and they are stored in floating point",
                where="qzeros",
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
        where="qzeros",
        hint=f"say which: zero_points={FLOAT_ZERO!r}, for scale · (q − z), or {FLOAT_OFFSET!r}, "
        "for scale · q + z",
    )
