"""What is decided when an edge folder is written."""

from __future__ import annotations

import pytest
import torch

import qalora_compile as qc
from qalora_compile.api import edge_choices
from qalora_compile.api.edge_choices import LOADING, chosen_for
from qalora_compile.config import FLOAT, ExportSpec
from qalora_compile.errors import UserInputError
from tests.models import OneLinear


def test_a_model_that_webassembly_cannot_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    program = qc.quantize_groups(qc.capture_model(OneLinear(64, 8).eval(), (torch.zeros(2, 64),)))
    web, weights = ExportSpec.from_preset("web"), 64 * 8
    monkeypatch.setattr(edge_choices, "WASM_MEMORY", weights * LOADING)
    assert chosen_for(program, web, "web", FLOAT)[1].expansion == FLOAT
    monkeypatch.setattr(edge_choices, "WASM_MEMORY", weights * LOADING - 1)
    with pytest.raises(UserInputError, match="WebAssembly has") as caught:
        chosen_for(program, web, "web", FLOAT)
    assert "--expansion nbits" in str(caught.value.hint)
    on_codes = ExportSpec.from_preset("web", expansion="nbits")
    assert chosen_for(program, on_codes, "web", FLOAT)[1].expansion == "nbits"
    assert chosen_for(program, web, None, FLOAT)[1].expansion == FLOAT
