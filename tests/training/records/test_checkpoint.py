"""Checkpoints: complete or absent, the last ones kept, and only for their own training."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qalora_compile as qc
from qalora_compile.config.choices import CHECKPOINTS_KEPT
from qalora_compile.errors import UserInputError
from qalora_compile.ir.safetensors_io import load_tensors, save_tensors
from qalora_compile.sealed import digests_of, read_sealed, unchecked, write_sealed
from qalora_compile.training import Example, FitSpec, FitState, StepReport, fit
from qalora_compile.training.records.checkpoint import (
    STATE,
    Checkpoint,
    list_checkpoints,
    remove_unfinished,
    restore_checkpoint,
    save_checkpoint,
)
from qalora_compile.training.records.run_identity import Identity, file_digest
from tests.models import llama, token_ids
from tests.training.test_fit import EXAMPLES, ROWS, adapters, diverge, language_model

SPEC = FitSpec(steps=8, batch_size=3, accumulate=2, learning_rate=1e-2, lora_plus_ratio=4.0, seed=3)
HELD_OUT = [Example(row[::-1], row[::-1]) for row in ROWS]


def stop_at(
    step: int, program: qc.Program, spec: FitSpec, folder: Path, **given: Any
) -> list[float]:
    """Train up to a step, save there, and stop."""

    def stop(report: StepReport, state: FitState) -> bool:
        if report.step == step:
            save_checkpoint(folder, program, state, Identity.of(program, spec))
        return report.step == step

    result = fit(program, EXAMPLES, spec, on_step=stop, **given)
    assert result.stopped
    return list(result.losses)


def go_on(program: qc.Program, spec: FitSpec, folder: Path) -> FitState:
    state = FitState.fresh(program, spec)
    restore_checkpoint(list_checkpoints(folder)[-1], program, state, Identity.of(program, spec))
    return state


@pytest.mark.parametrize("step", [1, 5, 7])
def test_resuming_gives_the_same_weights_bit_for_bit(tmp_path: Path, step: int) -> None:
    uninterrupted = language_model(dropout=0.2)
    losses = fit(uninterrupted, EXAMPLES, SPEC).losses
    first = stop_at(step, language_model(dropout=0.2), SPEC, tmp_path)
    again = language_model(dropout=0.2)
    result = fit(again, EXAMPLES, SPEC, state=go_on(again, SPEC, tmp_path))
    assert (*first, *result.losses) == losses
    expected = adapters(uninterrupted)
    assert all(torch.equal(expected[n], p) for n, p in adapters(again).items())


@pytest.mark.slow
def test_early_stopping_goes_on_where_it_was(tmp_path: Path) -> None:
    """The best adapters, and how long ago they were, are in the checkpoint."""
    spec = FitSpec(steps=60, batch_size=6, learning_rate=5e-2, evaluate_every=2, patience=3)
    uninterrupted = language_model()
    expected = fit(uninterrupted, EXAMPLES, spec, held_out=HELD_OUT)
    assert expected.kept < expected.step < 60
    between = expected.kept + 3  # the best are behind, and one evaluation was in vain
    stop_at(between, language_model(), spec, tmp_path, held_out=HELD_OUT)
    again = language_model()
    state = go_on(again, spec, tmp_path)
    assert state.best is not None
    assert (state.best.step, state.stale) == (expected.kept, 1)
    found = fit(again, EXAMPLES, spec, held_out=HELD_OUT, state=state)
    assert (found.kept, found.step) == (expected.kept, expected.step)
    wanted = adapters(uninterrupted)
    assert all(torch.equal(wanted[n], p) for n, p in adapters(again).items())
    finished = fit(again, EXAMPLES, spec, held_out=HELD_OUT, state=state)
    assert finished.losses == ()


@pytest.mark.parametrize("steps", [4, 8])
def test_the_only_checkpoint_is_a_good_one_though_the_weights_diverge(
    tmp_path: Path, steps: int
) -> None:
    """They overflow in step 4, the last one or not, and one checkpoint is kept."""
    spec = dataclasses.replace(SPEC, steps=steps)
    program = language_model()
    identity = Identity.of(program, spec)

    def save(state: FitState, last: bool) -> None:
        save_checkpoint(tmp_path, program, state, identity, keep=1)

    with pytest.raises(UserInputError, match="step . the loss is nan"):
        fit(program, EXAMPLES, spec, on_step=diverge, on_good=save)
    assert [c.step for c in list_checkpoints(tmp_path)] == [3]
    again, uninterrupted = language_model(), language_model()
    fit(again, EXAMPLES, spec, state=go_on(again, spec, tmp_path))
    fit(uninterrupted, EXAMPLES, spec)
    expected = adapters(uninterrupted)
    assert all(torch.equal(expected[n], p) for n, p in adapters(again).items())


@pytest.mark.parametrize("keep", [1, CHECKPOINTS_KEPT, 3])
def test_the_last_checkpoints_are_kept_and_hold_no_pickle(tmp_path: Path, keep: int) -> None:
    program = language_model()
    state = FitState.fresh(program, SPEC)
    identity = Identity.of(program, SPEC)
    for step in range(1, 6):
        state.step = step
        save_checkpoint(tmp_path, program, state, identity, keep=keep)
    assert [c.step for c in list_checkpoints(tmp_path)] == [1, 2, 3, 4, 5][-keep:]
    assert {f.suffix for f in tmp_path.rglob("*") if f.is_file()} == {".json", ".safetensors"}


def saved(folder: Path, spec: FitSpec = SPEC, data: str = "") -> tuple[qc.Program, Checkpoint]:
    program = language_model()
    state = FitState.fresh(program, spec)
    state.step = 1
    return program, save_checkpoint(folder, program, state, Identity.of(program, spec, data=data))


def refuse(
    checkpoint: Checkpoint, program: qc.Program, match: str, spec: FitSpec = SPEC, data: str = ""
) -> None:
    """The checkpoint is refused, and the program is not touched."""
    before = adapters(program)
    state = FitState.fresh(program, spec)
    with pytest.raises(UserInputError, match=match):
        restore_checkpoint(checkpoint, program, state, Identity.of(program, spec, data=data))
    assert state.step == 0
    assert all(torch.equal(before[n], p) for n, p in adapters(program).items())


def test_a_checkpoint_of_another_plan_model_option_or_data_is_refused(tmp_path: Path) -> None:
    program, checkpoint = saved(tmp_path, data="a")
    other_plan = language_model(rank=2)
    refuse(checkpoint, other_plan, r"q_proj was .*rank 4, .*, and is .*rank 2,", data="a")
    captured = qc.capture_model(llama().eval(), (token_ids(2, 8),))
    bits = qc.insert_adapters(
        qc.quantize_groups(captured, qc.QuantSpec(bits=3)), qc.AdapterSpec(rank=4)
    )
    refuse(checkpoint, bits, "q_proj was .*4 bits.*, and is .*3 bits", data="a")
    torch.manual_seed(2)
    other = qc.quantize_groups(qc.capture_model(llama().eval(), (token_ids(2, 8),)))
    other = qc.insert_adapters(other, qc.AdapterSpec(rank=4))
    refuse(checkpoint, other, r"numbers of the tensor \S*0.self_attn.q_proj.qweight are", data="a")
    seed = dataclasses.replace(SPEC, seed=4)
    refuse(checkpoint, program, "option seed was 3, and is 4", seed, data="a")
    refuse(checkpoint, program, "the training data are not those", data="b")


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"alpha": 8}, r"q_proj was .*times 8.0 .*, and is .*times 2.0 "),
        ({"pooling": "mean"}, r"q_proj was .*times 8.0 .*, and is .*times 0.25 "),
        ({"dropout": 0.3}, r"q_proj was .*dropout 0.0, and is .*dropout 0.3 now"),
        ({"group_size": 64}, r"q_proj was .*sums of 32, .*, and is .*sums of 64,"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_adapter_is_refused(
    tmp_path: Path, adapter: dict[str, Any], said: str
) -> None:
    """Of the same shapes, but for the last, and of another function."""
    _, checkpoint = saved(tmp_path)
    refuse(checkpoint, language_model(**adapter), said)


def test_a_checkpoint_of_another_integer_zero_adapter_is_refused(tmp_path: Path) -> None:
    captured = qc.capture_model(llama().eval(), (token_ids(2, 8),))
    quantized = qc.quantize_groups(captured, qc.QuantSpec(zero_point="integer"))
    one, *others = (
        qc.insert_adapters(quantized, qc.AdapterSpec(rank=4, **values))
        for values in ({"kind": "scale"}, {"kind": "scale", "alpha": 8}, {"zero_point": "integer"})
    )
    state = FitState.fresh(one, SPEC)
    checkpoint = save_checkpoint(tmp_path, one, state, Identity.of(one, SPEC))
    for other, said in zip(others, ("times 2.0 on the scale", "on the integer"), strict=True):
        refuse(checkpoint, other, f"q_proj was .*times 8.0 on the scale .*, and is .*{said}")


def test_a_checkpoint_of_a_model_with_other_tensors_is_refused(tmp_path: Path) -> None:
    program, checkpoint = saved(tmp_path)
    file = checkpoint.folder / STATE
    state = read_sealed(file)
    weights = state["identity"]["weights"]
    ours, theirs = "model.layers.0.self_attn.q_proj.scale", "lm_head.bias"
    for name, changed, when in (
        (ours, {k: v for k, v in weights.items() if k != ours}, "then"),
        (theirs, weights | {theirs: "0"}, "now"),
    ):
        write_sealed(file, state | {"identity": state["identity"] | {"weights": changed}})
        refuse(checkpoint, program, f"there is no tensor {name} {when}")


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_moments_that_are_not_those_of_then_are_refused(tmp_path: Path, change: str) -> None:
    """They would begin at zero without a word, and other weights would come out."""
    stop_at(2, language_model(), SPEC, tmp_path)
    (checkpoint,) = list_checkpoints(tmp_path)
    file = checkpoint.folder / "optimizer.safetensors"
    moments = load_tensors(file)
    name = "model.layers.0.self_attn.q_proj.lora_A:exp_avg"
    said = {
        "missing": "is missing",
        "unknown": "belongs to no adapter",
        "shape": r"is \[1\], and",
    }
    if change == "missing":
        del moments[name]
    elif change == "unknown":
        name = "model.layers.0.self_attn.q_proj.lora_C:exp_avg"
        moments[name] = torch.zeros(1)
    else:
        moments[name] = torch.zeros(1)
    save_tensors(moments, file)
    state = read_sealed(checkpoint.folder / STATE)
    names = state["files"]
    write_sealed(checkpoint.folder / STATE, state | {"files": digests_of(checkpoint.folder, names)})
    refuse(checkpoint, language_model(), f"the state {name} of the optimizer {said[change]}")


@pytest.mark.parametrize("field", ["step", "stale", "moments", "identity", "best"])
def test_a_checkpoint_without_a_part_of_its_state_is_refused(tmp_path: Path, field: str) -> None:
    program, checkpoint = saved(tmp_path)
    state = read_sealed(checkpoint.folder / STATE)
    del state[field]
    write_sealed(checkpoint.folder / STATE, state)
    refuse(checkpoint, program, f"broken: {field} in state.json is missing")


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "step-old").mkdir()
    (tmp_path / "step-00000009 (copy)").mkdir()
    (tmp_path / "step-3").write_text("")
    assert [c.step for c in list_checkpoints(tmp_path)] == [1]


def test_a_broken_checkpoint_is_refused(tmp_path: Path) -> None:
    program, checkpoint = saved(tmp_path)
    tensors = checkpoint.folder / "optimizer.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-7])
    refuse(checkpoint, program, "changed after it was written")
    with unchecked():
        refuse(checkpoint, program, "truncated")
    tensors.write_bytes(content)
    state = read_sealed(checkpoint.folder / STATE)
    write_sealed(checkpoint.folder / STATE, state | {"version": 99})
    refuse(checkpoint, program, "version 99")
    write_sealed(checkpoint.folder / STATE, {"step": 1})
    refuse(checkpoint, program, "not a checkpoint of this package")


def test_what_a_killed_process_left_is_no_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / ".step-00000002.abc.tmp").mkdir()
    (tmp_path / ".step-00000000.going").mkdir()
    assert [c.step for c in list_checkpoints(tmp_path)] == [1]
    remove_unfinished(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["step-00000001"]


def test_the_digest_of_files_tells_where_one_ends(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("12")
    b.write_text("3")
    first = file_digest([a, b])
    a.write_text("1")
    b.write_text("23")
    assert file_digest([a, b]) != first
    with pytest.raises(UserInputError, match="cannot read"):
        file_digest([tmp_path / "none"])


@pytest.mark.slow
def test_a_training_that_is_killed_anywhere_ends_with_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL after any step, and at any point of writing a checkpoint; then resumed."""
    module, root = "tests.training.kill_and_resume", Path(__file__).parents[3]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # with one thread, a fork is safe
    done = subprocess.run(
        [sys.executable, "-m", module, str(tmp_path)],
        cwd=root,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    rows = json.loads(done.stdout)
    assert {row["point"] for row in rows} == {
        "after step", "optimizer.safetensors", "state.json", "rename", "prune", "going",
    }  # fmt: skip
    for row in rows:
        assert row["killed"] == 9, row
        assert row["same"], row
        assert row["resumed_at"] <= row["step"], row


def test_a_checkpoint_of_an_earlier_version_lacks_later_options(tmp_path: Path) -> None:
    """What did not exist then had no effect; a value with an effect is another training."""
    program = language_model()
    stored = Identity.of(program, SPEC).to_json()
    del stored["options"]["neftune_alpha"]
    Identity.of(program, SPEC).check(stored, where="here")
    noisy = Identity.of(program, dataclasses.replace(SPEC, neftune_alpha=5.0))
    with pytest.raises(UserInputError, match=r"option neftune_alpha was 0\.0, and is 5\.0 now"):
        noisy.check(stored, where="here")
