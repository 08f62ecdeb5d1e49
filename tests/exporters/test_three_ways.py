"""One file of target `ort`, three ways: with the library, stock kernels, standard operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

import qalora_compile as qc
from qalora_compile.ir.meta import QDQ_ACCURACY_KEY
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.runtime import library_path, open_session, register
from tests import forked
from tests.exporters.test_experts import Grouped
from tests.models import (
    MLP,
    OneLinear,
    adapted,
    assert_close,
    llama,
    randomize_adapters,
    token_ids,
)

PROVIDERS = ["CPUExecutionProvider"]
LIBRARY = pytest.mark.parametrize("library", [False, True], ids=["stock", "library"])


def folded(bits: int, group: int, k: int = 96, seed: int = 0) -> tuple[qc.Program, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(5, 2, k)
    program = adapted(MLP(k, 33, 8).eval(), (x,), qc.QuantSpec(bits=bits, group_size=group))
    return qc.fold_adapters(program), x


def run(path: Path, x: Tensor, *, library: bool) -> Tensor:
    session = open_session(path, library=library, trusted=path.suffix == ".ort")
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def optimized_kinds(path: Path, tmp_path: Path, *, library: bool) -> list[str]:
    """The operators that ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    if library:
        register(options)
    onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS)
    return [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]


@pytest.mark.parametrize("parameter_dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("bits", "group"), [(2, 16), (3, 32), (4, 32), (8, 64), (4, 48), (3, 24), (2, 96), (4, 200)]
)
def test_equal_three_ways(bits: int, group: int, parameter_dtype: str, tmp_path: Path) -> None:
    program, x = folded(bits, group)
    path = tmp_path / "model.onnx"
    qc.export_model(program, path, qc.ExportSpec(parameter_dtype=parameter_dtype))
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    (plain,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    results = [torch.from_numpy(plain), *(run(path, x, library=use) for use in (False, True))]
    relative = 1e-5 if parameter_dtype == "float32" else 1e-2
    for result in results:
        assert_close(result, program(x), relative=relative)
        assert_close(result, results[0], relative=1e-5)


def test_layers_of_every_form_share_one_function(tmp_path: Path) -> None:
    """ONNX Runtime takes one body for each operator: it has the steps that any layer needs."""
    torch.manual_seed(0)
    x = torch.randn(5, 2, 96)
    captured = AnnotateLinears()(qc.capture_model(MLP(96, 96, 8).eval(), (x,))).program
    first = next(iter(captured.plan)).name
    plan = captured.plan.update({first: {"chosen_bits": 3, "chosen_group": 24}})
    program = qc.quantize_groups(captured.evolve(plan=plan))
    program = qc.fold_adapters(randomize_adapters(qc.insert_adapters(program), size=0.1))
    assert [(site.bits, site.group_size) for site in program.plan] == [(3, 24), (4, 32)]
    path = tmp_path / "model.onnx"
    qc.export_model(program, path)
    (plain,) = ReferenceEvaluator(onnx.load(path)).run(None, {"x": x.numpy()})
    for result in (torch.from_numpy(plain), *(run(path, x, library=u) for u in (False, True))):
        assert_close(result, program(x), relative=1e-5)
    assert qc.prove_equivalence(program, path).passed


@pytest.mark.parametrize(
    ("bits", "group", "steps"),
    [(4, 32, 11), (8, 48, 39), (3, 32, 118), (3, 48, 126)],
)
def test_the_function_has_no_step_that_no_layer_needs(
    bits: int, group: int, steps: int, tmp_path: Path
) -> None:
    """Every step is computed for every layer when a session without the library is made."""
    program = qc.fold_adapters(
        adapted(
            OneLinear(96, 8).eval(),
            (torch.randn(2, 96),),
            qc.QuantSpec(bits=bits, group_size=group),
        )
    )
    qc.export_model(program, tmp_path / "model.onnx")
    body = next(f for f in onnx.load(tmp_path / "model.onnx").functions if f.domain == "qalora")
    assert len(body.node) == steps


@LIBRARY
def test_the_kernels_that_run(library: bool, tmp_path: Path) -> None:
    program, _ = folded(4, 32)
    qc.export_model(program, tmp_path / "model.onnx")
    kinds = optimized_kinds(tmp_path / "model.onnx", tmp_path, library=library)
    assert kinds.count("GroupQuantLinear") == (2 if library else 0)
    assert kinds.count("MatMulNBits") == (0 if library else 2)
    folded_away = {"Round", "BitShift", "BitwiseAnd", "Range", "Pow", "Transpose"}
    assert not folded_away & set(kinds), "what depends on weights alone is not computed once"


@LIBRARY
def test_readers_of_one_input_share_its_group_sums(library: bool, tmp_path: Path) -> None:
    ids = token_ids(2, 16)
    program = qc.fold_adapters(adapted(llama(), (ids,)))
    qc.export_model(program, tmp_path / "model.onnx")
    kinds = optimized_kinds(tmp_path / "model.onnx", tmp_path, library=library)
    # Two layers, with four inputs each: of q, k, v; of o; of gate, up; of down.
    assert kinds.count("ReduceSum") == (0 if library else 8)


@LIBRARY
def test_graph_optimizations_may_be_off(library: bool, tmp_path: Path) -> None:
    program, x = folded(3, 32)
    qc.export_model(program, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if library:
        register(options)
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), options, providers=PROVIDERS
    )
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(y), program(x), relative=1e-5)


@pytest.mark.parametrize("n", [8, 5000])  # the widened bias is folded, and is not
def test_a_half_precision_bias_is_of_its_layer(n: int, tmp_path: Path) -> None:
    half = qc.fold_adapters(adapted(OneLinear(32, n).half().eval(), (torch.randn(2, 32).half(),)))
    qc.export_model(half, tmp_path / "half.onnx")
    assert qc.prove_equivalence(half, tmp_path / "half.onnx").passed


@LIBRARY
def test_half_models_and_experts(library: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 64).half()
    half = qc.fold_adapters(adapted(OneLinear(64, 8).half().eval(), (x,)))
    qc.export_model(half, tmp_path / "half.onnx")
    assert_close(run(tmp_path / "half.onnx", x.float(), library=library), half(x), relative=1e-2)
    rows = torch.randn(8, 40)
    experts = qc.fold_adapters(adapted(Grouped(), (rows,)))
    qc.export_model(experts, tmp_path / "experts.onnx")
    result = run(tmp_path / "experts.onnx", rows, library=library)
    assert_close(result, experts(rows), relative=1e-4)


@LIBRARY
def test_verify_runs_on_either_kernels(library: bool, tmp_path: Path) -> None:
    program, x = folded(4, 32)
    path = tmp_path / "model.onnx"
    qc.export_model(program, path)
    kernels = library_path() if library else None
    report = qc.verify_equivalence(
        program, path, [(x,)], qc.Tolerance(max_rel=1e-5), library=kernels
    )
    assert report.passed
    assert ("libqalora" in report.candidate) == library
    assert {c.name for c in report.sites} == {"layers.0", "layers.1"}


@pytest.mark.parametrize("library", [False, True], ids=["without", "with the library"])
def test_conversion_to_ort_format(library: bool, tmp_path: Path) -> None:
    program, x = folded(4, 32)
    qc.export_model(program, tmp_path / "model.onnx")
    extra = ["--custom_op_library", str(library_path())] if library else []
    options = ["--optimization_style", "Fixed", "--output_dir", str(tmp_path / "out")]
    words = [*extra, *options, str(tmp_path / "model.onnx")]
    ended, _, errors = forked.module("onnxruntime.tools.convert_onnx_models_to_ort", words).wait()
    assert ended == 0, errors[-2000:]
    (converted,) = (tmp_path / "out").glob("*.ort")
    assert_close(run(converted, x, library=library), program(x), relative=1e-5)
    if library:
        with pytest.raises(Exception, match="GroupQuantLinear"):
            run(converted, x, library=False)


def test_target_onnx_is_fused_and_exact_with_its_key(tmp_path: Path) -> None:
    program, x = folded(4, 32)
    path = tmp_path / "model.onnx"
    report = qc.export_model(program, path, qc.ExportSpec(target="onnx"))
    assert QDQ_ACCURACY_KEY in str(report.capabilities["activations"])
    model = onnx.load(path)
    assert {n.domain for n in model.graph.node} == {""}
    assert [o.domain for o in model.opset_import] == [""]
    assert model.opset_import[0].version == 21
    kinds = {i.data_type for i in model.graph.initializer}
    assert onnx.TensorProto.UINT4 in kinds
    assert optimized_kinds(path, tmp_path, library=False).count("MatMulNBits") == 2
    (plain,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    assert_close(torch.from_numpy(plain), program(x), relative=1e-5)
    errors: dict[str, Any] = {}
    for exact in (True, False):
        session = open_session(path, exact=exact)
        (y,) = session.run(None, {model.graph.input[0].name: x.numpy()})
        errors["exact" if exact else "default"] = float(np.abs(y - plain).max())
    scale = float(np.abs(plain).max())
    assert errors["exact"] < 1e-5 * scale < 1e-3 * scale < errors["default"]
