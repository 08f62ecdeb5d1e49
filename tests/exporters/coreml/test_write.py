"""Target `coreml`: weights are the program's, and what coremltools computes is what torch does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import qalora_compile as qc
from qalora_compile.api import lower
from qalora_compile.errors import (
    InternalError,
    PreconditionError,
    UnsupportedError,
    UserInputError,
)
from qalora_compile.exporters.coreml.check import check_weights
from qalora_compile.exporters.coreml.weights import Weights, legal_name
from qalora_compile.ir.coreml_package import MODEL_PART, main_block, read_specification
from tests.exporters.coreml.running import builtin_to_string, constants, kinds, run
from tests.models import (
    MLP,
    OneLinear,
    TiedHead,
    UsedTwice,
    adapted,
    assert_close,
    bert,
    outputs,
    token_ids,
)

SPEC = qc.ExportSpec(target="coreml")
NAME = "model.mlpackage"


def folded_mlp(bits: int = 4, group: int = 32, bias: bool = True) -> qc.Program:
    x = torch.randn(4, 3, 50)
    model = MLP(50, 64, 10, bias=bias).eval()
    return qc.fold_adapters(adapted(model, (x,), qc.QuantSpec(bits=bits, group_size=group)))


@pytest.mark.parametrize(
    ("bits", "group", "stored"),
    [(4, 32, "uint4"), (3, 16, "uint4"), (2, 24, "uint4"), (8, 32, "uint8"), (4, 1, "uint4")],
)
def test_every_width_and_group(bits: int, group: int, stored: str, tmp_path: Path) -> None:
    program, path = folded_mlp(bits, group, bias=group % 3 != 0), tmp_path / NAME
    report = qc.export_model(program, path, SPEC)
    assert report.quantized_layers == 2
    files = {f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file()}
    assert set(report.files) == files
    found = constants(path)
    assert {builtin_to_string(op.data.dtype) for op in found.values()} == {stored}
    assert {op.offset.val.dtype for op in found.values()} == {np.dtype(np.float32)}
    for shape in ((1, 1, 50), (5, 7, 50)):
        x = torch.randn(shape)
        assert_close(run(path, x)[0], program(x), relative=1e-5)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 16), (8, 32)])
def test_each_weight_is_the_program_s_within_one_rounding(
    bits: int, group: int, tmp_path: Path
) -> None:
    x = torch.randn(2, 64)
    codes = qc.QuantSpec(bits=bits, group_size=group)
    program, path = (
        qc.fold_adapters(adapted(OneLinear(64, 16).eval(), (x,), codes)),
        tmp_path / NAME,
    )
    qc.export_model(program, path, SPEC)
    ((name, constant),) = constants(path).items()
    eye = torch.eye(64, dtype=torch.float64)
    wanted = (program(eye.float()) - program(torch.zeros(1, 64))).T.double().numpy()
    data, scale, offset = (
        np.asarray(part.val).astype(np.float64)
        for part in (constant.data, constant.scale, constant.offset)
    )
    blocks = data.reshape(16, -1, group)
    made = (scale[..., None] * (blocks - offset[..., None])).reshape(16, 64)
    assert name.endswith("_weight")
    bound = 2.0**-24 * np.abs(scale * offset).max() + 2.0**-22 * np.abs(wanted).max()
    assert np.abs(made - wanted).max() <= bound
    inferred = torch.from_numpy(constant.materialized_val_inference())
    assert_close(inferred, torch.from_numpy(made).float(), relative=1e-6)


def test_an_encoder_at_sizes_never_captured(tmp_path: Path) -> None:
    program = qc.fold_adapters(adapted(bert(), (token_ids(2, 16),)))
    path = tmp_path / NAME
    report = qc.export_model(program, path, SPEC)
    assert report.notes[0].startswith("13 quantized weights, read from the package again")
    described = read_specification(path).description
    assert [one.name for one in described.input] == ["input_ids"]
    assert [one.name for one in described.output] == ["last_hidden_state", "pooler_output"]
    ranges = described.input[0].type.multiArrayType.shapeRange.sizeRanges
    assert [one.lowerBound for one in ranges] == [1, 1]
    assert kinds(path).count("linear") == 13
    for shape in ((1, 1), (1, 5), (3, 37)):
        ids = token_ids(*shape)
        for one, other in zip(run(path, ids), outputs(program(ids)), strict=True):
            assert_close(one, other, relative=1e-5)


def test_a_layer_that_is_used_twice_is_stored_once(tmp_path: Path) -> None:
    x = torch.randn(2, 32)
    program, path = qc.fold_adapters(adapted(UsedTwice().eval(), (x,))), tmp_path / NAME
    assert qc.export_model(program, path, SPEC).quantized_layers == 3
    assert len(constants(path)) == 2
    assert_close(run(path, x)[0], program(x), relative=1e-5)


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 16)])
def test_an_embedding_on_codes_with_its_tied_head(bits: int, group: int, tmp_path: Path) -> None:
    codes = qc.QuantSpec(bits=bits, group_size=group)
    program = qc.capture_model(TiedHead(256, 72).eval(), (torch.randint(0, 256, (2, 5)),))
    program, path = qc.quantize_groups(program, embeddings=codes), tmp_path / NAME
    qc.export_model(program, path, SPEC)
    assert len(constants(path)) == 2, "the table, which is the head too, and one layer"
    ids = torch.randint(0, 256, (3, 7))
    assert_close(run(path, ids)[0], program(ids), relative=1e-5)


def test_unfolded_adapters_are_exported_on_request(tmp_path: Path) -> None:
    x, path = torch.randn(4, 3, 50), tmp_path / NAME
    program = adapted(MLP(50, 64, 10).eval(), (x,), qc.QuantSpec(group_size=32)).eval()
    with pytest.raises(PreconditionError, match="adapters are not folded"):
        qc.export_model(program, path, SPEC)
    qc.export_model(program, path, qc.ExportSpec(target="coreml", allow_unfolded=True))
    assert_close(run(path, x)[0], program(x), relative=1e-5)


def test_a_model_in_half_precision_is_computed_in_float32(tmp_path: Path) -> None:
    model, x = OneLinear(64, 16).eval().bfloat16(), torch.randn(3, 64, dtype=torch.bfloat16)
    program, path = qc.fold_adapters(adapted(model, (x,))), tmp_path / NAME
    qc.export_model(program, path, SPEC)
    assert_close(run(path, x.float())[0], program(x).float(), relative=1e-2)


def test_a_weight_that_differs_is_found(tmp_path: Path) -> None:
    path = tmp_path / NAME
    qc.export_model(folded_mlp(), path, SPEC)
    lowered = lower(folded_mlp(), SPEC)
    with pytest.raises(InternalError, match=r"does not hold the weight of layers\.0"):
        check_weights(lowered, Weights(), path)


def test_the_package_is_equal_each_time_and_names_no_path(tmp_path: Path) -> None:
    program = folded_mlp()
    for name in ("one", "two"):
        qc.export_model(program, tmp_path / name / NAME, SPEC)
    one, two = (
        {
            f.relative_to(tmp_path / n): f.read_bytes()
            for f in (tmp_path / n).rglob("*")
            if f.is_file()
        }
        for n in ("one", "two")
    )
    assert list(one.values()) and one == two
    assert not any(str(tmp_path).encode() in content for content in one.values())
    manifest = json.loads((tmp_path / "one" / NAME / "Manifest.json").read_text("utf-8"))
    root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
    assert (root["author"], root["path"]) == ("com.apple.CoreML", MODEL_PART)


def test_values_have_names_that_do_not_depend_on_a_trace(tmp_path: Path) -> None:
    path = tmp_path / NAME
    qc.export_model(folded_mlp(), path, SPEC)
    made = [op for op in main_block(read_specification(path)).operations if op.type != "const"]
    names = [value.name for op in made for value in op.outputs]
    assert names[-1] == "output"
    numbered = [name for name in names[:-1] if not name.endswith("_weight")]
    kinds_of = {value.name: op.type for op in made for value in op.outputs}
    assert numbered
    assert all(name.rsplit("_", 1)[0] == kinds_of[name] for name in numbered)


class Sorted(torch.nn.Module):
    """An operator that coremltools has no rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.i0e(self.layer(x))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    program = folded_mlp()
    with pytest.raises(UserInputError, match=r"does not end in \.mlpackage"):
        qc.export_model(program, tmp_path / "model.onnx", SPEC)
    wide = OneLinear(32, 16).eval().double()
    double = qc.fold_adapters(adapted(wide, (torch.randn(2, 32).double(),)))
    with pytest.raises(UnsupportedError, match="no float64 kernel"):
        qc.export_model(double, tmp_path / NAME, SPEC)
    odd = qc.fold_adapters(adapted(Sorted().eval(), (torch.randn(2, 32),)))
    with pytest.raises(UnsupportedError, match="coremltools cannot convert special_i0e") as caught:
        qc.export_model(odd, tmp_path / NAME, SPEC)
    assert "target ort or onnx may hold the model" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_only_own_packages_are_replaced(tmp_path: Path) -> None:
    again, path = qc.ExportSpec(target="coreml", overwrite=True), tmp_path / NAME
    path.mkdir()
    (path / "Manifest.json").write_text('{"itemInfoEntries": {"a": {"description": "x"}}}', "utf-8")
    with pytest.raises(UserInputError, match="was not written by this tool"):
        qc.export_model(folded_mlp(), path, again)
    (path / "Manifest.json").unlink()
    qc.export_model(folded_mlp(), path, again)
    qc.export_model(folded_mlp(), path, again)
    assert len(constants(path)) == 2


@pytest.mark.parametrize(
    ("name", "legal"), [("layers.0", "layers_0"), ("0.weight", "_0_weight"), ("é", "_")]
)
def test_names_are_those_of_core_ml(name: str, legal: str) -> None:
    assert legal_name(name) == legal
