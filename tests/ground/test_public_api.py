"""The public names, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import qalora_compile as qc

NAMES = [
    "AdapterSpec",
    "ExportSpec",
    "Pass",
    "PassResult",
    "Pipeline",
    "Program",
    "QaloraError",
    "QuantSpec",
    "Tolerance",
    "__version__",
    "capture_model",
    "export_model",
    "fold_adapters",
    "insert_adapters",
    "quantize_groups",
    "verify_equivalence",
]


def test_the_public_names_are_these() -> None:
    assert qc.__all__ == NAMES
    assert len(NAMES) <= 20
    for name in NAMES:
        assert getattr(qc, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(qc, "quantise")


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, qalora_compile; "
        "print([m for m in ('torch', 'numpy', 'rich', 'onnx', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
