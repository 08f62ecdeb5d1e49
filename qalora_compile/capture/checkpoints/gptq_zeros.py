"""Determines the meaning of the stored zero-points of each GPTQ layer.

There are three kinds of evidence. The tag of `config.json` covers the checkpoint and is believed
unless strong evidence contradicts it. Zero-points that are all the middle code, or all one less,
belong to a symmetric layer. The mean of a layer's weights is small relative to a step of their
codes, and reading one version as the other moves it by one step; reading an offset as a zero-point,
or the reverse, moves it by more than their standard deviation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qalora_compile.config import one_of
from qalora_compile.config.choices import FLOAT_OFFSET, FLOAT_ZERO, STORED_ZERO_POINTS, V1, V2
from qalora_compile.errors import UserInputError
from qalora_compile.ir.affine import expand_groups, group_count, sum_groups

_OTHER = {V1: V2, V2: V1}
_NEAR, _FAR = 0.25, 0.75
"""In steps of the codes: the largest mean of balanced weights, the least of a wrong version."""
_WIDEST = 4
"""Up to this many bits, a step is large relative to the mean of a layer's weights."""
_OVERRIDE = "(zero_points, --stored-zero-points, overrides that)"


@dataclass(frozen=True)
class StoredLayer:
    """The unpacked tensors of a layer.

    Attributes:
        codes: `[N, K]` uint8, groups contiguous.
        scale: `[N, L]` float32.
        zeros: `[N, L]` float32: the stored zero-points or offsets.
        floating: Whether they are stored in floating point.
        bits, group_size: Bits and group size of the codes.
        symmetric: Whether `config.json` states that zero-points are the middle code.
    """

    codes: Tensor
    scale: Tensor
    zeros: Tensor
    floating: bool
    bits: int
    group_size: int
    symmetric: bool

    def offset(self, form: str) -> Tensor:
        """`offset` of `w = scale · q + offset`, `[N, L]`, if the stored values are of `form`."""
        if form == FLOAT_OFFSET:
            return self.zeros
        zeros = (self.zeros + 1) % 2**self.bits if form == V1 else self.zeros
        return -self.scale * zeros

    @property
    def middle(self) -> int:
        """The zero-point of symmetric codes."""
        return int(2 ** (self.bits - 1))

    def shown(self) -> str | None:
        """The version in which all zero-points are the middle code, or None."""
        first = float(self.zeros[0, 0])
        version = {self.middle - 1: V1, self.middle: V2}.get(int(first))
        return version if version and bool((self.zeros == first).all()) else None

    def balance(self, form: str) -> float:
        """|mean| of the weights in steps of their codes."""
        k = self.codes.shape[1]
        columns = torch.full((group_count(k, self.group_size),), float(self.group_size))
        columns[-1] = k - self.group_size * (len(columns) - 1)
        codes = sum_groups(self.codes.float(), self.group_size)
        total = (self.scale * codes + self.offset(form) * columns).double().sum()
        step = (self.scale * columns).double().sum()
        return abs(float(total / step)) if float(step) else 0.0

    def is_plausible(self, form: str) -> bool:
        """Whether the mean of the weights is within their standard deviation of 0."""
        k, g = self.codes.shape[1], self.group_size
        weight = self.codes * expand_groups(self.scale, g, k)
        weight += expand_groups(self.offset(form), g, k)
        return float(weight.mean().abs()) <= float(weight.std(correction=0))


def zero_forms(
    layers: Mapping[str, StoredLayer], tag: str, stated: str | None
) -> tuple[dict[str, str], tuple[str, ...]]:
    """How the zero-points of each layer are stored, and notes on contrary evidence.

    Args:
        layers: Layers by module.
        tag: The version according to `config.json`.
        stated: What the caller states for all layers, one of `STORED_ZERO_POINTS`, or None.

    Raises:
        UserInputError: only some layers have floating ones, they are not of the kind that the
            caller states, or their meaning cannot be determined.
    """
    if stated is not None:
        one_of("zero_points", stated, STORED_ZERO_POINTS)
    if not layers:
        return {}, ()
    first, one = next(iter(layers.items()))
    odd = next((m for m, layer in layers.items() if layer.floating != one.floating), None)
    if odd is not None:
        kinds = {False: "packed integers", True: "in floating point"}
        raise UserInputError(
            f"{odd}.qzeros is {kinds[layers[odd].floating]}, and {first}.qzeros "
            f"{kinds[one.floating]}",
            where=f"{odd}.qzeros",
            hint="store those of all layers packed, or those of all in floating point",
        )
    fitting = (FLOAT_ZERO, FLOAT_OFFSET) if one.floating else (V1, V2)
    if stated is not None and stated not in fitting:
        raise UserInputError(
            f"zero_points is {stated!r}, but they are stored "
            f"{'in floating point' if one.floating else 'as integers'}",
            where=f"{first}.qzeros",
            hint=f"use {fitting[0]!r} or {fitting[1]!r}",
        )
    if stated is not None:
        return dict.fromkeys(layers, stated), ()
    return _float_forms(layers) if one.floating else _versions(layers, tag)


def _float_forms(layers: Mapping[str, StoredLayer]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Zero-points or offsets, whichever centers the weights of a layer around 0.

    Raises:
        UserInputError: both or neither do.
    """
    found = {}
    for module, layer in layers.items():
        fitting = [form for form in (FLOAT_ZERO, FLOAT_OFFSET) if layer.is_plausible(form)]
        if len(fitting) != 1:
            raise UserInputError(
                f"floating zero-points with a median of {float(layer.zeros.median()):.3g} may be "
                "zero-points or offsets",
                where=f"{module}.qzeros",
                hint=f"state which: zero_points={FLOAT_ZERO!r}, for scale · (q − z), or "
                f"{FLOAT_OFFSET!r}, for scale · q + z",
            )
        found[module] = fitting[0]
    offsets = [module for module, form in found.items() if form == FLOAT_OFFSET]
    if not 0 < len(offsets) < len(found):
        return found, ()
    return found, (
        f"{len(offsets)} layers, first {offsets[0]}, store offsets and {len(found) - len(offsets)} "
        f"zero-points, by their weights {_OVERRIDE}",
    )


def _versions(
    layers: Mapping[str, StoredLayer], tag: str
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The tag's version, except for layers that are certainly symmetric in the other version.

    Raises:
        UserInputError: only the weights contradict the tag, in all remaining layers.
    """
    other = _OTHER[tag]
    against = [module for module, layer in layers.items() if layer.shown() == other]
    lean = {m for m, layer in layers.items() if _leans(layer, tag, other)}
    backed = any(_is_balanced(layer, tag) for layer in layers.values())
    all_layers = len(against) == len(layers) and not backed and (len(layers) > 1 or bool(lean))
    sure = {m for m in against if all_layers or (layers[m].symmetric and m in lean)}
    if lean >= layers.keys() - sure and len(lean - sure) > 1:
        first = next(module for module in layers if module in lean - sure)
        raise UserInputError(
            f"zero-points are stored as {tag} according to config.json, but then the weights of "
            f"{first} ({len(lean - sure)} layers) are all too large or too small by one step",
            where=f"{first}.qzeros",
            hint=f"state how they are stored: zero_points={other!r} (finetune, adapt or quantize "
            f"--stored-zero-points {other})",
        )
    read = {module: other if module in sure else tag for module in layers}
    return read, tuple(_notes(layers, against, read, tag, lean - sure - set(against)))


def _leans(layer: StoredLayer, tag: str, other: str) -> bool:
    """Whether the weights of a layer are balanced in the version other than the tag's."""
    return _is_balanced(layer, other) and layer.balance(tag) > _FAR


def _is_balanced(layer: StoredLayer, version: str) -> bool:
    """Whether the weights of a layer have a mean of about 0; False for codes of many bits."""
    return layer.bits <= _WIDEST and layer.balance(version) < _NEAR


def _notes(
    layers: Mapping[str, StoredLayer],
    against: list[str],
    read: Mapping[str, str],
    tag: str,
    lean: set[str],
) -> list[str]:
    notes = []
    for version in dict.fromkeys(read[module] for module in against):
        same = [module for module in against if read[module] == version]
        middle = layers[same[0]].middle
        notes.append(
            f"zero-points are stored as {tag} by config.json, but those of {same[0]}, {middle}, "
            f"are stored as {middle - (_OTHER[tag] == V1)} ({len(same)} layers): read as "
            f"{version} {_OVERRIDE}"
        )
    unclear = [m for m, layer in layers.items() if layer.symmetric and layer.shown() is None]
    if unclear:
        notes.append(
            f"{len(unclear)} layers are symmetric by config.json, first {unclear[0]}, but their "
            f"zero-points are not: read as {read[unclear[0]]} {_OVERRIDE}"
        )
    if lean:
        first = next(module for module in layers if module in lean)
        notes.append(
            f"{len(lean)} layers, first {first}, have a mean of about one step of their codes: "
            f"read as {tag}, as config.json says {_OVERRIDE}"
        )
    return notes
