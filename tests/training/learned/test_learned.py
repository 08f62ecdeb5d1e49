"""Method `learned`: what it gains, what it leaves alone, how it goes on, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qalora_compile as qc
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.ops.linear import GroupLinear
from qalora_compile.ir.packing.bitstream import unpack_codes
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.progress import listening
from qalora_compile.quantizers import get_method
from qalora_compile.training.learned import end_to_end
from qalora_compile.training.learned.lessons import read_lessons, split_rows
from tests.models import MLP, VOCABULARY, bert, llama, token_ids, worst

FORM: dict[str, Any] = {"bits": 2, "group_size": 16}
STEPS = 16


def spec(method: str = "learned", **options: Any) -> qc.QuantSpec:
    more: dict[str, Any] = {}
    if method == "learned":
        more = {"learn_steps": STEPS, "learn_rate": 3e-3}
    return qc.QuantSpec(method=method, **FORM, **(more | options))


def texts(count: int = 16, *, padded: bool = True) -> list[dict[str, Tensor]]:
    found = []
    for at in range(count):
        torch.manual_seed(at)
        ids = torch.randint(0, VOCABULARY, (4, 16))
        mask = torch.ones_like(ids)
        if padded:
            mask[0, 9:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


@pytest.fixture(scope="module")
def captured() -> qc.Program:
    torch.manual_seed(0)
    model: Any = llama()
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(4)  # so that layers count next to the embeddings
    return qc.capture_model(model, (), texts(1)[0])


@pytest.fixture(scope="module")
def start(captured: qc.Program) -> qc.Program:
    return qc.quantize_groups(captured, spec("gptq"), calibration=texts())


@pytest.fixture(scope="module")
def learned(captured: qc.Program) -> qc.Program:
    return qc.quantize_groups(captured, spec(), calibration=texts())


def divergence(captured: qc.Program, program: qc.Program, calls: list[dict[str, Tensor]]) -> float:
    total = 0.0
    for call in calls:
        with torch.no_grad():
            truth, found = (next(iter(p(**call).values())) for p in (captured, program))
        keep = call["attention_mask"].bool()
        truth, found = truth[keep].log_softmax(-1), found[keep].log_softmax(-1)
        total += float((truth.exp() * (truth - found)).sum(-1).mean())
    return total / len(calls)


@pytest.mark.slow
def test_predictions_come_closer_on_these_and_on_other_texts(
    captured: qc.Program, start: qc.Program, learned: qc.Program
) -> None:
    assert divergence(captured, learned, texts()) < 0.85 * divergence(captured, start, texts())
    others = texts(24)[16:]
    assert divergence(captured, learned, others) < divergence(captured, start, others)


@pytest.mark.slow
def test_only_scales_and_offsets_differ_from_the_start(
    start: qc.Program, learned: qc.Program
) -> None:
    before, after = start.tensors(), learned.tensors()
    assert list(before) == list(after)
    assert learned.stage == start.stage and learned.trained == ()
    changed = {n.rpartition(".")[2] for n in after if not torch.equal(before[n], after[n])}
    assert changed == {"scale", "offset"}
    for name, tensor in after.items():
        assert type(tensor) is type(before[name])
        assert tensor.dtype == before[name].dtype and not tensor.requires_grad
    for node in learned.graph.find_nodes(op="call_function", target=GroupLinear.target):
        view = GroupLinear.of(node)
        codes = unpack_codes(after[str(view.qweight.target)], view.bits, 16)
        assert int(codes.max()) < 2**view.bits
        assert float(after[str(view.scale.target)].min()) >= 0


@pytest.mark.slow
def test_the_result_takes_adapters_folds_and_runs_in_onnx_runtime(
    learned: qc.Program, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    adapted = qc.insert_adapters(learned, qc.AdapterSpec(rank=2))
    for at, parameter in enumerate(adapted.adapter_parameters()):
        torch.manual_seed(at)
        torch.nn.init.normal_(parameter, std=0.05)
    folded = qc.fold_adapters(adapted)
    call = texts(1, padded=False)[0]
    with torch.no_grad():
        trained, plain = adapted(**call), folded(**call)
    assert worst(trained, plain) < 1e-4
    qc.export_model(folded, tmp_path / "m.onnx", qc.ExportSpec(target="ort-stock"))
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    names = {each.name for each in session.get_inputs()}
    feed = {name: value.numpy() for name, value in call.items() if name in names}
    (found, *_) = session.run(None, feed)
    assert float((torch.from_numpy(found) - next(iter(plain.values()))).abs().max()) < 1e-3


@pytest.mark.slow
def test_it_is_deterministic_and_leaves_the_random_generator(
    captured: qc.Program, learned: qc.Program
) -> None:
    calls = texts()
    state = torch.random.get_rng_state()
    again = qc.quantize_groups(captured, spec(), calibration=calls)
    assert torch.equal(state, torch.random.get_rng_state())
    for name, tensor in learned.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_killed_training_goes_on_bit_exactly(
    captured: qc.Program, learned: qc.Program, tmp_path: Path
) -> None:
    said: list[str] = []

    def kill(what: str, done: int, total: int) -> None:
        if what == "learn" and done == 11:
            raise Killed

    with pytest.raises(Killed), listening(kill):
        qc.quantize_groups(captured, spec(), calibration=texts(), checkpoints=tmp_path / "work")
    with listening(lambda *_: None, said.append):
        again = qc.quantize_groups(
            captured, spec(), calibration=texts(), checkpoints=tmp_path / "work"
        )
    assert any(f"goes on after step 8 of {STEPS}" in line for line in said)
    for name, tensor in learned.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name


@pytest.mark.parametrize("other", ["data", "options"])
def test_work_of_another_training_is_not_taken_up(
    captured: qc.Program, tmp_path: Path, other: str
) -> None:
    said: list[str] = []
    short = spec(learn_steps=1)
    qc.quantize_groups(captured, short, calibration=texts(), checkpoints=tmp_path)
    calls = texts(17) if other == "data" else texts()
    changed = short if other == "data" else spec(learn_steps=1, learn_rate=2e-2)
    with listening(lambda *_: None, said.append):
        qc.quantize_groups(captured, changed, calibration=calls, checkpoints=tmp_path)
    assert not any("goes on" in line for line in said)


@pytest.mark.slow
def test_held_out_texts_stop_it_and_the_best_step_is_kept(
    captured: qc.Program, start: qc.Program
) -> None:
    """With a rate that ruins the model, the start itself is kept."""
    said: list[str] = []
    with listening(lambda *_: None, said.append):
        program = qc.quantize_groups(
            captured, spec(learn_rate=1.0, learn_steps=400), calibration=texts()
        )
    assert "after step 0 of 24" in said[-1]  # three evaluations without a gain
    for name, tensor in start.tensors().items():
        assert torch.equal(tensor, program.tensors()[name]), name


def test_too_few_texts_are_refused(captured: qc.Program) -> None:
    few = [{name: value[:1] for name, value in texts(1)[0].items()}]
    with pytest.raises(UserInputError, match="8 calibration texts or more, and 1 are") as caught:
        qc.quantize_groups(captured, spec(), calibration=few)
    assert "--calibration-samples" in str(caught.value.hint)


def test_missing_data_are_refused(captured: qc.Program) -> None:
    with pytest.raises(UserInputError, match="learned needs calibration data"):
        qc.quantize_groups(captured, spec())


def test_a_model_without_logits_is_refused() -> None:
    ids = token_ids(2, 8)
    model = bert()
    captured = qc.capture_model(model, (ids,))
    if "logits" in captured.signature.outputs:
        pytest.skip("it has logits")
    with pytest.raises(UnsupportedError, match="no logits"):
        qc.quantize_groups(captured, spec(), calibration=[(ids,)] * 8)


def test_a_loss_that_is_not_finite_names_its_step(
    captured: qc.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_to_end, "clip_gradients", lambda *_: float("nan"))
    with pytest.raises(UserInputError, match="at step 1 the divergence is") as caught:
        qc.quantize_groups(captured, spec(), calibration=texts())
    assert "learn_rate" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "value"), [("learn_steps", 0), ("learn_rate", 0.0), ("learn_rate", 2.0)]
)
def test_bad_options_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserInputError, match=name):
        qc.QuantSpec(method="learned", **{name: value})


@pytest.mark.slow
def test_layers_that_keep_their_codes_keep_scales_and_offsets(captured: qc.Program) -> None:
    annotated = AnnotateLinears()(captured).program
    start = qc.quantize_groups(annotated, spec("gptq"), calibration=texts())
    kept = start.plan.weights_to_adapt()[0].path
    found = end_to_end.learn_parameters(annotated, start, spec(), texts(), keep={kept})
    same = {n for n, t in found.tensors().items() if torch.equal(t, start.tensors()[n])}
    assert {f"{kept}.scale", f"{kept}.offset"} <= same
    assert len(same) < len(start.tensors())


def test_calls_are_split_so_that_memory_does_not_grow(captured: qc.Program) -> None:
    ids = torch.zeros(64, 100, dtype=torch.long)
    leaves = captured.leaves((), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    parts = split_rows(captured, leaves)
    assert max(part[0].numel() for part in parts) <= 512
    assert torch.equal(torch.cat([part[0] for part in parts]), ids)


def test_lessons_are_held_out_at_equal_distances(captured: qc.Program) -> None:
    lessons = read_lessons(AnnotateLinears()(captured).program, texts(32))
    assert len(lessons.held_out) == 4 and len(lessons.taught) == 28
    steps = lessons.steps(5, 1024)
    assert all(sum(len(lesson.teacher) for lesson in step) >= 1024 for step in steps)
    assert steps[:3] == lessons.steps(3, 1024)


def test_the_method_is_in_the_registry() -> None:
    assert get_method("learned").needs_data and get_method("learned").finish is not None


@pytest.mark.slow
def test_two_layers_without_tokens_learn_too() -> None:
    torch.manual_seed(0)
    model = MLP(32, 48, 10).eval()
    calls = [(torch.randn(64, 32),) for _ in range(8)]
    captured = qc.capture_model(model, calls[0])
    programs = [
        qc.quantize_groups(captured, spec(method), calibration=calls)
        for method in ("gptq", "learned")
    ]
    losses = []
    for program in programs:
        with torch.no_grad():
            truth, found = (p(*calls[0]).log_softmax(-1) for p in (captured, program))
        losses.append(float((truth.exp() * (truth - found)).sum(-1).mean()))
    assert losses[1] < losses[0]
