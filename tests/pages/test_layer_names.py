"""Paths of layers, taken apart for maps and grouped tables."""

from __future__ import annotations

import pytest

from qalora_compile.pages.layer_names import LayerName, by_kind, grids, layer_name


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("model.layers.3.self_attn.q_proj", ("model.layers", 3, "self_attn.q_proj")),
        ("encoder.block.0.layer.1.wi", ("encoder.block", 0, "layer.1.wi")),
        ("layers.0", ("layers", 0, "")),
        ("2.weight", ("", 2, "weight")),
        ("lm_head", ("", None, "lm_head")),
        ("output logits\n.0x", ("", None, "output logits\n.0x")),
    ],
)
def test_a_path_is_taken_apart_at_its_first_number(
    path: str, parts: tuple[str, int | None, str]
) -> None:
    assert layer_name(path) == LayerName(*parts)


def test_layers_are_grouped_by_kind_and_those_outside_come_last() -> None:
    paths = ["head", "m.0.q", "m.0.k", "m.1.q", "m.1.k"]
    assert by_kind(paths) == {"q": [1, 3], "k": [2, 4], "other layers": [0]}
    two = ["e.0.q", "d.0.q", "e.1.q"]
    assert by_kind(two) == {"e.*.q": [0, 2], "d.*.q": [1]}


def test_a_stack_is_a_grid_with_holes_and_wide_ones_are_split() -> None:
    paths = ["m.0.q", "m.0.k", "m.1.q", "head", "n.0.q", "p.0", "p.1"]
    (grid,), rest = grids(paths, columns=12)
    assert (grid.stack, grid.kinds) == ("m", ("q", "k"))
    assert grid.rows == ((0, (0, 1)), (1, (2, None)))
    assert rest == [3, 4, 5, 6], "one block, one kind, or no number: no grid"
    wide = [f"m.{i}.k{j}" for i in (0, 1) for j in range(5)]
    found, rest = grids(wide, columns=2)
    assert [len(one.kinds) for one in found] == [2, 2, 1] and rest == []
    assert sorted(p for one in found for _, row in one.rows for p in row if p is not None) == [
        *range(10)
    ]
