"""Patterns that select sites: exact names, dotted suffixes, globs and regular expressions."""

from __future__ import annotations

import fnmatch
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qalora_compile.errors import UserInputError
from qalora_compile.passes.analysis.select_sites import as_patterns, match_patterns

PATHS = [
    f"model.layers.{layer}.{part}"
    for layer in (0, 1, 10)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
] + ["lm_head"]
NAMES = {path: (path,) for path in PATHS}


def select(*patterns: str) -> set[str]:
    return match_patterns(patterns, NAMES, "targets")


@pytest.mark.parametrize(
    ("pattern", "count", "expected"),
    [
        ("lm_head", 1, "lm_head"),
        ("model.layers.1.mlp.up_proj", 1, r"model\.layers\.1\.mlp\.up_proj"),
        ("q_proj", 3, r".*\.q_proj"),
        ("mlp.up_proj", 3, r".*\.mlp\.up_proj"),
        ("*", 13, ".*"),
        ("*_proj", 12, ".*_proj"),
        ("*.mlp.*", 6, r".*\.mlp\..*"),
        ("model.layers.1.*", 4, r"model\.layers\.1\..*"),
        ("model.layers.1*", 8, r"model\.layers\.(1|10)\..*"),
        ("model.layers.?.mlp.up_proj", 2, r"model\.layers\.[01]\.mlp\.up_proj"),
        ("*.[qv]_proj", 6, r".*\.self_attn\..*"),
        ("re:_proj$", 12, ".*_proj"),
        ("re:layers\\.(0|10)\\.", 8, r"model\.layers\.(0|10)\..*"),
        ("re:^lm_head$", 1, "lm_head"),
        ("re:", 13, ".*"),
    ],
)
def test_each_form_of_pattern(pattern: str, count: int, expected: str) -> None:
    assert select(pattern) == {path for path in PATHS if re.fullmatch(expected, path)}
    assert len(select(pattern)) == count


@pytest.mark.parametrize(
    "pattern",
    [
        "proj",  # a suffix begins at a dot
        "layers.1",  # and reaches to the end
        "model",
        "LM_HEAD",
        "mlp.*",  # a glob covers the full path
        "up_proj.",
        ".q_proj",
        "",
        "re:^q_proj",
    ],
)
def test_what_does_not_match(pattern: str) -> None:
    with pytest.raises(UserInputError, match="matches no linear layer") as caught:
        select(pattern)
    assert caught.value.where == "targets"
    assert str(caught.value.hint).startswith("near names: ")


@given(st.sampled_from(PATHS), st.integers(0, 5))
def test_every_dotted_suffix_selects_its_path(path: str, cut: int) -> None:
    suffix = ".".join(path.split(".")[-(cut + 1) :])
    expected = {p for p in PATHS if p == suffix or p.endswith("." + suffix)}
    assert path in expected
    assert select(suffix) == expected


@given(st.lists(st.sampled_from(["q_proj", "lm_head", "*.mlp.*", "re:\\.10\\."]), max_size=4))
def test_several_patterns_select_the_union(patterns: list[str]) -> None:
    expected: set[str] = set().union(*(select(p) for p in patterns))
    assert select(*patterns) == expected


@given(st.text(alphabet="abc.*?[]0_", min_size=1, max_size=8))
def test_any_pattern_selects_or_is_refused(pattern: str) -> None:
    alone = {path for path in PATHS if fnmatch.fnmatchcase(path, pattern)}
    if not set(pattern) & set("*?["):
        alone = {path for path in PATHS if f".{path}".endswith(f".{pattern}")}
    if alone:
        assert select(pattern) == alone
    else:
        with pytest.raises(UserInputError, match=re.escape(repr(pattern))):
            select(pattern)


def test_any_alias_of_a_site_will_do() -> None:
    names = {"lm_head": ("lm_head", "embed"), "fc@2": ("fc", "fc"), "fc": ("fc", "fc")}
    assert match_patterns(["embed"], names, "targets") == {"lm_head"}
    assert match_patterns(["fc"], names, "targets") == {"fc", "fc@2"}


def test_one_good_pattern_does_not_excuse_a_bad_one() -> None:
    with pytest.raises(UserInputError, match="'k_proj' matches no linear layer"):
        select("q_proj", "k_proj")


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("qproj", "q_proj"), ("lmhead", "lm_head"), ("model.layer.1.mlp.up_proj", "layers.1.mlp.up")],
)
def test_near_names_are_listed(pattern: str, near: str) -> None:
    with pytest.raises(UserInputError) as caught:
        select(pattern)
    assert near in str(caught.value.hint)
    assert str(caught.value.hint).count(",") <= 4


def test_a_name_like_none_of_them_lists_the_first_few() -> None:
    with pytest.raises(UserInputError) as caught:
        select("zzzzzzzz")
    assert str(caught.value.hint) == "near names: " + ", ".join(sorted(PATHS)[:5])


def test_a_model_without_linear_layers_says_so() -> None:
    with pytest.raises(UserInputError) as caught:
        match_patterns(["fc"], {}, "exclude")
    assert caught.value.where == "exclude"
    assert caught.value.hint == "the model has no linear layer"
    assert match_patterns([], {}, "exclude") == set()


@pytest.mark.parametrize("expression", ["(", "[a", "*", "a{2,1}"])
def test_a_broken_regular_expression_is_shown(expression: str) -> None:
    with pytest.raises(re.error):
        re.compile(expression)
    with pytest.raises(UserInputError, match="is not a regular expression") as caught:
        select(f"re:{expression}")
    assert expression in caught.value.what


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("fc", ("fc",)),
        (3, ("3",)),
        (["a", 0], ("a", "0")),
        (("a",), ("a",)),
        ((), ()),
    ],
)
def test_values_become_patterns(value: object, expected: tuple[str, ...]) -> None:
    assert as_patterns(value, "targets") == expected


@pytest.mark.parametrize("value", [None, True, 1.5, ["a", None], [["a"]], {"a": 1}, b"fc"])
def test_values_that_are_no_patterns_are_refused(value: object) -> None:
    with pytest.raises(UserInputError, match="exclude holds"):
        as_patterns(value, "exclude")
