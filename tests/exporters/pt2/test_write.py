"""Target `torch`: what torch computes from the file is what the folded program computes."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import qalora_compile as qc
from qalora_compile.errors import PreconditionError, UnsupportedError, UserInputError
from tests.exporters.pt2.running import calls, run
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

SPEC = qc.ExportSpec(target="torch")
KERNEL = "aten._weight_int4pack_mm_for_cpu.default"


def folded_mlp(bits: int = 4, group: int = 32, bias: bool = True) -> qc.Program:
    x = torch.randn(4, 3, 50)
    model = MLP(50, 64, 10, bias=bias).eval()
    return qc.fold_adapters(adapted(model, (x,), qc.QuantSpec(bits=bits, group_size=group)))


@pytest.mark.parametrize(
    ("bits", "group", "products"),
    [(4, 32, 2), (3, 16, 2), (2, 24, 2), (8, 32, 4), (4, 1, 2), (4, 100, 2), (2, 576, 2)],
)
def test_every_width_and_group_runs_on_the_kernel(
    bits: int, group: int, products: int, tmp_path: Path
) -> None:
    program, path = folded_mlp(bits, group, bias=group % 3 != 0), tmp_path / "model.pt2"
    report = qc.export_model(program, path, SPEC)
    assert (report.quantized_layers, set(report.files)) == (products, {"model.pt2"})
    assert calls(path).count(KERNEL) == products
    assert not [name for name in calls(path) if name.startswith("qalora")]
    for shape in ((1, 1, 50), (5, 7, 50)):
        x = torch.randn(shape)
        assert_close(run(path, x)[0], program(x), relative=1e-5)


@pytest.mark.slow
def test_an_encoder_at_sizes_never_captured(tmp_path: Path) -> None:
    program = qc.fold_adapters(adapted(bert(), (token_ids(2, 16),)))
    path = tmp_path / "model.pt2"
    qc.export_model(program, path, SPEC)
    for shape in ((1, 2), (3, 37)):
        ids = token_ids(*shape)
        for one, other in zip(run(path, ids), outputs(program(ids)), strict=True):
            assert_close(one, other, relative=1e-5)


def test_a_model_in_half_precision_is_computed_in_float32(tmp_path: Path) -> None:
    model, x = OneLinear(64, 16).eval().bfloat16(), torch.randn(3, 64, dtype=torch.bfloat16)
    program, path = qc.fold_adapters(adapted(model, (x,))), tmp_path / "model.pt2"
    qc.export_model(program, path, SPEC)
    assert_close(run(path, x.float())[0], program(x).float(), relative=1e-2)


def test_a_layer_that_is_used_twice_is_stored_once(tmp_path: Path) -> None:
    x = torch.randn(2, 32)
    program, path = qc.fold_adapters(adapted(UsedTwice().eval(), (x,))), tmp_path / "model.pt2"
    report = qc.export_model(program, path, SPEC)
    assert report.quantized_layers == 3
    stored = torch.export.load(path).state_dict
    assert sum(name.endswith(".packed") for name in stored) == 2
    assert_close(run(path, x)[0], program(x), relative=1e-5)


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 16)])
def test_an_embedding_on_codes_with_its_tied_head(bits: int, group: int, tmp_path: Path) -> None:
    codes = qc.QuantSpec(bits=bits, group_size=group)
    program = qc.capture_model(TiedHead(256, 72).eval(), (torch.randint(0, 256, (2, 5)),))
    program, path = qc.quantize_groups(program, embeddings=codes), tmp_path / "model.pt2"
    qc.export_model(program, path, SPEC)
    ids = torch.randint(0, 256, (3, 7))
    assert_close(run(path, ids)[0], program(ids), relative=1e-5)
    shapes = [list(t.shape) for t in torch.export.load(path).state_dict.values()]
    assert [256, 72] not in shapes, "no float copy of the table"


def test_unfolded_adapters_are_exported_on_request(tmp_path: Path) -> None:
    x, path = torch.randn(4, 3, 50), tmp_path / "model.pt2"
    program = adapted(MLP(50, 64, 10).eval(), (x,), qc.QuantSpec(group_size=32)).eval()
    with pytest.raises(PreconditionError, match="adapters are not folded"):
        qc.export_model(program, path, SPEC)
    qc.export_model(program, path, qc.ExportSpec(target="torch", allow_unfolded=True))
    assert_close(run(path, x)[0], program(x), relative=1e-5)


OTHER = """
import sys, torch
model = torch.export.load(sys.argv[1]).module()
try:
    model(torch.ones(2, 1, 50))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
def test_another_processor_gets_an_error_and_no_wrong_numbers(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    report = qc.export_model(folded_mlp(), path, SPEC)
    here = torch.backends.cpu.get_cpu_capability()
    assert report.notes == (f"4-bit weights are packed for processors with {here}",)
    for level in {"default", "avx2", "avx512"} - {here.lower()}:  # its own runs in other tests
        environment = os.environ | {"ATEN_CPU_CAPABILITY": level}
        done = subprocess.run(
            [sys.executable, "-c", OTHER, str(path)],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        said = f"are packed for {here}" in done.stdout
        assert said or not done.stdout
        if here == "AVX512":
            assert said


def test_the_file_names_no_path_and_is_equal_each_time(tmp_path: Path) -> None:
    program = folded_mlp()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        qc.export_model(program, tmp_path / name / "model.pt2", SPEC)
    one, two = ((tmp_path / name / "model.pt2").read_bytes() for name in ("one", "two"))
    assert one == two
    assert str(Path(__file__).parents[3]).encode() not in one
    with zipfile.ZipFile(tmp_path / "one" / "model.pt2") as archive:
        pickled = [name for name in archive.namelist() if "sample_inputs" in name]
        assert [archive.getinfo(name).file_size for name in pickled] == [0]


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folded_mlp()
    with pytest.raises(UserInputError, match=r"does not end in \.pt2"):
        qc.export_model(program, tmp_path / "model.onnx", SPEC)
    with pytest.raises(UserInputError, match="aot is True for target ort"):
        qc.ExportSpec(aot=True)
    with pytest.raises(UserInputError, match="parameter_dtype is 'float16' for target torch"):
        qc.ExportSpec(target="torch", parameter_dtype="float16")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"no g\+\+ here"):
        qc.export_model(program, tmp_path / "model.pt2", qc.ExportSpec(target="torch", aot=True))
    wide = OneLinear(32, 16).eval().double()
    double = qc.fold_adapters(adapted(wide, (torch.randn(2, 32).double(),)))
    with pytest.raises(UnsupportedError, match="no float64 kernel"):
        qc.export_model(double, tmp_path / "model.pt2", SPEC)
    assert not list(tmp_path.iterdir())


def test_only_own_files_are_replaced(tmp_path: Path) -> None:
    again, path = qc.ExportSpec(target="torch", overwrite=True), tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/models/model.json", "{}")
    with pytest.raises(UserInputError, match="was not written by this tool"):
        qc.export_model(folded_mlp(), path, again)
    path.unlink()
    qc.export_model(folded_mlp(), path, SPEC)
    qc.export_model(folded_mlp(), path, again)
    assert calls(path).count(KERNEL) == 2
