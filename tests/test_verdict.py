"""The words for what a check finds."""

from __future__ import annotations

import json

import pytest

from qalora_compile.verdict import Verdict

EQUAL, UNDECIDED, DIFFERENT = Verdict


def test_a_verdict_is_its_word_in_texts_and_files() -> None:
    assert f"{EQUAL}, {UNDECIDED:10}| {DIFFERENT!s}" == "EQUAL, UNDECIDED | DIFFERENT"
    assert json.loads(json.dumps({"verdict": EQUAL})) == {"verdict": "EQUAL"}
    assert Verdict("DIFFERENT") is DIFFERENT
    with pytest.raises(ValueError, match="'PASS'"):
        Verdict("PASS")


@pytest.mark.parametrize(
    ("verdicts", "worst"),
    [
        ([EQUAL, EQUAL], EQUAL),
        ([UNDECIDED, EQUAL], UNDECIDED),
        ([EQUAL, DIFFERENT, UNDECIDED], DIFFERENT),
        ([], DIFFERENT),
    ],
)
def test_the_worst_of_some_verdicts_counts(verdicts: list[Verdict], worst: Verdict) -> None:
    assert Verdict.worst(verdicts) == worst


def test_verdicts_are_ordered() -> None:
    assert DIFFERENT.is_worse_than(UNDECIDED)
    assert UNDECIDED.is_worse_than(EQUAL)
    assert not EQUAL.is_worse_than(EQUAL)
    assert (Verdict.of(True), Verdict.of(False)) == (EQUAL, DIFFERENT)
