"""`Program`: calls, modes, and the folder it is saved to."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qalora_compile as qc
from qalora_compile.errors import UserInputError
from qalora_compile.ir import program_record, storage
from qalora_compile.ir.safetensors_io import load_tensors
from qalora_compile.sealed import read_sealed, unchecked, write_sealed
from tests.models import (
    MLP,
    OneLinear,
    TiedHead,
    UsedTwice,
    adapted,
    capture_transformer,
    gpt2,
    randomize_adapters,
    token_ids,
    worst,
)


class TwoInputs(nn.Module):
    """A model with an optional second input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor, scale: Tensor, shift: float = 0.0) -> Tensor:
        """A scaled and shifted linear map."""
        return self.fc(x) * scale + shift


def two_inputs() -> tuple[nn.Module, qc.Program, Tensor, Tensor]:
    """The model above, captured with positional tensors."""
    model, x, scale = TwoInputs(), torch.randn(4, 16), torch.randn(4, 8)
    return model, qc.capture_model(model, (x, scale)), x, scale


# Calls


@pytest.mark.parametrize("style", ["position", "keyword", "mixed"])
def test_call_by_position_and_keyword(style: str) -> None:
    model, program, x, scale = two_inputs()
    calls = {
        "position": lambda: program(x, scale),
        "keyword": lambda: program(scale=scale, x=x),
        "mixed": lambda: program(x, scale=scale),
    }
    assert worst(calls[style](), model(x, scale)) == 0.0


def test_call_of_a_model_captured_with_keywords() -> None:
    model, x, scale = TwoInputs(), torch.randn(4, 16), torch.randn(4, 8)
    program = qc.capture_model(model, (x,), {"shift": 0.5, "scale": scale})
    fresh, fresh_scale = torch.randn(3, 16), torch.randn(3, 8)
    expected = model(fresh, fresh_scale, 0.5)
    assert worst(program(fresh, scale=fresh_scale, shift=0.5), expected) == 0.0
    assert worst(program(scale=fresh_scale, shift=0.5, x=fresh), expected) == 0.0


BAD_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "missing": ((torch.zeros(4, 16),), {}, "missing argument: scale"),
    "missing all": ((), {}, "missing argument: x, scale"),
    "unknown": ((torch.zeros(4, 16), torch.zeros(4, 8)), {"gain": 1}, "gain is unknown"),
    "twice": (
        (torch.zeros(4, 16), torch.zeros(4, 8)),
        {"x": torch.zeros(4, 16)},
        "x is given twice",
    ),
    "too many": ((torch.zeros(4, 16), torch.zeros(4, 8), 1, 2), {}, "4 arguments given"),
    "fixed size": ((torch.zeros(4, 17), torch.zeros(4, 8)), {}, r"input x has shape \[4, 17\]"),
    "rank": ((torch.zeros(4, 2, 16), torch.zeros(4, 8)), {}, "input x has shape"),
    "dtype": ((torch.zeros(4, 16), torch.zeros(4, 8).double()), {}, "input scale is float64"),
    "no tensor": ((torch.zeros(4, 16), 3.0), {}, "input scale is float, not a tensor"),
    "nesting": (((torch.zeros(4, 16),), torch.zeros(4, 8)), {}, "nested differently"),
}


@pytest.mark.parametrize("kind", BAD_CALLS)
def test_bad_call_names_the_input(kind: str) -> None:
    _, program, _, _ = two_inputs()
    args, kwargs, message = BAD_CALLS[kind]
    with pytest.raises(UserInputError, match=message):
        program(*args, **kwargs)


def test_inputs_that_must_be_equally_long_are_checked() -> None:
    _, program, _, _ = two_inputs()
    with pytest.raises(UserInputError):
        program(torch.zeros(4, 16), torch.zeros(5, 8))


def test_a_constant_must_be_repeated() -> None:
    model, x, scale = TwoInputs(), torch.randn(4, 16), torch.randn(4, 8)
    program = qc.capture_model(model, (x, scale), {"shift": 0.5})
    with pytest.raises(UserInputError, match="input shift is 0.75, but was 0.5"):
        program(x, scale, shift=0.75)


# Train and eval


class Moody(nn.Module):
    """Everything that behaves otherwise in training."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        """Linear, batch norm, module dropout, functional dropout."""
        y = self.drop(self.norm(self.fc(x)))
        return functional.dropout(y, 0.3, self.training)


class Attention(nn.Module):
    """Self-attention whose dropout has no mode of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        """Two heads of width 8."""
        parts = self.fc(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        p = 0.5 if self.training else 0.0
        return functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], dropout_p=p)


def seeded(function: Any, *args: Any) -> Any:
    """Call with a fixed seed."""
    torch.manual_seed(11)
    return function(*args)


@pytest.mark.parametrize("captured_training", [True, False])
@pytest.mark.parametrize("kind", [Moody, Attention])
def test_train_and_eval_equal_eager(kind: type[nn.Module], captured_training: bool) -> None:
    model = kind().train(captured_training)
    eager = copy.deepcopy(model)
    x = torch.randn(*((8, 16) if kind is Moody else (2, 5, 16)))
    program = qc.capture_model(model, (x,))
    assert program.module.training is captured_training
    for training in (True, False, True, False):
        eager.train(training)
        returned = program.train() if training else program.eval()
        assert returned is program
        assert program.module.training is training
        assert worst(seeded(program, x), seeded(eager, x)) == 0.0
    assert worst(seeded(program.train(), x), seeded(program.eval(), x)) > 0.1


def test_batch_norm_updates_its_statistics_in_training() -> None:
    model = Moody().train()
    eager = copy.deepcopy(model)
    x = torch.randn(8, 16) + 3
    program = qc.capture_model(model, (x,)).train()
    before = program.tensors()["norm.running_mean"].clone()
    seeded(program, x)
    seeded(eager, x)
    after = program.tensors()["norm.running_mean"]
    assert worst(after, eager.norm.running_mean) == 0.0
    assert worst(after, before) > 0.01


def test_mode_survives_passes_and_saving(tmp_path: Path) -> None:
    model = Moody().train()
    x = torch.randn(8, 16)
    program = qc.insert_adapters(qc.quantize_groups(qc.capture_model(model, (x,))))
    assert program.module.training
    program.save(tmp_path / "p")
    again = qc.Program.load(tmp_path / "p")
    assert again.module.training
    assert worst(seeded(again, x), seeded(program, x)) == 0.0
    assert worst(again.eval()(x), program.eval()(x)) == 0.0


def test_attention_dropout_survives_eval_and_saving(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 16)
    program = qc.capture_model(Attention().train(), (x,)).eval()
    program.save(tmp_path / "p")
    again = qc.Program.load(tmp_path / "p")
    assert worst(seeded(again.train(), x), seeded(program.train(), x)) == 0.0
    assert worst(seeded(program, x), seeded(program.eval(), x)) > 0.01


def test_training_moves_the_adapters_alone() -> None:
    x, target = torch.randn(8, 32), torch.randn(8, 4)
    program = adapted(OneLinear(32, 4), (x,), size=0.0)
    frozen = {n: t.clone() for n, t in program.tensors().items() if not t.requires_grad}
    optimizer = torch.optim.SGD(program.adapter_parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (program(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, tensor in frozen.items():
        assert torch.equal(program.tensors()[name], tensor), name


# Values


def test_evolve_and_passes_leave_the_program_alone() -> None:
    x = torch.randn(4, 32)
    program = qc.capture_model(OneLinear(32, 4), (x,))
    text, before = str(program), program(x)
    quantized = qc.quantize_groups(program)
    assert str(program) == text
    assert worst(program(x), before) == 0.0
    assert program.history == ()
    assert [entry.split("{")[0] for entry in quantized.history] == [
        "canonicalize-complex",
        "canonicalize-clamps",
        "canonicalize-pointwise",
        "annotate-linears",
        "quantize-groups",
    ]


def test_history_parses_back_and_reproduces_the_program() -> None:
    x = torch.randn(4, 40)
    program = qc.capture_model(MLP(40, 24, 8), (x,))
    made = qc.insert_adapters(
        qc.quantize_groups(program, qc.QuantSpec(bits=3, group_size=16), exclude=("layers.1",)),
        qc.AdapterSpec(rank=2, alpha=0.5, seed=3),
    )
    again = qc.Pipeline.parse(",".join(made.history))(program).program
    assert str(again) == str(made)
    assert worst(again(x), made(x)) == 0.0


# Folders


def saved(tmp_path: Path) -> tuple[qc.Program, Path, Tensor]:
    """An adapted program and the folder it was saved to."""
    x = torch.randn(4, 40)
    program = adapted(MLP(40, 24, 8), (x,), qc.QuantSpec(bits=3, group_size=16))
    program.save(tmp_path / "p")
    return program, tmp_path / "p", x


def stages(x: Tensor) -> dict[str, qc.Program]:
    """A program at every stage."""
    program = qc.capture_model(MLP(40, 24, 8), (x,))
    annotated = qc.Pipeline.parse("annotate-linears")(program).program
    quantized = qc.quantize_groups(annotated)
    made = randomize_adapters(qc.insert_adapters(quantized))
    folded = qc.fold_adapters(made)
    lowered = qc.Pipeline.parse("legalize-ort-stock")(folded).program
    found = (program, annotated, quantized, made, folded, lowered)
    return {p.stage: p for p in found}


def test_every_stage_saves_and_loads(tmp_path: Path) -> None:
    x = torch.randn(4, 40)
    fresh = torch.randn(7, 40)
    for index, (stage, program) in enumerate(stages(x).items()):
        program.save(tmp_path / str(index))
        again = qc.Program.load(tmp_path / str(index))
        assert again.stage == stage
        assert str(again) == str(program)
        assert worst(again(fresh), program(fresh)) == 0.0
        assert again.plan == program.plan
        assert again.signature == program.signature
        assert again.history == program.history
        assert again.notes == program.notes
        assert worst(again.example, program.example) == 0.0
        assert (tmp_path / str(index) / "adapters.safetensors").exists() is (stage == "adapted")


def test_a_loaded_program_goes_on(tmp_path: Path) -> None:
    program, folder, x = saved(tmp_path)
    again = qc.Program.load(folder)
    assert [p.shape for p in again.adapter_parameters()] == [
        p.shape for p in program.adapter_parameters()
    ]
    assert all(p.requires_grad for p in again.adapter_parameters())
    assert worst(qc.fold_adapters(again)(x), qc.fold_adapters(program)(x)) == 0.0


@pytest.mark.parametrize("forced", [False, True])
def test_ties_are_kept(tmp_path: Path, forced: bool) -> None:
    ids = torch.randint(0, 48, (2, 6))
    program = qc.capture_model(TiedHead(), (ids,))
    if forced:
        program = qc.quantize_groups(program, targets=("mid",))
    program.save(tmp_path / "p")
    again = qc.Program.load(tmp_path / "p")
    assert worst(again(ids), program(ids)) == 0.0
    shared = {n for n in again.tensors() if n in ("embed.weight", "lm_head.weight")}
    pointers = {again.tensors()[n].data_ptr() for n in shared}
    assert shared and len(pointers) == 1
    stored = load_tensors(tmp_path / "p" / "quantized.safetensors")
    assert sum(tuple(t.shape) == (48, 32) for t in stored.values()) == 1


def test_a_layer_used_twice_is_stored_once(tmp_path: Path) -> None:
    x = torch.randn(4, 32)
    program = adapted(UsedTwice(), (x,))
    program.save(tmp_path / "p")
    again = qc.Program.load(tmp_path / "p")
    assert len(again.adapter_parameters()) == len(program.adapter_parameters()) == 4
    assert worst(again(x), program(x)) == 0.0


def test_a_transformer_saves_and_loads(tmp_path: Path) -> None:
    program = randomize_adapters(
        qc.insert_adapters(qc.quantize_groups(capture_transformer(gpt2())))
    )
    program.save(tmp_path / "p")
    again = qc.Program.load(tmp_path / "p")
    ids = token_ids(3, 5)
    assert str(again) == str(program)
    assert worst(again(ids), program(ids)) == 0.0
    assert type(again(ids)) is type(program(ids))


def test_the_folder_holds_json_and_safetensors_alone(tmp_path: Path) -> None:
    _, folder, _ = saved(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapters.safetensors",
        "example.safetensors",
        "program.json",
        "quantized.safetensors",
    ]
    for path in folder.iterdir():
        head = path.read_bytes()[:16]
        assert not head.startswith((b"\x80", b"PK")), f"{path.name} is a pickle or a zip archive"
        if path.suffix == ".safetensors":
            length = int.from_bytes(head[:8], "little")
            json.loads(path.read_bytes()[8 : 8 + length])
        else:
            json.loads(path.read_text("utf-8"))


def test_loading_reads_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, folder, x = saved(tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle was read")

    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr("torch.load", refuse)
    assert worst(qc.Program.load(folder)(x), program(x)) == 0.0


FILES = ["program.json", "quantized.safetensors", "adapters.safetensors", "example.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "garbage"])
def test_damaged_files_are_refused(tmp_path: Path, name: str, damage: str) -> None:
    _, folder, _ = saved(tmp_path)
    path = folder / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"truncated": data[: len(data) // 2], "empty": b"", "garbage": b"\xff\x00{]" * 40}[
                damage
            ]
        )
    with pytest.raises(UserInputError):
        qc.Program.load(folder)


def rewrite(folder: Path, **changes: Any) -> None:
    """Replace top-level entries of program.json."""
    path = folder / "program.json"
    write_sealed(path, read_sealed(path) | changes)


def test_a_changed_record_or_tensor_is_noticed(tmp_path: Path) -> None:
    program, folder, x = saved(tmp_path)
    path = folder / "program.json"
    before = path.read_bytes()
    value = json.loads(before)
    for changed in (value | {"training": not value["training"]}, value | {"sha256": "0" * 64}):
        path.write_text(json.dumps(changed), "utf-8")
        with pytest.raises(UserInputError, match="changed after it was written"):
            qc.Program.load(folder)
    del value["sha256"]
    path.write_text(json.dumps(value), "utf-8")
    with pytest.raises(UserInputError, match="changed after it was written"):
        qc.Program.load(folder)
    path.write_bytes(before)
    for name in FILES[1:]:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserInputError, match=f"{name} was changed"):
            qc.Program.load(folder)
        with unchecked():
            assert qc.Program.load(folder).stage == program.stage
        (folder / name).write_bytes(data)
    assert worst(qc.Program.load(folder)(x), program(x)) == 0.0


def test_folders_of_version_1_are_read(tmp_path: Path) -> None:
    """They have no digests."""
    program, folder, x = saved(tmp_path)
    path = folder / "program.json"
    value = json.loads(path.read_text("utf-8"))
    del value["sha256"], value["files"]
    path.write_text(json.dumps(value | {"version": 1}), "utf-8")
    assert worst(qc.Program.load(folder)(x), program(x)) == 0.0


@pytest.mark.parametrize("kind", ["lora", "scale"])
def test_folders_of_version_2_are_read(kind: str, tmp_path: Path) -> None:
    """Two operators and two fields of the plan had other names in them."""
    x = torch.randn(2, 24)
    spec = qc.QuantSpec(bits=4, group_size=8, zero_point="integer" if kind == "scale" else "real")
    program = qc.quantize_groups(qc.capture_model(nn.Linear(24, 8), (x,)), spec)
    program = qc.insert_adapters(program, qc.AdapterSpec(rank=2, kind=kind))
    folder = tmp_path / "p"
    program.save(folder)
    value = read_sealed(folder / "program.json")
    for row in value["plan"]:
        row["whole"] = row.pop("frozen_integer_zero")
        row["integer"] = row.pop("integer_zero_point")
    text = json.dumps(value | {"version": 2})
    old = text.replace("qalora.integer_zero_linear.default", "qalora.whole_linear.default")
    assert (old != text) == (kind == "scale")
    write_sealed(folder / "program.json", json.loads(old))
    again = qc.Program.load(folder)
    assert str(again) == str(program) and again.plan == program.plan
    assert worst(again(x), program(x)) == 0.0


def test_adapters_are_replaced_so_that_the_folder_can_be_read_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, folder, _ = saved(tmp_path)
    others = {name: torch.ones_like(p) for name, p in program.named_adapter_parameters()}
    original, seen = program_record.admit_file, []

    def watch(*args: Any) -> None:
        original(*args)
        loaded = qc.Program.load(folder)
        seen.append(bool(all(bool((p == 1).all()) for p in loaded.adapter_parameters())))

    monkeypatch.setattr(storage, "admit_file", watch)
    storage.replace_adapters(others, folder)
    assert seen == [False, True]
    value = json.loads((folder / "program.json").read_text("utf-8"))
    assert len(value["files"]["adapters.safetensors"]) == 1


BAD_ENTRIES: dict[str, dict[str, Any]] = {
    "another format": {"format": "something"},
    "later version": {"version": 4},
    "earlier version": {"version": 0},
    "no digests": {"files": {}},
    "digests of another form": {"files": ["quantized.safetensors"]},
    "unknown stage": {"stage": "nonsense"},
    "plan is no list": {"plan": 3},
    "plan row": {"plan": [{"name": "fc"}]},
    "signature": {"signature": {}},
    "no graph": {"graph": {"nodes": []}},
    "ties": {"ties": {"a": "no such tensor"}},
}


@pytest.mark.parametrize("kind", BAD_ENTRIES)
def test_malformed_programs_are_refused(tmp_path: Path, kind: str) -> None:
    _, folder, _ = saved(tmp_path)
    rewrite(folder, **BAD_ENTRIES[kind])
    with pytest.raises(UserInputError):
        qc.Program.load(folder)


def test_a_program_that_is_no_object_is_refused(tmp_path: Path) -> None:
    _, folder, _ = saved(tmp_path)
    (folder / "program.json").write_text("[1, 2]", "utf-8")
    with pytest.raises(UserInputError, match="no JSON object"):
        qc.Program.load(folder)


def test_a_version_from_the_future_says_which(tmp_path: Path) -> None:
    _, folder, _ = saved(tmp_path)
    rewrite(folder, version=99)
    with pytest.raises(UserInputError, match="version 99, this package reads versions 1 to 3"):
        qc.Program.load(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="no program folder"):
        qc.Program.load(tmp_path / "nothing")


def test_code_in_a_stored_graph_is_not_run(tmp_path: Path) -> None:
    _, folder, _ = saved(tmp_path)
    marker = tmp_path / "ran"
    call = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    graph = json.loads((folder / "program.json").read_text("utf-8"))["graph"]
    graph["tree"]["arguments"] = [f"x={call} or '''''' '''):\n    0 #"]
    rewrite(folder, graph=graph)
    error: Exception | None = None
    try:
        qc.Program.load(folder)
    except Exception as raised:
        error = raised
    assert not marker.exists(), "loading ran code that the file contained"
    assert isinstance(error, UserInputError)


def test_an_existing_folder_is_refused_or_replaced(tmp_path: Path) -> None:
    program, folder, x = saved(tmp_path)
    (folder / "stray.txt").write_text("old", "utf-8")
    with pytest.raises(UserInputError, match="already exists"):
        qc.fold_adapters(program).save(folder)
    assert qc.Program.load(folder).stage == "adapted"
    qc.fold_adapters(program).save(folder, overwrite=True)
    again = qc.Program.load(folder)
    assert again.stage == "folded"
    assert worst(again(x), qc.fold_adapters(program)(x)) == 0.0
    assert not (folder / "stray.txt").exists()
    assert not (folder / "adapters.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("failing", ["save_tensors", "write_record"])
def test_a_crash_while_saving_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, overwrite: bool
) -> None:
    x = torch.randn(4, 40)
    program = adapted(MLP(40, 24, 8), (x,))
    if overwrite:
        program.save(tmp_path / "p")
    original = getattr(storage, failing)

    def crash(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(storage, failing, crash)
        with pytest.raises(OSError, match="the disk is full"):
            qc.fold_adapters(program).save(tmp_path / "p", overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == (["p"] if overwrite else [])
    if overwrite:
        again = qc.Program.load(tmp_path / "p")
        assert again.stage == "adapted"
        assert worst(again(x), program(x)) == 0.0
