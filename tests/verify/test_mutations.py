"""Generated faults of a transformer are never proved equal; changes that keep the meaning are."""

from __future__ import annotations

import pytest

import qalora_compile as qc
from tests.models import COMPLETE, slow
from tests.verify.mutations import mutants, one_row_of_the_table, rewrites
from tests.verify.transformer import TARGETS, Exported, export_transformer, judged

THIRDS = slow(*((target, 1, 0) if COMPLETE else (target, 3, i) for i, target in enumerate(TARGETS)))
"""Each target's export with every third change; most that are left out of one are in another.

`make test-complete` and `make mutation-score` make all of them in each.
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The exports."""
    return export_transformer(tmp_path_factory.mktemp("transformer"))


@pytest.mark.parametrize("target", TARGETS)
def test_a_language_model_with_its_cache_is_proved(target: str, exported: Exported) -> None:
    certificate = qc.prove_equivalence(exported.program, exported.paths[target], samples=0)
    assert certificate.verdict == "PROVED UNDER", certificate
    assert certificate.proved and not certificate.sampled
    assert list(certificate.conditions) == [
        "axis 1 of attention_mask has past_sequence + sequence elements",
        "in each row of attention the mask allows at least one key (other rows have no value)",
    ]


@pytest.mark.parametrize(("target", "every", "first"), [("ort-stock", 27, 0), *THIRDS])
def test_no_generated_fault_is_proved_equal(
    target: str, every: int, first: int, exported: Exported
) -> None:
    found = judged(exported, target, mutants, every, first)
    assert len(found) >= 140 // every
    assert [name for name, proved in found.items() if proved] == []
    assert not exported.is_proved(target, one_row_of_the_table(exported.model(target)))


@pytest.mark.parametrize("planted", ["softcap", "from position 40", "softcap of Attention", "Neg"])
def test_what_samples_once_called_equal_is_not_proved(planted: str, exported: Exported) -> None:
    """A softcap far above the logits, and logits doubled where no sample is long enough."""
    made = next(made for name, made in mutants(exported.model("onnx")) if planted in name)
    assert not exported.is_proved("onnx", made)


@pytest.mark.parametrize(("target", "every", "first"), [("ort", 12, 0), *THIRDS])
def test_changes_that_keep_the_meaning_are_proved(
    target: str, every: int, first: int, exported: Exported
) -> None:
    found = judged(exported, target, rewrites, every, first)
    assert len(found) >= 24 // every
    assert [name for name, proved in found.items() if not proved] == []
