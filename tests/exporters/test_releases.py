"""The form of a model for an older release of ONNX Runtime (`ExportSpec.runtime`).

`make test-runtimes` runs such files in these releases; here they are proved, and their nodes read.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

import qalora_compile as qc
from qalora_compile.api import complete_spec
from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.signature import InputLeaf, Signature
from tests.exporters.test_experts import Grouped
from tests.models import MLP, adapted


def folded(bits: int) -> tuple[qc.Program, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 96)
    quant = qc.QuantSpec(bits=bits, group_size=32)
    return qc.fold_adapters(adapted(MLP(96, 33, 8).eval(), (x,), quant)), x


def exported(bits: int, path: Path, **options: Any) -> tuple[onnx.ModelProto, qc.Program, Any]:
    """The file, the program that it is proved equal to, and the exporter's notes."""
    program, x = folded(bits)
    report = qc.export_model(program, path, qc.ExportSpec(**options))
    certificate = qc.prove_equivalence(program, path)
    assert certificate.passed, certificate
    assert len(certificate.sites) == 2
    qc.verify_equivalence(program, path, [(x,)], qc.Tolerance(max_rel=1e-5)).check()
    return onnx.load(path), program, report.notes


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bias_is_added_where_the_kernel_takes_none(bits: int, tmp_path: Path) -> None:
    path, runtime = tmp_path / "model.onnx", "onnxruntime==1.18"
    model, _, notes = exported(bits, path, target="ort-stock", runtime=runtime)
    kernels = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert {len(node.input) for node in kernels} == {4}
    assert {a.i for node in kernels for a in node.attribute if a.name == "bits"} == {4}
    assert len(kernels) == (2 if bits == 4 else 4)
    assert "biases are added after MatMulNBits" in notes[0]
    assert notes[0].startswith(f"for {runtime}: opset 20, fusion none")
    newer = tmp_path / "newer.onnx"
    model, _, _ = exported(bits, newer, target="ort-stock", runtime="onnxruntime>=1.19")
    kernels = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert sorted(len(node.input) for node in kernels) == ([6, 6] if bits == 4 else [4, 4, 6, 6])


@pytest.mark.parametrize(("runtime", "planes"), [("1.22", 2), ("1.23", 1)])
def test_8_bits_are_two_planes_where_the_kernel_has_none(
    runtime: str, planes: int, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    model, _, notes = exported(8, path, runtime=f"onnxruntime=={runtime}")
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["GroupQuantLinear"] == 2 * planes
    assert ("two planes" in notes[0]) == (planes == 2)


def test_what_has_no_form_for_a_release_is_refused(tmp_path: Path) -> None:
    program, _ = folded(2)
    spec = qc.ExportSpec(target="ort-stock", accuracy_level=4, runtime="onnxruntime==1.23")
    with pytest.raises(UnsupportedError, match="no codes of 2 bits") as caught:
        qc.export_model(program, tmp_path / "model.onnx", spec)
    assert "accuracy level 0" in str(caught.value.hint)
    torch.manual_seed(0)
    x = torch.randn(6, 40)
    experts = adapted(Grouped().eval(), (x,), qc.QuantSpec(bits=8, group_size=32))
    with pytest.raises(UnsupportedError, match="no codes of 8 bits"):
        qc.export_model(
            qc.fold_adapters(experts),
            tmp_path / "model.onnx",
            qc.ExportSpec(runtime="onnxruntime==1.20"),
        )


@pytest.mark.parametrize(
    ("options", "runtime", "fusion", "opset"),
    [
        ({}, "1.20", "none", 20),
        ({}, "1.21", "ort", 22),
        ({"target": "onnx"}, "1.22", "none", 21),
        ({}, "1.23", "standard", 23),
        ({"opset": 21}, "1.23", "none", 21),
    ],
)
def test_the_fastest_form_that_the_release_runs_is_taken(
    options: dict[str, Any], runtime: str, fusion: str, opset: int
) -> None:
    past = InputLeaf("past_key_values.0.key", "float32", ("batch", 2, "past", 16))
    cached = replace(folded(4)[0], signature=Signature((past,), ("logits",)))
    spec = complete_spec(cached, qc.ExportSpec(**options, runtime=f"onnxruntime=={runtime}"))
    assert (spec.fusion, spec.onnx_opset) == (fusion, opset)
