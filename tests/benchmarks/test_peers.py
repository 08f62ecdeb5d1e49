"""The comparison with other runtimes: requests, alternation, table and plot; nothing is timed."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray

import qalora_compile as qc
from benchmarks.peers import __main__ as peers
from benchmarks.peers.artefacts import artefact, model_file, stored_bytes
from benchmarks.peers.child import Server
from benchmarks.peers.environments import UnavailableError
from benchmarks.peers.report import Report, put_into
from benchmarks.peers.runner import Child, Figures, PeerError, Plan, children, measure
from benchmarks.peers.variants import EDGES, FLOAT, VARIANTS
from benchmarks.ratios import ratios, spread
from tests.models import llama


class Counting:
    """An engine over four tokens that prefers the one after the last it read."""

    version = "counting 1"

    def __init__(self, path: str, *, threads: int, context: int, step: int = 1) -> None:
        assert path and threads and context
        self.step, self.read = step, list[int]()

    def reset(self) -> None:
        self.read = []

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.read += tokens
        logits = np.zeros(4, np.float32)
        logits[(self.read[-1] + self.step) % 4] = np.log(5)
        return logits


LOAD = {"do": "load", "path": "x", "threads": 1, "context": 8, "options": {}}


@pytest.mark.slow
def test_a_child_answers_requests() -> None:
    server = Server(Counting)
    assert server.answer(LOAD)["version"] == "counting 1"
    timed = server.answer({"do": "run", "prompt": [0, 1], "following": [2, 3, 0]})
    assert timed["prompt"] > 0 and len(timed["steps"]) == 3
    found = server.answer({"do": "greedy", "prompt": [0, 1], "count": 4})
    assert found == {"tokens": [2, 3, 0, 1]}
    right = server.answer({"do": "score", "tokens": [0, 1, 2]})["loss"]
    assert right == pytest.approx(np.log(8 / 5))
    assert server.answer({"do": "score", "tokens": [0, 0]})["loss"] == pytest.approx(np.log(8))
    assert server.answer({"do": "peak"})["bytes"] >= 0


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"do": "run", "prompt": [0], "following": []}, "nothing is loaded"),
        ({"do": "dance"}, "dance"),
        (LOAD | {"options": {"colour": 1}}, "colour"),
    ],
)
def test_an_error_is_an_answer(request_: dict[str, Any], said: str) -> None:
    assert said in Server(Counting).answer(request_)["error"]


class Recording:
    """A peer that notes who is asked what, in one list for all."""

    def __init__(self, name: str, asked: list[tuple[str, str]], fails: str = "") -> None:
        self.name, self.asked, self.fails = name, asked, fails
        self.server = Server(Counting)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        what = f"{request['do']} {len(request.get('prompt', ()))}"
        self.asked.append((self.name, what))
        if self.fails and request["do"] == self.fails:
            raise PeerError("out of memory")
        return self.server.answer(dict(request))


PLAN = Plan(
    tokens=[0, 1, 2, 3] * 4, prompts=(2, 6), decode=(6, 8), steps=3, rounds=2, loads=2,
    greedy=4, greedy_prompt=4, scored=5,
)  # fmt: skip


@pytest.mark.slow
def test_peers_are_asked_in_turn() -> None:
    asked: list[tuple[str, str]] = []
    names = ("a", "b", "c")
    loads = {name: {n: v for n, v in LOAD.items() if n != "do"} for name in names}
    found = measure({name: Recording(name, asked) for name in names}, loads, PLAN)
    assert [name for name, _ in asked] == list(names) * (len(asked) // 3)
    assert [what for name, what in asked if name == "a"] == [
        "load 0", "run 2",
        "run 2", "run 6", "run 8", "run 2", "run 6", "run 8",
        "peak 0", "greedy 4", "score 0", "load 0",
    ]  # fmt: skip
    one = found["a"]
    assert [len(times) for times in (one.loads, one.prompts[6], one.steps[8])] == [2, 2, 2]
    assert one.prompts.keys() == {2, 6} and one.steps.keys() == {6, 8}
    assert one.greedy == [0, 1, 2, 3] and one.loss == pytest.approx(np.log(8 / 5))


def test_all_read_the_same_tokens() -> None:
    assert PLAN.request(2) == {"do": "run", "prompt": [0, 1], "following": []}
    assert PLAN.request(6)["following"] == [2, 3, 0]
    assert PLAN.context >= 8 + 3


@pytest.mark.slow
def test_a_peer_that_fails_is_left_out() -> None:
    asked: list[tuple[str, str]] = []
    made = {"a": Recording("a", asked, fails="run"), "b": Recording("b", asked)}
    loads = {name: {n: v for n, v in LOAD.items() if n != "do"} for name in made}
    found = measure(made, loads, PLAN)
    assert found["a"].failed == "out of memory" and not found["b"].failed
    assert [what for name, what in asked if name == "a"] == ["load 0", "run 2"]


def test_a_model_that_does_not_fit_is_not_loaded() -> None:
    asked: list[tuple[str, str]] = []
    load = {name: value for name, value in LOAD.items() if name != "do"}
    found = measure({"a": Recording("a", asked)}, {"a": load}, PLAN, needs={"x": 1 << 60})
    assert "GB are available" in found["a"].failed and asked == []


def figures(per_token: float, *, loss: float = 3.0) -> Figures:
    """Two rounds, the second twice as slow."""
    rounds = [per_token, 2 * per_token]
    return Figures(
        version="v",
        loads=[0.5],
        prompts={10: [10 * t for t in rounds]},
        steps={10: rounds},
        memory=10**8,
        loss=loss,
        greedy=[1, 2],
    )


OURS, BEST, SLOWER = "fast, library", "llama.cpp Q4_0", "llama.cpp Q4_1"


def report(**changed: Figures) -> Report:
    table = {OURS: figures(0.01), BEST: figures(0.02), SLOWER: figures(0.04), FLOAT: figures(0.08)}
    table |= {OURS: changed["ours"]} if changed else {}
    shown = [variant for variant in VARIANTS if variant.name in table]
    sizes = dict.fromkeys(table, 2 * 10**6)
    return Report(
        machine={"cpu": "x"}, variants=shown, sizes=sizes, tables={1: table},
        skipped={"GenAI": "not installed"},
    )  # fmt: skip


def test_ratios_are_to_the_fastest_of_the_reference() -> None:
    lines = report().markdown().splitlines()
    (ours,) = [line for line in lines if line.startswith(f"| {OURS}")]
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert cells[2:4] == ["75, 2.00 (2.00-2.00)"] * 2
    assert cells[4:] == ["0.50", "100", "2", "20.09", "2 of 2"]
    assert "* GenAI: skipped, not installed" in lines
    assert any(OURS in line and "2.00" in line for line in report().reach())
    assert json.loads(json.dumps(report().to_json()))["rows"][0]["threads"] == 1


def test_another_model_is_noticed() -> None:
    assert report().implausible() == []
    other = report(ours=figures(0.01, loss=5.0))
    assert other.implausible() == [OURS]
    assert f"{OURS}: its mean loss is 2.00 nats" in "\n".join(other.notes())


def test_a_missing_reference_is_noted() -> None:
    alone = report()
    without = {name: found for name, found in alone.tables[1].items() if name != FLOAT}
    notes = dataclasses.replace(alone, tables={1: without}).notes()
    assert any("no loss or token was compared" in note for note in notes)


def test_a_failure_is_noted_and_has_no_row() -> None:
    failed = report(ours=Figures(failed="out of memory")).markdown()
    assert f"| {OURS}" not in failed and f"{OURS}, threads 1: failed, out of memory" in failed


def test_the_plot_has_a_bar_for_each() -> None:
    root = ElementTree.fromstring(report().svg("t"))
    bars = [e for e in root.iter() if e.tag.endswith("rect") and e.attrib.get("height") == "9"]
    assert len(bars) == 2 * 4
    widths = [float(e.attrib["width"]) for e in bars[:4]]
    assert widths == pytest.approx([300, 150, 75, 37.5])


def test_the_page_keeps_what_is_around_the_marks() -> None:
    page = "a\n<!-- written by benchmarks.peers: m -->\nold\n<!-- end of m -->\nb"
    assert put_into(page, "m", "new").split("\n\n") == [
        "a\n<!-- written by benchmarks.peers: m -->", "new", "<!-- end of m -->\nb",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no marks"):
        put_into(page, "other", "new")


def test_quartiles_and_ratios() -> None:
    assert str(spread([4.0, 1.0, 2.0, 3.0, 5.0])) == "3.00 (2.00-4.00)"
    assert ratios([1.0, 4.0], [2.0, 2.0]).median == 1.25


def test_what_cannot_be_had_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Path:
        raise UnavailableError("no npm")

    monkeypatch.setattr("benchmarks.peers.environments.llama_folder", refuse)
    ready, skipped = peers.prepare(peers.chosen(["llama"]), str(tmp_path), tmp_path)
    assert ready == {}
    assert set(skipped.values()) == {"no npm"} and len(skipped) == 3


@pytest.mark.slow
def test_our_edge_runs_in_a_child(tmp_path: Path) -> None:
    source = tmp_path / "tiny"
    model: Any = llama(hidden_size=64, intermediate_size=64)
    model.save_pretrained(source)
    place = artefact("fast", source, tmp_path / "made", tmp_path)
    assert artefact("fast", source, tmp_path / "made", tmp_path) == place
    path = model_file("fast", place)
    assert stored_bytes(place) == path.stat().st_size
    engines = {"a": (Path(sys.executable), "ort")}
    load = {"path": str(path), "threads": 1, "context": PLAN.context, "options": {}}
    with children(engines, threads=1) as made:
        found = measure(made, {"a": load}, PLAN)["a"]
    assert not found.failed and found.version.startswith("ONNX Runtime")
    assert len(found.greedy) == PLAN.greedy and found.loss > 0 and found.memory > 0


def test_a_process_that_ends_is_an_error() -> None:
    with (
        Child(Path(sys.executable), "no_such_engine", threads=1) as child,
        pytest.raises(PeerError, match="ended"),
    ):
        child.ask({"do": "peak"})


def test_edges_are_valid_specifications() -> None:
    for edge in EDGES.values():
        assert qc.ExportSpec(**edge.export).is_onnx
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
