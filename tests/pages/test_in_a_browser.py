"""The pages in headless Chromium: nothing is clipped from 400 to 1600 pixels, in light and dark."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qalora_compile.api.inspect_page import inspect_page
from qalora_compile.pages import Mark, Page, histogram, line_chart
from qalora_compile.training.records.report_page import LayerChange, Sample, write_report
from qalora_compile.training.sample_answers import Question
from tests.chromium import browser, python_with_clients

pytestmark = pytest.mark.slow

LOOK = Path(__file__).with_name("look.py")
PATHS = [
    f"model.decoder.layers.{i}.{kind}"
    for i in range(24)
    for kind in ("self_attn.q_proj", "self_attn.k_proj", "encoder_attn.out_proj", "fc1", "fc2")
]
WORD = "x" * 300


def run(pages: list[Path], shots: Path) -> dict[str, list[str]]:
    """What `look.py` finds, by page and setting."""
    words = [python_with_clients(), LOOK, browser(), shots, *pages]
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def report(path: Path) -> Path:
    """A training report with long names, long prompts, and numbers of every size."""
    log: list[dict[str, Any]] = [
        {
            "step": step,
            "loss": 3.0 / step,
            "learning_rate": 1e-3 / step,
            "grad_norm": 10.0**-step,
            "tokens_per_second": 123456.0,
            "held_out": 2.0 / step,
            "held_out_accuracy": 0.1 * step,
        }
        for step in range(1, 6)
    ]
    changes = [LayerChange(p, "4096×11008", 4, 16, 0.123, i / 9, 1e-9) for i, p in enumerate(PATHS)]
    write_report(
        path,
        log,
        [*changes, LayerChange("lm_head", "4096×128256", 8, 16, 1.0, math.inf, math.nan)],
        title=f"Training of {WORD}",
        settings={"model": WORD, "a setting with a long name": "value", "bits": 4},
        results={"held-out accuracy": "35.0% → 90.0%", "adapter parameters": 1234567890},
        samples=[Sample(Question("a prompt of many words " * 40, WORD), WORD, "right")] * 2,
    )
    return path


def inspected(path: Path) -> Path:
    """A page of `inspect` with many layers, some of them kept in float for a long reason."""
    rows = [
        {
            "path": name,
            "kind": "linear",
            "shape": "4096×11008",
            "K×N": "4096×11008",
            "bits": 4,
            "group": 32,
            "zero-point": "real (folded)",
            "rank": 16,
            "bytes": 23_456_789,
            "decision": "keep" if name.endswith("fc2") else "quantize",
            "reason": "a reason of several words, with a name: model.layers.mlp.down_proj.weight",
            "why": "",
        }
        for name in PATHS
    ]
    totals = {"stage": "folded", "size": "1,234.5 MB", "passes": f"a{WORD} → b"}
    return inspect_page(f"runs/{WORD}", rows, totals).write(path)


def everything(path: Path) -> Path:
    """Each kind of block."""
    page = Page(f"{WORD} → edge", "qalora-compile 0")
    page.verdict(Mark("DIFFERENT", good=False), f"first difference: {WORD}")
    page.section("One", "A paragraph.", WORD)
    page.facts({"name": WORD, WORD: "value", "short": 1.5})
    columns = ("execution mode", "verdict", "values", "largest ratio", "at", "on")
    row = ("optimization disabled", Mark("EQUAL", good=True), 943, 1e-7, PATHS[0], "right padding")
    page.table(columns, [row, (WORD, Mark("UNDECIDED", good=None), 1, 2.0, WORD, WORD)], "caption")
    page.section("Two")
    page.bars({name: float(i) for i, name in enumerate(PATHS[:5])}, "bars")
    page.layer_map({f"m.{i}.{'k' * 30}{j}": 1e-7 * i for i in range(3) for j in range(14)})
    page.chart(line_chart({"a": ([1, 2], [1e-9, 1e9])}, x="step", y="loss", log_y=True))
    page.chart(histogram([1e-9, 5.0, 1e7], x="shift of a zero-point, in codes"), "caption")
    page.side_by_side(("left " + WORD, "%x = " + WORD), ("right", "y"), fold=f"graphs {WORD}")
    return page.write(path)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What was found in all pages, in one browser."""
    python_with_clients(), browser()
    root = tmp_path_factory.mktemp("pages")
    pages = [
        report(root / "report.html"),
        inspected(root / "inspect.html"),
        everything(root / "all.html"),
    ]
    result = run(pages, root)
    for name in ("report-400-light", "inspect-1000-dark", "all-1600-light"):
        assert (root / f"{name}.png").stat().st_size > 10_000, "a screenshot is taken"
    return result


@pytest.mark.parametrize("page", ["report", "inspect", "all"])
def test_no_text_is_clipped_and_no_page_scrolls_to_the_side(
    page: str, found: dict[str, list[str]]
) -> None:
    settings = {name: wrong for name, wrong in found.items() if name.startswith(f"{page}-")}
    assert len(settings) == 6
    assert {name: wrong for name, wrong in settings.items() if wrong} == {}


def test_a_clipped_text_a_wide_page_and_an_invisible_text_are_found(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<body style="background:#fff"><p style="width:50px;overflow:hidden;white-space:nowrap">'
        'much more text than fits</p><div style="width:3000px">wide</div>'
        '<p style="color:#fff">white</p><p style="font-size:6px">tiny</p></body>',
        "utf-8",
    )
    wrong = " ".join(run([bad], tmp_path)["bad-400-light"])
    for part in ("scrolls to the side", "clipped: P much", "outside: DIV", "invisible", "6.0 px"):
        assert part in wrong, wrong
