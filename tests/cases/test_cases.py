"""Small cases from public reports that must work; the numbers are those of the cases' list.

The key-value cache of case 11 belongs to a later version, which exports one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.api import lower
from qalora_compile.config import METHODS
from qalora_compile.errors import PreconditionError
from qalora_compile.ir.affine import expand_groups
from qalora_compile.ir.packing.bitstream import unpack_codes
from qalora_compile.ir.site_plan import KEEP, QUANTIZE
from qalora_compile.ir.spec import GROUP_SUM
from qalora_compile.quantizers import needs_data
from qalora_compile.runtime import open_session
from tests.models import (
    TRANSFORMERS,
    VOCABULARY,
    SquareConv1D,
    ThreeReaders,
    TiedHead,
    UsedTwice,
    adapted,
    outputs,
    randomize_adapters,
    scale_of,
    slow,
    token_ids,
    worst,
)
from tests.zoo.entries import ENTRIES

K, N, G, RANK, SCALING = 128, 48, 32, 4, 0.25
POOLINGS = ("sum", "mean", "mean_times_groups")
FACTORS = {"sum": 1.0, "mean": 1 / G, "mean_times_groups": K / G / G}


def tensors_of(program: qc.Program, path: str) -> dict[str, np.ndarray]:
    """Stored tensors of a layer as float64 arrays, codes unpacked."""
    stored = program.tensors()
    parts = {n: stored[f"{path}.{n}"].detach().double().numpy() for n in ("scale", "offset")}
    site = next(s for s in program.plan if s.path == path)
    assert site.bits is not None
    codes = unpack_codes(stored[f"{path}.qweight"], site.bits, site.k)
    return parts | {"codes": codes.double().numpy()}


def case_program(pooling: str, dtype: torch.dtype) -> tuple[qc.Program, Tensor]:
    model = nn.Sequential(nn.Linear(K, N, bias=False)).to(dtype)
    x = torch.randn(7, K, dtype=dtype)
    quant = qc.QuantSpec(bits=4, group_size=G)
    adapter = qc.AdapterSpec(rank=RANK, alpha=SCALING * RANK, pooling=pooling)
    return adapted(model.eval(), (x,), quant, adapter, size=0.5), x


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_case_01_six_conventions_one_answer(pooling: str, dtype: torch.dtype, limit: float) -> None:
    program, x = case_program(pooling, dtype)
    folded = qc.fold_adapters(program)
    assert worst(program(x), folded(x)) <= limit * max(1.0, scale_of(program(x)))

    before, after = tensors_of(program, "0"), tensors_of(folded, "0")
    adapters = {n.rpartition(".")[2]: p for n, p in program.named_adapter_parameters()}
    lora_a, lora_b = (adapters[n].detach().double().numpy() for n in ("lora_A", "lora_B"))
    update = SCALING * FACTORS[pooling] * (lora_b @ lora_a)

    def weight(scale: np.ndarray, levels: np.ndarray) -> np.ndarray:
        return np.asarray(np.repeat(scale, G, axis=1) * levels)

    # The base in zero-point form folds by the zero-point formula …
    zero_point = -before["offset"] / before["scale"]
    folded_zero = zero_point - update / before["scale"]
    by_zero = weight(before["scale"], before["codes"] - np.repeat(folded_zero, G, axis=1))
    by_offset = weight(after["scale"], after["codes"]) + np.repeat(after["offset"], G, axis=1)
    np.testing.assert_allclose(by_zero, by_offset, atol=10 * limit)
    # … which an offset does not take: the two cannot be confused and go unseen.
    confused = before["offset"] - update / before["scale"]
    wrong = weight(before["scale"], before["codes"]) + np.repeat(confused, G, axis=1)
    error = x.double().numpy() @ (wrong - by_offset).T
    assert np.abs(error).max() > 0.05


def test_case_02_rounding_is_not_folding(tmp_path: Path) -> None:
    program, x = case_program("sum", torch.float32)
    folded = qc.fold_adapters(program)
    parts = {n: torch.from_numpy(v) for n, v in tensors_of(folded, "0").items()}
    rounded = (-parts["offset"] / parts["scale"]).round()
    levels = parts["codes"] - expand_groups(rounded, G, K)
    forced = x.double() @ (expand_groups(parts["scale"], G, K) * levels).t()
    assert worst(forced.float(), folded(x)) > 0.1
    qc.export_model(folded, tmp_path / "model.onnx")
    report = qc.verify_equivalence(
        program, tmp_path / "model.onnx", [(x,)], qc.Tolerance(max_rel=1e-5)
    )
    assert report.passed, "what is shipped is the real zero-point"


FLAT = {
    "equal": torch.full((N, G), 0.37),
    "zero": torch.zeros(N, G),
    "tiny": torch.linspace(-1e-30, 1e-30, G).repeat(N, 1),
    "huge": torch.full((N, G), 6e4),
}


every_method = pytest.mark.parametrize("method", [m for m in METHODS if m != "learned"])
"""`learned` has the codes of `gptq`, and trains on the loss of a model."""


def adapted_by(
    method: str, model: nn.Module, x: Tensor, calls: list[tuple[Tensor]], bits: int = 4
) -> qc.Program:
    """Random adapters on codes of a method, calibrated where it needs data."""
    spec = qc.QuantSpec(bits=bits, group_size=G, method=method, refine_offsets=False)
    data = calls if needs_data(method) else None
    quantized = qc.quantize_groups(qc.capture_model(model, (x,)), spec, calibration=data)
    return randomize_adapters(qc.insert_adapters(quantized, qc.AdapterSpec(rank=RANK)))


@every_method
def test_case_03_flat_groups(method: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(K, N, bias=False)).eval()
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.cat(list(FLAT.values()), dim=1))
    x = torch.randn(7, K)
    program = adapted_by(method, model, x, [(torch.randn(300, K),)])
    quantized = tensors_of(program, "0")
    again = np.repeat(quantized["scale"], G, 1) * quantized["codes"]
    again += np.repeat(quantized["offset"], G, 1)
    weight = model.get_parameter("0.weight").detach().double().numpy()
    for index, name in enumerate(FLAT):
        group = slice(index * G, (index + 1) * G)
        assert np.isfinite(again[:, group]).all()
        limit = 1e-30 if name == "tiny" else 0.0
        assert np.abs(again[:, group] - weight[:, group]).max() <= limit, name
    folded = qc.fold_adapters(program)
    assert worst(program(x), folded(x)) <= 1e-6 * scale_of(program(x))
    qc.export_model(folded, tmp_path / "model.onnx")
    tolerance = qc.Tolerance(max_rel=1e-5)
    assert qc.verify_equivalence(folded, tmp_path / "model.onnx", [(x,)], tolerance).passed


ONE_SIDED = [("minmax", bits, sign) for bits in (2, 3, 4, 8) for sign in (1.0, -1.0)]
ONE_SIDED += [("mse", 2, 1.0), ("mse", 4, -1.0), ("hqq", 2, -1.0), ("hqq", 3, 1.0)]
ONE_SIDED += [("gptq", 3, -1.0), ("gptq", 4, 1.0)]


@pytest.mark.parametrize(("method", "bits", "sign"), ONE_SIDED)
def test_case_04_one_sided_groups(method: str, bits: int, sign: float, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(K, N)).eval()
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(sign * (5 + torch.rand(N, K)))
    x = torch.randn(7, K)
    program = adapted_by(method, model, x, [(torch.randn(300, K),)], bits)
    folded = qc.fold_adapters(program)
    stored = tensors_of(folded, "0")
    zero_point = -stored["offset"] / stored["scale"]
    assert ((zero_point < 0) | (zero_point > 2**bits - 1)).all(), "outside the code range"
    qc.export_model(folded, tmp_path / "model.onnx")
    tolerance = qc.Tolerance(max_rel=1e-5)
    assert qc.verify_equivalence(folded, tmp_path / "model.onnx", [(x,)], tolerance).passed


@pytest.mark.parametrize(
    ("k", "n", "g"), [(576, 576, 128), (288, 288, 256), (20, 8, 32), (1, 8, 32), (64, 1, 32)]
)
def test_case_05_sizes_that_do_not_divide(k: int, n: int, g: int, tmp_path: Path) -> None:
    x = torch.randn(5, k)
    program = adapted(nn.Sequential(nn.Linear(k, n)).eval(), (x,), qc.QuantSpec(group_size=g))
    (site,) = program.plan
    assert site.decision == QUANTIZE
    assert program.tensors()["0.scale"].shape == (n, -(-k // g))
    folded = qc.fold_adapters(program)
    assert worst(program(x), folded(x)) <= 1e-5 * max(1.0, scale_of(program(x)))
    qc.export_model(folded, tmp_path / "model.onnx")
    tolerance = qc.Tolerance(max_rel=1e-5)
    assert qc.verify_equivalence(folded, tmp_path / "model.onnx", [(x,)], tolerance).passed


def test_case_06_square_conv1d_and_a_planted_missing_transpose() -> None:
    model, x = SquareConv1D(768).eval(), torch.randn(3, 768)
    program = qc.quantize_groups(qc.capture_model(model, (x,)), qc.QuantSpec(bits=8))
    (site,) = program.plan
    assert site.kind == "addmm"
    assert site.transposed
    reference = model(x)
    assert worst(program(x), reference) < 0.02 * scale_of(reference)
    with torch.no_grad():
        weight = next(p for p in model.parameters() if p.dim() == 2)
        weight.copy_(weight.t().clone())
    missed = qc.quantize_groups(qc.capture_model(model, (x,)), qc.QuantSpec(bits=8))
    report = qc.verify_equivalence(program, missed, [(x,)], qc.Tolerance(max_rel=0.05))
    assert not report.passed
    assert report.first_divergence == site.name


def test_case_07a_one_layer_used_twice(tmp_path: Path) -> None:
    x = torch.randn(3, 32)
    program = adapted(UsedTwice(32).eval(), (x,))
    shared = [s for s in program.plan if s.storage == program.plan.sites[0].storage]
    assert len(shared) == 2
    assert len({s.name for s in shared}) == 2
    codes = [n for n in program.tensors() if n.endswith(".qweight")]
    assert len(codes) == len({s.storage for s in program.plan})
    folded = qc.fold_adapters(program)
    assert worst(program(x), folded(x)) < 1e-4
    qc.export_model(folded, tmp_path / "model.onnx")
    tolerance = qc.Tolerance(max_rel=1e-5)
    report = qc.verify_equivalence(folded, tmp_path / "model.onnx", [(x,)], tolerance)
    assert report.passed
    assert len(report.sites) == len(program.plan)


def test_case_07b_a_head_tied_to_the_embedding() -> None:
    model, ids = TiedHead(VOCABULARY).eval(), token_ids(2, 8)
    program = qc.quantize_groups(qc.capture_model(model, (ids,)))
    tied = [s for s in program.plan if s.decision == KEEP and "tied" in s.reason]
    assert len(tied) == 1
    head = tied[0].name
    forced = qc.quantize_groups(qc.capture_model(model, (ids,)), targets=[head])
    assert forced.plan[head].decision == QUANTIZE
    embeddings = [s for s in forced.plan if s.kind == "embedding"]
    assert embeddings[0].decision == KEEP


def test_case_07c_the_bias_is_added_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(K, N)).eval()
    with torch.no_grad():
        model.get_parameter("0.bias").fill_(100.0)
    x = torch.zeros(2, K)
    program = adapted(model, (x,))
    folded = qc.fold_adapters(program)
    lowered = lower(folded, qc.ExportSpec())
    qc.export_model(folded, tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for y in (program(x), folded(x), lowered(x), torch.from_numpy(found)):
        assert worst(y, torch.full((2, N), 100.0)) == 0.0


@pytest.mark.parametrize(("pool", "folds"), [(8, False), (32, True), (64, True), (48, False)])
def test_case_08_pool_against_group(pool: int, folds: bool) -> None:
    x = torch.randn(7, K)
    model = nn.Sequential(nn.Linear(K, N)).eval()
    quantized = qc.quantize_groups(qc.capture_model(model, (x,)), qc.QuantSpec(group_size=G))
    spec = qc.AdapterSpec(rank=RANK, group_size=pool)
    if not folds:
        with pytest.raises(PreconditionError, match=f"groups of {pool}.*groups of {G}"):
            qc.insert_adapters(quantized, spec)
        return
    program = adapted(model, (x,), qc.QuantSpec(group_size=G), spec)
    folded = qc.fold_adapters(program)
    assert worst(program(x), folded(x)) <= 1e-5 * scale_of(program(x))


def encoder() -> nn.Module:
    """A torch encoder whose evaluation takes the fused fast path; no dropout."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "modules"])
@pytest.mark.parametrize("padded", [False, True])
def test_case_09_the_fast_path(graph: bool, padded: bool) -> None:
    torch.manual_seed(0)
    model, x = encoder(), torch.randn(3, 10, 32)
    mask = torch.arange(10)[None] >= torch.tensor([[10], [7], [4]])
    kwargs = {"src_key_padding_mask": mask} if padded else {}
    spec = qc.AdapterSpec(rank=RANK)
    if graph:
        program = qc.quantize_groups(qc.capture_model(model, (x,), kwargs))
        program = qc.insert_adapters(program, spec)
    else:
        program = qc.adapt_module_(model, (x,), kwargs, adapter=spec)
        # on the fast path torch writes zeros to padded rows
        assert any("288 of 960 values" in note for note in program.notes) == padded
    ours: Any = program if graph else model
    valid = ~mask if padded else torch.ones_like(mask)  # padded rows are no output

    def run(*, train: bool) -> Tensor:
        ours.train() if train else ours.eval()
        with torch.inference_mode():
            value = ours(x, **kwargs)
        assert isinstance(value, Tensor)
        return value[valid]

    before = run(train=False)
    randomize_adapters(program)
    adapted_output = run(train=False)
    assert worst(adapted_output, before) > 0.05 * scale_of(before)
    assert worst(run(train=True), adapted_output) < 1e-5 * scale_of(adapted_output)
    randomize_adapters(program, size=0.0)
    assert worst(run(train=False), before) == 0.0


def test_case_10_same_input_many_readers(tmp_path: Path) -> None:
    x = torch.randn(5, 64)
    folded = qc.fold_adapters(adapted(ThreeReaders(64).eval(), (x,)))
    spec = qc.ExportSpec(target="ort-stock")
    lowered = lower(folded, spec)
    (shared,) = [n for n in lowered.graph.nodes if n.target is GROUP_SUM]
    assert len(shared.users) == 3
    qc.export_model(folded, tmp_path / "model.onnx", spec)
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    (group_sum,) = [n for n in nodes if n.op_type == "ReduceSum"]
    readers = [n for n in nodes if group_sum.output[0] in n.input]
    assert [n.op_type for n in readers] == ["MatMul"] * 3
    tolerance = qc.Tolerance(max_rel=1e-5)
    assert qc.verify_equivalence(folded, tmp_path / "model.onnx", [(x,)], tolerance).passed


@pytest.mark.parametrize("name", ["bert", *slow("llama", "gpt2")])
def test_case_11_a_batch_the_capture_never_saw(name: str, tmp_path: Path) -> None:
    model = TRANSFORMERS[name]()
    program = qc.capture_model(model, (token_ids(2, 16),))
    qc.export_model(program, tmp_path / "float.onnx", qc.ExportSpec(allow_unfolded=True))
    session = open_session(tmp_path / "float.onnx")
    for shape in ((1, 1), (3, 37)):
        ids = token_ids(*shape)
        with torch.no_grad():
            expected = model(ids)
        assert worst(program(ids), expected) < 1e-5
        found = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        for ours, theirs in zip(found, outputs(expected), strict=True):
            assert worst(torch.from_numpy(ours), theirs) < 1e-4


EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half a step at 1: the largest relative error of one rounding."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float16)], ids=str)
@pytest.mark.parametrize("name", ["vit", *slow("llama")])
def test_case_12_half_precision_models(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    entry = ENTRIES[name]
    model = entry.build().to(dtype)

    def inputs(batch: int, sequence: int) -> dict[str, Tensor]:
        _, kwargs = entry.inputs(batch, sequence, 1)
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in kwargs.items()}

    call, new = inputs(2, 16), inputs(4, 9)
    program = qc.capture_model(model, (), call)
    with torch.no_grad():
        assert worst(program(**new), model(**new)) == 0.0
    quantized = qc.quantize_groups(program)

    # Codes, scales and offsets are those of the exact values …
    wide = {k: v.float() if v.is_floating_point() else v for k, v in call.items()}
    exact = qc.quantize_groups(qc.capture_model(copy.deepcopy(model).float(), (), wide)).tensors()
    names = [n for n in exact if n.endswith((".qweight", ".scale", ".offset"))]
    assert len(names) == 3 * len(quantized.plan.weights_to_quantize())
    assert all(torch.equal(quantized.tensors()[n], exact[n]) for n in names)

    # … adapters fold to within the roundings of the dtype …
    adapted_program = randomize_adapters(qc.insert_adapters(quantized, qc.AdapterSpec(rank=4)))
    folded = qc.fold_adapters(adapted_program)
    with torch.no_grad():
        expected, found = adapted_program(**new), folded(**new)
    assert worst(found, expected) <= 16 * EPSILON[dtype] * scale_of(expected)

    # … and the file computes the same weights in float32, between float32 inputs and outputs.
    report = qc.export_model(folded, tmp_path / "model.onnx")
    assert "float32" in report.capabilities["activations"].detail
    session = open_session(tmp_path / "model.onnx")
    declared = {v.type for v in [*session.get_inputs(), *session.get_outputs()]}
    assert declared <= {"tensor(float)", "tensor(int64)"}
    close = qc.Tolerance(max_rel=16 * EPSILON[dtype])
    assert qc.verify_equivalence(folded, tmp_path / "model.onnx", [new], close).passed
    same = qc.Tolerance(max_rel=1e-5)
    lowered = lower(folded, qc.ExportSpec())
    assert qc.verify_equivalence(lowered, tmp_path / "model.onnx", [wide], same).passed
