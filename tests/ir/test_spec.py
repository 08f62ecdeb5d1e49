"""`validate` finds every planted breakage, and nothing in sound programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import qalora_compile as qc
from qalora_compile.errors import InternalError
from qalora_compile.ir.meta import mark_site, site_of
from qalora_compile.ir.spec import (
    GROUP_LINEAR,
    GROUP_SUM,
    MATMUL_NBITS,
    POOLED_ADAPTER,
    is_qalora,
    layer_on_codes,
    stored_parts,
    validate,
)
from tests.models import MLP, randomize_adapters

SPEC = qc.QuantSpec(bits=4, group_size=16)


def at_stage(stage: str) -> qc.Program:
    """A sound program of two layers, 40 → 24 → 8."""
    program = qc.capture_model(MLP(40, 24, 8), (torch.randn(4, 40),))
    if stage == "float":
        return program
    if stage == "annotated":
        return qc.Pipeline.parse("annotate-linears")(program).program
    program = qc.quantize_groups(program, SPEC)
    if stage == "quantized":
        return program
    program = randomize_adapters(qc.insert_adapters(program, qc.AdapterSpec(rank=2)))
    if stage == "adapted":
        return program
    program = qc.fold_adapters(program)
    if stage == "folded":
        return program
    target = stage.partition(":")[2]
    return qc.Pipeline.parse(f"legalize-{target},share-group-sums")(program).program


TARGETS = ["legalized:ort", "legalized:ort-stock", "legalized:onnx"]
STAGES = ["float", "annotated", "quantized", "adapted", "folded", *TARGETS]


@pytest.mark.parametrize("stage", STAGES)
def test_sound_programs_pass(stage: str) -> None:
    program = at_stage(stage)
    assert program.stage == stage
    validate(program)


def with_tensors(program: qc.Program, **changes: Tensor) -> qc.Program:
    """Replace tensors by their last two name parts, `layers.0.` left out."""
    tensors = program.tensors()
    for name, value in changes.items():
        assert f"layers.0.{name}" in tensors
        tensors[f"layers.0.{name}"] = value
    return program.evolve(graph=program.copy_graph(), tensors=tensors)


def first(graph: fx.Graph, target: object) -> fx.Node:
    """The first node that calls `target`."""
    return next(n for n in graph.nodes if n.target is target)


def edited(program: qc.Program, edit: Callable[[fx.Graph], None]) -> qc.Program:
    """A program whose graph was changed behind the passes' back."""
    graph = program.copy_graph()
    edit(graph)
    return program.evolve(graph=graph)


def unused_parameter(*shape: int, value: float = 1.0, trainable: bool = False) -> nn.Parameter:
    """A parameter filled with one value."""
    return nn.Parameter(torch.full(shape, value), requires_grad=trainable)


# Tensors of a group_linear: N = 24, K = 40, three groups of 16.

GROUP_TENSORS: dict[str, dict[str, Tensor]] = {
    "scale and offset one group short": {"scale": torch.ones(24, 2), "offset": torch.ones(24, 2)},
    "scale alone of another shape": {"scale": torch.ones(24, 2)},
    "scale of another dtype": {"scale": torch.ones(24, 3, dtype=torch.float64)},
    "row missing": {"scale": torch.ones(23, 3), "offset": torch.ones(23, 3)},
    "codes too narrow": {"qweight": torch.zeros(24, 16, dtype=torch.uint8)},
    "codes of another dtype": {"qweight": torch.zeros(24, 20, dtype=torch.int32)},
    "codes of too few rows": {"qweight": torch.zeros(23, 20, dtype=torch.uint8)},
    "NaN in the scale": {"scale": torch.full((24, 3), float("nan"))},
    "infinite offset": {"offset": torch.full((24, 3), float("-inf"))},
    "bias of another size": {"bias": unused_parameter(23)},
}


@pytest.mark.parametrize("kind", GROUP_TENSORS)
def test_group_linear_tensors(kind: str) -> None:
    broken = with_tensors(at_stage("quantized"), **GROUP_TENSORS[kind])
    with pytest.raises(InternalError, match=r"layers\.0"):
        validate(broken)


ADAPTER_TENSORS: dict[str, dict[str, Tensor]] = {
    "A and B of different rank": {"lora_A": unused_parameter(3, 3, trainable=True)},
    "A of another number of groups": {"lora_A": unused_parameter(2, 4, trainable=True)},
    "B of another number of outputs": {"lora_B": unused_parameter(25, 2, trainable=True)},
    "A a vector": {"lora_A": unused_parameter(2, trainable=True)},
}


@pytest.mark.parametrize("kind", ADAPTER_TENSORS)
def test_adapter_tensors(kind: str) -> None:
    with pytest.raises(InternalError):
        validate(with_tensors(at_stage("adapted"), **ADAPTER_TENSORS[kind]))


# Of a matmul_nbits in three blocks of 16.

NBITS_TENSORS: dict[str, dict[str, Tensor]] = {
    "float zero-point": {"zero_point": torch.zeros(24, 2)},
    "unpacked zero-point": {"zero_point": torch.zeros(24, 3, dtype=torch.uint8)},
    "scale of another shape": {"scale": torch.ones(24, 4)},
    "codes of another width": {"qweight": torch.zeros(24, 3, 9, dtype=torch.uint8)},
    "NaN in the scale": {"scale": torch.full((24, 3), float("nan"))},
}


@pytest.mark.parametrize("kind", NBITS_TENSORS)
def test_matmul_nbits_tensors(kind: str) -> None:
    with pytest.raises(InternalError):
        validate(with_tensors(at_stage("legalized:ort-stock"), **NBITS_TENSORS[kind]))


@pytest.mark.parametrize(("position", "value"), [(5, 3), (6, 24), (6, 8)])
def test_matmul_nbits_takes_only_what_the_kernel_takes(position: int, value: int) -> None:
    def edit(graph: fx.Graph) -> None:
        first(graph, MATMUL_NBITS).update_arg(position, value)

    with pytest.raises(InternalError, match="MatMulNBits does not take"):
        validate(edited(at_stage("legalized:ort-stock"), edit))


# Of a group_quant_linear in three groups of 16, and a matmul_blocks of [40, 24].

KERNEL_TENSORS: dict[str, dict[str, Tensor]] = {
    "zero-point of another shape": {"zero_point": torch.zeros(24, 2)},
    "zero-point of another dtype": {"zero_point": torch.zeros(24, 3, dtype=torch.float16)},
    "scale of another shape": {"scale": torch.ones(24, 4)},
    "codes of another width": {"qweight": torch.zeros(24, 3, 9, dtype=torch.uint8)},
    "infinite zero-point": {"zero_point": torch.full((24, 3), float("inf"))},
}
BLOCK_TENSORS: dict[str, dict[str, Tensor]] = {
    "zero-point of another shape": {"zero_point": torch.zeros(24, 2, dtype=torch.uint8)},
    "scale of another shape": {"scale": torch.ones(4, 24)},
    "fewer codes": {"qweight": torch.zeros(24 * 16, dtype=torch.uint8)},
    "NaN in the scale": {"scale": torch.full((3, 24), float("nan"))},
}


@pytest.mark.parametrize("kind", KERNEL_TENSORS)
def test_group_quant_linear_tensors(kind: str) -> None:
    with pytest.raises(InternalError):
        validate(with_tensors(at_stage("legalized:ort"), **KERNEL_TENSORS[kind]))


@pytest.mark.parametrize("kind", BLOCK_TENSORS)
def test_matmul_blocks_tensors(kind: str) -> None:
    with pytest.raises(InternalError):
        validate(with_tensors(at_stage("legalized:onnx"), **BLOCK_TENSORS[kind]))


# Operators at stages where they have no place


@pytest.mark.parametrize(
    ("made", "claimed"),
    [
        ("quantized", "float"),
        ("quantized", "annotated"),
        ("adapted", "quantized"),
        ("adapted", "folded"),
        ("folded", "legalized:ort-stock"),
        ("legalized:ort-stock", "folded"),
    ],
)
def test_operators_of_another_stage(made: str, claimed: str) -> None:
    program = dataclasses.replace(at_stage(made), stage=claimed)
    with pytest.raises(InternalError, match=f"not legal at stage {claimed}"):
        validate(program)


def test_unknown_stage() -> None:
    with pytest.raises(InternalError, match="unknown stage 'finished'"):
        validate(dataclasses.replace(at_stage("float"), stage="finished"))


# Gradients


@pytest.mark.parametrize("stage", ["quantized", "adapted", "folded"])
def test_a_trainable_base_is_found(stage: str) -> None:
    program = at_stage(stage)
    program.tensors()["layers.1.bias"].requires_grad_(True)
    with pytest.raises(InternalError, match=r"layers\.1\.bias is trainable"):
        validate(program)


def test_a_frozen_adapter_is_found() -> None:
    program = at_stage("adapted")
    program.adapter_parameters()[0].requires_grad_(False)
    with pytest.raises(InternalError, match=r"lora_A is not trainable"):
        validate(program)


# Sites


def test_a_site_without_a_node_is_found() -> None:
    def edit(graph: fx.Graph) -> None:
        first(graph, GROUP_LINEAR).meta.pop("qalora_site")

    with pytest.raises(InternalError, match=r"no node computes the site layers\.0"):
        validate(edited(at_stage("quantized"), edit))


def test_a_site_with_two_nodes_is_found() -> None:
    def edit(graph: fx.Graph) -> None:
        mark_site(first(graph, torch.ops.aten.tanh.default), "layers.0")

    with pytest.raises(InternalError, match="computed by 2 nodes"):
        validate(edited(at_stage("quantized"), edit))


def test_a_site_outside_the_plan_is_found() -> None:
    def edit(graph: fx.Graph) -> None:
        mark_site(first(graph, torch.ops.aten.tanh.default), "layers.9")

    with pytest.raises(InternalError, match=r"layers\.9, which is not in the plan"):
        validate(edited(at_stage("quantized"), edit))


def test_a_computed_weight_is_found() -> None:
    def edit(graph: fx.Graph) -> None:
        node = first(graph, GROUP_LINEAR)
        with graph.inserting_before(node):
            doubled = graph.call_function(torch.ops.aten.mul.Tensor, (node.args[2], 2.0))
        node.update_arg(2, doubled)

    with pytest.raises(InternalError, match="the operand .* is not a stored tensor"):
        validate(edited(at_stage("quantized"), edit))


def test_the_node_and_site_are_named() -> None:
    broken = with_tensors(at_stage("quantized"), scale=torch.full((24, 3), float("nan")))
    name = first(broken.graph, GROUP_LINEAR).name
    with pytest.raises(InternalError) as caught:
        validate(broken)
    assert caught.value.where == f"node {name}, site layers.0"


def test_helpers() -> None:
    program = at_stage("adapted")
    node = first(program.graph, GROUP_LINEAR)
    qweight, *_ = stored_parts(program, node, layer_on_codes(node))
    assert qweight is program.tensors()["layers.0.qweight"]
    ours = [n for n in program.graph.nodes if is_qalora(n)]
    assert {n.target for n in ours} == {GROUP_LINEAR, GROUP_SUM, POOLED_ADAPTER}
    assert [s for s in map(site_of, program.graph.nodes) if s] == ["layers.0", "layers.1"]
