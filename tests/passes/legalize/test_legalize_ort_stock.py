"""legalize-ort-stock: integer zero-points and a correction, exact for every size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

import qalora_compile as qc
from qalora_compile.api import lower
from qalora_compile.errors import (
    InternalError,
    PostconditionError,
    PreconditionError,
    UnsupportedError,
    UserInputError,
)
from qalora_compile.ir.affine import dequantize
from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.ops.linear import matmul_nbits
from qalora_compile.ir.packing.bitstream import pack_codes
from qalora_compile.ir.spec import GROUP_SUM, MATMUL_NBITS
from qalora_compile.passes.legalize import legalize_ort_stock as pass_module
from qalora_compile.passes.legalize.block_layout import BlockLayout
from qalora_compile.passes.legalize.legalize_ort_stock import LegalizeOrtStock, lower_weight
from tests.models import (
    MLP,
    OneLinear,
    UsedTwice,
    adapted,
    assert_close,
    bert,
    llama,
    randomize_adapters,
    token_ids,
)

Golden = Callable[[str, str], None]
X = torch.randn(4, 40, generator=torch.Generator().manual_seed(3))


@functools.cache
def captured(k: int, *, single: bool = False) -> tuple[qc.Program, Tensor]:
    """A captured model with rows of `k` weights, and an input; capturing is what takes time."""
    model, x = (OneLinear(k, 5) if single else MLP(k, 24, 8)), torch.randn(4, k)
    return qc.capture_model(model.eval(), (x,)), x


def trained(program: qc.Program, quant: qc.QuantSpec, size: float = 0.1) -> qc.Program:
    """The program quantized, with adapters that have values folded into it."""
    program = qc.insert_adapters(qc.quantize_groups(program, quant), qc.AdapterSpec(rank=4))
    return qc.fold_adapters(randomize_adapters(program, size))


def folded(bits: int = 4, group: int = 16, k: int = 40) -> tuple[qc.Program, Tensor]:
    program, x = captured(k)
    return trained(program, qc.QuantSpec(bits=bits, group_size=group)), x


def test_golden(golden: Golden) -> None:
    golden("legalize-ort-stock", str(LegalizeOrtStock()(folded()[0]).program))
    golden("legalize-ort-stock-padded", str(LegalizeOrtStock()(folded(3, 24)[0]).program))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [1, 7, 16, 24, 32, 48, 100, 576])
@pytest.mark.parametrize("k", [33, 64])
def test_every_size_is_exact(bits: int, group: int, k: int) -> None:
    program, x = folded(bits, group, k)
    assert_close(LegalizeOrtStock()(program).program(x), program(x), relative=1e-5)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    narrow=st.booleans(),
    group=st.integers(1, 70),
    k=st.integers(1, 80),
    shift=st.floats(-100, 100),
    seed=st.integers(0, 9),
)
def test_the_weight_comes_back_from_its_parts(
    bits: int, narrow: bool, group: int, k: int, shift: float, seed: int
) -> None:
    """x = one unit vector a column reads the weight out of kernel and correction."""
    generator = torch.Generator().manual_seed(seed)
    n, groups = 3, -(-k // group)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scale = torch.rand(n, groups, generator=generator, dtype=torch.float32)
    scale[0, 0] = 0.0
    offset = (torch.randn(n, groups, generator=generator) + shift).float()
    packed = pack_codes(codes, bits)
    layout = BlockLayout.choose(bits=bits, group_size=group, k=k, narrow=narrow)
    parts = lower_weight(packed, scale, offset, bits, group, k, layout)
    eye = torch.eye(k, dtype=torch.float64)
    x = torch.ops.qalora.pad_groups(eye, group, layout.width) if layout.padded else eye
    y = matmul_nbits(
        x, parts["qweight"], parts["scale"], parts["zero_point"], None, layout.bits,
        layout.block_size, 0,
    )  # fmt: skip
    y = y + torch.ops.qalora.group_sum(eye, group) @ parts["correction"].double()
    expected = dequantize(packed, scale.double(), offset.double(), bits=bits, group_size=group, k=k)
    assert_close(y.t(), expected, relative=1e-6)


@given(group=st.integers(1, 2000), k=st.integers(1, 4000), bits=st.sampled_from([2, 3, 4, 8]))
def test_a_layout_is_one_that_the_kernel_takes(group: int, k: int, bits: int) -> None:
    layout = BlockLayout.choose(bits=bits, group_size=group, k=k, narrow=False)
    assert layout.block_size in (16, 32, 64, 128, 256)
    assert layout.width % layout.block_size == 0
    assert layout.width - group < 16
    assert layout.bits in (2, 4, 8)
    assert layout.bits >= bits


def test_no_correction_where_zero_points_are_integers() -> None:
    model = OneLinear(32, 4)
    with torch.no_grad():  # levels −8 … 7 with scale 1: zero-point 8 exactly
        model.fc.weight.copy_(torch.arange(128).reshape(4, 32).remainder(16) - 8.0)
    program = qc.quantize_groups(qc.capture_model(model.eval(), (torch.randn(2, 32),)))
    lowered = LegalizeOrtStock()(program).program
    assert "fc.correction" not in lowered.tensors()
    assert not any(n.target is GROUP_SUM for n in lowered.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_unless_widened(dtype: torch.dtype) -> None:
    x = torch.randn(2, 40).to(dtype)
    program = qc.fold_adapters(adapted(MLP(40, 24, 8).to(dtype).eval(), (x,)))
    with pytest.raises(PreconditionError, match="widen-halves") as caught:
        LegalizeOrtStock()(program)
    assert caught.value.where == "layers.0"
    lowered = lower(program, qc.ExportSpec(target="ort-stock"))
    assert lowered(x.float()).dtype == torch.float32
    assert_close(lowered(x.float()), program(x), relative=2e-2)


@pytest.mark.parametrize("build", [bert, llama])
def test_transformers(build: Callable[[], torch.nn.Module]) -> None:
    ids = token_ids(2, 16)
    program = qc.fold_adapters(adapted(build(), (ids,)))
    lowered = lower(program, qc.ExportSpec(target="ort-stock"))
    assert_close(lowered(ids), program(ids), relative=1e-4)
    count = sum(n.target is MATMUL_NBITS for n in lowered.graph.nodes)
    assert count == len(program.plan.to_quantize())


def test_unfolded_adapters_stay() -> None:
    program = adapted(MLP(40, 24, 8).eval(), (X,))
    lowered = LegalizeOrtStock()(program).program
    assert_close(lowered(X), program(X), relative=1e-5)
    assert len(lowered.adapter_parameters()) == 4


def swap_nibbles(parts: dict[str, Tensor]) -> None:
    q = parts["qweight"]
    parts["qweight"] = (q >> 4) | (q << 4)


def off_by_one(parts: dict[str, Tensor]) -> None:
    parts["zero_point"] = parts["zero_point"] + 1


def drop_correction(parts: dict[str, Tensor]) -> None:
    parts["correction"] = torch.zeros_like(parts["correction"])


def negate_correction(parts: dict[str, Tensor]) -> None:
    parts["correction"] = -parts["correction"]


def lose_tail(parts: dict[str, Tensor]) -> None:
    parts["correction"] = parts["correction"].clone()
    parts["correction"][-1] = 0


FAULTS = [swap_nibbles, off_by_one, drop_correction, negate_correction, lose_tail]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_wrong_lowering_is_caught(
    fault: Callable[[dict[str, Tensor]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, x = folded(4, 16)
    real = lower_weight

    def wrong(*args: object) -> dict[str, Tensor]:
        parts = real(*args)  # type: ignore[arg-type]
        fault(parts)
        return parts

    monkeypatch.setattr(pass_module, "lower_weight", wrong)
    lowered = LegalizeOrtStock()(program).program
    report = qc.verify_equivalence(program, lowered, [(x,)], qc.Tolerance(max_rel=1e-4))
    assert not report.passed
    assert report.first_divergence == "layers.0"


def test_the_result_says_what_was_stored_otherwise() -> None:
    changes = LegalizeOrtStock()(folded(3, 24)[0]).changes
    assert "3-bit codes stored in 4 bits" in changes[0].why
    assert "groups of 24 padded to 32" in changes[0].why


def test_float64_and_other_stages_are_refused() -> None:
    x = torch.randn(2, 40, dtype=torch.float64)
    program = qc.quantize_groups(qc.capture_model(MLP(40, 8).double().eval(), (x,)))
    with pytest.raises(UnsupportedError, match="no float64 kernel"):
        LegalizeOrtStock()(program)
    lowered = LegalizeOrtStock()(folded()[0]).program
    with pytest.raises(PreconditionError):
        LegalizeOrtStock()(lowered)
    with pytest.raises(UserInputError):
        LegalizeOrtStock(accuracy_level=2)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group", "k"), [(1, 17), (7, 50), (24, 100), (48, 145), (100, 601), (576, 1153), (1024, 1030)]
)
def test_long_rows_with_a_tail_group_are_exact(bits: int, group: int, k: int) -> None:
    program, x = captured(k, single=True)
    program = trained(program, qc.QuantSpec(bits=bits, group_size=group), size=0.3)
    lowered = LegalizeOrtStock()(program).program
    assert lowered.tensors()["fc.correction"].shape == (-(-k // group), 5)
    assert_close(lowered(x), program(x), relative=1e-5)


def test_groups_of_equal_weights_are_exact() -> None:
    model = OneLinear(40, 4)
    with torch.no_grad():
        model.fc.weight[:, :16] = 0.75
        model.fc.weight[1] = 0.0
    program = qc.quantize_groups(qc.capture_model(model.eval(), (X,)), qc.QuantSpec(group_size=16))
    scale = program.tensors()["fc.scale"]
    assert float(scale[:, 0].abs().max()) == 0.0
    assert float(scale[1].abs().max()) == 0.0
    assert_close(LegalizeOrtStock()(program).program(X), program(X), relative=1e-6)


def test_a_bias_added_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = folded()
    real = LegalizeOrtStock._rewrite

    def twice(self: LegalizeOrtStock, graph: fx.Graph, node: fx.Node, *rest: Any) -> None:
        bias, name = node.args[4], site_of(node)
        real(self, graph, node, *rest)
        done = next(n for n in graph.nodes if site_of(n) == name)
        with graph.inserting_after(done):
            more = graph.call_function(torch.ops.aten.add.Tensor, (done, done))
        move_site(done, more)
        done.replace_all_uses_with(more, delete_user_cb=lambda user: user is not more)
        more.args = (done, bias)

    monkeypatch.setattr(LegalizeOrtStock, "_rewrite", twice)
    wrong = LegalizeOrtStock()(program).program
    report = qc.verify_equivalence(program, wrong, [(x,)], qc.Tolerance(max_rel=1e-4))
    assert not report.passed
    assert report.first_divergence == "layers.0"


def test_codes_packed_in_the_wrong_order_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = folded()

    def permuted(codes: Tensor, bits: int) -> Tensor:
        packed = pack_codes(codes, bits)
        return (packed >> 4) | (packed << 4)

    monkeypatch.setattr(pass_module, "pack_codes", permuted)
    wrong = LegalizeOrtStock()(program).program
    report = qc.verify_equivalence(program, wrong, [(x,)], qc.Tolerance(max_rel=1e-4))
    assert not report.passed
    assert report.first_divergence == "layers.0"


@pytest.mark.parametrize("width", [24, 48])
def test_a_layout_of_the_wrong_width_is_caught(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 24 have no kernel; 48 columns a group in blocks of 32 mix two groups in one."""
    program, x = folded(4, 24)
    block = {24: 24, 48: 32}[width]
    monkeypatch.setattr(BlockLayout, "choose", lambda **_: BlockLayout(4, block, width, True))
    if width == 24:
        with pytest.raises(InternalError, match="blocks of 24"):
            LegalizeOrtStock()(program)
        return
    wrong = LegalizeOrtStock()(program).program
    report = qc.verify_equivalence(program, wrong, [(x,)], qc.Tolerance(max_rel=1e-4))
    assert not report.passed


def test_a_layer_left_behind_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = LegalizeOrtStock._rewrite
    seen: list[str] = []

    def first_only(self: LegalizeOrtStock, graph: fx.Graph, node: fx.Node, *rest: Any) -> None:
        if not seen:
            real(self, graph, node, *rest)
        seen.append(node.name)

    monkeypatch.setattr(LegalizeOrtStock, "_rewrite", first_only)
    with pytest.raises(PostconditionError, match="not legalized") as caught:
        LegalizeOrtStock()(folded()[0])
    assert caught.value.where == "layers.1"


def test_a_weight_used_twice_is_lowered_once() -> None:
    x = torch.randn(2, 40)
    program = qc.fold_adapters(adapted(UsedTwice(40).eval(), (x,)))
    result = LegalizeOrtStock()(program)
    assert [c.path for c in result.changes] == ["shared", "head"]
    assert sum(n.target is MATMUL_NBITS for n in result.program.graph.nodes) == 3
    assert sum(n.endswith(".qweight") for n in result.program.tensors()) == 2
    assert_close(result.program(x), program(x), relative=1e-5)


@pytest.mark.parametrize(("level", "most"), [(0, 5e-4), (4, 8e-3)])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 24), (4, 16), (4, 32), (4, 7), (8, 16)])
@pytest.mark.parametrize("k", [64, 100])
def test_digits_are_near(bits: int, group: int, k: int, level: int, most: float) -> None:
    program, x = folded(bits, group, k)
    lowering = LegalizeOrtStock(correction="digits", accuracy_level=level)
    result = lowering(program)
    assert "digits of" in result.changes[0].why
    assert not any(name.endswith("correction") for name in result.program.tensors())
    assert_close(result.program(x), program(x), relative=most)


def test_fewer_digits_are_worse() -> None:
    program, x = folded(4, 16, 64)
    errors = []
    for level in (0, 4):  # three digits, two digits
        lowered = LegalizeOrtStock(correction="digits", accuracy_level=level)(program).program
        errors.append(float((lowered(x) - program(x)).abs().max()))
    assert 4 * errors[0] < errors[1]


def test_an_unknown_correction_is_refused() -> None:
    with pytest.raises(UserInputError, match="fp32, digits"):
        LegalizeOrtStock(correction="float")
