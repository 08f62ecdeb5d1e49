"""ONNX export: what ONNX Runtime computes is what the folded program computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

import qalora_compile as qc
from qalora_compile.config import ONNX_TARGETS
from qalora_compile.errors import PreconditionError, UnsupportedError, UserInputError
from qalora_compile.exporters.onnx import initializers, model
from qalora_compile.ir.meta import ONNX_METADATA_KEY
from qalora_compile.runtime import kernel_level, open_session
from tests.models import (
    MLP,
    TRANSFORMERS,
    ThreeReaders,
    adapted,
    assert_close,
    llama,
    outputs,
    slow,
    token_ids,
)


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    session = open_session(path, exact=True)
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feed)]


def folded_mlp(bits: int = 4, group: int = 16, bias: bool = True) -> qc.Program:
    x = torch.randn(4, 3, 50)
    model = MLP(50, 64, 10, bias=bias).eval()
    return qc.fold_adapters(adapted(model, (x,), qc.QuantSpec(bits=bits, group_size=group)))


EVERY_TARGET = pytest.mark.parametrize("target", ONNX_TARGETS)
STOCK = qc.ExportSpec(target="ort-stock")


@EVERY_TARGET
@pytest.mark.parametrize(
    ("bits", "group"),
    [(b, g) for b in (2, 3, 4, 8) for g in (16, 32)]
    + [(4, 1), (4, 7), (3, 24), (4, 48), (8, 64), (4, 100), (2, 576)],
)
def test_every_width_and_group(bits: int, group: int, target: str, tmp_path: Path) -> None:
    program = folded_mlp(bits, group, bias=group % 3 != 0)
    path = tmp_path / "model.onnx"
    report = qc.export_model(program, path, qc.ExportSpec(target=target))
    assert report.quantized_layers == 2, "two planes are one layer"
    for shape in ((1, 1, 50), (5, 7, 50)):
        x = torch.randn(shape)
        assert_close(run(path, x), program(x), relative=1e-5)


@EVERY_TARGET
@pytest.mark.parametrize("name", ["bert", *slow("llama", "gpt2")])
def test_transformers_at_sizes_never_captured(name: str, target: str, tmp_path: Path) -> None:
    program = qc.fold_adapters(adapted(TRANSFORMERS[name](), (token_ids(2, 16),)))
    path = tmp_path / "model.onnx"
    qc.export_model(program, path, qc.ExportSpec(target=target))
    for shape in ((1, 1), (3, 37)):
        ids = token_ids(*shape)
        assert_close(run(path, ids), outputs(program(ids)), relative=1e-4)


@pytest.fixture(scope="module", params=ONNX_TARGETS)
def llama_file(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[qc.Program, onnx.ModelProto]:
    torch.manual_seed(0)
    ids = token_ids(2, 16)
    program = qc.fold_adapters(adapted(llama(), (ids, torch.ones_like(ids))))
    path = tmp_path_factory.mktemp("llama") / "model.onnx"
    qc.export_model(program, path, qc.ExportSpec(target=request.param))
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return program, model


def test_names_are_those_of_the_model(llama_file: tuple[qc.Program, onnx.ModelProto]) -> None:
    _, model = llama_file
    inputs = {
        i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in model.graph.input
    }
    assert inputs == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "sequence_length"],
    }
    assert [o.name for o in model.graph.output] == ["logits"]
    names = {n.name for n in model.graph.node}
    kinds = ("GroupQuantLinear", "MatMulNBits", "MatMul")
    assert names & {f"model.layers.1.mlp.down_proj/{kind}" for kind in kinds}
    assert model.producer_name == "qalora-compile"


def test_nothing_is_stored_twice(llama_file: tuple[qc.Program, onnx.ModelProto]) -> None:
    program, model = llama_file
    floats = [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    shapes = [tuple(i.dims) for i in floats]
    for site in program.plan.to_quantize():
        assert (site.n, site.k) not in shapes, f"a float copy of {site.name}"
        assert (site.k, site.n) not in shapes
    assert shapes.count((128, 64)) == 1, "the tied embedding"
    used = {name for node in model.graph.node for name in node.input}
    assert all(i.name in used for i in model.graph.initializer)


def test_readers_share_their_group_sum(tmp_path: Path) -> None:
    program = qc.fold_adapters(adapted(ThreeReaders(), (torch.randn(2, 64),)))
    qc.export_model(program, tmp_path / "model.onnx", STOCK)
    kinds = [n.op_type for n in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("MatMulNBits") == 3
    assert kinds.count("ReduceSum") == 1


def test_metadata_says_what_was_done(llama_file: tuple[qc.Program, onnx.ModelProto]) -> None:
    program, model = llama_file
    text = {p.key: p.value for p in model.metadata_props}[ONNX_METADATA_KEY]
    value = json.loads(text)
    assert [(layer["site"], layer["decision"], layer["reason"]) for layer in value["layers"]] == [
        (s.name, s.decision, s.reason) for s in program.plan
    ]
    assert value["history"][: len(program.history)] == list(program.history)
    produced = {name for node in model.graph.node for name in node.output}
    assert set(value["site_values"].values()) <= produced


def test_unfolded_programs_are_refused_or_exported_on_request(tmp_path: Path) -> None:
    x = torch.randn(4, 50)
    program = adapted(MLP(50, 64, 10).eval(), (x,))
    path = tmp_path / "model.onnx"
    with pytest.raises(PreconditionError, match="not folded") as caught:
        qc.export_model(program, path)
    assert "qc.fold_adapters(program)" in str(caught.value.hint)
    assert not path.exists()
    qc.export_model(program, path, qc.ExportSpec(allow_unfolded=True))
    assert_close(run(path, x), program(x), relative=1e-5)


def test_float_programs_are_refused_or_exported_on_request(tmp_path: Path) -> None:
    x = torch.randn(4, 50)
    program = qc.capture_model(MLP(50, 64, 10).eval(), (x,))
    with pytest.raises(PreconditionError, match="not quantized"):
        qc.export_model(program, tmp_path / "model.onnx")
    report = qc.export_model(program, tmp_path / "model.onnx", qc.ExportSpec(allow_unfolded=True))
    assert report.quantized_layers == 0
    assert_close(run(tmp_path / "model.onnx", x), program(x), relative=1e-5)


@pytest.mark.parametrize(
    ("target", "kind", "name"),
    [
        ("ort-stock", "MatMulNBits", "accuracy_level"),
        ("ort", "GroupQuantLinear", "stock_accuracy_level"),
    ],
)
def test_int8_activations_are_marked_and_near(
    target: str, kind: str, name: str, tmp_path: Path
) -> None:
    program = folded_mlp(group=32)
    spec = qc.ExportSpec(target=target, accuracy_level=4)
    report = qc.export_model(program, tmp_path / "m.onnx", spec)
    assert str(report.capabilities["activations"]) == "rounds(int8)"
    node = next(n for n in onnx.load(tmp_path / "m.onnx").graph.node if n.op_type == kind)
    assert {a.name: a.i for a in node.attribute}[name] == 4
    x = torch.randn(2, 3, 50)
    assert_close(run(tmp_path / "m.onnx", x), program(x), relative=5e-2)


def test_8_bits_are_two_planes_on_stock_float_kernels(tmp_path: Path) -> None:
    """MatMulNBits of 8 bits dequantizes the weight in each call at accuracy level 0."""
    program, x = folded_mlp(bits=8, group=32), torch.randn(2, 3, 50)
    widths = {}
    for level in (0, 4):
        path = tmp_path / f"{level}.onnx"
        report = qc.export_model(
            program, path, qc.ExportSpec(target="ort-stock", accuracy_level=level)
        )
        assert report.quantized_layers == 2
        nodes = [n for n in onnx.load(path).graph.node if n.op_type == "MatMulNBits"]
        widths[level] = [a.i for n in nodes for a in n.attribute if a.name == "bits"]
    assert widths == {0: [4] * 4, 4: [8] * 2}
    assert_close(run(tmp_path / "0.onnx", x), program(x), relative=1e-5)
    assert qc.prove_equivalence(program, tmp_path / "0.onnx").passed


def test_two_digits_run_exactly_on_stock_kernels(tmp_path: Path) -> None:
    """Without the library a file of level 2 computes in float32."""
    program, x = folded_mlp(group=32), torch.randn(2, 3, 50)
    report = qc.export_model(program, tmp_path / "m.onnx", qc.ExportSpec(accuracy_level=2))
    assert str(report.capabilities["activations"]) == "rounds(int16)"
    nodes = onnx.load(tmp_path / "m.onnx").graph.node
    node = next(n for n in nodes if n.op_type == "GroupQuantLinear")
    stated = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert (stated["compute"], stated["stock_accuracy_level"]) == (b"int16", 0)
    session = open_session(tmp_path / "m.onnx", library=False)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close([torch.from_numpy(y) for y in found], program(x), relative=1e-5)


@pytest.mark.skipif(kernel_level() is None, reason="the operator library was not built")
def test_two_digits_are_near_with_the_library(tmp_path: Path) -> None:
    program, x = folded_mlp(group=32), torch.randn(2, 3, 50)
    qc.export_model(program, tmp_path / "m.onnx", qc.ExportSpec(accuracy_level=2))
    try:
        session = open_session(tmp_path / "m.onnx", library=True)
    except UserInputError as refused:
        if "compute" not in str(refused):
            raise
        pytest.skip(f"this library has no kernel for two digits: {refused}")
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close([torch.from_numpy(y) for y in found], program(x), relative=5e-4)


def test_large_weights_go_next_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initializers, "INLINE_LIMIT_BYTES", 100)
    program, x = folded_mlp(), torch.randn(2, 3, 50)
    apart = qc.ExportSpec(external_data=True)
    report = qc.export_model(program, tmp_path / "model.onnx", apart)
    assert set(report.files) == {"model.onnx", "model.onnx_data"}
    assert {f.name for f in tmp_path.iterdir()} == set(report.files)
    assert_close(run(tmp_path / "model.onnx", x), program(x), relative=1e-5)
    calls = [(x,)]
    tolerance = qc.Tolerance(max_rel=1e-5)
    assert qc.verify_equivalence(program, tmp_path / "model.onnx", calls, tolerance).passed


def test_an_existing_file_is_kept_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    with pytest.raises(UserInputError, match="already exists"):
        qc.export_model(folded_mlp(), path)
    assert path.read_text() == "mine"
    with pytest.raises(UserInputError, match="was not written by this tool"):
        qc.export_model(folded_mlp(), path, qc.ExportSpec(overwrite=True))
    assert path.read_text() == "mine"
    path.unlink()
    for _ in range(2):
        qc.export_model(folded_mlp(), path, qc.ExportSpec(overwrite=True))
    assert run(path, torch.randn(1, 1, 50))


def test_a_crash_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir

    real: Callable[..., Any] = onnx_ir.save

    def half(model: Any, path: Path, **options: Any) -> None:
        real(model, path, **options)
        raise OSError("no space left on device")

    monkeypatch.setattr(onnx_ir, "save", half)
    with pytest.raises(OSError, match="no space"):
        qc.export_model(folded_mlp(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"does not end in \.onnx"):
        qc.export_model(folded_mlp(), tmp_path / "model.bin")
    with pytest.raises(UnsupportedError, match="no export target 'tflite'"):
        qc.ExportSpec(target="tflite")
    for values in ({"opset": 9}, {"accuracy_level": 3}):
        with pytest.raises(UserInputError):
            qc.ExportSpec(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("opset", qc.ExportSpec.OPSETS)
def test_every_opset_on_offer_runs(opset: int, tmp_path: Path) -> None:
    program, x = folded_mlp(), torch.randn(2, 3, 50)
    qc.export_model(program, tmp_path / "model.onnx", qc.ExportSpec(opset=opset))
    assert_close(run(tmp_path / "model.onnx", x), program(x), relative=1e-5)


class Mixed(torch.nn.Module):
    """Operands of several types, which torch promotes and ONNX does not."""

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        """Integers, halves and floats."""
        y = (x * n + n / 3).reshape(-1, 4)
        return torch.where(y > n.sum(), y.half(), y).sum(-1) + n.float().mean()


def test_types_are_promoted_as_torch_onnx_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, n = torch.randn(3, 4), torch.arange(12).reshape(3, 4)
    program, written = qc.capture_model(Mixed(), (x, n)), []
    for name in ("quick", "torch.onnx"):
        qc.export_model(program, tmp_path / f"{name}.onnx", qc.ExportSpec(allow_unfolded=True))
        written.append((tmp_path / f"{name}.onnx").read_bytes())
        monkeypatch.setattr(model, "quick_type_promotion", nullcontext)
    assert written[0] == written[1]
    casts = [
        node for node in onnx.load(tmp_path / "quick.onnx").graph.node if node.op_type == "Cast"
    ]
    assert len(casts) >= 2
    assert_close(run(tmp_path / "quick.onnx", x, n), Mixed()(x, n), relative=1e-5)
