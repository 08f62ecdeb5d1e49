"""The zoo: every architecture end to end, from capture to ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.models import COMPLETE, complete, slow
from tests.zoo.checks import run_checks
from tests.zoo.entries import ENTRIES

QUICK = ("cross-attention", "batched-experts", "odd-readings")
"""Those of the default suite: one of each kind of site."""

ALIKE = {
    "qwen2": "llama",  # with biases, which gpt2 has
    "qwen3": "qwen3-moe",
    "mixtral": "qwen3-moe",
    "roberta": "bert",
    "bart": "t5",  # and in tests/exporters/test_encoder_decoder
    "whisper": "t5",  # likewise
    "gru": "lstm",  # and in tests/verify/proof/test_kinds_of_models
}
"""Models that show what others show; `make test-complete` and `make supported` run them too."""
ONE_LAYER = ("phi3", "gpt2", "gpt-neox", "qwen3-moe", "mamba", "bert", "wav2vec2", "vit")
"""Models whose layers are all of one kind, and share nothing: the second has the first's nodes."""
SLOW = [name for name in ENTRIES if name not in (*QUICK, *ALIKE)]


@pytest.mark.parametrize("name", [*QUICK, *slow(*SLOW), *complete(*ALIKE)])
def test_zoo(name: str, tmp_path: Path) -> None:
    entry = ENTRIES[name]
    if name in ONE_LAYER and not COMPLETE:
        entry = replace(entry, build=partial(entry.build, layers=1))
    run_checks(entry, tmp_path)


def test_the_chosen_ones_are_of_the_zoo() -> None:
    assert {*QUICK, *ALIKE, *ALIKE.values(), *ONE_LAYER} < set(ENTRIES)
    assert not set(ALIKE) & set(ALIKE.values())
