"""Core ML packages computed without Core ML, and damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qalora_compile as qc
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.coreml_package import MODEL_PART, WEIGHTS_PART
from qalora_compile.ir.onnx_metadata import OnnxMetadata
from qalora_compile.verify.compare import Tolerance
from qalora_compile.verify.equivalence import verify_equivalence
from qalora_compile.verify.inputs import sample_inputs
from qalora_compile.verify.proof.open_graph import open_graph, open_graphs
from tests.models import MLP, adapted, assert_close

pytest.importorskip("coremltools", reason="coremltools is not installed")
from qalora_compile.verify.runners.coreml_session import CoremlSession

SPEC = qc.ExportSpec(target="coreml")


def exported(folder: Path) -> tuple[qc.Program, Path]:
    x = torch.randn(4, 3, 50)
    program = qc.fold_adapters(adapted(MLP(50, 64, 10).eval(), (x,), qc.QuantSpec(group_size=24)))
    qc.export_model(program, folder / "model.mlpackage", SPEC)
    return program, folder / "model.mlpackage"


def test_outputs_and_sites_are_the_program_s(tmp_path: Path) -> None:
    program, path = exported(tmp_path)
    report = verify_equivalence(program, path, sample_inputs(program, 2), Tolerance(max_rel=1e-5))
    assert report.passed, str(report)
    session, x = CoremlSession(path), torch.randn(2, 5, 50)
    sites = session.sites({"x": x.numpy()})
    assert "layers.0" in sites
    first = program.plan["layers.0"]
    assert sites["layers.0"].shape == (2, 5, first.n)
    assert_close(session.outputs({"x": x.numpy()})["output"], program(x), relative=1e-5)


class Gathered(nn.Module):
    """Operators that coremltools infers no value for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.layer(x))[rows, columns]


def test_operators_without_an_inferred_value(tmp_path: Path) -> None:
    calls = torch.randn(4, 32), torch.tensor([0, 3, 1]), torch.tensor([5, 0, 15])
    program = qc.fold_adapters(adapted(Gathered().eval(), calls))
    path = tmp_path / "model.mlpackage"
    qc.export_model(program, path, SPEC)
    names = ("x", "rows", "columns")
    feed = {name: value.numpy() for name, value in zip(names, calls, strict=True)}
    assert_close(CoremlSession(path).outputs(feed)["output"], program(*calls), relative=1e-5)


def test_a_package_has_inputs_for_display_and_no_proof(tmp_path: Path) -> None:
    _, path = exported(tmp_path)
    (graph,) = open_graphs(path)
    assert (graph.dialect, list(graph.inputs)) == ("coreml", ["x"])
    with pytest.raises(UnsupportedError, match="no form in a proof"):
        open_graph(path)


def test_damaged_packages_are_refused(tmp_path: Path) -> None:
    _, path = exported(tmp_path)
    model, weights = path / "Data" / MODEL_PART, path / "Data" / WEIGHTS_PART / "weight.bin"
    whole, stored = model.read_bytes(), weights.read_bytes()
    model.write_bytes(b"\xff" * 64)
    with pytest.raises(UserInputError, match="is not a specification of Core ML"):
        CoremlSession(path)
    model.write_bytes(b"")
    with pytest.raises(UserInputError, match="was not exported by this package"):
        CoremlSession(path)
    model.write_bytes(whole)
    weights.write_bytes(stored[: len(stored) // 2])
    with pytest.raises(UserInputError, match=r"coremltools cannot read model\.mlpackage"):
        CoremlSession(path)
    model.unlink()
    with pytest.raises(UserInputError):
        CoremlSession(path)


def test_metadata_name_the_target(tmp_path: Path) -> None:
    from qalora_compile.ir.coreml_package import coreml_metadata, read_specification

    _, path = exported(tmp_path)
    metadata = coreml_metadata(read_specification(path), path)
    assert isinstance(metadata, OnnxMetadata)
    assert (metadata.target, metadata.stage) == ("coreml", "legalized:coreml")
    assert np.all([layer.bits == 4 for layer in metadata.layers])
