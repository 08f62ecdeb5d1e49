"""Embeddings go on codes by themselves only where that loses next to nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qalora_compile as qc
from qalora_compile.api.choose_embeddings import (
    LOSS_LIMIT,
    EmbeddingChoice,
    choose_embeddings,
)
from qalora_compile.errors import UserInputError
from qalora_compile.passes.framework.pipeline import Pipeline
from tests.models import MLP, TiedHead

ROWS, WIDTH = 200, 64


def program(table: Tensor | None = None) -> qc.Program:
    torch.manual_seed(0)
    model = TiedHead(ROWS, WIDTH)
    if table is not None:
        with torch.no_grad():
            model.embed.weight.copy_(table)
    ids = torch.randint(0, ROWS, (2, 5))
    return qc.quantize_groups(qc.capture_model(model.eval(), (ids,)))


def grid(bits: int, group: int) -> Tensor:
    """A table on signed codes, as GGUF's Q8_0 (8, 32), Q6_K (6, 16) and Q4_0 (4, 32) hold it."""
    generator = torch.Generator().manual_seed(bits)
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(-top, top + 1, (ROWS, WIDTH // group, group), generator=generator)
    codes[..., 0] = top
    scale = torch.rand(ROWS, WIDTH // group, 1, generator=generator).half().float() + 2**-10
    return (codes * scale).reshape(ROWS, WIDTH)


def applied(choice: EmbeddingChoice, start: qc.Program) -> qc.Program:
    assert choice.step is not None
    return Pipeline([choice.step])(start).program


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (6, 16), (4, 32), (5, 32)])
def test_a_table_of_at_most_8_bits_is_kept_exactly(bits: int, group: int) -> None:
    start = program(grid(bits, group))
    choice = choose_embeddings(start, "auto")
    assert choice.loss == 0
    assert "as exact as the table" in choice.reason
    assert choice.step is not None
    assert choice.step.group_size == group
    ids = torch.randint(0, ROWS, (3, 7))
    torch.testing.assert_close(applied(choice, start)(ids), start(ids), rtol=1e-5, atol=1e-4)


def test_a_table_of_floats_stays_and_the_loss_is_said() -> None:
    choice = choose_embeddings(program(), "auto")
    assert choice.step is None
    assert choice.loss is not None
    assert choice.loss > LOSS_LIMIT
    assert "more than" in choice.reason


def test_what_is_asked_for_is_measured_and_done() -> None:
    start = program()
    eight, four = (choose_embeddings(start, bits) for bits in (8, 4))
    assert eight.loss is not None
    assert four.loss is not None
    assert 0 < 10 * eight.loss < four.loss
    assert {site.bits for site in applied(four, start).plan if site.frozen_integer_zero} == {4}
    assert choose_embeddings(start, "float") == EmbeddingChoice(None, None, "float")


def test_codes_that_are_there_stay() -> None:
    start = applied(choose_embeddings(program(), 4), program())
    assert choose_embeddings(start, 8).step is None
    assert "as in the program" in choose_embeddings(start, "auto").reason


def test_without_a_table_there_is_an_error_only_if_one_is_required() -> None:
    plain = qc.quantize_groups(qc.capture_model(MLP(64, 48, 40).eval(), (torch.randn(2, 64),)))
    with pytest.raises(UserInputError, match="no embedding and no head"):
        choose_embeddings(plain, 8)
    assert choose_embeddings(plain, 8, required=False).step is None
    assert choose_embeddings(plain, "auto").reason.startswith("float: ")
