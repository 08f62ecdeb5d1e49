"""The words for what a check finds."""

from __future__ import annotations

import json

import pytest

from qalora_compile.cli.exit_codes import exit_code
from qalora_compile.verdict import PROVEN, Verdict

PROVED, PROVED_UNDER, EQUAL, SAMPLED, UNDECIDED, DIFFERENT = Verdict


def test_a_verdict_is_its_word_in_texts_and_files() -> None:
    assert f"{EQUAL}, {UNDECIDED:10}| {DIFFERENT!s}" == "EQUAL, UNDECIDED | DIFFERENT"
    assert json.loads(json.dumps({"verdict": EQUAL})) == {"verdict": "EQUAL"}
    assert Verdict("DIFFERENT") is DIFFERENT
    assert Verdict("PROVED UNDER") is PROVED_UNDER
    with pytest.raises(ValueError, match="'PASS'"):
        Verdict("PASS")


@pytest.mark.parametrize(
    ("verdicts", "worst"),
    [
        ([EQUAL, EQUAL], EQUAL),
        ([UNDECIDED, EQUAL], UNDECIDED),
        ([EQUAL, DIFFERENT, UNDECIDED], DIFFERENT),
        ([PROVED, PROVED_UNDER], PROVED_UNDER),
        ([PROVED, SAMPLED, PROVED_UNDER], SAMPLED),
        ([SAMPLED, UNDECIDED], UNDECIDED),
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


def test_what_was_only_sampled_is_no_success_unless_that_is_allowed() -> None:
    codes = {verdict: exit_code(verdict) for verdict in Verdict}
    assert codes == {
        PROVED: 0, PROVED_UNDER: 0, EQUAL: 0, SAMPLED: 3, UNDECIDED: 2, DIFFERENT: 1
    }  # fmt: skip
    changed = {v for v in Verdict if exit_code(v, allow_sampled=True) != codes[v]}
    assert changed == {SAMPLED} and exit_code(SAMPLED, allow_sampled=True) == 0
    assert PROVEN == (PROVED, PROVED_UNDER)
