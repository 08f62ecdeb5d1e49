"""Expressions match as Python's own do, in time that does not explode."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qalora_compile.errors import UserInputError
from qalora_compile.untrusted.patterns import matches

ATOMS = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-c0]", "^", "$"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map("|".join).map("({})".format),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{0,}", "*?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=8,
)


@given(PATTERNS, st.text("abc0.", max_size=8))
def test_it_matches_what_python_matches(pattern: str, text: str) -> None:
    # Python's `$` also matches before a line's end, which no text here has.
    assert matches(pattern, text, full=False) == (re.match(pattern, text) is not None)
    assert matches(pattern, text, full=True) == (re.fullmatch(pattern, text) is not None)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*.*.*.*)*x", "(a|a)*b", "(a?){200}a{200}"])
def test_an_expression_that_explodes_elsewhere_ends_at_once(pattern: str) -> None:
    began = time.monotonic()
    matches(pattern, "a" * 400 + "!", full=True)
    assert time.monotonic() - began < 5


def test_looking_around_is_left_to_python_where_it_is_harmless() -> None:
    pattern = r"^(?!.*lm_head).*_proj$"
    assert matches(pattern, "model.layers.0.q_proj", full=False)
    assert not matches(pattern, "lm_head.q_proj", full=False)
    began = time.monotonic()
    assert not matches(r"(?!.*b.*c).*d", "a" * 2000, full=True)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "pattern",
    ["(", "[a", "*", "(?=(a+)+b)", r"(a+)+\1", "\\", "x" * 10_001, "((((a{99}){99}){99}){99})"],
)
def test_what_cannot_be_matched_is_refused(pattern: str) -> None:
    with pytest.raises(UserInputError, match="cannot be matched"):
        matches(pattern, "a", full=True)
