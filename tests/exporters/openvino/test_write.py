"""OpenVINO IR: what its CPU plugin computes is what the folded program computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qalora_compile as qc
from qalora_compile.errors import PreconditionError, UnsupportedError, UserInputError
from qalora_compile.ir.affine import dequantize
from qalora_compile.ir.meta import ONNX_METADATA_KEY
from tests.exporters.openvino.running import codes_of, compiled, constants, read, run
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

SPEC = qc.ExportSpec(target="openvino")


def folded_mlp(bits: int = 4, group: int = 16, bias: bool = True) -> qc.Program:
    x = torch.randn(4, 3, 50)
    model = MLP(50, 64, 10, bias=bias).eval()
    return qc.fold_adapters(adapted(model, (x,), qc.QuantSpec(bits=bits, group_size=group)))


@pytest.mark.parametrize(
    ("bits", "group"),
    [(4, 32), (3, 16), (2, 16), (8, 32), (4, 1), (3, 24), (4, 48), (4, 100), (2, 576)],
)
def test_every_width_and_group(bits: int, group: int, tmp_path: Path) -> None:
    program, path = folded_mlp(bits, group, bias=group % 3 != 0), tmp_path / "model.xml"
    report = qc.export_model(program, path, SPEC)
    assert report.quantized_layers == 2
    assert set(report.files) == {"model.xml", "model.bin"}
    for shape in ((1, 1, 50), (5, 7, 50)):
        x = torch.randn(shape)
        assert_close(run(path, x), program(x), relative=1e-5)


def test_the_file_holds_the_real_zero_points_of_the_program(tmp_path: Path) -> None:
    program, path = folded_mlp(3, 16), tmp_path / "model.xml"
    qc.export_model(program, path, SPEC)
    found, tensors = constants(path), program.tensors()
    for layer, k in (("layers.0", 50), ("layers.1", 64)):
        codes, zero, scale = (found[f"{layer}.{n}"] for n in ("qweight", "zero_point", "scale"))
        assert codes.get_element_type().get_type_name() == "u4"
        assert zero.get_element_type().get_type_name() == "f32"
        values = zero.data.astype(np.float64)
        assert np.abs(values - values.round()).max() > 1e-3, "they are not integers"
        weight = ((codes_of(codes) - values) * scale.data).reshape(len(values), -1)[:, :k]
        parts = (tensors[f"{layer}.{n}"] for n in ("qweight", "scale", "offset"))
        exact = dequantize(*parts, bits=3, group_size=16, k=k)
        assert_close(torch.from_numpy(weight).float(), exact, relative=1e-6)


def test_float16_parameters_are_stored_and_rounded_once(tmp_path: Path) -> None:
    program, path = folded_mlp(), tmp_path / "model.xml"
    spec = qc.ExportSpec(target="openvino", parameter_dtype="float16")
    report = qc.export_model(program, path, spec)
    assert str(report.capabilities["zero_point"]) == "rounds(float16)"
    found = constants(path)
    assert found["layers.0.zero_point"].get_element_type().get_type_name() == "f16"
    x = torch.randn(3, 2, 50)
    assert_close(run(path, x), program(x), relative=5e-3)


def test_the_plugin_multiplies_by_codes(tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    qc.export_model(folded_mlp(group=25), path, SPEC)
    kinds = [
        node.get_rt_info()["layerType"].value
        for node in compiled(path).get_runtime_model().get_ops()
    ]
    assert kinds.count("FullyConnected") == 2
    assert "Subtract" not in kinds, "no weight is dequantized before the product"


def test_an_encoder_at_sizes_never_captured(tmp_path: Path) -> None:
    program = qc.fold_adapters(adapted(bert(), (token_ids(2, 16),)))
    path = tmp_path / "model.xml"
    qc.export_model(program, path, SPEC)
    for shape in ((1, 1), (3, 37)):
        ids = token_ids(*shape)
        assert_close(run(path, ids), outputs(program(ids)), relative=1e-5)


class Picture(nn.Module):
    """A convolution with batch norm and pooling before a quantized layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of ten classes."""
        y = torch.nn.functional.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        return self.head(y.flatten(1))


def test_a_convolution_around_a_quantized_layer(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    program, path = qc.fold_adapters(adapted(Picture().eval(), (x,))), tmp_path / "model.xml"
    qc.export_model(program, path, SPEC)
    assert_close(run(path, x), program.eval()(x), relative=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_computed_in_float32(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model, x = OneLinear(48, 16).eval().to(dtype), torch.randn(3, 48, dtype=dtype)
    program, path = qc.fold_adapters(adapted(model, (x,))), tmp_path / "model.xml"
    qc.export_model(program, path, SPEC)
    assert_close(run(path, x.float()), program(x).float(), relative=1e-2)


def test_a_layer_that_is_used_twice_is_stored_once(tmp_path: Path) -> None:
    x = torch.randn(2, 32)
    program, path = qc.fold_adapters(adapted(UsedTwice().eval(), (x,))), tmp_path / "model.xml"
    report = qc.export_model(program, path, SPEC)
    assert report.quantized_layers == 3
    assert sum(name.endswith(".qweight") for name in constants(path)) == 2
    assert_close(run(path, x), program(x), relative=1e-5)


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 16)])
def test_an_embedding_tied_to_the_head_is_stored_once(
    bits: int, group: int, tmp_path: Path
) -> None:
    codes = qc.QuantSpec(bits=bits, group_size=group)
    program = qc.capture_model(TiedHead(256, 72).eval(), (torch.randint(0, 256, (2, 5)),))
    program, path = qc.quantize_groups(program, embeddings=codes), tmp_path / "model.xml"
    qc.export_model(program, path, SPEC)
    ids, found = torch.randint(0, 256, (3, 7)), constants(path)
    assert_close(run(path, ids), program(ids), relative=1e-5)
    assert sum(name.endswith(".qweight") for name in found) == 2, "the layer and the table"
    shapes = [list(c.get_output_shape(0)) for c in found.values()]
    assert [256, 72] not in shapes, "no float copy of the table"


def test_unfolded_adapters_are_exported_on_request(tmp_path: Path) -> None:
    x, path = torch.randn(4, 3, 50), tmp_path / "model.xml"
    program = adapted(MLP(50, 64, 10).eval(), (x,), qc.QuantSpec(group_size=16)).eval()
    with pytest.raises(PreconditionError, match="adapters are not folded"):
        qc.export_model(program, path, SPEC)
    spec = qc.ExportSpec(target="openvino", allow_unfolded=True)
    qc.export_model(program, path, spec)
    assert_close(run(path, x), program(x), relative=1e-5)


def test_settings_and_metadata_are_in_the_file(tmp_path: Path) -> None:
    program, path = folded_mlp(), tmp_path / "model.xml"
    qc.export_model(program, path, SPEC)
    model = read(path)
    assert model.get_friendly_name() == "qalora-compile"
    for key in ("DYNAMIC_QUANTIZATION_GROUP_SIZE", "KV_CACHE_PRECISION"):
        taken = compiled(path).get_property(key)
        stated = model.get_rt_info(["runtime_options", key]).astype(str)
        assert str(taken) in (stated, "<Type: 'float32'>"), "the plugin takes it from the file"
    value = json.loads(model.get_rt_info([ONNX_METADATA_KEY]).astype(str))
    assert value["target"] == "openvino"
    assert list(value["site_values"]) == [site.name for site in program.plan]
    named = {node.get_friendly_name() for node in model.get_ops()}
    assert set(value["site_values"].values()) <= named


class Special(nn.Module):
    """An operator that OpenVINO does not have, after a quantized layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Log of the gamma function."""
        return torch.special.bessel_j0(self.fc(x))


def test_an_operator_without_a_rule_is_named_before_anything_is_written(tmp_path: Path) -> None:
    program = qc.fold_adapters(adapted(Special().eval(), (torch.randn(2, 32),)))
    with pytest.raises(UnsupportedError, match=r"cannot convert aten\.special_bessel_j0"):
        qc.export_model(program, tmp_path / "model.xml", SPEC)
    assert not list(tmp_path.iterdir())


def test_other_names_and_files_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    program = folded_mlp()
    with pytest.raises(UserInputError, match=r"does not end in \.xml"):
        qc.export_model(program, tmp_path / "model.onnx", SPEC)
    path = tmp_path / "other.xml"
    path.write_text('<?xml version="1.0"?><net name="theirs" version="11"/>', "utf-8")
    again = qc.ExportSpec(target="openvino", overwrite=True)
    with pytest.raises(UserInputError, match="was not written by this tool"):
        qc.export_model(program, path, again)
    qc.export_model(program, tmp_path / "own.xml", SPEC)
    first = (tmp_path / "own.bin").read_bytes()
    qc.export_model(program, tmp_path / "own.xml", again)
    assert (tmp_path / "own.bin").read_bytes() == first
