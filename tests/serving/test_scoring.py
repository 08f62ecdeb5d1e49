"""Scores of texts, and texts up to a string, as evaluation harnesses ask for them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qalora_compile.api.lm_eval import Harness, register
from qalora_compile.api.text_model import open_text_model
from qalora_compile.runtime.language_model import Sampling
from qalora_compile.serving.scoring import Scorer
from qalora_compile.serving.text_model import TextModel


@pytest.fixture(scope="module")
def model(plain_edge: Path) -> TextModel:
    return open_text_model(plain_edge, threads=1)


def expected(model: TextModel, before: list[int], tokens: list[int]) -> tuple[float, bool]:
    logits = model.model.logits(np.array([[*before, *tokens]], np.int64))[0].astype(np.float64)
    rows = logits[len(before) - 1 : -1]
    logs = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    total = sum(float(row[token]) for row, token in zip(logs, tokens, strict=True))
    return total, rows.argmax(-1).tolist() == tokens


def test_scores_are_those_of_the_logits(model: TextModel) -> None:
    scorer = Scorer(model, longest=64)
    for before, tokens in (([2, 8], [9, 10]), ([2, 8], [3]), ([2], [8, 9, 10]), ([5, 6], [2])):
        total, greedy = scorer.score(before, tokens)
        wanted = expected(model, before, tokens)
        assert total == pytest.approx(wanted[0], abs=1e-3) and greedy == wanted[1]
    likely = list(model.model.generate([2, 8], max_new_tokens=3))
    assert scorer.score([2, 8], likely)[1]


def test_long_texts_lose_their_beginning(model: TextModel) -> None:
    scorer = Scorer(model, longest=5)
    found = scorer.score([3] * 20 + [4, 5, 6], [7, 8])
    assert found[0] == pytest.approx(expected(model, [3, 4, 5, 6][-4:], [7, 8])[0], abs=1e-3)
    assert math.isfinite(scorer.score([2], [3] * 9)[0])


def test_a_text_ends_before_a_string(model: TextModel) -> None:
    scorer = Scorer(model, longest=64)
    free = scorer.generate([2, 8], [], most=8, sampling=Sampling())
    word = free.split()[1]
    assert scorer.generate([2, 8], [word, ""], most=8, sampling=Sampling()) == free.split(word)[0]


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


class Recorded(Harness):
    """The harness's part of the model, without the harness."""

    def __init__(self, folder: Path) -> None:
        self.seen: list[tuple[str, Any, Any]] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *result: self.seen.append(result))
        super().__init__(str(folder), threads=1, batch_size=4)


def test_the_adapter_answers_the_harness(plain_edge: Path, model: TextModel) -> None:
    adapter = Recorded(plain_edge)
    assert (adapter.eot_token_id, adapter.prefix_token_id, adapter.max_length) == (1, 1, 64)
    assert adapter.tok_encode("red is") == [2, 8]
    scored = adapter._loglikelihood_tokens([(("red is", " a"), [2, 8], [9]), (("", ""), [1], [])])
    assert scored[0][0] == pytest.approx(expected(model, [2, 8], [9])[0], abs=1e-3)
    assert scored[1] == (0.0, True)
    until = {"until": "never", "max_gen_toks": 4, "do_sample": False, "temperature": 1.0}
    text = adapter.generate_until([request("red is", until)])
    tokens = list(model.model.generate([2, 8], max_new_tokens=4, stop=[1]))
    assert text == [model.tokenizer.decode(tokens, skip_special_tokens=True)]
    hot = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 5.0}
    assert adapter.generate_until([request("red is", hot)]) != text
    assert [kind for kind, _, _ in adapter.seen] == [
        *["loglikelihood"] * 2,
        *["generate_until"] * 2,
    ]
    assert adapter.chat_template(True) is None


def test_the_harness_runs_the_model(plain_edge: Path, model: TextModel) -> None:
    harness = pytest.importorskip("lm_eval", reason="lm-evaluation-harness")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    register()
    made = get_model("qalora").create_from_arg_obj(
        {"folder": str(plain_edge), "threads": 1}, {"batch_size": 1, "device": "cpu"}
    )
    assert isinstance(made, harness.api.model.LM)
    pairs = [("red is", " a"), ("", "two is"), ("red is a ", "colour")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    found = made.loglikelihood(requests)
    wanted = [([2, 8], [9]), ([1], [6, 8]), ([2, 8, 9], [10])]
    for (total, greedy), (before, tokens) in zip(found, wanted, strict=True):
        exact = expected(model, before, tokens)
        assert (total, greedy) == (pytest.approx(exact[0], abs=1e-3), exact[1])
    text = " ".join(["red", "two", "is"] * 30)
    (rolling,) = made.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    tokens = model.encode(text)
    first = expected(model, [1], tokens[:64])[0] if len(tokens) > 64 else 0.0
    assert rolling < first < 0
    (said,) = made.generate_until(
        [Instance("generate_until", {}, ("red is", {"until": ["\n"], "max_gen_toks": 3}), 0)]
    )
    assert isinstance(said, str)


def test_a_task_of_the_harness_is_evaluated(plain_edge: Path, tmp_path: Path) -> None:
    """A task of our own, from a file, so that nothing is downloaded."""
    harness = pytest.importorskip("lm_eval", reason="lm-evaluation-harness")
    from lm_eval.tasks import TaskManager

    register()
    (tmp_path / "rows.jsonl").write_text(
        '{"q": "red is a", "choices": ["colour", "number"], "label": 0}\n'
        '{"q": "two is a", "choices": ["colour", "number"], "label": 1}\n',
        "utf-8",
    )
    (tmp_path / "kinds.yaml").write_text(
        "task: kinds\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: label\n"
        "metric_list:\n  - metric: acc\n",
        "utf-8",
    )
    found = harness.simple_evaluate(
        model="qalora",
        model_args={"folder": str(plain_edge), "threads": 1},
        tasks=["kinds"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found["results"]["kinds"]["acc,none"] in (0.0, 0.5, 1.0)
    assert found["n-samples"]["kinds"]["effective"] == 2
