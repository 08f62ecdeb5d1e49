"""compressed-tensors checkpoints of format `pack-quantized`: `w = scale · (q − zero_point)`.

`weight_packed` is int32 `[N, K · bits / 32]`, a little-endian stream of codes along K, each plus
2^(bits − 1); `weight_zero_point` is packed the same way along N, `[N · bits / 32, L]`, and absent
if all are 0 (`symmetric`); `weight_scale` is `[N, L]`; `weight_shape` is (N, K). `weight_g_idx`
`[K]`, of versions up to 0.19, is the group of each column of layers that were quantized in
activation order (`actorder`: `group`).

Layers are matched to `config_groups` by the library's rules: `targets` and `ignore` hold layer
names, `re:` with a regular expression that matches the beginning of a name, or class names. If
several groups match a layer, names take precedence over expressions and expressions over classes;
expressions are ordered alphabetically; if a target is in two groups, the later group counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qalora_compile.capture.checkpoints.base import (
    CONFIG,
    Decoded,
    Tensors,
    affine_of,
    check_matrix,
    code_width,
    column_order,
    missing_order,
    read_count,
    section,
    small_numbers,
    take,
    unpack_stream,
)
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.checkpoint_codes import CheckpointWeight
from qalora_compile.untrusted import quoted
from qalora_compile.untrusted.patterns import matches

_PARTS = ("weight_packed", "weight_scale", "weight_shape")
_ZERO, _G_IDX = "weight_zero_point", "weight_g_idx"
_OPTIONAL = (_ZERO, _G_IDX)
_PATTERN = "re:"
_IN_GROUPS = ("group", True)
"""The `actorder` with a stored order of columns; other values keep columns in place."""
Modules = Callable[[], Mapping[str, nn.Module]]
"""The modules of the model by the names that a checkpoint may use."""


def decode_compressed(
    tensors: Tensors, config: Mapping[str, Any], *, modules: Modules = dict
) -> Decoded:
    """Every weight that has `weight_packed`.

    Args:
        tensors: Tensors by name.
        config: `config.json`.
        modules: Modules whose classes the configuration may name; others are linear layers.

    Raises:
        UserInputError: a tensor is missing, its shape does not fit the others, or the configuration
            states that a layer with codes is in float.
        UnsupportedError: the format is another, or a layer is not quantized in groups.
    """
    options = section(config, "quantization_config", CONFIG)
    if options.get("format") != "pack-quantized":
        raise UnsupportedError(
            f"a compressed-tensors checkpoint of format {options.get('format')!r}",
            where=CONFIG,
            hint="the format pack-quantized can be read",
        )
    weights, used, known = {}, set[str](), modules()
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        settings = _settings(module, _classes(known.get(module)), options)
        wanted = _PARTS if settings.symmetric else (*_PARTS, _ZERO)
        parts = take(tensors, module, wanted)
        more = {n: tensors[f"{module}.{n}"] for n in _OPTIONAL if f"{module}.{n}" in tensors}
        weights[module] = _decode(module, parts | more, settings)
        used |= {f"{module}.{part}" for part in (*_PARTS, *more)}
    return Decoded(weights, frozenset(used))


def _classes(module: nn.Module | None) -> frozenset[str]:
    """The names of a module's class and its base classes.

    A module that the model does not have under this name is a part of a larger one, such as an
    expert of a stack, and was a linear layer when it was quantized.
    """
    kinds = nn.Linear.__mro__ if module is None else type(module).__mro__
    return frozenset(kind.__name__ for kind in kinds if issubclass(kind, nn.Module))


@dataclass(frozen=True)
class _Settings:
    """The configuration of a module's weights."""

    bits: int
    group_size: int
    symmetric: bool
    ordered: bool


def _settings(module: str, classes: Collection[str], options: Mapping[str, Any]) -> _Settings:
    """The configuration of a module.

    Raises:
        UserInputError: the configuration is malformed, or states that the module is in float.
        UnsupportedError: the module is in no group of the configuration, or in an unsupported one.
    """
    ignored = _first_meant(_texts(options, "ignore", CONFIG), module, classes, CONFIG)
    if ignored is not None:
        raise UserInputError(
            f"{module} is quantized, but {ignored!r} of quantization_config.ignore excludes it",
            where=module,
        )
    groups = section(options, "config_groups", CONFIG)
    group_of: dict[str, str] = {}
    for name in groups:
        where = f"{CONFIG}: {name}"
        group_of |= dict.fromkeys(_texts(section(groups, name, CONFIG), "targets", where), name)
    target = _first_meant(group_of, module, classes, CONFIG)
    if target is not None:
        where = f"{CONFIG}: {group_of[target]}"
        weights = section(section(groups, group_of[target], CONFIG), "weights", where)
        if weights.get("strategy") == "group" and weights.get("type") == "int":
            return _Settings(
                code_width(weights, "num_bits", where),
                read_count(weights, "group_size", where),
                bool(weights.get("symmetric", True)),
                weights.get("actorder") in _IN_GROUPS,
            )
    raise UnsupportedError(
        f"{module} is not quantized to integers in groups", where=module, hint="give a float model"
    )


def _texts(options: Mapping[str, Any], name: str, where: str) -> list[str]:
    """A list of a configuration, as strings; empty if it is missing or null.

    Raises:
        UserInputError: it is not a list.
    """
    values = options.get(name) or []
    if not isinstance(values, list):
        raise UserInputError(f"{name} is {values!r}", where=where, hint="give a list")
    return [str(value) for value in values]


def _first_meant(
    targets: Iterable[str], module: str, classes: Collection[str], where: str
) -> str | None:
    """The most specific target that matches a module: a name, an expression, or a class.

    Raises:
        UserInputError: an expression is malformed.
    """
    names = sorted(targets, key=lambda text: (text.startswith(_PATTERN), text))
    by_name = next((text for text in names if _names(text, module, where)), None)
    return by_name or next((text for text in names if text in classes), None)


def _names(target: str, module: str, where: str) -> bool:
    if not target.startswith(_PATTERN):
        return target == module
    try:
        return matches(target.removeprefix(_PATTERN), module, full=False)
    except UserInputError as error:
        raise UserInputError(
            f"the target {quoted(target)} cannot be read: {error.what}",
            where=where,
            hint=error.hint,
        ) from None


def _decode(module: str, parts: Mapping[str, Tensor], settings: _Settings) -> CheckpointWeight:
    n, k = small_numbers(module, "weight_shape", parts["weight_shape"], 2)
    check_matrix(module, "weight_scale", parts["weight_scale"], None, "[N, L]")
    bits, group_size, zeros = settings.bits, settings.group_size, parts.get(_ZERO)
    codes = _unpack(module, "weight_packed", parts["weight_packed"], bits, k)
    scale = parts["weight_scale"].float()
    level = torch.full_like(scale, 2 ** (bits - 1))
    if zeros is not None:
        check_matrix(module, _ZERO, zeros, torch.int32, "[N · bits / 32, L]")
        level = _unpack(module, _ZERO, zeros.t(), bits, n).t().float()
    if level.shape != scale.shape:
        raise UserInputError(
            f"{module}.{_ZERO} is for {list(level.shape)} groups, and {module}.weight_scale is "
            f"{list(scale.shape)}",
            where=f"{module}.{_ZERO}",
        )
    order = _order(module, parts.get(_G_IDX), k, settings)
    codes = codes if order is None else codes[:, order]
    affine = affine_of(module, codes, scale, -scale * level, bits, group_size)
    act = ", act-order" if order is not None else ""
    return CheckpointWeight(affine, f"compressed-tensors {bits} bits{act}", order)


def _order(module: str, g_idx: Tensor | None, k: int, settings: _Settings) -> Tensor | None:
    """The order of a layer's columns in which groups are contiguous; see `column_order`.

    Raises:
        UserInputError: the configuration states an order, but there is none.
    """
    name = f"{module}.{_G_IDX}"
    if g_idx is None and settings.ordered and k > settings.group_size:
        raise missing_order(name, "actorder: group")
    return column_order(name, g_idx, k, settings.group_size)


def _unpack(module: str, part: str, packed: Tensor, bits: int, count: int) -> Tensor:
    """Rows of int32 words `[R, ceil(count · bits / 32)]` to `[R, count]` uint8."""
    check_matrix(module, part, packed, torch.int32, "words, rows of codes")
    words = -(-count * bits // 32)
    if packed.shape[1] != words:
        raise UserInputError(
            f"{module}.{part} is {list(packed.shape)}, and {count} codes of {bits} bits take "
            f"{words} int32 words",
            where=f"{module}.{part}",
            hint="the file may be truncated: fetch it again",
        )
    return unpack_stream(packed.contiguous().view(torch.uint8), bits, count)
