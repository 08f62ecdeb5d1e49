"""Target `ort` with its function in float: one file, weights made when it is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import qalora_compile as qc
from qalora_compile.errors import UserInputError
from tests.exporters.test_experts import Grouped
from tests.exporters.test_three_ways import LIBRARY, folded, optimized_kinds, run
from tests.models import OneLinear, adapted, assert_close, llama, token_ids

IN_FLOAT = qc.ExportSpec(expansion="float")


@pytest.mark.parametrize("parameter_dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("bits", "group"), [(2, 16), (3, 32), (4, 32), (8, 64), (4, 48), (3, 24), (4, 200)]
)
def test_equal_with_and_without_the_library(
    bits: int, group: int, parameter_dtype: str, tmp_path: Path
) -> None:
    program, x = folded(bits, group)
    path = tmp_path / "model.onnx"
    qc.export_model(program, path, replace(IN_FLOAT, parameter_dtype=parameter_dtype))
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    (plain,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    results = [torch.from_numpy(plain), *(run(path, x, library=use) for use in (False, True))]
    relative = 1e-5 if parameter_dtype == "float32" else 1e-2
    for result in results:
        assert_close(result, program(x), relative=relative)
        assert_close(result, results[0], relative=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_without_the_library_only_products_in_float_run(bits: int, tmp_path: Path) -> None:
    program, _ = folded(bits, 32)
    path = tmp_path / "model.onnx"
    qc.export_model(program, path, IN_FLOAT)
    assert optimized_kinds(path, tmp_path, library=True).count("GroupQuantLinear") == 2
    kinds = optimized_kinds(path, tmp_path, library=False)
    assert {kind for kind in kinds if "MatMul" in kind} <= {"MatMul", "FusedMatMul"}
    weights = {"BitShift", "BitwiseAnd", "Cast", "Sub", "Transpose", "Reshape", "ReduceSum"}
    assert not weights & set(kinds), "what depends on weights alone is not computed once"


def test_the_file_needs_standard_operators_alone(tmp_path: Path) -> None:
    program, _ = folded(3, 32)
    qc.export_model(program, tmp_path / "model.onnx", IN_FLOAT)
    model = onnx.load(tmp_path / "model.onnx")
    assert {o.domain for o in model.opset_import} == {"", "qalora"}
    (function,) = model.functions
    assert {o.domain for o in function.opset_import} == {""}
    assert {node.domain for node in function.node} == {""}


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_proved_by_the_operator_and_by_its_function(bits: int, tmp_path: Path) -> None:
    program, _ = folded(bits, 32)
    qc.export_model(program, tmp_path / "model.onnx", IN_FLOAT)
    assert qc.prove_equivalence(program, tmp_path / "model.onnx").passed


def test_a_fault_of_the_function_is_found(tmp_path: Path) -> None:
    program, _ = folded(4, 32)
    path = tmp_path / "model.onnx"
    qc.export_model(program, path, IN_FLOAT)
    model = onnx.load(path)
    level = next(node for node in model.functions[0].node if node.op_type == "Sub")
    level.op_type = "Add"
    onnx.save(model, path)
    assert not qc.prove_equivalence(program, path).passed


@pytest.mark.slow
def test_a_language_model_with_embeddings_on_codes(tmp_path: Path) -> None:
    ids = token_ids(2, 16)
    program = qc.capture_model(llama(), (ids,))
    program = qc.quantize_groups(program, embeddings=qc.QuantSpec(bits=8))
    path = tmp_path / "model.onnx"
    qc.export_model(program, path, IN_FLOAT)
    assert qc.verify_equivalence(program, path, [(ids,)], qc.Tolerance(max_rel=1e-4)).passed
    heads = [n for n in onnx.load(path).graph.node if n.op_type == "GroupQuantLinear"]
    assert any(a.name == "bits" and a.i == 8 for n in heads for a in n.attribute)


@LIBRARY
def test_half_models_and_experts(library: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 64).half()
    half = qc.fold_adapters(adapted(OneLinear(64, 8).half().eval(), (x,)))
    qc.export_model(half, tmp_path / "half.onnx", IN_FLOAT)
    assert_close(run(tmp_path / "half.onnx", x.float(), library=library), half(x), relative=1e-2)
    rows = torch.randn(8, 40)
    experts = qc.fold_adapters(adapted(Grouped(), (rows,)))
    qc.export_model(experts, tmp_path / "experts.onnx", IN_FLOAT)
    result = run(tmp_path / "experts.onnx", rows, library=library)
    assert_close(result, experts(rows), relative=1e-4)


@pytest.mark.parametrize("target", ["ort-stock", "onnx", "openvino", "gguf"])
def test_other_targets_have_no_function(target: str) -> None:
    with pytest.raises(UserInputError, match="expansion is 'float' for target") as caught:
        qc.ExportSpec(target=target, expansion="float")
    assert "target ort" in str(caught.value.hint)
