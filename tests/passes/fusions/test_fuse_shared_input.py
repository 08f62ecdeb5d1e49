"""fuse-shared-input: layers of one input are joined, computed and proved as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.errors import PreconditionError
from qalora_compile.ir.joined_layers import joined_layers
from qalora_compile.ir.program import Program
from qalora_compile.ir.spec import GROUP_QUANT_LINEAR, validate
from qalora_compile.passes.framework.pipeline import Pipeline
from qalora_compile.passes.fusions.fuse_shared_input import FuseSharedInput
from qalora_compile.passes.legalize.legalize_ort import LegalizeOrt
from qalora_compile.runtime import kernel_level, open_session
from tests.models import ThreeReaders, UsedTwice, adapted, assert_close
from tests.verify.planted import with_tensors

Golden = Callable[[str, str], None]


class Readers(nn.Module):
    """Layers of one input with different numbers of outputs, some with a bias."""

    def __init__(self, k: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        layers = (nn.Linear(k, n, bias=i % 2 == 0) for i, n in enumerate(sizes))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The result of each."""
        return [layer(x) for layer in self.layers]


def lowered(model: nn.Module, k: int, bits: int = 4, group: int = 32, level: int = 0) -> Program:
    x = torch.randn(2, 3, k)
    spec = qc.QuantSpec(bits=bits, group_size=group)
    folded = qc.fold_adapters(adapted(model.eval(), (x,), spec))
    return LegalizeOrt(accuracy_level=level)(folded).program


def kernels(program: Program) -> int:
    return sum(node.target is GROUP_QUANT_LINEAR for node in program.graph.nodes)


def test_golden(golden: Golden) -> None:
    torch.manual_seed(0)
    golden("fuse-shared-input", str(FuseSharedInput()(lowered(ThreeReaders(64), 64)).program))


@pytest.mark.slow
@settings(max_examples=12)
@given(
    sizes=st.lists(st.integers(1, 24), min_size=2, max_size=4).map(tuple),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([7, 16, 32, 48]),
    k=st.sampled_from([33, 64]),
    seed=st.integers(0, 2**16),
)
def test_any_sizes_are_joined_into_one_and_compute_the_same(
    sizes: tuple[int, ...], bits: int, group: int, k: int, seed: int
) -> None:
    torch.manual_seed(seed)
    program = lowered(Readers(k, sizes), k, bits, group)
    result = FuseSharedInput()(program)
    validate(result.program)
    assert (kernels(program), kernels(result.program)) == (len(sizes), 1)
    assert len(joined_layers(result.program.graph)) == len(sizes)
    x = torch.randn(2, 5, k)
    assert_close(result.program(x), program(x), relative=1e-6)
    certificate = qc.prove_equivalence(program, result.program)
    assert certificate.proved, certificate
    assert not FuseSharedInput()(result.program).modified


def test_layers_that_differ_are_left_with_a_reason() -> None:
    model, x = ThreeReaders(64), torch.randn(2, 3, 64)
    captured = qc.capture_model(model.eval(), (x,))
    steps = Pipeline.parse('annotate-linears,assign-bits{choices=["q=4/32","k=8/32","v=4/32"]}')
    mixed = qc.quantize_groups(steps(captured).program)
    program = LegalizeOrt()(mixed).program
    result = FuseSharedInput()(program)
    assert [change.path for change in result.changes] == ["q"]
    (skip,) = result.skips
    assert "differ in bits" in skip.why
    assert kernels(result.program) == 2
    assert_close(result.program(x), program(x), relative=1e-6)


def test_a_weight_that_is_read_twice_stays() -> None:
    program = lowered(UsedTwice(64), 64)
    result = FuseSharedInput()(program)
    for node in result.program.graph.nodes:
        assert "joined" not in str(node.target)
    assert not result.modified


def test_other_stages_are_refused() -> None:
    x = torch.randn(2, 3, 64)
    with pytest.raises(PreconditionError):
        FuseSharedInput()(qc.quantize_groups(qc.capture_model(ThreeReaders(64).eval(), (x,))))


@pytest.mark.parametrize("level", [0, 4])
def test_the_file_names_proves_and_computes_every_layer(level: int, tmp_path: Path) -> None:
    model, x, path = ThreeReaders(64), torch.randn(2, 3, 64), tmp_path / "model.onnx"
    folded = qc.fold_adapters(adapted(model.eval(), (x,)))
    spec = qc.ExportSpec(fusion="standard", accuracy_level=level)
    report = qc.export_model(folded, path, spec)
    assert report.quantized_layers == 3
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert (kinds.count("GroupQuantLinear"), kinds.count("Split")) == (1, 1)
    for library in (False, True) if kernel_level() else (False,):
        session = open_session(path, library=library)
        found = [torch.from_numpy(y) for y in session.run(None, {"x": x.numpy()})]
        assert_close(found, folded(x), relative=5e-2 if level else 1e-5)
    certificate = qc.prove_equivalence(folded, path)
    assert certificate.proved, certificate
    assert [len(site.modes) for site in certificate.sites] == [3, 3, 3]
    sites = qc.verify_equivalence(folded, path, [(x,)], qc.Tolerance(max_rel=0.1)).sites
    assert [site.name for site in sites] == ["q", "k", "v"]


def test_a_swap_of_two_layers_is_found() -> None:
    program = lowered(ThreeReaders(64), 64)
    joined = FuseSharedInput()(program).program
    rows = torch.tensor([*range(32, 64), *range(32), *range(64, 96)])
    names = [n for n in joined.tensors() if ".joined." in n]
    swapped = with_tensors(joined, dict.fromkeys(names, lambda t: t[rows]))
    certificate = qc.prove_equivalence(program, swapped)
    assert certificate.verdict == "DIFFERENT"
    assert [site.status for site in certificate.sites] == ["different", "different", "proved"]


def test_fusion_none_leaves_them_and_other_targets_too(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 64)
    folded = qc.fold_adapters(adapted(ThreeReaders(64).eval(), (x,)))
    for target, fusion in (("ort", "none"), ("ort-stock", "standard"), ("onnx", "standard")):
        path = tmp_path / f"{target}.onnx"
        qc.export_model(folded, path, qc.ExportSpec(target=target, fusion=fusion))
        assert "Split" not in {node.op_type for node in onnx.load(path).graph.node}
