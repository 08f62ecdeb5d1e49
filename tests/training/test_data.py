"""Examples from JSON lines, truncation, padding, batches, and bad lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qalora_compile.errors import UserInputError
from qalora_compile.training.data import IGNORED, Example, batch_at, collate, load_examples


class Words:
    """A tokenizer whose tokens are the lengths of words; end of text is 99."""

    eos_token_id: int | None = 99
    chat_template: str | None = "there is one"

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        tokens = [len(word) for word in text.split()]
        return type("Encoding", (), {"input_ids": tokens})()

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        turns = [f"{m['role'][0] * 7} {m['content']}" for m in messages]
        return " ".join([*turns, *(["aaaaaaa"] if add_generation_prompt else [])])


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), "utf-8")
    return path


def only(path: Path, row: Any, max_length: int = 50) -> Example:
    (example,) = load_examples(write(path, row), Words(), max_length=max_length).examples
    return example


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


def test_a_prompt_carries_no_loss(path: Path) -> None:
    example = only(path, {"prompt": "a bb ccc", "completion": "dddd"})
    assert example.tokens == (1, 2, 3, 4, 99)
    assert example.labels == (IGNORED, IGNORED, IGNORED, 4, 99)


def test_text_carries_loss_throughout(path: Path) -> None:
    assert only(path, {"text": "a bb"}).labels == (1, 2, 99)


def test_only_the_assistant_is_learned(path: Path) -> None:
    messages = [
        {"role": "user", "content": "a bb"},
        {"role": "assistant", "content": "ccc"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "dddd"},
    ]
    example = only(path, {"messages": messages})
    assert example.tokens == (7, 1, 2, 7, 3, 7, 1, 7, 4)
    learned = [t for t, label in zip(example.tokens, example.labels, strict=True) if label >= 0]
    assert learned == [3, 4]


def test_token_ids_need_no_tokenizer(path: Path) -> None:
    data = load_examples(write(path, {"input_ids": [1, 2, 3]}), None, max_length=8)
    assert data.examples == (Example((1, 2, 3), (1, 2, 3)),)


def test_truncation_keeps_the_completion_and_is_counted(path: Path) -> None:
    write(path, {"prompt": "a bb ccc", "completion": "dddd"}, {"text": "a bb ccc dddd"})
    data = load_examples(path, Words(), max_length=3)
    assert data.truncated == 2
    assert data.examples[0].tokens == (3, 4, 99)
    assert data.examples[1].tokens == (1, 2, 3)


def test_an_example_with_nothing_to_learn_is_counted(path: Path) -> None:
    write(path, {"prompt": "a", "completion": " "}, {"text": "a bb"})
    data = load_examples(path, Words(), max_length=8)
    assert (len(data.examples), data.skipped) == (1, 1)


BAD_LINES = {
    "not JSON": "{",
    "a list": "[1]",
    "no known field": '{"question": "?"}',
    "completion is a number": '{"prompt": "a", "completion": 3}',
    "prompt is missing": '{"completion": "a"}',
    "ids are text": '{"input_ids": ["a"]}',
    "labels of another length": '{"input_ids": [1, 2], "labels": [1]}',
    "messages is text": '{"messages": "hi"}',
    "no assistant": '{"messages": [{"role": "user", "content": "hi"}]}',
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_reported_with_its_number(path: Path, kind: str) -> None:
    write(path, {"text": "a bb"}, "", BAD_LINES[kind])
    with pytest.raises(UserInputError) as caught:
        load_examples(path, Words(), max_length=8)
    assert str(caught.value.where).endswith("data.jsonl:3")


@pytest.mark.parametrize("content", ["", "\n\n", '{"prompt": "a", "completion": ""}'])
def test_a_file_without_a_usable_example_is_refused(path: Path, content: str) -> None:
    path.write_text(content, "utf-8")
    with pytest.raises(UserInputError, match="no usable example"):
        load_examples(path, Words(), max_length=8)


def test_a_missing_file_and_bytes_that_are_no_text_are_refused(path: Path) -> None:
    with pytest.raises(UserInputError, match="cannot read"):
        load_examples(path, Words(), max_length=8)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserInputError, match="not UTF-8"):
        load_examples(path, Words(), max_length=8)


def test_text_without_a_tokenizer_is_refused(path: Path) -> None:
    with pytest.raises(UserInputError, match="no tokenizer"):
        load_examples(write(path, {"text": "a"}), None, max_length=8)


def test_a_template_that_rewrites_earlier_turns_is_refused(path: Path) -> None:
    class Rewriting(Words):
        def apply_chat_template(
            self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool
        ) -> str:
            return (
                "x" * len(messages)
                + " "
                + super().apply_chat_template(messages, tokenize, add_generation_prompt)
            )

    turns = [{"role": r, "content": "a"} for r in ("user", "assistant")]
    with pytest.raises(UserInputError, match="rewrites"):
        load_examples(write(path, {"messages": turns}), Rewriting(), max_length=50)


def pairs(path: Path, *rows: Any, max_length: int = 50) -> tuple[Example, ...]:
    data = load_examples(write(path, *rows), Words(), max_length=max_length, decoder_start=7)
    return data.examples


def test_an_encoder_reads_prompts_and_its_decoder_learns_completions(path: Path) -> None:
    (example,) = pairs(path, {"prompt": "a bb ccc", "completion": "dddd"})
    assert example == Example((7, 4, 99), (IGNORED, 4, 99), (1, 2, 3))
    (cut,) = pairs(path, {"prompt": "a bb ccc", "completion": "dddd eeeee"}, max_length=2)
    assert cut == Example((7, 4), (IGNORED, 4), (1, 2))


def test_an_end_that_the_tokenizer_writes_is_not_written_again(path: Path) -> None:
    (example,) = pairs(path, {"prompt": "a", "completion": "bb " + "c" * 99})
    assert example.labels == (IGNORED, 2, 99)


@pytest.mark.parametrize("row", [{"text": "a"}, {"input_ids": [1, 2]}, {"prompt": "a"}, [1]])
def test_an_encoder_needs_pairs(path: Path, row: Any) -> None:
    with pytest.raises(UserInputError, match="from text to text"):
        pairs(path, row)
    with pytest.raises(UserInputError, match="holds no token"):
        pairs(path, {"prompt": "", "completion": "a"})


def test_pairs_are_padded_each_for_itself() -> None:
    batch = collate([Example((7, 4), (IGNORED, 4), (1, 2, 3)), Example((7,), (IGNORED,), (5,))])
    assert batch.input_ids.tolist() == [[7, 4], [7, 0]]
    assert batch.labels.tolist() == [[IGNORED, 4], [IGNORED, IGNORED]]
    source, mask = batch.source
    assert source.tolist() == [[1, 2, 3], [5, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_padding_carries_neither_attention_nor_loss() -> None:
    batch = collate([Example((5, 6, 7), (5, 6, 7)), Example((8,), (8,))])
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[5, 6, 7], [8, IGNORED, IGNORED]]


def test_an_epoch_takes_every_example_once() -> None:
    examples = [Example((i, i), (i, i)) for i in range(12)]
    epoch = [batch_at(examples, step, batch_size=4, seed=1).input_ids[:, 0] for step in range(3)]
    assert sorted(torch.cat(epoch).tolist()) == list(range(12))
    later = batch_at(examples, 3, batch_size=4, seed=1).input_ids[:, 0]
    assert later.tolist() != epoch[0].tolist()


def test_the_batch_of_a_step_depends_on_nothing_else() -> None:
    examples = [Example((i, i), (i, i)) for i in range(12)]
    first, again, other = (
        batch_at(examples, 7, batch_size=4, seed=seed).input_ids for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
