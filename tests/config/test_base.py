"""All specifications: ranges, JSON, unknown keys."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qalora_compile.config import (
    BUDGET_UNITS,
    INITS,
    METHODS,
    POOLINGS,
    SUPPORTED_BITS,
    AdapterSpec,
    ExportSpec,
    QuantSpec,
    Spec,
)
from qalora_compile.errors import UserInputError

SPECS = [QuantSpec, AdapterSpec, ExportSpec]


@given(
    st.one_of(
        st.builds(
            QuantSpec,
            bits=st.sampled_from(SUPPORTED_BITS),
            group_size=st.integers(1, 4096),
            method=st.sampled_from(METHODS),
        ),
        st.builds(
            QuantSpec,
            bits=st.just("auto"),
            budget=st.floats(0.01, 1e6),
            budget_unit=st.sampled_from(BUDGET_UNITS),
        ),
        st.builds(
            QuantSpec,
            bits=st.just("auto"),
            group_size=st.just("auto"),
            budget=st.floats(0.01, 1e6),
            budget_unit=st.sampled_from(("stored-bits", "megabytes")),
        ),
        st.builds(
            AdapterSpec,
            rank=st.integers(1, 512),
            alpha=st.floats(-1e6, 1e6),
            pooling=st.sampled_from(POOLINGS),
            group_size=st.none() | st.integers(1, 4096),
            use_rslora=st.booleans(),
            seed=st.integers(0, 2**31),
            init=st.sampled_from(INITS),
        ),
        st.builds(AdapterSpec, rank=st.just("auto"), rank_budget=st.integers(1, 10**9)),
        st.builds(
            ExportSpec,
            opset=st.sampled_from(ExportSpec.OPSETS),
            accuracy_level=st.sampled_from((0, 4)),
            overwrite=st.booleans(),
        ),
    )
)
def test_json_round_trip(spec: Spec) -> None:
    assert type(spec).from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize("kind", SPECS)
def test_specs_are_frozen_and_keyword_only(kind: type[Spec]) -> None:
    spec = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.bits = 3  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        kind(4)  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", SPECS)
def test_an_unknown_key_is_refused_and_the_fields_are_listed(kind: type[Spec]) -> None:
    with pytest.raises(UserInputError, match="no field 'block_size'") as caught:
        kind.from_json({"block_size": 32})
    for field in dataclasses.fields(kind):
        assert field.name in str(caught.value)


BAD: dict[str, tuple[type[Spec], dict[str, Any]]] = {
    "bits 5": (QuantSpec, {"bits": 5}),
    "bits 0": (QuantSpec, {"bits": 0}),
    "bits as text": (QuantSpec, {"bits": "4"}),
    "group size 0": (QuantSpec, {"group_size": 0}),
    "group size -1": (QuantSpec, {"group_size": -1}),
    "group size 2.5": (QuantSpec, {"group_size": 2.5}),
    "group size true": (QuantSpec, {"group_size": True}),
    "method": (QuantSpec, {"method": "best"}),
    "seed beyond torch's": (AdapterSpec, {"seed": 2**63}),
    "group auto, bits given": (QuantSpec, {"group_size": "auto"}),
    "group auto, codes counted alone": (
        QuantSpec,
        {"group_size": "auto", "bits": "auto", "budget": 4.0},
    ),
    "bits without a budget": (QuantSpec, {"budget": None, "bits": "auto"}),
    "budget 0": (QuantSpec, {"budget": 0, "bits": "auto"}),
    "budget infinite": (QuantSpec, {"budget": math.inf, "bits": "auto"}),
    "budget for nothing": (QuantSpec, {"budget": 3.0, "bits": 4}),
    "budget unit": (QuantSpec, {"budget_unit": "stones"}),
    "rank 0": (AdapterSpec, {"rank": 0}),
    "alpha infinite": (AdapterSpec, {"alpha": math.inf}),
    "alpha NaN": (AdapterSpec, {"alpha": math.nan}),
    "alpha text": (AdapterSpec, {"alpha": "32"}),
    "pooling": (AdapterSpec, {"pooling": "max"}),
    "pool 0": (AdapterSpec, {"group_size": 0}),
    "rank as text": (AdapterSpec, {"rank": "8"}),
    "no budget": (AdapterSpec, {"rank_budget": None, "rank": "auto"}),
    "rank budget 0": (AdapterSpec, {"rank_budget": 0, "rank": "auto"}),
    "budget without use": (AdapterSpec, {"rank_budget": 9, "rank": 4}),
    "init": (AdapterSpec, {"init": "random"}),
    "opset": (ExportSpec, {"opset": 9}),
    "accuracy": (ExportSpec, {"accuracy_level": 3}),
}


@pytest.mark.parametrize("case", BAD)
def test_values_out_of_range_are_refused_with_a_hint(case: str) -> None:
    kind, values = BAD[case]
    with pytest.raises(UserInputError) as caught:
        kind(**values)
    assert caught.value.hint
    assert repr(next(iter(values.values()))) in caught.value.what
    with pytest.raises(UserInputError):
        kind.from_json(values)
