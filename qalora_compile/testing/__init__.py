"""Assertions for users' tests; with pytest also fixtures and readable failures (`plugin`).

    from qalora_compile.testing import assert_equivalent

    def test_export(folded, tmp_path):
        qc.export_model(folded, tmp_path / "model.onnx")
        assert_equivalent(folded, tmp_path / "model.onnx")

`check_pass`, `check_quantizer`, `check_target` and `check_reader` are the contracts of extensions
(docs/reference/extending.md). Names are imported on first use.
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
    from qalora_compile.testing.contract import ContractError
    from qalora_compile.testing.golden import Golden
    from qalora_compile.testing.pass_contract import check_pass
    from qalora_compile.testing.quantizer_contract import check_quantizer
    from qalora_compile.testing.reader_contract import check_reader
    from qalora_compile.testing.target_contract import check_target

_HOMES = {
    "ContractError": "contract",
    "Golden": "golden",
    "NotEqualError": "assertions",
    "assert_equivalent": "assertions",
    "assert_structurally_equal": "assertions",
    "check_pass": "pass_contract",
    "check_quantizer": "quantizer_contract",
    "check_reader": "reader_contract",
    "check_target": "target_contract",
}

__all__ = [
    "ContractError",
    "Golden",
    "NotEqualError",
    "assert_equivalent",
    "assert_structurally_equal",
    "check_pass",
    "check_quantizer",
    "check_reader",
    "check_target",
]


if not TYPE_CHECKING:  # else every misspelt name would have a type

    def __getattr__(name: str) -> Any:
        return lazy_attribute(__name__, name, _HOMES)
