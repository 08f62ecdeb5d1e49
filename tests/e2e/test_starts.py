"""On SmolLM2: what starts, ranks and bits are worth that the weights and a few texts choose.

The first six layers of thirty are quantized, so that perplexity is that of a model that works.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from benchmarks import initialisation
from benchmarks.initialisation import Bench, Row
from qalora_compile.training import evaluate
from qalora_compile.training.evaluate import program_forward

EXAMPLES = str(Path(__file__).parents[2] / "examples")
FLOAT = [str(layer) for layer in range(6, 30)]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        small = ["--articles", "4", "--calibration", "4", "--length", "96", "--bits", "3"]
        small += ["--ranks", "4", "--uniform", "2", "--in-float", *FLOAT]
        yield initialisation.load(initialisation.parse(small))


@pytest.fixture(scope="module")
def before(bench: Bench) -> float:
    """The loss in float, in nats."""
    return evaluate(program_forward(bench.captured), bench.held_out, batch_size=8).loss


def lost(before: float, rows: Iterable[Row]) -> list[float]:
    """By how many nats the loss of each row is larger."""
    return [math.log(row.perplexity) - before for row in rows]


@pytest.mark.slow
def test_the_svd_start_is_much_nearer_to_the_model(bench: Bench, before: float) -> None:
    zeros, calibrated, blind = lost(before, initialisation.start(bench))
    assert calibrated < 0.75 * blind < 0.75 * zeros


@pytest.mark.slow
def test_ranks_spread_over_the_layers_are_better_at_equal_parameters(
    bench: Bench, before: float
) -> None:
    uniform, auto = rows = list(initialisation.ranks(bench))
    assert auto.parameters <= uniform.parameters
    one, spread = lost(before, rows)
    assert spread < 0.95 * one


@pytest.mark.slow
def test_bits_spread_over_the_layers_are_better_at_equal_bytes(bench: Bench, before: float) -> None:
    uniform, auto, both = rows = list(initialisation.bits(bench))
    assert auto.mean <= uniform.mean
    assert max(auto.megabytes, both.megabytes) <= uniform.megabytes
    one, bits, bits_and_groups = lost(before, rows)
    assert bits < 0.65 * one
    assert bits_and_groups < 0.6 * bits
