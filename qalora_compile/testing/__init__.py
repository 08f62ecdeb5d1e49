"""Assertions for users' tests; with pytest also fixtures and readable failures (`plugin`).

    from qalora_compile.testing import assert_equivalent

    def test_export(folded, tmp_path):
        qc.export_model(folded, tmp_path / "model.onnx")
        assert_equivalent(folded, tmp_path / "model.onnx")

Names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qalora_compile.optional import lazy_attribute

if TYPE_CHECKING:
    from qalora_compile.testing.assertions import (
        NotEqualError,
        assert_equivalent,
        assert_structurally_equal,
    )
    from qalora_compile.testing.golden import Golden

_HOMES = {
    "Golden": "golden",
    "NotEqualError": "assertions",
    "assert_equivalent": "assertions",
    "assert_structurally_equal": "assertions",
}

__all__ = ["Golden", "NotEqualError", "assert_equivalent", "assert_structurally_equal"]


if not TYPE_CHECKING:  # else every misspelt name would have a type

    def __getattr__(name: str) -> Any:
        return lazy_attribute(__name__, name, _HOMES)
