"""Expressions match as Python's own do, in time that does not explode."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qalora_compile.errors import UserInputError
from qalora_compile.linear_regex import compile_expression, is_harmless

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
    # Python's `$` also matches before a line's end, which no text here has
    made = compile_expression(pattern)
    assert made.matches(text, whole=False) == (re.match(pattern, text) is not None)
    assert made.matches(text, whole=True) == (re.fullmatch(pattern, text) is not None)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*.*.*.*)*x", "(a|a)*b", "(a?){200}a{200}"])
def test_an_expression_that_explodes_elsewhere_ends_at_once(pattern: str) -> None:
    began = time.monotonic()
    compile_expression(pattern).matches("a" * 400 + "!", whole=True)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        ")",
        "[a",
        "*",
        "a**",
        "\\",
        "a{3,2}",
        "x" * 1001,
        "(" * 40 + ")" * 40,
        "((((a{99}){99}){99}){99})",
    ],
)
def test_what_cannot_be_matched_is_refused(pattern: str) -> None:
    with pytest.raises(UserInputError):
        compile_expression(pattern)


@pytest.mark.parametrize(
    ("pattern", "harmless"),
    [
        ("re:.*lm_head", True),
        (r"model\.layers\.(0|1)\.q", True),
        ("(a+)+$", False),
        ("(.*a){3}", False),
        ("(a|a)" * 20 + "x", False),
        ("(?!x)(.*b)?c", True),
        (".*.*.*.*x", False),
    ],
)
def test_what_may_be_given_to_another_engine(pattern: str, harmless: bool) -> None:
    assert is_harmless(pattern) == harmless


@pytest.mark.parametrize("pattern", [r".*(?<!down_proj)$", r"(?!x)a.*", r"(a|b)c\1"])
def test_what_looks_around_is_left_to_python_where_that_is_harmless(pattern: str) -> None:
    for text in ("aca", "acb", "up_proj", "down_proj", "xa"):
        made = compile_expression(pattern)
        assert made.matches(text, whole=False) == (re.match(pattern, text) is not None)


@pytest.mark.parametrize("pattern", ["(?=a)(a+)+$", r"(.*.*.*.*)\1x"])
def test_what_looks_around_and_explodes_is_refused(pattern: str) -> None:
    with pytest.raises(UserInputError, match="cannot be read"):
        compile_expression(pattern)
