"""Paths of layers, taken apart: the stack of similar blocks, the block's number, the kind of layer.

`model.layers.3.self_attn.q_proj` is layer `self_attn.q_proj` of block 3 of the stack
`model.layers`. Layers outside of a stack, such as `lm_head`, have no number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_PATH = re.compile(r"(?:(?P<stack>.+?)\.)?(?P<block>\d+)(?:\.(?P<kind>.+))?", re.DOTALL)


@dataclass(frozen=True)
class LayerName:
    """The parts of a path.

    Attributes:
        stack: The path of the stack; "" outside of one.
        block: The number of the block; None outside of a stack.
        kind: The rest of the path, or all of it outside of a stack.
    """

    stack: str
    block: int | None
    kind: str


def layer_name(path: str) -> LayerName:
    """Take a path apart at its first number."""
    found = _PATH.fullmatch(path)
    if found is None:
        return LayerName("", None, path)
    return LayerName(found["stack"] or "", int(found["block"]), found["kind"] or "")


def by_kind(paths: Iterable[str]) -> dict[str, list[int]]:
    """Label of a kind → positions of its layers, in the order of the first of each.

    Layers outside of a stack are of the kind `other layers`, which comes last.
    """
    names = [layer_name(path) for path in paths]
    several = len({name.stack for name in names if name.block is not None}) > 1
    found: dict[str, list[int]] = {}
    others = [place for place, name in enumerate(names) if name.block is None]
    for place, name in enumerate(names):
        if name.block is not None:
            found.setdefault(_label(name, with_stack=several), []).append(place)
    return found | ({"other layers": others} if others else {})


def _label(name: LayerName, *, with_stack: bool) -> str:
    if with_stack or not name.kind:
        return ".".join(part for part in (name.stack, "*", name.kind) if part)
    return name.kind


@dataclass(frozen=True)
class Grid:
    """A stack as a grid: one row for each block, one column for each kind of layer.

    Attributes:
        stack: The path of the stack.
        kinds: The kind of each column.
        rows: Number of a block, and the position of the layer in each column, None if it has none.
    """

    stack: str
    kinds: tuple[str, ...]
    rows: tuple[tuple[int, tuple[int | None, ...]], ...]


def grids(paths: Sequence[str], *, columns: int) -> tuple[list[Grid], list[int]]:
    """The stacks of some layers as grids, and the positions of all layers outside of them.

    A stack of one block, or of one kind of layer, is no grid.

    Args:
        paths: Paths of layers, each once.
        columns: The largest number of columns of a grid; a stack with more kinds gives several.
    """
    places: dict[str, dict[tuple[int, str], int]] = {}
    rest = []
    for place, path in enumerate(paths):
        name = layer_name(path)
        if name.block is None:
            rest.append(place)
        else:
            places.setdefault(name.stack, {})[name.block, name.kind] = place
    found = []
    for stack, cells in places.items():
        blocks = sorted({block for block, _ in cells})
        kinds = list(dict.fromkeys(kind for _, kind in cells))
        if len(blocks) < 2 or len(kinds) < 2:
            rest += cells.values()
            continue
        for start in range(0, len(kinds), columns):
            part = tuple(kinds[start : start + columns])
            rows = tuple((b, tuple(cells.get((b, kind)) for kind in part)) for b in blocks)
            found.append(Grid(stack, part, rows))
    return found, sorted(rest)
