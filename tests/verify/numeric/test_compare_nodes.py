"""Comparison along the graph: the compared values, the inputs, and the messages."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.capture.causal_lm import capture_causal_lm
from qalora_compile.cli.main import main
from qalora_compile.errors import UserInputError, VerificationError
from qalora_compile.ir.signature import InputLeaf, Signature
from qalora_compile.progress import listening
from qalora_compile.runtime.library import kernel_level, library_path
from qalora_compile.verdict import Verdict
from qalora_compile.verify import compare_nodes, named_inputs
from qalora_compile.verify.compare import BEYOND, EXPLAINED, verdict_of
from qalora_compile.verify.numeric import compare_nodes as compare_module
from qalora_compile.verify.numeric.error_bound import check_bound
from qalora_compile.verify.numeric.run_float64 import run_nodes
from qalora_compile.verify.padding import padding_of
from qalora_compile.verify.runners.onnx_session import LEVELS, OnnxSession
from tests.models import MLP, adapted, llama, worst
from tests.verify.planted import SPECS, program, with_graph, with_tensors

UNIT = 2.0**-24


def pair() -> tuple[qc.Program, qc.Program]:
    source = adapted(MLP(40, 24, 8), (torch.randn(2, 40),))
    return source, qc.fold_adapters(source)


def output_name(source: qc.Program) -> str:
    return next(node.args[0][0].name for node in source.graph.nodes if node.op == "output")


def test_float64_is_what_the_model_computes_in_float64() -> None:
    class Casting(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.fc, self.dtype = nn.Linear(16, 16), dtype

        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(x.shape[1], dtype=self.dtype) / 7 + torch.ones(1)
            h = x.to(self.dtype) * places[:, None].sin()
            return torch.softmax(self.fc(h), -1, dtype=self.dtype)

    narrow, x = Casting(torch.float32), torch.randn(3, 5, 16)
    wide = copy.deepcopy(narrow).double()
    wide.dtype = torch.float64
    captured = qc.capture_model(narrow, (torch.randn(2, 4, 16),))
    name = output_name(captured)
    found = run_nodes(captured, captured.leaves((x,), {}), {name}, torch.float64)[name]
    assert found.dtype is torch.float64
    assert worst(found, wide(x.double())) < 1e-15
    assert worst(found, narrow(x)) > 1e-10, "float32 rounds"


def test_a_program_computes_at_its_own_precision_if_asked_for_none() -> None:
    source, _ = pair()
    x = torch.randn(3, 40)
    name = output_name(source)
    assert torch.equal(run_nodes(source, [x], {name})[name], source.eval()(x))
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("name", SPECS)
def test_every_target_passes_at_every_level(name: str, models: Path) -> None:
    library = library_path() if kernel_level() is not None else None
    report = compare_nodes(program("folded"), models / f"{name}.onnx", library=library).check()
    with_library = name == "ort" and library is not None
    assert len(report.modes) == len(LEVELS) * (2 if with_library else 1) + (name == "ort")
    for mode in report.modes:
        assert {row.name for row in mode.rows} >= {"q", "input of q", "down", "output output"}
        assert mode.worst is not None and 0 < mode.worst.worst.ratio < EXPLAINED / 2
    assert bool(report.notes) == (name != "ort" or library is None)


def test_the_passes_in_between_pass_too() -> None:
    for kind in ("folded", *(f"lowered:{name}" for name in SPECS)):
        compare_nodes(program("adapted"), program(kind)).check()


def test_a_language_model_with_its_cache_is_compared_before_and_after_attention(
    tmp_path: Path,
) -> None:
    cached = qc.quantize_groups(capture_causal_lm(llama()))
    qc.export_model(cached, tmp_path / "model.onnx")
    calls = named_inputs(cached, 1)
    assert {"zeros", "last token", "all padding"} < set(calls), "caches, tokens and masks"
    tried = {name: calls[name] for name in ("random 0", "one-hot", "left padding", "all padding")}
    report = compare_nodes(cached, tmp_path / "model.onnx", tried, levels=("all",)).check()
    names = {row.name for row in report.modes[0].rows}
    assert "input of model.layers.0.self_attn.o_proj" in names
    assert "output present.1.key" in names
    assert sum(name.startswith("node ") for name in names) >= 4
    assert [note for note in report.notes if "all padding" in note]


def test_half_precision_is_held_to_float32_where_the_file_computes_in_it(tmp_path: Path) -> None:
    folded = qc.fold_adapters(adapted(MLP(40, 24, 8).half(), (torch.randn(2, 40).half(),)))
    qc.export_model(folded, tmp_path / "model.onnx")
    report = compare_nodes(folded, tmp_path / "model.onnx", levels=("all",)).check()
    row = report.modes[0].rows[-1]
    assert row.worst.own < 1e-5 * row.worst.scale, "held to float32, not to float16"


def test_a_result_that_is_rounded_otherwise_is_as_far_off_as_rounding_makes_it() -> None:
    source, _ = pair()
    x, name = torch.randn(3, 40), output_name(source)
    exact = run_nodes(source, [x], {name}, torch.float64)[name]
    found = [
        run_nodes(source, [x], {name}, torch.float32, noise=(UNIT, seed))[name]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    for one in found:
        assert one.dtype is torch.float32
        assert UNIT / 8 < worst(one, exact) / float(exact.abs().max()) < 64 * UNIT


def test_inputs_are_odd_where_the_program_has_inputs_for_it() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(30, 16), nn.Linear(16, 16)

        def forward(self, ids: Tensor, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.fc(self.embed(ids) + x) * attention_mask[..., None]

    example = (torch.randint(0, 30, (2, 6)), torch.randn(2, 6, 16), torch.ones(2, 6).long())
    calls = named_inputs(qc.capture_model(Masked(), example), 1)
    assert list(calls) == [
        "random 0", "zeros", "one-hot", "large", "denormal", "first token", "last token",
        "all padding", "left padding", "right padding", "long", "every token",
    ]  # fmt: skip
    found = {name: dict(call) for name, call in calls.items()}
    assert not found["zeros"]["x"].any() and found["zeros"]["ids"].any()
    assert torch.equal(found["one-hot"]["x"].sum(-1), torch.ones(3, found["one-hot"]["x"].shape[1]))
    assert found["large"]["x"].abs().max() > 4096
    tiny = found["denormal"]["x"].abs()
    assert 0 < tiny.max() < torch.finfo(torch.float32).tiny
    assert found["last token"]["ids"].unique().tolist() == [29]
    assert found["first token"]["ids"].unique().tolist() == [0]
    length = found["left padding"]["attention_mask"].shape[1]
    assert found["all padding"]["attention_mask"].sum() == 0
    left = found["left padding"]["attention_mask"][0]
    right = found["right padding"]["attention_mask"][0]
    assert left.tolist() == [0] * (length // 2) + [1] * (length - length // 2)
    assert right.tolist() == [1] * (length // 2) + [0] * (length - length // 2)


def test_a_fault_that_only_an_odd_input_shows_is_found() -> None:
    _, folded = pair()
    wrong = with_tensors(folded, {f"{folded.plan.sites[0].path}.bias": lambda t: t + 1e-5})
    calls = named_inputs(folded, 1)
    assert compare_nodes(folded, wrong, {"large": calls["large"]}).passed, "too small to be seen"
    report = compare_nodes(folded, wrong, calls)
    assert report.culprit is not None and report.culprit[1] is not None
    assert report.culprit[1].name == folded.plan.sites[0].name


def test_an_error_between_rounding_and_a_mistake_is_ambiguous() -> None:
    _, folded = pair()
    name = f"{folded.plan.sites[0].path}.bias"
    calls = {"random": named_inputs(folded, 1)["random 0"]}
    found = set()
    for exponent in range(-24, -10):
        wrong = with_tensors(folded, {name: lambda t, e=exponent: t + 2.0**e})  # type: ignore[misc]
        report = compare_nodes(folded, wrong, calls)
        found.add(report.verdict)
        if report.verdict == Verdict.UNDECIDED:
            with pytest.raises(VerificationError, match="UNDECIDED") as caught:
                report.check()
            assert "prove_equivalence" in str(caught.value)
            assert caught.value.report is report
    assert found == {Verdict.EQUAL, Verdict.UNDECIDED, Verdict.DIFFERENT}


class Told(nn.Module):
    """One layer, and outputs that are derived from it."""

    def __init__(self, tell: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.tell = nn.Linear(32, 8), tell
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, x: Tensor) -> Any:
        return self.tell(self.fc(x)) | {"table": self.table}


def stated(tell: Callable[[Tensor], Any]) -> qc.Program:
    return qc.quantize_groups(qc.capture_model(Told(tell).eval(), (torch.randn(3, 32),)))


@pytest.mark.parametrize(
    ("tell", "says"),
    [
        (lambda y: {"y": y}, "output z: program (quantized) has no such output"),
        (lambda y: {"y": y, "z": y.tanh(), "more": y}, "output more: program (quantized) has no"),
        (lambda y: {"y": y.reshape(-1), "z": y.tanh()}, "output y: shapes [1, 8] and [8] differ"),
        (lambda y: {"y": y, "z": y.tanh().double()}, None),
        (lambda y: {"y": y, "z": (y > 0).long()}, "output z: holds int64 where the reference has"),
    ],
)
def test_outputs_have_to_be_there_in_their_shape_and_kind(
    tell: Callable[[Tensor], Any], says: str | None
) -> None:
    report = compare_nodes(stated(lambda y: {"y": y, "z": y.tanh()}), stated(tell))
    assert report.passed == (says is None)
    assert says is None or (report.difference or "").startswith(says)
    json.dumps(report.to_json(), allow_nan=False)


def test_an_output_that_is_a_stored_tensor_is_compared_too() -> None:
    source = stated(lambda y: {"y": y})
    report = compare_nodes(source, source).check()
    assert "output table" in {row.name for row in report.modes[0].rows}
    wrong = with_tensors(source, {"table": lambda t: t + 1})
    assert (compare_nodes(source, wrong).difference or "").startswith("output table: off by 1")


def test_an_output_that_is_no_tensor_is_noted() -> None:
    source = stated(lambda y: {"y": y, "rows": y.shape[0]})
    assert compare_nodes(source, source).notes == (
        "output rows is not compared: it is not a tensor",
    )


class Windowed(nn.Module):
    """Attention to `window` positions back, with or without a table of positions."""

    def __init__(self, window: int, table: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.fc, self.window = nn.Embedding(30, 32), nn.Linear(32, 32), window
        self.places = nn.Embedding(table, 32) if table else None

    def forward(self, ids: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1])
        h = self.fc(
            self.embed(ids) if self.places is None else self.embed(ids) + self.places(place)
        )
        back = place[:, None] - place[None, :]
        far = back >= self.window if self.window else back < 0
        scores = (h @ h.transpose(1, 2)).masked_fill(far | (back < 0), -1e30)
        return self.fc(torch.softmax(scores, -1) @ h)


@pytest.mark.parametrize(("window", "table", "length"), [(64, 0, 160), (300, 0, 332), (40, 65, 65)])
def test_a_sliding_window_that_was_dropped_shows_on_a_long_call(
    window: int, table: int, length: int
) -> None:
    right, wrong = (
        qc.quantize_groups(
            qc.capture_model(Windowed(size, table).eval(), (torch.randint(0, 30, (2, 6)),))
        )
        for size in (window, 0)
    )
    calls = named_inputs(right, 1)
    assert calls["long"]["ids"].shape == (1, length)  # type: ignore[call-overload]
    short = {name: call for name, call in calls.items() if name != "long"}
    assert compare_nodes(right, wrong, short).passed, "nothing else is long enough"
    assert compare_nodes(right, wrong, calls).verdict == Verdict.DIFFERENT
    assert compare_nodes(right, right, {"long": calls["long"]}).passed


def test_a_failure_names_both_nodes_and_is_json(tmp_path: Path) -> None:
    source, folded = pair()
    site = folded.plan.sites[1]
    wrong = with_tensors(folded, {f"{site.path}.offset": lambda t: t * 1.001})
    report = compare_nodes(source, wrong)
    assert report.verdict == Verdict.DIFFERENT
    text = report.difference or ""
    assert text.startswith(f"{site.name}: off by")
    assert "aten.add" in text and "qalora.group_linear" in text and text.count("\n") == 2
    with pytest.raises(VerificationError, match=f"(?s)where: as a program: {site.name}: off by"):
        report.check()
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert written["verdict"] == "DIFFERENT" and written["difference"] == text
    assert f"first: {site.name}" in str(report)


def test_a_file_that_does_not_run_fails_with_its_reason(models: Path, tmp_path: Path) -> None:
    model = onnx.load(models / "ort-stock.onnx")
    next(o for o in model.opset_import if not o.domain).version = 999
    onnx.save(model, tmp_path / "model.onnx")
    report = compare_nodes(program("folded"), tmp_path / "model.onnx", levels=("basic",))
    assert report.verdict == Verdict.DIFFERENT and report.modes[0].problem
    with pytest.raises(VerificationError, match="ONNX Runtime cannot load model.onnx"):
        report.check()
    calls = list(named_inputs(program("folded"), 1).values())
    with pytest.raises(UserInputError, match="cannot load") as caught:
        qc.verify_equivalence(
            program("folded"), tmp_path / "model.onnx", calls, qc.Tolerance(max_rel=1e-3)
        )
    assert "optimization level all" in (caught.value.where or "")


def test_wrong_use_is_refused(models: Path) -> None:
    folded = program("folded")
    with pytest.raises(UserInputError, match="only a program runs in float64"):
        compare_nodes(models / "ort.onnx", folded)
    with pytest.raises(UserInputError, match="O3 is no optimization level"):
        compare_nodes(folded, models / "ort.onnx", levels=("O3",))
    with pytest.raises(UserInputError, match="no input"):
        compare_nodes(folded, folded, {})


def test_the_command_line_compares_along_the_graph(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program("folded").save(tmp_path / "folded")
    words = ["verify", str(tmp_path / "folded"), str(models / "ort-stock.onnx"), "--numeric"]
    assert main([*words, "--inputs", "1", "--levels", "basic,all"]) == 0
    shown = capsys.readouterr().out
    assert "optimization basic" in shown and "last token" in shown and "EQUAL" in shown
    assert main([*words, "--inputs", "1", "--levels", "all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "EQUAL"
    wrong = with_tensors(program("folded"), {"q.offset": lambda t: t * 1.001})
    wrong.save(tmp_path / "wrong")
    assert main(["verify", str(tmp_path / "folded"), str(tmp_path / "wrong"), "--numeric"]) == 1
    assert "q: off by" in capsys.readouterr().out
    assert main([*words, "--max-abs", "1"]) == 2
    assert main([*words[:3], "--levels", "all"]) == 2
    assert main(["verify", words[2], words[1], "--numeric"]) == 2


# Padding


def padded_model() -> qc.Program:
    class Averaged(nn.Module):
        """Attention that gives padding the mean of all, or zero."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(30, 16), nn.Linear(16, 16)

        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            h = self.fc(self.embed(ids))
            scores = h @ h.transpose(1, 2)
            blocked = attention_mask[:, None, :] == 0
            weights = torch.softmax(scores.masked_fill(blocked, -1e30), -1)
            return self.fc(torch.where(blocked.all(-1, keepdim=True), 0.0, weights) @ h)

    ids, mask = torch.randint(0, 30, (2, 6)), torch.ones(2, 6).long()
    captured = qc.capture_model(Averaged().eval(), (ids, mask))
    return qc.quantize_groups(captured, qc.QuantSpec(group_size=8))


def test_values_at_padding_are_not_compared_but_have_to_be_finite() -> None:
    right = padded_model()

    def instead(value: float) -> qc.Program:
        def change(graph: torch.fx.Graph) -> None:
            node = next(n for n in graph.nodes if str(n.target).startswith("aten.where"))
            node.update_arg(1, value)

        return with_graph(right, change)

    calls = named_inputs(right, 1)
    lax = compare_nodes(right, instead(0.5), calls)
    assert "no output is checked on all padding" in "".join(lax.notes)
    assert [name for name, _ in lax.modes[0].inputs] == [n for n in calls if n != "all padding"]
    assert lax.passed
    assert compare_nodes(right, instead(math.nan), calls).verdict == Verdict.DIFFERENT


def test_positions_of_padding_are_found_in_values_of_many_shapes() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    signature = Signature(
        (InputLeaf("input_ids", "int64", (2, 2)), InputLeaf("attention_mask", "int64", (2, 3))), ()
    )
    padding = padding_of(signature, [torch.ones(2, 2).long(), mask])
    assert padding is not None
    assert set(padding.masks) == {2, 3}
    assert not padding.masks[2].any(), "the tokens are the last positions"
    for shape in ((2, 3, 5), (2, 4, 3, 5), (6, 5), (2, 3)):
        found = padding.of(torch.zeros(shape))
        assert found is not None
        assert int((torch.zeros(shape, dtype=torch.bool) | found).sum()) * 6 == math.prod(shape)
    assert padding.of(torch.zeros(5, 5)) is None
    assert padding_of(signature, [torch.ones(2, 2).long(), torch.ones(2, 3).long()]) is None


# The check itself


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_an_error_is_measured_by_that_of_the_reference() -> None:
    exact = values(1.0, -2.0)
    found = check_bound(exact, values(1e-6, 5e-7), exact + 5e-6, UNIT)
    assert (found.own, found.error, found.scale) == pytest.approx((1e-6, 5e-6, 2.0), rel=1e-6)
    assert found.ratio == pytest.approx(5.0, rel=1e-6) and found.verdict == Verdict.EQUAL


def test_a_reference_without_error_admits_one_rounding() -> None:
    exact = values(1.0, 2.0)
    assert check_bound(exact, exact * 0, exact + 2.0 * UNIT, UNIT).ratio == pytest.approx(1.0)
    assert check_bound(exact, exact * 0, exact + 400.0 * UNIT, UNIT).verdict == Verdict.DIFFERENT


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_fails_where_the_reference_is(bad: float) -> None:
    exact = values(1.0, 2.0)
    assert check_bound(exact, exact * 0, values(1.0, bad), UNIT).verdict == Verdict.DIFFERENT
    found = check_bound(values(1.0, bad), values(0.0, math.nan), values(1.0, 5.0), UNIT)
    assert (found.checked, found.undefined, found.verdict) == (1, 1, Verdict.EQUAL)
    assert (
        check_bound(values(bad), values(math.nan), values(0.0), UNIT).verdict == Verdict.UNDECIDED
    )


def test_a_reference_that_has_lost_its_bits_decides_nothing() -> None:
    exact = values(1.0, 2.0)
    found = check_bound(exact, values(0.5, 0.5), exact + 0.5, UNIT)
    assert (found.checked, found.verdict) == (0, Verdict.UNDECIDED)


def test_shapes_and_integers() -> None:
    exact = values(1.0, 2.0, 3.0, 4.0)
    none = torch.zeros(2, 2, dtype=torch.float64)
    assert check_bound(exact.reshape(2, 2), none, exact, UNIT).verdict == Verdict.EQUAL, (
        "rows, flattened"
    )
    assert "shapes" in check_bound(exact.reshape(2, 2), none, exact, UNIT, as_is=True).problem
    assert "shapes" in check_bound(exact, none.flatten(), exact[:2], UNIT).problem
    ids, none = torch.tensor([1, 2, 3]), torch.zeros(3)
    assert check_bound(ids, none, ids, UNIT).ratio == 0
    assert check_bound(ids, none, ids.int(), UNIT).verdict == Verdict.EQUAL
    assert check_bound(ids, none, ids.flip(0), UNIT).verdict == Verdict.DIFFERENT
    assert check_bound(ids, none, ids.float(), UNIT).verdict == Verdict.EQUAL, (
        "a mask may be numbers"
    )
    found = check_bound(ids, none, ids.float(), UNIT, as_is=True)
    assert found.problem == "holds float32 where the reference has int64"


@pytest.mark.parametrize("size", [2**24, 2**53])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_integers_are_equal_or_wrong(size: int, dtype: torch.dtype) -> None:
    exact, none = torch.tensor([[7, size]]), torch.zeros(1, 2, dtype=torch.float64)
    other = (exact + torch.tensor([[0, 2]])).to(dtype)
    found = check_bound(exact, none, other, UNIT)
    assert (found.verdict, found.checked) == (Verdict.DIFFERENT, 2)
    assert f"1 of 2 are not equal, the first {other[0, 1].item()}, not {size}" in found.problem
    assert (
        check_bound(exact, none, other, UNIT, torch.tensor([[False, True]])).verdict
        == Verdict.EQUAL
    )


def test_booleans_are_equal_or_wrong() -> None:
    mask, none = torch.tensor([True, False]), torch.zeros(2, dtype=torch.float64)
    assert check_bound(mask, none, mask, UNIT, as_is=True).verdict == Verdict.EQUAL
    assert check_bound(mask, none, ~mask, UNIT, as_is=True).verdict == Verdict.DIFFERENT


def test_an_integer_that_rounding_decides_is_not_compared() -> None:
    exact, own = torch.tensor([3, 4]), values(1.0, 0.0)
    found = check_bound(exact, own, torch.tensor([2, 4]), UNIT)
    assert (found.verdict, found.checked, found.undefined) == (Verdict.EQUAL, 1, 1)
    assert check_bound(exact, own, torch.tensor([3, 5]), UNIT).verdict == Verdict.DIFFERENT


def test_below_the_least_normal_number_zero_is_as_good() -> None:
    exact = values(1e-40, -2e-41)
    assert check_bound(exact, exact * 0, exact * 0, UNIT).verdict == Verdict.EQUAL


@given(st.floats(0, 1e9))
def test_verdicts_are_in_order(ratio: float) -> None:
    expected = (
        Verdict.EQUAL
        if ratio <= EXPLAINED
        else Verdict.DIFFERENT
        if ratio >= BEYOND
        else Verdict.UNDECIDED
    )
    assert verdict_of(ratio) == expected
    assert Verdict.worst([Verdict.EQUAL, verdict_of(ratio)]) == expected


def test_nothing_compared_is_no_pass() -> None:
    assert Verdict.worst([]) == Verdict.DIFFERENT


def test_an_interrupt_keeps_the_modes_that_are_done(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def session(path: Path, library: Path | None, level: str, **options: bool) -> OnnxSession:
        opened.append(level)
        if len(opened) == 3:
            raise KeyboardInterrupt
        return OnnxSession(path, library, level, **options)

    monkeypatch.setattr(compare_module, "OnnxSession", session)
    report = compare_nodes(program("folded"), models / "onnx.onnx")
    assert [mode.verdict for mode in report.modes] == [
        *(Verdict.EQUAL, Verdict.EQUAL, Verdict.UNDECIDED, Verdict.UNDECIDED)
    ]
    assert report.verdict == Verdict.UNDECIDED
    assert "interrupted before it was done" in str(report)
    opened[:] = ["", ""]
    with pytest.raises(KeyboardInterrupt):  # nothing is done yet
        compare_nodes(program("folded"), models / "onnx.onnx")


def test_the_time_left_covers_all_of_the_work(models: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    with listening(lambda what, done, total: seen.append((what, done, total))):
        report = compare_nodes(program("folded"), models / "ort.onnx", levels=("all",))
    own = [(done, total) for what, done, total in seen if what == "compare"]
    assert len({total for _, total in own}) == 1
    dones = [done for done, _ in own]
    assert dones == sorted(dones)
    assert own[0][0] == 0
    assert own[-1][0] == own[-1][1] == len(report.inputs) * (3 + 1) + 1
