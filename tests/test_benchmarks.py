"""The benchmarks' verdicts: targets that can be missed, and are seen to be."""

from __future__ import annotations

import gc
import importlib
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import export_time, llama_cpp, ort_layers, quantizers
from benchmarks.export_time import PASSES
from benchmarks.export_time import TOTAL as WHOLE
from benchmarks.machine import available_memory
from benchmarks.passes import EXPORT, NUMBERS, TOTAL, Result, main
from benchmarks.scatter import Point, scatter_svg

Seconds = dict[int, dict[str, float]]


def seconds(**passes: float) -> Seconds:
    """Depth → what → seconds; torch.export takes a second a layer."""
    rows = {int(name.removeprefix("at_")): value for name, value in passes.items()}
    return {n: {EXPORT: float(n), TOTAL: value} for n, value in rows.items()}


@pytest.mark.parametrize(
    ("measured", "missed"),
    [
        (seconds(at_12=0.6, at_24=1.3), []),
        (seconds(at_12=0.6, at_24=1.4), ["2.33×"]),
        (seconds(at_12=1.3, at_24=2.3), ["at 12 layers"]),
        (seconds(at_12=0.5, at_24=2.5), ["5.00×", "at 24 layers"]),
        (seconds(at_12=0.6, at_36=1.0), []),
    ],
)
def test_missed_targets_are_named(measured: Seconds, missed: list[str]) -> None:
    found = Result(measured).misses
    assert len(found) == len(missed)
    assert all(part in text for part, text in zip(missed, found, strict=True))


@pytest.mark.parametrize(
    "name",
    ["passes", "ort_layers", "ort_model", "export_time", "proof", "quantizers", "llama_cpp"],
)
def test_help_has_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit, match="0"):
        benchmark.main(["--help"])
    examples = capsys.readouterr().out.split("examples:")[1]
    assert f"python -m benchmarks.{name} --" in examples


def test_tokens_in_common_end_at_the_first_that_differs(tmp_path: Path) -> None:
    assert llama_cpp.common([1, 2, 3], [1, 2, 3]) == 3
    wanted = np.array([[0.0, 1.0], [0.5, 2.0]])
    np.save(tmp_path / "logits-0.npy", wanted + np.array([[0, 0], [0.25, 0]]))
    found = {"tokens": [[1, 0]], "choices": [[1, 1]]}
    assert llama_cpp.compared(found, 0, wanted, [1, 1], tmp_path) == (1, 2, 1.5, 0.25)


def test_a_layer_is_timed_beside_stock() -> None:
    row = ort_layers.Row(
        m=1,
        k=64,
        n=32,
        group_size=32,
        variants=(ort_layers.Variant(stock=True), ort_layers.Variant()),
    )
    stock, ours = ort_layers.time_row(row, rounds=3, cache_bytes=4096)
    assert stock.ratio == 1.0
    assert ours.ratio > 0
    assert ours.reach == 0.85


def test_memory_limits_a_chain() -> None:
    row = next(iter(ort_layers.rows([1], ["avx2"])))
    huge, plenty = 480 << 20, 1 << 50
    assert ort_layers.chain_length(row, huge, plenty) * row.k * row.n // 4 >= 2 * huge
    memory = 8 << 30
    layers = ort_layers.chain_length(row, huge, memory)
    assert layers >= 2 and layers * ort_layers.layer_bytes(row) <= memory
    assert ort_layers.chain_length(row, huge, 1) == 2
    assert available_memory() > 0


def test_weights_in_the_cache_are_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    variants = (ort_layers.Variant(stock=True), ort_layers.Variant())
    row = ort_layers.Row(m=1, k=64, n=32, group_size=32, variants=variants)
    ort_layers.print_results(
        ort_layers.time_row(row, rounds=1, cache_bytes=1 << 29, memory_bytes=0)
    )
    assert "all weights fit into the last-level cache" in capsys.readouterr().out
    ort_layers.print_results(ort_layers.time_row(row, rounds=1, cache_bytes=64))
    assert "fit into" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "missed"),
    [
        ({15: (1.0, 20.0), 30: (3.0, 40.0)}, []),
        ({15: (1.0, 20.0), 30: (3.0, 48.0)}, ["2.40×"]),
        ({30: (1.0, 61.0)}, ["61 s"]),
        ({12: (5.0, 50.0), 15: (1.0, 61.0)}, ["12 layers passes take 10.0%"]),
    ],
)
def test_missed_targets_of_an_export_are_named(
    rows: dict[int, tuple[float, float]], missed: list[str]
) -> None:
    found = export_time.Result({n: {PASSES: a, WHOLE: b} for n, (a, b) in rows.items()}).misses
    assert len(found) == len(missed)
    assert all(part in text for part, text in zip(missed, found, strict=True))


def test_bad_depths_are_refused() -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--layers", "0"])


@pytest.mark.slow
def test_it_measures_every_pass(capsys: pytest.CaptureFixture[str]) -> None:
    gc.collect()
    gc.freeze()  # before each pass the benchmark collects all that other tests have left
    main(["--layers", "1", "--rounds", "1", "--json"])
    (row,) = json.loads(capsys.readouterr().out)["seconds"].values()
    assert {"annotate-linears", "quantize-groups", "legalize-ort-stock", NUMBERS} <= row.keys()
    assert all(value > 0 for value in row.values())


def test_a_plot_places_what_loses_less_lower() -> None:
    points = [Point(10, 0.1, "a & b", "3 bits"), Point(20, 0.01, "c", "4 bits")]
    text = scatter_svg(points, title="t", x="MB", y="loss", line=0.05)
    root = ElementTree.fromstring(text)
    marks = [e for e in root.iter() if e.tag.endswith("circle") and len(e)]
    assert [e[0].text for e in marks] == ["a & b, 3 bits: 0.1", "c, 4 bits: 0.01"]
    (first, second) = [(float(e.attrib["cx"]), float(e.attrib["cy"])) for e in marks]
    assert first[0] < second[0] and first[1] < second[1], "down is less, in SVG a larger y"
    (dashed,) = [e for e in root.iter() if "stroke-dasharray" in e.attrib]
    assert first[1] < float(dashed.attrib["y1"]) < second[1]


def test_bad_groups_are_refused() -> None:
    with pytest.raises(SystemExit, match="2"):
        quantizers.main(["--groups", "0"])
