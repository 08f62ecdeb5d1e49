"""The public names, where they live, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import qalora_compile as qc
from qalora_compile import testing, verify

HOMES = {
    "AdapterSpec": "config.adapter",
    "ExportSpec": "config.export",
    "Pass": "passes.framework.base",
    "PassResult": "passes.framework.base",
    "Pipeline": "passes.framework.pipeline",
    "Program": "ir.program",
    "QaloraError": "errors",
    "QuantSpec": "config.quant",
    "Tolerance": "verify.compare",
    "adapt_module_": "api.steps",
    "add_kv_cache": "api.forms",
    "capture_model": "capture.model",
    "export_model": "api.export",
    "fold_adapters": "api.steps",
    "insert_adapters": "api.steps",
    "prove_equivalence": "verify.proof.prove",
    "quantize_groups": "api.steps",
    "split_encoder_decoder": "api.forms",
    "verify_equivalence": "verify.equivalence",
}
"""Adding a name here is a decision; moving or removing one breaks users."""
MAX_NAMES = 20
HEAVY = ("torch", "numpy", "rich", "safetensors", "onnx", "onnxruntime", "transformers")


def heavy_after(code: str) -> list[str]:
    """The heavy modules that a fresh interpreter holds after running `code`."""
    report = f"import sys; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {report}"], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_the_public_names_are_these() -> None:
    assert qc.__all__ == sorted([*HOMES, "__version__"])
    assert len(qc.__all__) <= MAX_NAMES


@pytest.mark.parametrize("name", HOMES)
def test_a_public_name_lives_where_it_did(name: str) -> None:
    assert getattr(qc, name).__module__ == f"qalora_compile.{HOMES[name]}"
    assert getattr(qc, name).__doc__
    assert name in dir(qc)


def test_the_version_is_three_numbers() -> None:
    assert [part.isdigit() for part in qc.__version__.split(".")] == [True] * 3


@pytest.mark.parametrize(
    ("module", "name", "near"),
    [
        (qc, "quantise_groups", "quantize_groups"),
        (verify, "Raport", "Report"),
        (testing, "assert_equivalnt", "assert_equivalent"),
    ],
)
def test_an_unknown_name_is_an_attribute_error_that_suggests_the_nearest(
    module: ModuleType, name: str, near: str
) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}'; did you mean '{near}'?"):
        getattr(module, name)


def test_a_name_like_no_other_is_refused_without_a_suggestion() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'xyz'$"):
        getattr(qc, "xyz")  # noqa: B009


@pytest.mark.slow
def test_type_checkers_refuse_a_misspelt_name(tmp_path: Path) -> None:
    """A module's `__getattr__`, if type checkers see it, gives every name the type Any."""
    lines = [
        "import qalora_compile as qc",
        "from qalora_compile import testing, verify",
        *(f"right_{place} = qc.{name}" for place, name in enumerate(HOMES)),
        "report, check = verify.Report, testing.assert_equivalent",
        "_ = qc.quantise_groups",
        "_ = verify.Raport",
        "_ = testing.assert_equivalnt",
    ]
    file = tmp_path / "user.py"
    file.write_text("\n".join(lines), "utf-8")
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--config-file="]
    done = subprocess.run(
        [*command, "--cache-dir", str(tmp_path / "cache"), str(file)],
        capture_output=True,
        text=True,
        cwd=Path(qc.__file__).parents[1],
        check=False,
    )
    found = [line.split(":")[1] for line in done.stdout.splitlines() if ": error:" in line]
    assert found == [str(len(lines) - 2), str(len(lines) - 1), str(len(lines))], done.stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert heavy_after("import qalora_compile") == []


def test_errors_and_specs_are_light() -> None:
    assert heavy_after("from qalora_compile import QaloraError, QuantSpec") == []


def test_a_heavy_import_is_seen() -> None:
    assert heavy_after("import numpy") == ["numpy"]
