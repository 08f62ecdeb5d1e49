"""quantize-embeddings: tables and heads on codes, one set of tensors where they are tied."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.errors import InternalError, PostconditionError, UserInputError
from qalora_compile.ir.affine import GroupAffine, has_integer_zero_points
from qalora_compile.ir.spec import GROUP_EMBEDDING, GROUP_LINEAR, POOLED_ADAPTER, validate
from qalora_compile.ir.stages import FLOAT
from qalora_compile.passes import quantize_embeddings as pass_module
from qalora_compile.passes.dequantize_groups import DequantizeGroups
from qalora_compile.passes.quantize_embeddings import QuantizeEmbeddings
from qalora_compile.quantizers.minmax import quantize_integer_zero
from qalora_compile.verify.inputs import token_limits
from tests.models import (
    TiedHead,
    assert_close,
    capture_transformer,
    gpt2,
    llama,
    randomize_adapters,
    token_ids,
    worst,
)

Golden = Callable[[str, str], None]
VOCABULARY, WIDTH = 160, 40
EIGHT = qc.QuantSpec(bits=8)


class Untied(nn.Module):
    """A table and a head of their own, of one shape, and a layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mid = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of each position."""
        return self.head(torch.tanh(self.mid(self.embed(ids))))


class TableAdded(nn.Module):
    """A table that is looked up and also read completely."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mid = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the table, and its mean."""
        return self.mid(self.embed(ids)) + self.embed.weight.mean(0)


def ids_of(*shape: int) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def captured(model: nn.Module) -> qc.Program:
    return qc.capture_model(model.eval(), (ids_of(2, 6),))


@functools.cache
def llama_program() -> qc.Program:
    """A captured language model whose head is tied."""
    return capture_transformer(llama())


def count(program: qc.Program, target: object) -> int:
    return sum(node.target is target for node in program.graph.nodes)


@given(
    bits=st.sampled_from([4, 8]),
    group=st.integers(1, 40),
    k=st.integers(1, 50),
    shift=st.floats(-3, 3),
    size=st.sampled_from([1e-34, 1.0, 6e4]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_zero_points_are_integers_and_weights_near(
    bits: int, group: int, k: int, shift: float, size: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(k)
    size = min(size, 1e3) if dtype == torch.float16 else size
    weight = ((torch.randn(5, k, generator=generator) + shift) * size).to(dtype)
    weight[0, : k // 2] = 0
    affine = quantize_integer_zero(weight, bits, group).validate()
    assert bool(has_integer_zero_points(affine.scale, affine.offset, bits).all())
    step = affine.scale.double().repeat_interleave(group, 1)[:, :k]
    error = (affine.dequantize().double() - weight.double()).abs()
    assert bool((error <= 0.51 * step).all())
    top = weight.double().abs().amax()
    assert float(affine.scale.max()) <= max(1.0, 2.1 * float(top))


@pytest.mark.parametrize("value", [0.0, 1.7, -0.3, 1e-30, -6e4])
def test_groups_of_one_value_come_back(value: float) -> None:
    weight = torch.full((3, 24), value)
    assert torch.equal(quantize_integer_zero(weight, 4, 16).dequantize(), weight)


def test_golden(golden: Golden) -> None:
    torch.manual_seed(0)
    program = qc.quantize_groups(captured(TiedHead(VOCABULARY, WIDTH)))
    golden("quantize-embeddings", str(QuantizeEmbeddings()(program).program))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_it_is_the_model_on_the_quantized_table(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, ids = TiedHead(VOCABULARY, WIDTH).to(dtype), ids_of(3, 5)
    program = captured(model)
    spec = qc.QuantSpec(bits=bits, group_size=16)
    found = qc.quantize_groups(program, embeddings=spec)
    table = quantize_integer_zero(model.embed.weight, bits, 16).dequantize()
    floats = qc.quantize_groups(program)
    with torch.no_grad():
        model.embed.weight.copy_(table)  # the programs' own, tied to the head
        relative = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
        assert_close(found(ids), floats(ids), relative=relative)
    assert [t.shape[0] for n, t in found.tensors().items() if "embed" in n or "head" in n] == (
        [VOCABULARY] * 3
    )


def test_a_tie_is_stored_once_and_the_plan_says_why() -> None:
    program = qc.quantize_groups(llama_program(), embeddings=EIGHT)
    rows = {site.name: site for site in program.plan if site.frozen_integer_zero}
    assert rows.keys() == {"model.embed_tokens", "lm_head"}
    assert {(s.path, s.shape, s.bits, s.group_size) for s in rows.values()} == {
        ("lm_head", "64×128", 8, 32)
    }
    assert "table of an embedding" in rows["model.embed_tokens"].reason
    assert "head" in rows["lm_head"].reason
    assert not any(name.endswith("embed_tokens.weight") for name in program.tensors())
    assert "lm_head.weight" not in program.tensors()
    assert set(token_limits(program).values()) == {128}


def test_a_small_table_stays() -> None:
    result = QuantizeEmbeddings()(qc.quantize_groups(capture_transformer(gpt2())))
    assert count(result.program, GROUP_EMBEDDING) == 1  # positions: 64 × 64 weights are few
    assert [(s.path, s.why) for s in result.skips] == [("transformer.wpe", "small: 4096 weights")]


def test_a_head_of_its_own_gets_no_adapter() -> None:
    program = qc.quantize_groups(captured(Untied()), embeddings=qc.QuantSpec(bits=4))
    assert {s.name: (s.bits, s.frozen_integer_zero) for s in program.plan} == {
        "embed": (4, True),
        "mid": (4, False),
        "head": (4, True),
    }
    assert program.plan["head"].path != program.plan["embed"].path
    adapted = qc.insert_adapters(program, qc.AdapterSpec(rank=4))
    assert count(adapted, POOLED_ADAPTER) == 1
    assert {name.rpartition(".")[0] for name, _ in adapted.named_adapter_parameters()} == {"mid"}
    ids = ids_of(2, 3)
    randomize_adapters(adapted)
    assert_close(qc.fold_adapters(adapted)(ids), adapted(ids), relative=1e-5)


def test_without_the_option_such_a_head_is_a_layer() -> None:
    program = qc.quantize_groups(captured(Untied()))
    assert (program.plan["head"].bits, program.plan["head"].frozen_integer_zero) == (4, False)
    assert program.plan["embed"].decision == "keep"


@pytest.mark.parametrize("model", [Untied, lambda: TiedHead(VOCABULARY, WIDTH)])
def test_a_head_that_is_named_has_its_adapter(model: Callable[[], nn.Module]) -> None:
    build = model().eval()
    head = "head" if isinstance(build, Untied) else "lm_head"
    program = captured(build)
    program = qc.quantize_groups(program, targets=["mid", head], embeddings=EIGHT)
    row = program.plan[head]
    assert (row.bits, row.frozen_integer_zero, row.reason) == (4, False, "named in targets")
    assert program.plan["embed"].bits == 8
    assert program.plan["embed"].path != row.path
    adapted = randomize_adapters(qc.insert_adapters(program, qc.AdapterSpec(rank=4)))
    assert count(adapted, POOLED_ADAPTER) == 2
    ids = ids_of(2, 3)
    assert_close(qc.fold_adapters(adapted)(ids), adapted(ids), relative=1e-5)


def test_an_excluded_head_stays_and_its_table_with_it() -> None:
    program = captured(TiedHead(VOCABULARY, WIDTH))
    with pytest.raises(UserInputError, match="no embedding and no head") as error:
        qc.quantize_groups(program, exclude=["lm_head"], embeddings=EIGHT)
    assert "tied to lm_head, which is excluded" in str(error.value.where)
    untied = qc.quantize_groups(captured(Untied()), exclude=["head"], embeddings=EIGHT)
    assert untied.plan["head"].bits is None
    assert untied.plan["embed"].bits == 8


def test_a_table_with_another_reader_stays() -> None:
    result = QuantizeEmbeddings()(qc.quantize_groups(captured(TableAdded())))
    assert not result.changes
    assert "also read by mean" in result.skips[0].why


def test_after_training_too() -> None:
    ids = token_ids(2, 8)
    program = qc.quantize_groups(llama_program())
    adapted = randomize_adapters(qc.insert_adapters(program, qc.AdapterSpec(rank=4)))
    late = QuantizeEmbeddings()(qc.fold_adapters(adapted)).program
    early = qc.fold_adapters(QuantizeEmbeddings()(adapted).program)
    assert worst(late(ids), early(ids)) == 0.0
    with pytest.raises(AssertionError):
        assert_close(late(ids), adapted(ids), relative=1e-6)


def test_back_to_float() -> None:
    ids = token_ids(2, 8)
    program = qc.quantize_groups(llama_program(), embeddings=EIGHT)
    after = DequantizeGroups()(program).program
    assert after.stage == FLOAT
    assert count(after, GROUP_EMBEDDING) == 0
    assert sum(tuple(t.shape) == (128, 64) for t in after.tensors().values()) == 1
    assert_close(after(ids), program(ids), relative=1e-5)


@pytest.mark.parametrize("bad", [{"bits": 3}, {"bits": 2}, {"group_size": 24}, {"group_size": 0}])
def test_bad_options(bad: dict[str, int]) -> None:
    with pytest.raises(UserInputError):
        QuantizeEmbeddings(**bad)


def test_another_method_is_refused() -> None:
    with pytest.raises(UserInputError, match="method of embeddings"):
        qc.quantize_groups(captured(Untied()), embeddings=qc.QuantSpec(bits=8, method="mse"))


def shifted(weight: Tensor, bits: int, group_size: int) -> GroupAffine:
    """A quantizer whose zero-points are not integers."""
    affine = quantize_integer_zero(weight, bits, group_size)
    parts = (affine.codes, affine.scale, affine.offset + 0.3 * affine.scale)
    return GroupAffine(*parts, bits, group_size)


def test_planted_zero_points_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    program = qc.quantize_groups(captured(Untied()))
    monkeypatch.setattr(pass_module, "quantize_integer_zero", shifted)
    with pytest.raises(PostconditionError, match="not an integer"):
        QuantizeEmbeddings()(program)


def test_the_specification_checks_integer_zero_points() -> None:
    program = qc.quantize_groups(captured(Untied()), embeddings=EIGHT)
    validate(program)
    tensors = program.tensors()
    tensors["head.offset"] = tensors["head.offset"] + 0.1 * tensors["head.scale"]
    with pytest.raises(InternalError, match="not an integer"):
        validate(program.evolve(graph=program.copy_graph(), tensors=tensors))
    assert count(program, GROUP_LINEAR) == 2
