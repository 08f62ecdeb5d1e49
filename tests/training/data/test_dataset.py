"""Examples from JSON lines, truncation, padding, and bad lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qalora_compile.errors import UserInputError
from qalora_compile.training.data.dataset import Dataset
from qalora_compile.training.data.example import IGNORED, Example, collate
from qalora_compile.training.data.load_examples import find_classes, load_examples


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


class Marking(Words):
    """As many tokenizers: 98 begins every text and 99 ends it, one that holds nothing too."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        encoding = super().__call__(text)
        if add_special_tokens:
            encoding.input_ids = [98, *encoding.input_ids, 99]
        return encoding


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), "utf-8")
    return path


def only(path: Path, row: Any, tokenizer: Any = None) -> Example:
    data = load_examples(write(path, row), tokenizer or Words(), max_length=50)
    (example,) = data.examples
    return example


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


def test_a_prompt_carries_no_loss(path: Path) -> None:
    example = only(path, {"prompt": "a bb ccc", "completion": " dddd"})
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
    write(path, {"prompt": "a bb ccc", "completion": " dddd"}, {"text": "a bb ccc dddd"})
    data = load_examples(path, Words(), max_length=3)
    assert data.truncated == 2
    assert data.examples[0].tokens == (3, 4, 99)
    assert data.examples[1].tokens == (1, 2, 3)


def test_prompts_are_learned_too_where_asked(path: Path) -> None:
    turns = [{"role": r, "content": "a bb"} for r in ("user", "assistant")]
    write(path, {"prompt": "a bb", "completion": " ccc"}, {"messages": turns}, {"text": "a bb"})
    data = load_examples(path, Words(), max_length=50, learn="everything")
    assert all(example.labels == example.tokens for example in data.examples)
    assert data.examples[0].tokens == (1, 2, 3, 99)
    write(path, {"prompt": "a bb", "completion": ""}, {"text": "a bb"})
    assert load_examples(path, Words(), max_length=50, learn="everything").skipped == 1
    with pytest.raises(UserInputError, match="learn is 'prompts'"):
        load_examples(path, Words(), max_length=50, learn="prompts")


def test_files_are_read_in_order_and_counted_each(tmp_path: Path) -> None:
    for name, count in (("b", 2), ("a", 1)):
        rows = [{"text": f"{name} {'bb ' * i}"} for i in range(1, count + 1)]
        write(tmp_path / f"{name}.jsonl", *rows, {"prompt": "a", "completion": ""})
    given = [tmp_path / "b.jsonl", tmp_path / "a.jsonl"]
    data = load_examples(given, Words(), max_length=3)
    assert [(Path(f.path).name, f.examples, f.truncated, f.skipped) for f in data.files] == [
        ("b.jsonl", 2, 1, 1),
        ("a.jsonl", 1, 0, 1),
    ]
    assert (data.truncated, data.skipped, data.token_range) == (1, 2, (1, 99))
    sorted_ones = load_examples(str(tmp_path / "*.jsonl"), Words(), max_length=3)
    assert [Path(f.path).name for f in sorted_ones.files] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(UserInputError, match="given twice"):
        load_examples([*given, str(tmp_path / "a*")], Words(), max_length=3)
    with pytest.raises(UserInputError, match="no file matches"):
        load_examples(str(tmp_path / "c*.jsonl"), Words(), max_length=3)
    (tmp_path / "a.jsonl").write_text("", "utf-8")
    with pytest.raises(UserInputError, match="no usable example") as caught:
        load_examples(given, Words(), max_length=3)
    assert str(caught.value.where).endswith("a.jsonl")


def test_a_separator_inside_a_text_ends_no_line(path: Path) -> None:
    path.write_text('{"text": "a\u2028bb"}\r\n{"text": "ccc dd"}\n', "utf-8")
    found = load_examples(path, Words(), max_length=8).examples
    # `str.split` cuts at the separator, too: words of 1 and 2, then of 3 and 2
    assert [list(example.tokens) for example in found] == [[1, 2, 99], [3, 2, 99]]


def test_a_token_that_the_model_does_not_know_is_named(path: Path) -> None:
    data = load_examples(write(path, {"text": "a"}, {"text": "bb ccc"}), Words(), max_length=8)
    data.check_tokens(100)
    with pytest.raises(UserInputError, match="example 1 holds the token 99; the model knows 0 to"):
        data.check_tokens(99)
    (only,) = pairs(path, {"prompt": "a " + "b" * 120, "completion": "a"})
    with pytest.raises(UserInputError, match="example 1 holds the token 120"):
        Dataset((only,), token_range=(1, 120)).check_tokens(100)


def test_a_label_that_the_model_does_not_know_is_named(path: Path) -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, last]} for last in (9, 999)]
    data = load_examples(write(path, *rows), None, max_length=8)
    assert data.token_range == (1, 999)
    data.check_tokens(1000)
    with pytest.raises(UserInputError, match="example 2 holds the label 999; the model knows 0 to"):
        data.check_tokens(999)


def test_an_example_with_nothing_to_learn_is_counted(path: Path) -> None:
    write(path, {"prompt": "a", "completion": " "}, {"text": "a bb"})
    data = load_examples(path, Words(), max_length=8)
    assert (len(data.examples), data.skipped) == (1, 1)


BAD_LINES = {
    "not JSON": "{",
    "a list": "[1]",
    "both kinds": '{"text": "a", "prompt": "a", "completion": "b"}',
    "no known field": '{"question": "?"}',
    "completion is a number": '{"prompt": "a", "completion": 3}',
    "prompt is missing": '{"completion": "a"}',
    "ids are text": '{"input_ids": ["a"]}',
    "ids are no numbers": '{"input_ids": [true, false]}',
    "a negative id": '{"input_ids": [1, -1]}',
    "an ignored id": '{"input_ids": [1, -100]}',
    "an id of more than 32 bits": '{"input_ids": [1, 3000000000]}',
    "a label that is no token": '{"input_ids": [1, 2], "labels": [-100, -1]}',
    "a label of more than 32 bits": '{"input_ids": [1, 2], "labels": [-100, 3000000000]}',
    "brackets without end": "[" * 100_000,
    "a number without end": '{"input_ids": [' + "1" * 5000 + "]}",
    "half of a character": '{"text": "a \\ud800"}',
    "half of a character in a prompt": '{"prompt": "a \\ud800", "completion": "a"}',
    "half of a character in a completion": '{"prompt": "a", "completion": "a \\ud800"}',
    "the assistant begins": '{"messages": [{"role": "assistant", "content": "hi"}]}',
    "nothing to read": '{"text": ""}',
    "blanks to read": '{"text": " "}',
    "labels of another length": '{"input_ids": [1, 2], "labels": [1]}',
    "messages is text": '{"messages": "hi"}',
    "no assistant": '{"messages": [{"role": "user", "content": "hi"}]}',
}


@pytest.mark.parametrize("tokenizer", [Words(), Marking()], ids=["plain", "marking"])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_reported_with_its_number(path: Path, kind: str, tokenizer: Words) -> None:
    write(path, {"text": "a bb"}, "", BAD_LINES[kind])
    with pytest.raises(UserInputError) as caught:
        load_examples(path, tokenizer, max_length=8)
    assert str(caught.value.where).endswith("data.jsonl:3")


REFUSED_CHATS = {
    "the template refuses them": (["user", "user", "assistant"], "a"),
    "the template fails": (["system", "assistant"], "a"),
    "half of a character": (["user", "assistant"], "a \ud800"),
    "the assistant begins": (["assistant", "user", "assistant"], "a"),
}


@pytest.fixture(scope="module")
def library_tokenizer() -> Any:
    """One of transformers, with special tokens around a text, and a template of a kind in use."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    known = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "a", "bb"])}
    inside = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    inside.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inside.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inside, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = (
        "{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) and messages[0].role != 'system' %}"
        "{{ raise_exception('roles must take turns') }}{% endif %}"
        "{{ m.content + (m.missing if m.role == 'system' else ' ') }}{% endfor %}"
    )
    return made


@pytest.mark.parametrize("kind", REFUSED_CHATS)
def test_a_chat_that_a_template_refuses_is_reported_with_its_number(
    path: Path, library_tokenizer: Any, kind: str
) -> None:
    roles, content = REFUSED_CHATS[kind]
    good = [{"role": role, "content": "a bb"} for role in ("user", "assistant")]
    bad = [{"role": role, "content": content} for role in roles]
    assert only(path, {"messages": good}, library_tokenizer).tokens == (3, 4, 3, 4)
    write(path, {"messages": good}, {"messages": bad})
    with pytest.raises(UserInputError) as caught:
        load_examples(path, library_tokenizer, max_length=8)
    assert str(caught.value.where).endswith("data.jsonl:2")


def test_a_tokenizer_that_fails_is_reported_with_the_line(path: Path) -> None:
    class Failing(Words):
        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            if "bb" in text:
                raise KeyError("[UNK]")
            return super().__call__(text)

    with pytest.raises(UserInputError, match=r"cannot read the text: '\[UNK\]'") as caught:
        load_examples(write(path, {"text": "a ccc"}, {"text": "bb"}), Failing(), max_length=8)
    assert str(caught.value.where).endswith("data.jsonl:2")


def test_special_tokens_stand_where_a_text_begins_and_ends(
    path: Path, library_tokenizer: Any
) -> None:
    pair = {"prompt": "a bb", "completion": " bb"}
    assert only(path, {"text": "a bb"}, library_tokenizer).tokens == (1, 3, 4, 2)
    assert only(path, pair, library_tokenizer) == Example((1, 3, 4, 4, 2), (*[IGNORED] * 3, 4, 2))
    assert only(path, {"text": "a bb"}, Marking()).labels == (98, 1, 2, 99)
    assert only(path, pair, Marking()) == Example((98, 1, 2, 2, 99), (*[IGNORED] * 3, 2, 99))
    begun = only(path, {"prompt": "", "completion": "bb"}, Marking())
    assert begun == Example((98, 2, 99), (IGNORED, 2, 99))
    # what a text itself says stays: of a prompt all, at the end once
    said = only(path, {"prompt": "a </s>", "completion": " bb </s>"}, library_tokenizer)
    assert said.tokens == (1, 3, 2, 4, 2)


def test_a_tokenizer_without_an_end_gets_none(path: Path) -> None:
    class Endless(Marking):
        eos_token_id = None

    assert only(path, {"text": "a bb"}, Endless()).tokens == (98, 1, 2, 99)
    assert only(path, {"prompt": "a", "completion": " bb"}, Endless()).tokens == (98, 1, 2)


def test_a_tokenizer_that_cannot_be_followed_is_refused(path: Path) -> None:
    class Shifting(Words):
        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            encoding = super().__call__(text)
            encoding.input_ids = [t + 50 * add_special_tokens for t in encoding.input_ids]
            return encoding

    with pytest.raises(UserInputError, match="without special tokens") as caught:
        only(path, {"prompt": "a", "completion": "bb"}, Shifting())
    assert str(caught.value.where).endswith("data.jsonl:1")


@pytest.mark.parametrize("content", ["", "\n\n", '{"prompt": "a", "completion": ""}'])
def test_a_file_without_a_usable_example_is_refused(path: Path, content: str) -> None:
    path.write_text(content, "utf-8")
    with pytest.raises(UserInputError, match="no usable example"):
        load_examples(path, Words(), max_length=8)


def test_a_missing_file_and_bytes_that_are_no_text_are_refused(path: Path) -> None:
    with pytest.raises(UserInputError, match="cannot read"):
        load_examples(path, Words(), max_length=8)
    path.write_bytes(b'{"text": "a bb"}\n\xff\xfe\x00')
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


CHAT = [{"role": role, "content": "a"} for role in ("user", "assistant")]


def pairs(
    path: Path, *rows: Any, max_length: int = 50, tokenizer: Any = None
) -> tuple[Example, ...]:
    write(path, *rows)
    tokenizer = tokenizer or Words()
    data = load_examples(path, tokenizer, max_length=max_length, decoder_start=7)
    return tuple(data.examples)


def test_an_encoder_reads_prompts_and_its_decoder_learns_completions(path: Path) -> None:
    (example,) = pairs(path, {"prompt": "a bb ccc", "completion": "dddd"})
    assert example == Example((7, 4, 99), (IGNORED, 4, 99), (1, 2, 3))
    (cut,) = pairs(path, {"prompt": "a bb ccc", "completion": "dddd eeeee"}, max_length=2)
    assert cut == Example((7, 4), (IGNORED, 4), (1, 2))


def test_an_end_that_the_tokenizer_writes_is_not_written_again(path: Path) -> None:
    (example,) = pairs(path, {"prompt": "a", "completion": "bb " + "c" * 99})
    assert example.labels == (IGNORED, 2, 99)


@pytest.mark.parametrize("row", [{"text": "a"}, {"input_ids": [1, 2]}, {"messages": CHAT}])
def test_an_encoder_needs_pairs(path: Path, row: Any) -> None:
    with pytest.raises(UserInputError, match="learns text from text"):
        pairs(path, row)


@pytest.mark.parametrize("tokenizer", [Words(), Marking()], ids=["plain", "marking"])
@pytest.mark.parametrize("empty", ["prompt", "completion"])
def test_a_pair_with_nothing_in_it_is_refused(path: Path, empty: str, tokenizer: Words) -> None:
    good = {"prompt": "a", "completion": "bb"}
    with pytest.raises(UserInputError, match=f"the {empty} holds no token") as caught:
        pairs(path, good, good | {empty: " "}, tokenizer=tokenizer)
    assert str(caught.value.where).endswith("data.jsonl:2")
    assert pairs(path, good, tokenizer=Marking()) == (
        Example((7, 98, 2, 99), (IGNORED, 98, 2, 99), (98, 1, 99)),
    )


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


LABELLED = ({"text": "a bb", "label": "good"}, {"text": "ccc", "label": "bad"})


class Truncating(Words):
    """As tokenizers of encoders: 77 ends every text, and is kept where a text is cut."""

    def __call__(self, text: str, add_special_tokens: bool = True, **limits: Any) -> Any:
        encoding = super().__call__(text)
        words = encoding.input_ids[: limits.get("max_length", 1000) - 1]
        encoding.input_ids = [*words, 77] if add_special_tokens else words
        return encoding


def test_classes_are_found_in_the_data(path: Path) -> None:
    assert find_classes(write(path, *LABELLED)) == ("bad", "good")
    data = load_examples(path, Truncating(), max_length=8, classes=("bad", "good"))
    assert data.classes == ("bad", "good")
    assert data.examples == (Example((1, 2, 77), (), label=1), Example((3, 77), (), label=0))
    cut = load_examples(path, Truncating(), max_length=2, classes=("bad", "good"))
    assert (cut.truncated, cut.examples[0].tokens) == (1, (1, 77))
    batch = collate(data.examples)
    assert (batch.labels.tolist(), batch.targets.tolist()) == ([1, 0], [1, 1])
    numbers = [{"text": "a", "label": n} for n in (10, 9, 2)]
    assert find_classes(write(path, *numbers)) == ("2", "9", "10")
    assert find_classes(write(path, *({"text": "a", "label": n} for n in (True, False)))) == (
        "false",
        "true",
    )


BAD_LABELS = {
    "no label": ({"text": "a"}, "no label"),
    "a number that is not an integer": ({"text": "a", "label": 0.5}, "no label"),
    "an empty one": ({"text": "a", "label": ""}, "no label"),
    "unknown": ({"text": "a", "label": "ugly"}, "'ugly' does not occur in the training data"),
    "no text": ({"label": "good"}, "'text' is missing"),
    "nothing to read": ({"text": "", "label": "good"}, "the text holds no token"),
    "blanks to read": ({"text": " ", "label": "good"}, "the text holds no token"),
    "half of a character": ({"text": "a", "label": "\ud800"}, "half of a surrogate pair"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_a_bad_label_is_reported_with_its_line(path: Path, kind: str) -> None:
    row, message = BAD_LABELS[kind]
    write(path, *LABELLED, row)
    with pytest.raises(UserInputError, match=message) as caught:
        load_examples(path, Truncating(), max_length=8, classes=("bad", "good"))
    assert str(caught.value.where).endswith("data.jsonl:3")


def test_a_text_of_which_nothing_is_left_is_refused(path: Path) -> None:
    class Closing(Truncating):
        """76 and 77 are kept where a text is cut: of two tokens, none is the text's."""

        def __call__(self, text: str, add_special_tokens: bool = True, **limits: Any) -> Any:
            limit = limits.get("max_length", 1000) - 1
            encoding = super().__call__(text, add_special_tokens, max_length=limit)
            encoding.input_ids = [76] * add_special_tokens + encoding.input_ids
            return encoding

    write(path, *LABELLED)
    options: dict[str, Any] = {"classes": ("bad", "good")}
    assert load_examples(path, Closing(), max_length=3, **options).examples[0].tokens == (76, 1, 77)
    with pytest.raises(UserInputError, match="2 tokens leave no room for the text") as caught:
        load_examples(path, Closing(), max_length=2, **options)
    assert str(caught.value.where).endswith("data.jsonl:1")


def test_classes_that_cannot_be_distinguished_are_refused(path: Path) -> None:
    with pytest.raises(UserInputError, match=r"same label \(good\)"):
        find_classes(write(path, *LABELLED[:1] * 3))
    with pytest.raises(UserInputError, match="half of a surrogate pair"):
        find_classes(write(path, {"text": "a", "label": "\ud800"}))
    with pytest.raises(UserInputError, match=r"there is none"):
        find_classes(write(path, ""))
    with pytest.raises(UserInputError, match="a text in one line"):
        find_classes(write(path, {"text": "a", "label": 1}, {"text": "a", "label": "1"}))
