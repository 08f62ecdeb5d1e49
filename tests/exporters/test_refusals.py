"""What a target cannot hold: each refusal names the reason, and a target that holds it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qalora_compile as qc
from qalora_compile.api import lower
from qalora_compile.api.edge_graphs import edge_graphs, graph_file
from qalora_compile.config import GRAPH_TARGETS, TARGETS
from qalora_compile.errors import QaloraError, UnsupportedError
from tests.exporters.checkpoint_cases import causal_lm, folded, llama_and_program
from tests.exporters.test_column_order import sorted_pair
from tests.exporters.test_experts import Grouped
from tests.models import MLP, OneLinear, SquareConv1D, adapted, bert, token_ids
from tests.zoo.modules import Bottleneck

Made = tuple[nn.Module | None, qc.Program]


@cache
def experts(bits: int = 4) -> Made:
    """Stacked experts."""
    quant = qc.QuantSpec(bits=bits, group_size=8)
    return None, qc.fold_adapters(adapted(Grouped(), (torch.randn(8, 40),), quant))


@cache
def transposed() -> Made:
    """A weight that the model stores `[K, N]`."""
    return None, qc.fold_adapters(adapted(SquareConv1D(64).eval(), (torch.randn(2, 64),)))


@cache
def group_of(size: int, *, bits: int = 4) -> Made:
    """Layers with groups of that size."""
    quant = qc.QuantSpec(bits=bits, group_size=size)
    return None, qc.fold_adapters(adapted(MLP(96, 64, 32).eval(), (torch.randn(3, 96),), quant))


@cache
def table(bits: int = 8) -> Made:
    """An embedding table on codes."""
    quant = qc.QuantSpec(bits=4, group_size=32)
    program = qc.quantize_groups(
        qc.capture_model(bert(), (token_ids(2, 16),)), quant, embeddings=qc.QuantSpec(bits=bits)
    )
    return None, program


@cache
def other_architecture() -> Made:
    """A model whose architecture llama.cpp does not have under a name that is known here."""
    model = bert()
    quant = qc.QuantSpec(bits=4, group_size=32)
    return model, qc.fold_adapters(adapted(model, (token_ids(2, 16),), quant))


@cache
def gelu() -> Made:
    """A Llama with another activation than llama.cpp's."""
    model = causal_lm(hidden_act="gelu")
    return model, folded(model)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something that a target does not hold.

    Attributes:
        make: The model, where the target reads its description, and the program.
        target: Refuses it.
        reason: Part of the message.
        instead: A target that the hint names and that holds it; "" if the hint names an option.
        options: Of the export.
        hint: Another part of the hint.
    """

    make: Callable[[], Made]
    target: str
    reason: str
    instead: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    hint: str = ""

    def __str__(self) -> str:
        name = getattr(self.make, "__name__", "case")
        return f"{self.target}-{name}-{self.instead or self.hint}".replace(" ", "-")


def groups_of_7() -> Made:
    """Groups that GPTQ's and MLX' kernels do not have."""
    return group_of(7)


def sorted_columns() -> Made:
    """Codes in activation order, with real zero-points."""
    return None, sorted_pair(integer=False)[1]


def real_zero_points() -> Made:
    """A folded adapter, whose zero-points are real."""
    return llama_and_program()


def eight_bits() -> Made:
    """Layers of 8 bits."""
    return llama_and_program(8, 32)


def eight_bit_experts() -> Made:
    """Experts of 8 bits."""
    return experts(8)


def four_bits() -> Made:
    """Layers of 4 bits with real zero-points."""
    return group_of(32)


def two_bits() -> Made:
    """Layers of 2 bits."""
    return group_of(32, bits=2)


@cache
def convolutions() -> Made:
    """A convolution of one pixel on codes, next to one of nine in float."""
    x = torch.randn(2, 64, 5, 5)
    return None, qc.fold_adapters(adapted(Bottleneck(64, 1).eval(), (x,)))


@cache
def double_precision() -> Made:
    """A layer that computes in float64."""
    model, x = OneLinear(64, 32).eval().double(), torch.randn(2, 64).double()
    return None, qc.fold_adapters(adapted(model, (x,)))


EXPERTS_HERE = "stacked experts have no form in target"
ODD_GROUPS = "cannot hold the codes of any layer"
ORDER = "quantized in activation order"
CASES = (
    *(
        Case(make=experts, target=target, reason=f"{EXPERTS_HERE} {target}", instead="ort")
        for target in ("torch", "coreml")
    ),
    Case(make=experts, target="torch", reason=f"{EXPERTS_HERE} torch", instead="openvino"),
    *(
        Case(make=convolutions, target=target, reason="of kind pointwise", instead="ort")
        for target in ("gptq", "compressed-tensors", "mlx", "hqq", "safetensors", "float")
    ),
    *(
        Case(make=double_precision, target=target, reason="no float64 kernel", hint="model.float()")
        for target in GRAPH_TARGETS
    ),
    Case(
        make=four_bits,
        target="ort-stock",
        options={"accuracy_level": 2},
        reason="accuracy_level is 2 for target ort-stock",
        instead="ort",
        hint="target ort has level 2",
    ),
    Case(
        make=four_bits,
        target="onnx",
        options={"runtime": "onnxruntime==1.18"},
        reason="whose DequantizeLinear has no blocks",
        instead="ort-stock",
    ),
    *(
        Case(make=experts, target=target, reason="cannot be stored in a checkpoint", instead="ort")
        for target in ("gptq", "compressed-tensors", "mlx", "hqq", "safetensors", "float")
    ),
    *(
        Case(make=transposed, target=target, reason="as [K, N]", instead="safetensors")
        for target in ("compressed-tensors", "mlx", "hqq")
    ),
    *(
        Case(make=real_zero_points, target=target, reason="have to be integers", instead="hqq")
        for target in ("gptq", "compressed-tensors")
    ),
    *(
        Case(make=groups_of_7, target=target, reason=ODD_GROUPS, instead="safetensors")
        for target in ("gptq", "mlx")
    ),
    *(
        Case(make=sorted_columns, target=target, reason=ORDER, instead="safetensors")
        for target in ("mlx", "hqq")
    ),
    Case(make=eight_bits, target="gguf", reason=ODD_GROUPS, instead="safetensors"),
    Case(make=other_architecture, target="gguf", reason="not written as GGUF", instead="mlx"),
    Case(make=gelu, target="gguf", reason="with silu", instead="mlx"),
    Case(
        make=table,
        target="onnx",
        options={"runtime": "onnxruntime==1.22"},
        reason="unpacks rows of an embedding",
        instead="ort",
    ),
    *(
        Case(
            make=eight_bit_experts,
            target=target,
            options={"runtime": "onnxruntime==1.18"},
            reason="takes no codes of 8 bits",
            hint="quantize to 4 bits",
        )
        for target in ("ort", "ort-stock")
    ),
    *(
        Case(
            make=two_bits,
            target=target,
            options={"runtime": "onnxruntime==1.20", "accuracy_level": 4},
            reason="takes no codes of 2 bits",
            hint="accuracy level 0",
        )
        for target in ("ort", "ort-stock")
    ),
)


def write(made: Made, target: str, folder: Path, **options: Any) -> None:
    """Export to a path that fits the target; where its library may be missing, only lower."""
    model, program = made
    if target in ("coreml", "openvino"):
        lower(program, qc.ExportSpec(target=target, **options))
        return
    suffix = {"gguf": ".gguf", "torch": ".pt2"}
    onnx = target in ("ort", "ort-stock", "onnx")
    path = folder / f"{target}{'.onnx' if onnx else suffix.get(target, '')}"
    spec = qc.ExportSpec(target=target, **options)
    qc.export_model(program, path, spec, model=model)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_refusal_names_the_reason_and_a_target_that_holds_it(case: Case, tmp_path: Path) -> None:
    made = case.make()
    with pytest.raises(QaloraError) as caught:
        write(made, case.target, tmp_path, **case.options)
    error = caught.value
    assert case.reason in error.what
    assert case.hint in str(error.hint)
    assert not list(tmp_path.iterdir()), "a refused export leaves nothing"
    if case.instead:
        assert case.instead in str(error.hint).replace(",", " ").replace(";", " ").split()
        runtime = {name: value for name, value in case.options.items() if name == "runtime"}
        write(made, case.instead, tmp_path, **runtime)


@pytest.mark.parametrize("target", ["torch", "coreml"])
def test_encoder_decoders_are_refused_where_a_target_is_one_graph(
    target: str, tmp_path: Path
) -> None:
    described = {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    text = json.dumps({"model_type": "t5", **described})
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    _, program = group_of(32)
    with pytest.raises(UnsupportedError, match="encoder-decoder models have no form") as caught:
        edge_graphs(program, tmp_path, file=graph_file(qc.ExportSpec(target=target)))
    assert "targets ort and openvino" in str(caught.value.hint)


def test_the_table_is_of_targets_that_exist() -> None:
    named = {case.target for case in CASES} | {case.instead for case in CASES if case.instead}
    assert named <= set(TARGETS)
