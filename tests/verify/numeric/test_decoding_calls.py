"""Mistakes of exports that show in the steps in which devices run them, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import qalora_compile as qc
from qalora_compile.ir.meta import PAST
from qalora_compile.runtime.library import kernel_level, library_path
from qalora_compile.verify import compare_nodes, named_inputs, sample_inputs
from qalora_compile.verify.numeric.decoding_calls import decoding_calls, every_token, sequence_calls
from qalora_compile.verify.runners.kv_cache import stops_of
from tests.models import gpt2, llama, randomize_adapters, slow, token_ids

Plant = Callable[[Any], None]
TOLERANCE = qc.Tolerance(max_rel=1e-4)
ONE = "ones"


def made(build: Callable[[], Any]) -> tuple[qc.Program, qc.Program]:
    """A folded program, and the same with a cache."""
    torch.manual_seed(0)
    model = build()
    ids = token_ids(2, 16)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = qc.quantize_groups(qc.capture_model(model, (), example))
    folded = qc.fold_adapters(randomize_adapters(qc.insert_adapters(program)))
    return folded, qc.add_kv_cache(folded, model)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[qc.Program, qc.Program, Path]:
    folded, cached = made(llama)
    path = tmp_path_factory.mktemp("decoding") / "model.onnx"
    qc.export_model(cached, path)
    return folded, cached, path


def insert(model: Any, value: str, *nodes: Any) -> None:
    """Put nodes behind a value: they read `<value>/right` and give `value`."""
    makers = [node for node in model.graph.node if value in node.output]
    for node in makers:
        node.output[:] = [f"{value}/right" if name == value else name for name in node.output]
    at = 1 + list(model.graph.node).index(makers[0])
    others = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*others[:at], *nodes, *others[at:]])


def number(model: Any, name: str, value: Any, dtype: torch.dtype) -> str:
    array = torch.tensor(value, dtype=dtype).numpy()
    model.graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def size(model: Any, source: str, axis: int) -> list[Any]:
    """Nodes that give the size of an axis of an input as `fault/size`."""
    number(model, "fault/axis", axis, torch.int64)
    return [
        helper.make_node("Shape", [source], ["fault/shape"]),
        helper.make_node("Gather", ["fault/shape", "fault/axis"], ["fault/size"]),
    ]


def scaled_where(source: str, axis: int, op: str, bound: int, *, second: bool = False) -> Plant:
    """Logits times 4 where the size of an axis of an input is so; or of the second row alone."""

    def plant(model: Any) -> None:
        nodes = size(model, source, axis)
        number(model, "fault/bound", bound, torch.int64)
        number(model, "fault/three", 3.0, torch.float32)
        number(model, ONE, 1.0, torch.float32)
        nodes += [
            helper.make_node(op, ["fault/size", "fault/bound"], ["fault/true"]),
            helper.make_node("Cast", ["fault/true"], ["fault/number"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", ["fault/number", "fault/three"], ["fault/more"]),
        ]
        more = "fault/more"
        if second:
            for name, value in (("fault/0", 0), ("fault/1", 1)):
                number(model, name, value, torch.int64)
            number(model, "fault/axes", [1, 2], torch.int64)
            nodes += [
                helper.make_node("Gather", ["fault/shape", "fault/0"], ["fault/rows"]),
                helper.make_node("Range", ["fault/0", "fault/rows", "fault/1"], ["fault/row"]),
                helper.make_node("Equal", ["fault/row", "fault/1"], ["fault/is second"]),
                helper.make_node(
                    "Cast", ["fault/is second"], ["fault/second"], to=onnx.TensorProto.FLOAT
                ),
                helper.make_node("Unsqueeze", ["fault/second", "fault/axes"], ["fault/column"]),
                helper.make_node("Mul", ["fault/column", "fault/more"], ["fault/more there"]),
            ]
            more = "fault/more there"
        nodes += [
            helper.make_node("Add", [more, ONE], ["fault/factor"]),
            helper.make_node("Mul", ["logits/right", "fault/factor"], ["logits"]),
        ]
        insert(model, "logits", *nodes)

    return plant


def token_read_as(word: int, other: int) -> Plant:
    def plant(model: Any) -> None:
        number(model, "fault/word", word, torch.int64)
        number(model, "fault/other", other, torch.int64)
        for node in model.graph.node:
            node.input[:] = ["fault/ids" if n == "input_ids" else n for n in node.input]
        nodes = [
            helper.make_node("Equal", ["input_ids", "fault/word"], ["fault/is"]),
            helper.make_node("Where", ["fault/is", "fault/other", "input_ids"], ["fault/ids"]),
        ]
        others = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*nodes, *others])

    return plant


def softcap(cap: float) -> Plant:
    """Scores of attention through cap · tanh(scores / cap), as some models have it."""

    def plant(model: Any) -> None:
        for node in model.graph.node:
            if node.op_type == "CachedAttention":  # its function has no such attribute
                node.domain, node.op_type = "", "Attention"
                kept = [each for each in node.attribute if each.name != "softcap"]
                del node.attribute[:]
                node.attribute.extend(kept)
                node.attribute.append(helper.make_attribute("softcap", cap))

    return plant


FAULTS: dict[str, Plant] = {
    "one token": scaled_where("input_ids", 1, "Equal", 1),
    "two tokens": scaled_where("input_ids", 1, "Equal", 2),
    "one token of the second row": scaled_where("input_ids", 1, "Equal", 1, second=True),
    "several tokens of the second row": scaled_where("input_ids", 1, "Greater", 2, second=True),
    "past 64 positions": scaled_where("attention_mask", 1, "Greater", 64),
    "more than 40 positions": scaled_where("attention_mask", 1, "Greater", 40),
    "a prompt": scaled_where(f"{PAST}0.key", 2, "Equal", 0),
}
OF_VALUES: dict[str, Plant] = {
    "token 93 read as 0": token_read_as(93, 0),
    "softcap": softcap(50.0),
}


def planted(path: Path, plant: Plant) -> Path:
    model = onnx.load(path)
    plant(model)
    faulty = path.with_name("faulty.onnx")
    onnx.save(model, faulty)
    return faulty


def libraries() -> tuple[Path | None, ...]:
    return (None, library_path()) if kernel_level() is not None else (None,)


@pytest.mark.parametrize("kind", FAULTS)
def test_complete_sequences_in_steps_show_it(
    kind: str, exported: tuple[qc.Program, qc.Program, Path]
) -> None:
    folded, _, path = exported
    calls = sample_inputs(folded, 1) + sequence_calls(folded)
    for library in libraries():
        faulty = planted(path, FAULTS[kind])
        assert not qc.verify_equivalence(folded, faulty, calls, TOLERANCE, library=library).passed


QUICK = ("one token of the second row", "past 64 positions")


@pytest.mark.parametrize("kind", [*QUICK, *slow(*(kind for kind in FAULTS if kind not in QUICK))])
def test_the_comparison_along_the_graph_shows_it(
    kind: str, exported: tuple[qc.Program, qc.Program, Path]
) -> None:
    _, cached, path = exported
    faulty = planted(path, (FAULTS | OF_VALUES)[kind])
    report = compare_nodes(cached, faulty, named_inputs(cached, 1), levels=("all",))
    assert report.verdict == "DIFFERENT"
    assert report.difference


@pytest.mark.parametrize("build", [llama, *slow(gpt2)], ids=["llama", "gpt2"])
def test_a_right_export_passes_in_all_steps(build: Callable[[], Any], tmp_path: Path) -> None:
    """With the operator library and without; GPT-2 has a table of positions."""
    folded, cached = made(build)
    path = tmp_path / "model.onnx"
    qc.export_model(cached, path)
    calls = sample_inputs(folded, 2) + sequence_calls(folded)
    assert len(calls) == 4
    for library in libraries():
        report = qc.verify_equivalence(folded, path, calls, TOLERANCE, library=library)
        assert report.passed, report
    steps = decoding_calls(cached) | every_token(cached)
    assert len(steps) == 6
    compare_nodes(cached, path, steps, levels=("all",), library=libraries()[-1]).check()


def test_steps_are_a_prompt_a_chunk_two_tokens_and_single_ones() -> None:
    assert stops_of(24) == [12, 19, 21, 22, 23, 24]
    assert stops_of(80) == [40, 75, 77, 78, 79, 80]
    assert stops_of(5) == [3, 4, 5]
    assert stops_of(1) == [1]


def test_calls_are_padded_on_the_left_and_count_behind_it(
    exported: tuple[qc.Program, qc.Program, Path],
) -> None:
    folded, cached, _ = exported
    call = decoding_calls(cached)["one token, padded"]
    assert call["attention_mask"].tolist() == [[0, 0, 0, *[1] * 7], [1] * 10]
    assert call["position_ids"].tolist() == [[6], [9]]
    long, padded = sequence_calls(folded)
    assert long["input_ids"].shape == (1, 80)
    assert padded["attention_mask"].sum(1).tolist() == [77, 80]
    ids = every_token(cached)["every token"]["input_ids"]
    assert set(ids.flatten().tolist()) == set(range(128))


def test_other_programs_have_no_such_calls() -> None:
    program = qc.capture_model(torch.nn.Linear(4, 4), (torch.randn(2, 4),))
    assert decoding_calls(program) == every_token(program) == {}
    assert sequence_calls(program) == []
