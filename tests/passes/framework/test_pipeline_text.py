"""The text of passes: what is written is read back as the same values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qalora_compile.config import POOLINGS, SUPPORTED_BITS
from qalora_compile.errors import UserInputError
from qalora_compile.passes import Pass, Pipeline, get_pass
from qalora_compile.passes.framework.pipeline_text import format_pass, parse_passes


def one_value(text: str) -> Any:
    """The value written as `text`."""
    (((_, options)),) = parse_passes(f"p{{v={text}}}")
    return options["v"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("-4", -4),
        ("0.5", 0.5),
        ("2.", 2.0),
        ("1e-07", 1e-07),
        ("-1E+3", -1000.0),
        ("true", True),
        ("false", False),
        ("none", None),
        ("sum", "sum"),
        ("all-linear", "all-linear"),
        ("model.layers.*", "model.layers.*"),
        ('"true"', "true"),
        ('"4"', "4"),
        ('"a, b}\\n\\""', 'a, b}\n"'),
        ('"\\u00e9"', "é"),
        ("[]", ()),
        ("[a]", ("a",)),
        ('[ 1 , "b c" , none ]', (1, "b c", None)),
        ("[[1,2],[]]", ((1, 2), ())),
    ],
)
def test_values_are_read_by_their_form(text: str, value: object) -> None:
    found = one_value(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "p"),
        ({"bits": 4, "group_size": 32}, "p{bits=4,group-size=32}"),
        ({"flag": True, "nothing": None}, "p{flag=true,nothing=none}"),
        ({"a": "sum", "b": "two words", "c": ""}, 'p{a=sum,b="two words",c=""}'),
        ({"a": "true", "b": "none", "c": "7"}, 'p{a="true",b="none",c="7"}'),
        ({"t": ("q_proj", "re:^a", "*.mlp.*")}, 'p{t=[q_proj,"re:^a",*.mlp.*]}'),
        ({"t": ()}, "p{t=[]}"),
        ({"x": 1e-07, "y": -0.5}, "p{x=1e-07,y=-0.5}"),
    ],
)
def test_options_are_written_in_the_shortest_form_that_is_read_back(
    options: dict[str, object], text: str
) -> None:
    assert format_pass("p", options) == text
    assert parse_passes(text) == [("p", options)]


TRICKY = st.text(alphabet="-.0123456789eE+_*?/@", min_size=1, max_size=6)


@given(TRICKY)
@example("-5")
@example("-1e5")
@example("-5x")
@example("--")
@example(".5")
def test_texts_that_look_like_numbers_stay_texts(value: str) -> None:
    written = format_pass("p", {"v": value, "w": (value,)})
    assert parse_passes(written) == [("p", {"v": value, "w": (value,)})], written


NAME = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True)
PATTERN = st.one_of(
    st.lists(NAME, min_size=1, max_size=3).map(".".join),
    NAME.map(lambda n: f"*.{n}"),
    NAME.map(lambda n: f"re:^{n}\\.(0|1)$"),
    st.integers(0, 99).map(str),
    st.text(max_size=8),
)
PASSES = st.one_of(
    st.builds(
        lambda targets, exclude: get_pass(
            "annotate-linears", {"targets": tuple(targets), "exclude": tuple(exclude)}
        ),
        st.lists(PATTERN, max_size=3),
        st.lists(PATTERN, max_size=2),
    ),
    st.builds(
        lambda bits, group: get_pass("quantize-groups", {"bits": bits, "group_size": group}),
        st.sampled_from(SUPPORTED_BITS),
        st.integers(1, 4096),
    ),
    st.builds(
        lambda **options: get_pass("insert-adapters", options),
        rank=st.integers(1, 512),
        alpha=st.floats(allow_nan=False, allow_infinity=False),
        pooling=st.sampled_from(POOLINGS),
        group_size=st.none() | st.integers(1, 4096),
        use_rslora=st.booleans(),
        seed=st.integers(0, 2**31),
    ),
    st.just(get_pass("fold-adapters")),
    st.just(get_pass("share-group-sums")),
    st.builds(
        lambda **options: get_pass("legalize-ort-stock", options),
        accuracy_level=st.sampled_from([0, 4]),
        correction=st.sampled_from(["fp32", "digits"]),
    ),
    st.builds(
        lambda **options: get_pass("legalize-ort", options),
        accuracy_level=st.sampled_from([0, 2, 4]),
        parameter_dtype=st.sampled_from(["float32", "float16"]),
    ),
    st.just(get_pass("legalize-onnx")),
)


@given(PASSES)
def test_every_pass_with_any_options_is_read_back_as_it_was(step: Pass) -> None:
    (again,) = Pipeline.parse(str(step)).passes
    assert again == step
    assert str(again) == str(step)


def test_a_complete_pipeline_parses_back() -> None:
    text = (
        'annotate-linears{targets=[q_proj,"re:mlp"],exclude=[],keep-heads=false},'
        'assign-bits{choices=["a.q_proj=8/16"]},'
        "quantize-groups{bits=3,group-size=24,method=gptq,refine-offsets=false,act-order=true,"
        "damping=0.05,budget=none,budget-unit=bits,zero-point=real,learn-steps=48,learn-rate=0.001},"
        "insert-adapters{rank=2,alpha=4.0,pooling=mean,group-size=48,use-rslora=true,dropout=0.0,seed=5,"
        'init=zeros,rank-budget=none,kind=lora,zero-point=real,ranks=["a.q_proj=3"]},'
        "share-group-sums,fold-adapters,legalize-ort-stock{accuracy-level=4,correction=digits},"
        "share-group-sums"
    )
    pipeline = Pipeline.parse(text)
    assert str(pipeline) == text
    assert Pipeline.parse(str(pipeline)) == pipeline


def test_space_and_underscores_are_tolerated() -> None:
    loose = "  quantize-groups { group_size = 8 , bits=2 } , insert-adapters{}\n"
    assert Pipeline.parse(loose) == Pipeline.parse(
        "quantize-groups{bits=2,group-size=8},insert-adapters"
    )


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("a b", 2, "expected ',' between passes"),
        ("a,", 2, "expected a pass name"),
        ("4a", 0, "expected a pass name"),
        ("a{=1}", 2, "expected an option name"),
        ("a{b}", 3, "expected '='"),
        ("a{b=}", 4, "expected a value"),
        ("a{b=1", 5, "expected ','"),
        ("a{b=[1,", 7, "expected a value"),
        ("a{b=[1}", 6, "expected ','"),
        ("a{b=4x}", 5, "expected ','"),
        ('a{b="c}', 4, "unfinished string"),
        ("a}", 1, "expected ',' between passes"),
    ],
)
def test_a_mistake_is_located(text: str, position: int, expected: str) -> None:
    with pytest.raises(UserInputError) as caught:
        parse_passes(text)
    assert caught.value.what == f"{expected} at position {position} of the pipeline"
    assert caught.value.where == f"{text[:position]}⟶{text[position:]}"
    assert "name{option=value" in str(caught.value.hint)


@given(st.text(alphabet='ab{}[]=,"4- .\\', max_size=14))
def test_any_text_is_read_or_refused_with_a_position(text: str) -> None:
    refused: UserInputError | None = None
    found: list[tuple[str, dict[str, Any]]] = []
    try:
        found = parse_passes(text)
    except UserInputError as error:
        refused = error
    if refused is not None:
        assert str(refused.where).replace("⟶", "", 1) == text
        return
    again = ",".join(format_pass(name, options) for name, options in found)
    assert found
    assert parse_passes(again) == found


@pytest.mark.parametrize(
    "text",
    [
        "quantize-groups{bits=5}",
        "quantize-groups{bits=4.0}",
        "quantize-groups{bits=true}",
        "quantize-groups{group-size=0}",
        "quantize-groups{group-size=8.0}",
        "quantize-groups{group-size=[8]}",
        "quantize-groups{method=best}",
        "quantize-groups{damping=0.0}",
        "quantize-groups{act-order=1}",
        "quantize-groups{calibration=[1]}",
        "insert-adapters{rank=none}",
        "insert-adapters{pooling=max}",
        "insert-adapters{alpha=big}",
        "insert-adapters{use-rslora=no}",
        "insert-adapters{use-rslora=3}",
        "insert-adapters{seed=lucky}",
        "legalize-ort-stock{accuracy-level=2}",
        "legalize-ort-stock{accuracy-level=false}",
        "annotate-linears{targets=[0.5]}",
        "annotate-linears{exclude=none}",
    ],
)
def test_an_option_of_the_wrong_kind_is_refused_when_read(text: str) -> None:
    with pytest.raises(UserInputError) as caught:
        Pipeline.parse(text)
    assert caught.value.hint, "the error says what would be right"
