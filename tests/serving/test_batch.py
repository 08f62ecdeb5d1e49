"""Texts in one batch have the logits that they have alone; the engine keeps them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qalora_compile.api.text_model import open_text_model
from qalora_compile.errors import UserInputError
from qalora_compile.runtime.language_model import Context, LanguageModel, Sampling
from qalora_compile.serving.batch import Batch, joins_texts
from qalora_compile.serving.engine import CHUNK, Engine
from qalora_compile.serving.job import Job, Order, Piece
from qalora_compile.serving.text_model import TextModel

PROMPTS = [[2, 3, 4], [5], [6, 7, 8, 9, 10, 2, 3], [4, 4]]


@pytest.fixture(scope="module")
def model(plain_edge: Path) -> TextModel:
    return open_text_model(plain_edge, threads=1)


def test_rows_join_and_leave_without_touching_each_other(model: TextModel) -> None:
    assert joins_texts(model.model)
    batch, alone = Batch(model.model), [Context(model.model) for _ in PROMPTS]

    def check(rows: list[int], token: int) -> None:
        found = batch.read([token] * len(rows))
        for row, logits in zip(rows, found, strict=True):
            assert abs(logits - alone[row].read([token])).max() < 1e-4

    for row, prompt in enumerate(PROMPTS):
        context = Context(model.model)
        context.read(prompt)
        alone[row].read(prompt)
        batch.join(context)
        check(list(range(row + 1)), 3 + row)
    batch.leave(2)
    check([0, 1, 3], 8)
    batch.leave(0)
    check([1, 3], 9)
    assert batch.lengths == [len(alone[1].tokens), len(alone[3].tokens)]
    batch.leave(1)
    batch.leave(0)
    assert batch.lengths == []


class Unmasked(LanguageModel):
    """A model that takes no mask."""

    @property
    def masked(self) -> bool:
        return False


class Blind(LanguageModel):
    """A model that ignores the mask, so that padding has an effect."""

    def step(self, input_ids: Any, attention_mask: Any, cache: Any) -> Any:
        return LanguageModel.step(self, input_ids, np.ones_like(attention_mask), cache)


class Single(LanguageModel):
    """A model that takes one text."""

    def step(self, input_ids: Any, attention_mask: Any, cache: Any) -> Any:
        if len(input_ids) > 1:
            raise UserInputError("one text only")
        return LanguageModel.step(self, input_ids, attention_mask, cache)


@pytest.mark.parametrize("kind", [Unmasked, Blind, Single])
def test_models_that_cannot_join_texts_are_recognized(kind: type, model: TextModel) -> None:
    assert not joins_texts(kind(model.model.session))


def run(engine: Engine, model: TextModel, orders: list[Order]) -> list[list[Piece]]:
    found: list[list[Piece]] = [[] for _ in orders]
    for pieces, order in zip(found, orders, strict=True):
        engine.add(Job(model, order, pieces.append))
    while not engine.idle:
        engine.step()
    return found


@pytest.mark.parametrize("joins", [True, False])
def test_every_job_has_the_tokens_that_it_has_alone(joins: bool, model: TextModel) -> None:
    graph = model.model if joins else Unmasked(model.model.session)
    engine = Engine(graph, rows=3)
    assert engine.joins == joins
    orders = [
        Order(
            prompt=prompt,
            max_tokens=3 + 4 * index,
            ends=frozenset({1}),
            sampling=Sampling(temperature=heat, seed=index, repetition_penalty=penalty),
        )
        for index, prompt in enumerate(PROMPTS)
        for heat, penalty in ((0.0, 1.0), (2.0, 1.0), (0.0, 1.4))
    ]
    for order, pieces in zip(orders, run(engine, model, orders), strict=True):
        alone = list(
            model.model.generate(
                order.prompt, max_new_tokens=order.max_tokens, stop=[1], sampling=order.sampling
            )
        )
        assert sum(piece.tokens for piece in pieces) == len(alone)
        text = model.tokenizer.decode(alone, skip_special_tokens=True)
        assert "".join(piece.text for piece in pieces) == text
        assert pieces[-1].finish == ("length" if len(alone) == order.max_tokens else "stop")


def test_a_long_prompt_is_read_in_parts_between_the_others(
    model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qalora_compile.serving.engine.CHUNK", 4)
    assert CHUNK == 256
    engine, events = Engine(model.model, rows=2), list[str]()
    short = Order(prompt=[2], max_tokens=12, ends=frozenset())
    long = Order(prompt=[3, 4] * 10, max_tokens=1, ends=frozenset())
    engine.add(Job(model, short, lambda _: events.append("short")))
    engine.add(Job(model, long, lambda _: events.append("long")))
    while not engine.idle:
        engine.step()
    assert events.count("short") == 12
    assert 4 <= events.index("long") < 12


def test_a_cancelled_job_leaves_at_the_next_step(model: TextModel) -> None:
    engine = Engine(model.model, rows=2)
    pieces: list[Piece] = []
    jobs = [
        Job(model, Order(prompt=[2, 3], max_tokens=40, ends=frozenset()), pieces.append)
        for _ in range(4)
    ]
    for job in jobs:
        engine.add(job)
    for _ in range(3):
        engine.step()
    for job in (jobs[0], jobs[3]):
        job.cancelled = True
    engine.step()
    assert set(engine.jobs()) == {jobs[1], jobs[2]}
    jobs[1].cancelled = jobs[2].cancelled = True
    engine.step()
    assert engine.idle


def test_an_error_ends_the_jobs_of_its_step_and_no_others(model: TextModel) -> None:
    engine = Engine(model.model, rows=2)
    outside = Order(prompt=[10**6], max_tokens=2, ends=frozenset())
    good = Order(prompt=[2], max_tokens=2, ends=frozenset())
    found = run(engine, model, [outside, good])
    assert isinstance(found[0][-1].error, UserInputError)
    assert found[1][-1].finish == "length"
