"""The table of what quantization lost."""

from __future__ import annotations

import math

import pytest

from qalora_compile.cli.quantized import print_reports
from qalora_compile.quantizers.report import QuantReport


def report(path: str, decibels: float, group: int = 32) -> QuantReport:
    return QuantReport(
        path=path,
        method="hqq",
        bits=3,
        group_size=group,
        weights=64,
        weight_sqnr_db=decibels,
        output_sqnr_db=decibels,
        rows=9,
        seconds=0.1,
    )


def rows(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


def test_layers_in_other_groups_have_a_row_of_their_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_reports([report("a.0", 15.0, 32), report("a.1", 9.0, 128), report("a.2", 11.0, 128)])
    assert [row[:4] for row in rows(capsys)] == [
        ["a.0", "1", "32", "15.0"],
        ["a.{1..2}", "2", "128", "10.0"],
    ]


def test_settings_that_all_layers_share_are_in_the_title(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_reports([report("a.0", 15.0), report("b.0", 9.0)])
    printed = capsys.readouterr().out
    assert "higher is better (method hqq, bits 3, group 32)" in " ".join(printed.split())
    head = next(line for line in printed.splitlines() if line.startswith("┃"))
    heads = [cell.strip() for cell in head.split("┃")[1:-1]]
    assert heads == ["layers", "count", "weights dB", "outputs dB", "worst", "s"]


def test_one_exact_layer_does_not_make_the_others_exact(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_reports([report("a.0", 15.0), report("a.1", math.inf), report("a.2", 9.0)])
    print_reports([report("a.0", math.inf), report("a.1", math.inf)])
    mixed, exact = rows(capsys)
    assert mixed[2:5] == ["12.0, 1 exact", "12.0, 1 exact", "9.0"]
    assert exact[2:5] == ["exact", "exact", "exact"]
