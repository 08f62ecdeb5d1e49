"""The tokens that end a text, from all who name them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qalora_compile.ir.end_tokens import end_tokens, ends_from_json, ends_to_json, with_ends


def test_all_places_are_asked_and_each_token_says_where_it_is_from() -> None:
    found = end_tokens(
        {"eos_token_id": 0},
        {"eos_token_id": [5, 2]},
        tokenizer=SimpleNamespace(eos_token_id=2),
        taught=[7],
    )
    assert found == {
        5: ["generation_config.json"],
        2: ["generation_config.json", "tokenizer"],
        0: ["config.json"],
        7: ["training"],
    }
    assert ends_from_json(ends_to_json(found)) == found


@pytest.mark.parametrize("value", [None, True, -1, "2", 2.0, [None], {}])
def test_what_is_no_token_ends_nothing(value: Any) -> None:
    assert end_tokens({"eos_token_id": value}, {}) == {}


def test_generation_settings_end_at_all_of_them() -> None:
    settings = {"top_k": 5, "eos_token_id": 3}
    assert with_ends(settings, {3: []}) == settings
    assert with_ends(settings, {3: [], 1: []})["eos_token_id"] == [3, 1]
    assert with_ends({}, {}) == {}
