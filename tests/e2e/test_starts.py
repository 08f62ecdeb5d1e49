"""On SmolLM2: what starts, ranks and bits are worth that the weights and a few texts choose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import initialisation
from benchmarks.initialisation import Bench

EXAMPLES = str(Path(__file__).parents[2] / "examples")


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        small = ["--articles", "4", "--calibration", "4", "--length", "96", "--bits", "3"]
        yield initialisation.load(initialisation.parse([*small, "--ranks", "4", "--uniform", "2"]))


@pytest.mark.slow
def test_the_svd_start_is_much_nearer_to_the_model(bench: Bench) -> None:
    zeros, calibrated, blind = (row.perplexity for row in initialisation.start(bench))
    assert calibrated < 0.6 * zeros
    assert calibrated < 0.6 * blind < 0.6 * zeros


@pytest.mark.slow
def test_ranks_spread_over_the_layers_are_better_at_equal_parameters(bench: Bench) -> None:
    uniform, auto = initialisation.ranks(bench)
    assert auto.parameters <= uniform.parameters
    assert auto.perplexity < 0.97 * uniform.perplexity


@pytest.mark.slow
def test_bits_spread_over_the_layers_are_better_at_equal_bytes(bench: Bench) -> None:
    uniform, auto, both = initialisation.bits(bench)
    assert auto.mean <= uniform.mean
    assert max(auto.megabytes, both.megabytes) <= uniform.megabytes
    assert auto.perplexity < 0.75 * uniform.perplexity
    assert both.perplexity < 0.9 * auto.perplexity
