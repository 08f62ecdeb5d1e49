"""`prove_equivalence`: what is equal is proved, at any shape; what is not is named; bounds hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qalora_compile as qc
from qalora_compile.api import lower
from qalora_compile.config import POOLINGS
from qalora_compile.errors import UserInputError, VerificationError
from qalora_compile.verify import Certificate, compare_structure
from qalora_compile.verify.proof.compare_weights import DIGITS_ROUNDING, compare_linears
from qalora_compile.verify.proof.graphs.read_fx import program_graph
from qalora_compile.verify.proof.weights.fx_layers import fx_linear
from qalora_compile.verify.proof.weights.linear_map import THREE_DIGITS, TWO_DIGITS, NotLinearError
from tests.models import (
    MLP,
    OneLinear,
    ThreeReaders,
    UsedTwice,
    adapted,
    bert,
    gpt2,
    llama,
    slow,
    token_ids,
)
from tests.verify.planted import SPECS, program, with_tensors
from tests.zoo.modules import BatchedExperts, CrossAttention


def folded_and_lowered(start: qc.Program) -> list[tuple[qc.Program, qc.Program]]:
    """Every pair of programs that have to be equal."""
    folded = qc.fold_adapters(start)
    return [(start, folded), *((folded, lower(folded, spec)) for spec in SPECS.values())]


def example_for(module: nn.Module) -> tuple[torch.Tensor, ...]:
    """Example inputs of a small module."""
    if isinstance(module, CrossAttention):
        return torch.randn(2, 5, 64), torch.randn(2, 7, 64)
    return (torch.randn(3, 5, 64),)


@pytest.mark.parametrize(
    "build",
    [
        lambda: MLP(64, 48, 40),
        lambda: ThreeReaders(64),
        lambda: UsedTwice(64),
        BatchedExperts,
        CrossAttention,
    ],
    ids=["mlp", "three readers", "used twice", "experts", "packed attention"],
)
def test_every_step_is_proved(build: Callable[[], nn.Module]) -> None:
    module = build().eval()
    for before, after in folded_and_lowered(adapted(module, example_for(module))):
        certificate = qc.prove_equivalence(before, after)
        assert certificate.proved, certificate
        assert certificate.sites


def test_a_mask_of_packed_positions_is_proved() -> None:
    """A program without a cache computes its mask by differences and sums of positions."""
    folded = qc.fold_adapters(adapted(llama(), (token_ids(2, 16),)))
    plain = lower(folded, qc.ExportSpec())
    assert qc.prove_equivalence(folded, plain).proved
    fused = lower(folded, qc.ExportSpec(fusion="standard"))
    certificate = qc.prove_equivalence(folded, fused, samples=0).check()
    assert (certificate.verdict, certificate.sampled) == ("PROVED UNDER", ())


@pytest.mark.parametrize("build", [*slow(bert, gpt2), llama])
def test_exports_without_a_cache_are_proved(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = token_ids(2, 16)
    calls = (ids, torch.ones_like(ids)) if build is bert else (ids,)
    folded = qc.fold_adapters(adapted(build(), calls))
    qc.export_model(folded, tmp_path / "model.onnx", qc.ExportSpec(target="ort-stock"))
    certificate = qc.prove_equivalence(folded, tmp_path / "model.onnx", samples=0).check()
    assert (certificate.verdict, certificate.sampled) == ("PROVED UNDER", ())
    limits = [c for c in certificate.conditions if "at most" in c]
    assert limits == (["the axis sequence has at most 64 elements"] if build is bert else [])


def test_adapters_are_a_difference_unless_they_are_zero() -> None:
    quantized = qc.quantize_groups(qc.capture_model(OneLinear(64, 8), (torch.randn(2, 64),)))
    fresh = qc.insert_adapters(quantized, qc.AdapterSpec(rank=2))
    assert qc.prove_equivalence(quantized, qc.fold_adapters(fresh)).proved
    trained = adapted(OneLinear(64, 8), (torch.randn(2, 64),))
    certificate = qc.prove_equivalence(program("quantized"), program("folded"))
    assert certificate.verdict == "DIFFERENT"
    assert (certificate.difference or "").startswith("q: weights differ by up to")
    with pytest.raises(VerificationError, match="not proved equal") as caught:
        certificate.check()
    assert caught.value.report is certificate
    assert qc.prove_equivalence(trained, qc.fold_adapters(trained)).check().proved


def test_names_and_the_order_of_independent_nodes_do_not_count() -> None:
    first = qc.quantize_groups(qc.capture_model(ThreeReaders(), (torch.randn(2, 64),)))
    graph = first.copy_graph()
    layers = [n for n in graph.nodes if "group_linear" in str(n.target)]
    layers[0].prepend(layers[1])
    for index, node in enumerate(graph.nodes):
        if node.op == "call_function":
            node.name = f"other_{index}"
    certificate = qc.prove_equivalence(first, first.evolve(graph=graph))
    assert certificate.proved, certificate


def test_the_structure_alone_shows_two_lines() -> None:
    same = compare_structure(program("folded"), program("lowered:onnx"))
    assert same.same
    assert same.difference is None

    def replace(node: torch.fx.Node) -> None:
        node.target = torch.ops.aten.gelu.default

    graph = program("folded").copy_graph()
    replace(next(n for n in graph.nodes if "silu" in str(n.target)))
    other = compare_structure(program("folded"), program("folded").evolve(graph=graph))
    assert not other.same
    where, *lines = (other.difference or "").splitlines()
    assert where == "input of down"
    assert "aten.silu(%group_linear_default_3)" in lines[0]
    assert "aten.gelu(%group_linear_default_3)" in lines[1]


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.integers(3, 40),
    k=st.integers(1, 70),
    n=st.integers(1, 20),
    pooling=st.sampled_from(POOLINGS),
    place=st.integers(0, 10**6),
)
@settings(max_examples=15)
def test_any_layer_is_proved_and_any_flipped_code_is_found(
    bits: int, group: int, k: int, n: int, pooling: str, place: int
) -> None:
    start = adapted(
        OneLinear(k, n),
        (torch.randn(2, k),),
        qc.QuantSpec(bits=bits, group_size=group),
        qc.AdapterSpec(rank=2, pooling=pooling),
    )
    for before, after in folded_and_lowered(start):
        assert qc.prove_equivalence(before, after).proved

    def flip(codes: torch.Tensor) -> torch.Tensor:
        row, code = place % n, place % k
        byte, bit = divmod(code * bits, 8)
        codes[row, byte] ^= 1 << bit
        return codes

    folded = qc.fold_adapters(start)
    scale = folded.tensors()["fc.scale"][place % n, place % k // group]
    certificate = qc.prove_equivalence(folded, with_tensors(folded, {"fc.qweight": flip}))
    assert certificate.verdict == ("PROVED" if scale == 0 else "DIFFERENT")
    assert certificate.max_abs == pytest.approx(float(scale), rel=1e-6, abs=0)


def test_a_difference_is_as_large_as_the_certificate_says_for_every_input() -> None:
    first, second = program("quantized"), program("folded")
    sides = [program_graph(p) for p in (first, second)]
    for name in ("q", "up"):
        maps = [fx_linear(side, side.sites[name]) for side in sides]
        found = compare_linears(*maps)
        weights = [m.rows(slice(0, m.n), -1).weight for m in maps]
        apart = weights[0] - weights[1]
        assert found.max_abs == np.abs(apart).max()
        assert found.frobenius == pytest.approx(np.linalg.norm(apart))
        largest = np.linalg.norm(apart, 2)
        assert largest <= found.operator * (1 + 1e-12)
        assert found.operator <= found.frobenius * (1 + 1e-12)
        worst = np.linalg.svd(apart)[2][0]  # the input that moves the output most
        assert np.linalg.norm(apart @ worst) == pytest.approx(largest)


@pytest.mark.parametrize("kind", ["folded", *(f"lowered:{name}" for name in SPECS)])
def test_float32_arithmetic_stays_within_its_bound(kind: str) -> None:
    shown = program(kind)
    graph = program_graph(shown)
    linear = fx_linear(graph, graph.sites["up"])
    bound = compare_linears(linear, linear).float32
    assert bound is not None
    weight, bias = linear.rows(slice(0, linear.n), -1).weight, linear.biases()
    node = next(n for n in shown.graph.nodes if n.name == graph.site_values["up"])
    x = torch.randn(50, 48) * torch.logspace(-3, 3, 50)[:, None]
    y = _site_output(shown, node, linear.source[0].name, x).double().numpy()
    error = np.linalg.norm(y - (x.double().numpy() @ weight.T + bias), axis=1)
    gamma = 1e-6 * np.linalg.norm(bias)
    assert (error <= bound * np.linalg.norm(x.double().numpy(), axis=1) + gamma).all()
    assert error.max() > 0, "it is computed in float32"


def _site_output(
    shown: qc.Program, node: torch.fx.Node, source: str, x: torch.Tensor
) -> torch.Tensor:
    """What a site computes of x."""
    graph = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    for old in shown.graph.nodes:
        if old.name == source:
            values[old] = graph.placeholder("x")
        known = old.all_input_nodes and all(a in values for a in old.all_input_nodes)
        if old.op == "get_attr" or (old.op == "call_function" and known):
            values[old] = graph.node_copy(old, values.__getitem__)
    graph.output(values[node])
    y: torch.Tensor = shown.module.rebuild(graph, shown.tensors())(x)
    return y


def test_matrices_that_do_not_fit_are_refused() -> None:
    graph = program_graph(program("folded"))
    q, up = (fx_linear(graph, graph.sites[name]) for name in ("q", "up"))
    with pytest.raises(NotLinearError, match="the shapes .* differ"):
        compare_linears(q, up)


def test_tensors_that_cannot_be_decoded_are_a_difference() -> None:
    cut = with_tensors(program("folded"), {"q.qweight": lambda codes: codes[:, :-1]})
    certificate = qc.prove_equivalence(program("folded"), cut)
    assert certificate.verdict == "DIFFERENT"
    assert "cannot be decoded" in (certificate.difference or "")


def test_half_precision_is_compared_as_widened() -> None:
    folded = qc.fold_adapters(adapted(MLP(64, 32, 8).bfloat16(), (torch.randn(2, 64).bfloat16(),)))
    certificate = qc.prove_equivalence(folded, lower(folded, qc.ExportSpec()))
    assert certificate.proved, certificate
    assert any("widened" in note for note in certificate.notes)


def test_rounded_parameters_and_int8_activations_are_said() -> None:
    folded = program("folded")
    rounded = lower(folded, qc.ExportSpec(parameter_dtype="float16", accuracy_level=4))
    certificate = qc.prove_equivalence(folded, rounded)
    assert certificate.passed
    assert certificate.max_abs > 1e-5, "float16 rounds"
    assert any("int8 activations" in note for note in certificate.notes)
    assert all(s.worst is not None and s.worst[1].float32 is None for s in certificate.sites)
    nearly = with_tensors(rounded, {"q.scale": lambda s: s * (1 + 2**-9)})
    assert not qc.prove_equivalence(folded, nearly).passed


def test_two_digits_have_a_bound_and_it_holds() -> None:
    folded = program("folded")
    exact, digits = (lower(folded, qc.ExportSpec(accuracy_level=level)) for level in (0, 2))
    certificate = qc.prove_equivalence(folded, digits)
    assert certificate.proved
    assert any("two int8 digits" in note for note in certificate.notes)
    other = qc.prove_equivalence(folded, exact)
    assert not any("digits" in note for note in other.notes)
    for site, plain in zip(certificate.sites, other.sites, strict=True):
        wide, narrow = site.modes["operators"], plain.modes["operators"]
        assert wide.float32 is not None
        assert narrow.float32 is not None
        two, three = DIGITS_ROUNDING[TWO_DIGITS], DIGITS_ROUNDING[THREE_DIGITS]
        moved = wide.float32 - narrow.float32
        assert moved > (two - three) * wide.weight_frobenius * (1 - 1e-9)
        assert narrow.float32 > three * narrow.weight_frobenius


@pytest.mark.parametrize(("digits", "note"), [(2, TWO_DIGITS), (3, THREE_DIGITS)])
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.sampled_from([16, 32]))
def test_the_rounding_to_digits_is_within_its_constant(
    digits: int, note: str, seed: int, power: float, block: int
) -> None:
    """As docs/reference/operators.md has it: in blocks, with a scale of the largest magnitude."""
    normal = np.random.default_rng(seed).standard_normal((8, block)) ** 3 * power
    x = normal.astype(np.float32)
    largest, top = np.abs(x).max(1, keepdims=True), np.float32(127 * 128 ** (digits - 1))
    step = (largest / top).astype(np.float64)
    moved = np.rint(x * (top / largest)) * step - x
    assert np.linalg.norm(moved) <= DIGITS_ROUNDING[note] * np.linalg.norm(x)


def test_an_offset_that_hides_a_code_is_said() -> None:
    folded = program("folded")
    far = with_tensors(folded, {"v.offset": lambda o: o + 1e7 * folded.tensors()["v.scale"]})
    certificate = qc.prove_equivalence(far, far)
    assert certificate.proved
    assert any(
        "hides a change of one code" in note and "v the first" in note for note in certificate.notes
    )
    assert not any("hides" in note for note in qc.prove_equivalence(folded, folded).notes)


def test_a_layer_that_is_missing_is_said() -> None:
    few = qc.quantize_groups(qc.capture_model(ThreeReaders(), (torch.randn(2, 64),)), exclude=["v"])
    complete = qc.quantize_groups(qc.capture_model(ThreeReaders(), (torch.randn(2, 64),)))
    certificate = qc.prove_equivalence(complete, few)
    assert certificate.verdict == "DIFFERENT"
    assert (certificate.difference or "").startswith("v: the site is missing in")


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    folded = program("folded")
    with pytest.raises(UserInputError, match="neither a program folder"):
        qc.prove_equivalence(folded, tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(UserInputError, match="cannot be read as an ONNX model"):
        qc.prove_equivalence(folded, tmp_path)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), tmp_path / "m.onnx")
    with pytest.raises(UserInputError, match="not exported by this package"):
        qc.prove_equivalence(folded, tmp_path / "m.onnx")


def test_two_exported_models_are_compared_without_a_program(models: Path) -> None:
    paths = [models / f"{name}.onnx" for name in SPECS]
    for path in paths[1:]:
        assert qc.prove_equivalence(paths[0], path).proved


def test_every_execution_mode_of_the_default_target_is_proved(models: Path) -> None:
    certificate: Certificate = qc.prove_equivalence(program("folded"), models / "ort.onnx")
    for site in certificate.sites:
        assert list(site.modes) == ["operators", "functions", "standard functions"]
        assert site.bound(1.0) < 1e-5


class Looked(nn.Module):
    """A table that is looked up by shifted numbers, and a layer that masked rows reach."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(200, 48), nn.Linear(48, 16)
        self.out = nn.Linear(16, 16)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Each row with sums over the positions that count."""
        rows = self.fc(self.table(ids + 2)) * attention_mask[:, :, None]
        y: torch.Tensor = self.out(rows + rows.sum(1, keepdim=True))
        return y


def looked_up(bits: int) -> qc.Program:
    """It, folded, with its table on codes."""
    torch.manual_seed(1)
    steps = "annotate-linears,quantize-groups,insert-adapters{rank=2},quantize-embeddings{bits=%d}"
    example = (torch.randint(0, 190, (2, 6)), torch.ones(2, 6))
    captured = qc.capture_model(Looked().eval(), example)
    return qc.fold_adapters(qc.Pipeline.parse(steps % bits)(captured).program)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("target", ["ort", "ort-stock", "onnx"])
def test_a_table_on_codes_is_proved_row_by_row(bits: int, target: str, tmp_path: Path) -> None:
    folded, spec = looked_up(bits), qc.ExportSpec(target=target)
    lowered = qc.prove_equivalence(folded, lower(folded, spec))
    assert lowered.proved, lowered
    qc.export_model(folded, tmp_path / "model.onnx", spec)
    certificate = qc.prove_equivalence(folded, tmp_path / "model.onnx")
    assert certificate.passed, certificate
    assert {s.name: s.status for s in certificate.sites}["table"] == "proved"
    model = onnx.load(tmp_path / "model.onnx")
    codes = next(t for t in model.graph.initializer if t.name.startswith("table."))
    assert codes.name.endswith("qweight")
    changed = bytearray(codes.raw_data)
    changed[len(changed) // 2] ^= 1
    codes.raw_data = bytes(changed)
    onnx.save(model, tmp_path / "other.onnx")
    other = qc.prove_equivalence(folded, tmp_path / "other.onnx")
    assert other.verdict == "DIFFERENT"
    assert (other.difference or "").startswith("table: weights differ")


def test_padding_is_tried_where_structure_does_not_tell(tmp_path: Path) -> None:
    folded = looked_up(4)
    qc.export_model(folded, tmp_path / "model.onnx", qc.ExportSpec(target="ort-stock"))
    model = onnx.load(tmp_path / "model.onnx")
    node = next(n for n in model.graph.node if "attention_mask" in n.input)
    place = list(node.input).index("attention_mask")
    node.input[place] = "read"  # of a mask of ones it makes the same: 2 − 1
    one = onnx.numpy_helper.from_array(np.array(1, np.float32), "one")
    model.graph.initializer.append(one)
    before = [
        onnx.helper.make_node("Sub", ["attention_mask", "attention_mask"], ["none"]),
        onnx.helper.make_node("Add", ["none", "one"], ["read"]),
    ]
    nodes = [*before, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "other.onnx")
    assert qc.prove_equivalence(folded, tmp_path / "model.onnx").passed
    other = qc.prove_equivalence(folded, tmp_path / "other.onnx")
    assert other.verdict == "DIFFERENT", other


class Convolved(nn.Module):
    """A convolution behind which an operator has no form that both kinds of graphs share."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Means of the channels."""
        y: torch.Tensor = self.fc(nn.functional.hardswish(self.conv(x)).mean((2, 3)))
        return y


class Tempered(nn.Module):
    """A layer times e to a stored power, as CLIP scales its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 32)
        self.power = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(W x + b) · e^power."""
        y: torch.Tensor = self.linear(x)
        return y * self.power.exp()


def test_what_an_exporter_folded_is_not_called_different(tmp_path: Path) -> None:
    """It computes e^power itself, and rounds: samples tell a rounded number from a wrong one."""
    folded = qc.fold_adapters(adapted(Tempered().eval(), (torch.randn(3, 64),)))
    path = tmp_path / "model.onnx"
    qc.export_model(folded, path, qc.ExportSpec(target="onnx"))
    certificate = qc.prove_equivalence(folded, path)
    assert certificate.verdict == "SAMPLED", certificate
    graph = onnx.load(path)
    named = {one.name: onnx.numpy_helper.to_array(one) for one in graph.graph.initializer}
    (name,) = [n for n, v in named.items() if v.size == 1 and abs(float(v.item()) - 2.0138) < 1e-3]
    wrong = next(one for one in graph.graph.initializer if one.name == name)
    wrong.CopyFrom(onnx.numpy_helper.from_array(np.float32(2.02).reshape(named[name].shape), name))
    onnx.save(graph, path)
    assert qc.prove_equivalence(folded, path).verdict == "DIFFERENT"


def test_a_weight_that_samples_cannot_tell_apart_is_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = (torch.randn(2, 3, 8, 8),)
    quantized = qc.quantize_groups(qc.capture_model(Convolved().eval(), example))
    qc.export_model(quantized, tmp_path / "model.onnx", qc.ExportSpec(target="ort-stock"))
    right = qc.prove_equivalence(quantized, tmp_path / "model.onnx")
    assert (right.verdict, right.passed) == ("SAMPLED", False)
    assert "hardswish" in next(s.problem for s in right.segments if s.problem)
    undecided = qc.prove_equivalence(quantized, tmp_path / "model.onnx", samples=0)
    assert (undecided.verdict, undecided.passed) == ("UNDECIDED", False)
    model = onnx.load(tmp_path / "model.onnx")
    proto = next(t for t in model.graph.initializer if t.name == "conv.weight")
    values = onnx.numpy_helper.to_array(proto).copy()
    values[0, 0, 0, 0] *= 1 + 1e-5
    proto.CopyFrom(onnx.numpy_helper.from_array(values, proto.name))
    onnx.save(model, tmp_path / "other.onnx")
    other = qc.prove_equivalence(quantized, tmp_path / "other.onnx")
    assert other.verdict == "DIFFERENT"
    assert "@conv.weight" in (other.difference or "")


@pytest.mark.parametrize("broken", ["float zero-points", "no block size"])
def test_a_broken_layer_of_a_file_is_refused(broken: str, models: Path, tmp_path: Path) -> None:
    model = onnx.load(models / "ort-stock.onnx")
    if broken == "no block size":
        node = next(n for n in model.graph.node if n.op_type == "MatMulNBits")
        node.attribute.remove(next(a for a in node.attribute if a.name == "block_size"))
    else:
        proto = next(t for t in model.graph.initializer if t.name == "q.zero_point")
        values = onnx.numpy_helper.to_array(proto).astype(np.float32)
        proto.CopyFrom(onnx.numpy_helper.from_array(values, proto.name))
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(UserInputError, match="a MatMulNBits says that its input"):
        qc.prove_equivalence(program("folded"), tmp_path / "other.onnx")
