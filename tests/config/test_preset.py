"""Presets: what each stands for, and that options replace parts of it."""

from __future__ import annotations

from typing import Any

import pytest

from qalora_compile.config import PRESETS, ExportSpec, preset_of
from qalora_compile.errors import UserInputError


@pytest.mark.parametrize(
    ("name", "level", "dtype"),
    [
        (None, 0, "auto"),
        ("exact", 0, "float32"),
        ("fast", 4, "float16"),
        ("small", 0, "float16"),
        ("web", 0, "auto"),
    ],
)
def test_a_preset_gives_what_is_not_given(name: str | None, level: int, dtype: str) -> None:
    spec = ExportSpec.from_preset(name)
    assert (spec.accuracy_level, spec.parameter_dtype) == (level, dtype)
    other = ExportSpec.from_preset(name, accuracy_level=2, parameter_dtype="float32")
    assert (other.accuracy_level, other.parameter_dtype) == (2, "float32")


def test_presets_fit_the_target() -> None:
    stock = ExportSpec.from_preset("fast", target="ort-stock")
    assert (stock.accuracy_level, stock.parameter_dtype) == (4, "float32")
    assert ExportSpec.from_preset("web").expansion == "float"
    assert ExportSpec.from_preset("web", expansion="nbits").expansion == "nbits"
    assert ExportSpec.from_preset("web", target="ort-stock").expansion == "nbits"
    for target in ("onnx", "gguf", "mlx"):
        assert ExportSpec.from_preset(None, target=target) == ExportSpec(target=target)
        with pytest.raises(UserInputError, match="preset is 'fast' for target"):
            ExportSpec.from_preset("fast", target=target)


@pytest.mark.parametrize(
    "values", [{"name": "quick"}, {"name": "fast", "target": "ort-stock", "correction": "none"}]
)
def test_bad_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserInputError, match="quick|correction"):
        ExportSpec.from_preset(**values)


def test_an_open_parameter_dtype_is_one_of_target_ort() -> None:
    assert ExportSpec(parameter_dtype="auto").parameter_dtype == "auto"
    with pytest.raises(UserInputError, match="parameter_dtype is 'auto'"):
        ExportSpec(target="mlx", parameter_dtype="auto")


def test_only_the_exact_preset_and_the_default_leave_outputs_alone() -> None:
    exact = {n for n, p in PRESETS.items() if p.embeddings == "float" and p.accuracy_level == 0}
    assert exact == {"exact"}
    assert preset_of(None).embeddings == preset_of(None).parameter_dtype == "auto"


def test_a_preset_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(UserInputError, match=r"preset is 'fsat'"):
        preset_of("fsat")
