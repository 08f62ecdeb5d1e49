"""What is learned of a completion: the tokens of the joint text behind the prompt."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from qalora_compile.training.data.example import IGNORED
from qalora_compile.training.data.parse_line import LineReader
from qalora_compile.training.data.tokenize import Texts

CORPUS = [
    'Answer: 4\nQuestion: What is 2 + 2? Answer: 4 {"x": 1} {"x":1}',
    "The colours are red, green and blue; über Straße, naïve café 日本語 😀",
    "a aa aaa aaaa b bb abab  two  spaces\n\nand lines\n",
]
ENDS = ["<unk>", "<s>", "</s>"]
UNKNOWN = 0  # may stand for more of a text than it did


def trained(model: Any, trainer: Any, **parts: Any) -> Tokenizer:
    """A tokenizer of parts, trained on the corpus."""
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def bpe(**options: Any) -> Any:
    return trainers.BpeTrainer(vocab_size=400, special_tokens=ENDS, show_progress=False, **options)


def byte_level(*, prefix: bool, regex: bool = True) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    before = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    return trained(models.BPE(), bpe(initial_alphabet=alphabet), pre_tokenizer=before)


def digits_apart() -> Tokenizer:
    before = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = bpe(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return trained(models.BPE(), trainer, pre_tokenizer=before)


def metaspace(scheme: str, model: str = "bpe") -> Tokenizer:
    before = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    if model == "bpe":
        made = models.BPE(unk_token="<unk>")
        return trained(made, bpe(), pre_tokenizer=before, decoder=decoders.Metaspace())
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=ENDS, unk_token="<unk>", show_progress=False
    )
    return trained(models.Unigram(), trainer, pre_tokenizer=before)


def llama() -> Tokenizer:
    """As transformers converts Llama 2: the normalizer replaces spaces; bytes for the rest."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*ENDS, *bytes_], show_progress=False
    )
    made = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = trained(made, trainer, normalizer=normalizers.Sequence(steps))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=[*ENDS, "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer = trained(
        models.WordPiece(unk_token="<unk>"),
        trainer,
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
    )
    return tokenizer


def t5() -> Tokenizer:
    tokenizer = metaspace("always", "unigram")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return tokenizer


def words() -> Tokenizer:
    trainer = trainers.WordLevelTrainer(special_tokens=ENDS, show_progress=False)
    before = pre_tokenizers.WhitespaceSplit()
    return trained(models.WordLevel(unk_token="<unk>"), trainer, pre_tokenizer=before)


def nfkc() -> Tokenizer:
    tokenizer = metaspace("first", "unigram")
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level, as GPT-2": lambda: byte_level(prefix=False),
    "byte level with a space before": lambda: byte_level(prefix=True),
    "byte level without cutting words": lambda: byte_level(prefix=False, regex=False),
    "byte level, digits apart": digits_apart,
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, never": lambda: metaspace("never"),
    "unigram, always": lambda: metaspace("always", "unigram"),
    "unigram with NFKC": nfkc,
    "Llama 2": llama,
    "T5": t5,
    "BERT": word_piece,
    "words": words,
}


@cache
def tokenizer(kind: str) -> Any:
    """A tokenizer as transformers has it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), unk_token="<unk>", eos_token="</s>"
    )


def learned(kind: str, prompt: str, completion: str) -> tuple[list[int], int]:
    """The tokens of an example, and how many of them carry no loss."""
    reader = LineReader(tokenizer=tokenizer(kind), max_length=10_000)
    row = {"prompt": prompt, "completion": completion}
    example = reader.read(row, "here").example
    free = sum(label == IGNORED for label in example.labels)
    assert list(example.labels) == [IGNORED] * free + list(example.tokens[free:])
    return list(example.tokens), free


PIECES = st.text(st.sampled_from('ab 4:{"}x1\nüß日😀é'), max_size=12)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(prompt=PIECES, completion=PIECES)
def test_the_tokens_are_those_of_the_joint_text(kind: str, prompt: str, completion: str) -> None:
    """By the tokenizer's own calls; a token in which the prompt ends is learned."""
    tokenize = tokenizer(kind)
    joint = tokenize(prompt + completion).input_ids
    own = tokenize(prompt + completion, add_special_tokens=False).input_ids
    alone = tokenize(prompt, add_special_tokens=False).input_ids
    tokens, free = learned(kind, prompt, completion)
    if not tokens:  # nothing to learn: every token of the joint text is the prompt's
        assert own == alone or not own
        return
    begins = next(i for i in range(len(joint) + 1) if joint[i : i + len(own)] == own)
    assert tokens == [*joint[: begins + len(own)], *([2] if own[-1:] != [2] else [])]
    if UNKNOWN not in own and own[: len(alone)] == alone and len(own) > len(alone):
        assert free == begins + len(alone) or not prompt
    else:
        same = next(
            (i for i, (a, b) in enumerate(zip(own, alone, strict=False)) if a != b), len(own)
        )
        assert free <= begins + max(same, len(alone))


@pytest.mark.parametrize("kind", [k for k in KINDS if "NFKC" not in k and k != "BERT"])
@settings(max_examples=30, deadline=None)
@given(prompt=PIECES, completion=PIECES)
def test_a_tokenizer_without_offsets_gives_the_same(
    kind: str, prompt: str, completion: str
) -> None:
    """Where the prompt's tokens begin the joint ones, there is no doubt."""
    texts = Texts(tokenizer(kind))
    own = texts.plain(prompt + completion, "here")
    alone = texts.plain(prompt, "here")
    if not prompt or UNKNOWN in own or own[: len(alone)] != alone:
        return
    by_prefix = texts._joint_by_prefix(prompt, prompt + completion, "here")
    assert by_prefix == texts.joint(prompt, completion, "here")


def test_the_cases_that_were_learned_wrongly() -> None:
    """`▁ ▁4` and the like, which no text has (a public report)."""
    kind = "metaspace, always"
    for prompt, completion in (("Answer:", " 4"), ("Answer: ", "4"), ('{"x":', "1}")):
        tokens, free = learned(kind, prompt, completion)
        text = tokenizer(kind).decode(tokens[:-1])
        assert text == prompt + completion
        assert "4" in text[len(tokenizer(kind).decode(tokens[:free])) :] or "1" in text
