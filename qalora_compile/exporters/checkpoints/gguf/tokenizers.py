"""A tokenizer in a GGUF file, from `tokenizer.json`: byte-level BPE, or SentencePiece's BPE.

llama.cpp has its own tokenizer for each. The first, `gpt2`, reads merges. The second, `llama`,
reads a score for every piece, as in SentencePiece's models: of all neighbours whose joined text is
a piece, those with the highest score are joined first, from the left. `tokenizer.json` holds no
scores, but its merges are sorted by them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.exporters.checkpoints.gguf.piece_scores import (
    BYTES,
    SPACE,
    Merge,
    piece_scores,
    refuse,
)
from qalora_compile.optional import quiet_logger, require
from qalora_compile.untrusted import read_json

_PURPOSE = "write GGUF files"
_FILE = "tokenizer.json"

_PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
}
"""Kinds of pre-tokenizers in `tokenizer.json` → the name of the same rule in llama.cpp."""
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_LLAMA3_WORDS: "llama-bpe", _LLAMA3_WORDS.replace("{1,3}", ""): "qwen2"}
"""Regular expressions of a Split before ByteLevel → the name of the same rule in llama.cpp."""

_SPACES = {
    ("prepend", "replace"): True,
    ("replace",): False,
    ("replace", "double", "metaspace always"): True,
    ("metaspace always",): True,
    ("metaspace first",): True,
    ("metaspace never",): False,
}
"""Steps before the pieces are joined (`_step`) → whether a space is put before the text."""
_OFF = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
"""Settings of a BPE model that llama.cpp does not have, so they must be unset."""


def write_tokenizer(folder: Path, vocabulary: int, writer: Any) -> None:
    """Write the keys that describe a tokenizer.

    Args:
        folder: Holds `tokenizer.json` and usually `tokenizer_config.json`.
        vocabulary: How many tokens the model has; the tokenizer may have fewer.
        writer: A GGUFWriter.

    Raises:
        UnsupportedError: llama.cpp has no tokenizer that computes the same.
        UserInputError: a token is beyond the vocabulary, two tokens have the same text, or the
            tokenizer adds a token to a text without saying which.
    """
    value = read_json(folder / _FILE)
    texts, types = _tokens(value, vocabulary, str(folder / _FILE))
    if _is_sentencepiece(value):
        _write_sentencepiece(value, folder, texts, types, writer)
    else:
        _write_byte_level(value, folder, texts, types, writer)


def _tokens(value: Mapping[str, Any], vocabulary: int, where: str) -> tuple[list[str], list[int]]:
    """Text and type of every token of the model.

    Raises:
        UserInputError: see `write_tokenizer`.
    """
    kind = require("gguf", extra="hf", purpose=_PURPOSE).TokenType
    known: dict[int, str] = {}
    if isinstance(value["model"]["vocab"], dict):  # a list, in kinds of models that are refused
        known = {number: token for token, number in value["model"]["vocab"].items()}
    kinds = dict.fromkeys(known, kind.NORMAL)
    for added in value.get("added_tokens") or ():
        known[added["id"]] = added["content"]
        kinds[added["id"]] = kind.CONTROL if added["special"] else kind.USER_DEFINED
    if max(known, default=0) >= vocabulary:
        raise UserInputError(
            f"the tokenizer has token {max(known)}, and the model has {vocabulary}", where=where
        )
    numbers = range(vocabulary)
    texts = [known.get(number, f"[PAD{number}]") for number in numbers]
    seen: dict[str, int] = {}
    for number, text in enumerate(texts):
        if text in seen:  # llama.cpp does not load such a file
            raise UserInputError(
                f"tokens {seen[text]} and {number} are both {text!r}",
                where=where,
                hint="unused tokens of the model are named [PAD…] by their number",
            )
        seen[text] = number
    return texts, [int(kinds.get(number, kind.UNUSED)) for number in numbers]


def _steps(rule: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or post-processor, which may be a sequence."""
    return list(rule.get(inner, [rule])) if rule else []


# Byte-level BPE


def _write_byte_level(
    value: Mapping[str, Any], folder: Path, texts: list[str], types: list[int], writer: Any
) -> None:
    """Write a byte-level BPE tokenizer: llama.cpp's `gpt2`, which reads the merges themselves."""
    gguf = require("gguf", extra="hf", purpose=_PURPOSE)
    pre = pre_tokenizer(value, folder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=len(texts))
    special.add_to_gguf(writer, quiet=True)


def pre_tokenizer(value: Mapping[str, Any], folder: Path) -> str:
    """llama.cpp's name for the rule by which a byte-level tokenizer cuts a text into words.

    Args:
        value: The contents of `tokenizer.json`.
        folder: The folder of that file.

    Raises:
        UnsupportedError: it is not a byte-level BPE tokenizer, or cuts words by another rule.
    """
    model, rule = value["model"], value.get("pre_tokenizer") or {}
    steps = _steps(rule, "pretokenizers")
    kinds = tuple(str(step.get("type")) for step in steps)
    found = None
    if model["type"] == "BPE" and value.get("normalizer") in (None, {"type": "NFC"}):
        if kinds == ("Split", "ByteLevel") and not steps[1].get("use_regex", True):
            found = _SPLITS.get(steps[0].get("pattern", {}).get("Regex"))
        elif all(step.get("use_regex", True) for step in steps if step["type"] == "ByteLevel") and (
            all(step.get("individual_digits") for step in steps if step["type"] == "Digits")
        ):
            found = _PRE_TOKENIZERS.get(kinds)
    if found is None:
        raise UnsupportedError(
            f"no rule of llama.cpp is known for a {model['type']} tokenizer with "
            f"{json.dumps(rule)[:120]}",
            where=str(folder / _FILE),
            hint="known: byte-level BPE as in GPT-2, SmolLM, Llama 3 and Qwen 2, SentencePiece's "
            "BPE with byte fallback as in Llama 2 and Mistral; give the model's own .gguf file as "
            "the model to take its metadata, or leave the tokenizer out",
        )
    return found


# SentencePiece's BPE


def _is_sentencepiece(value: Mapping[str, Any]) -> bool:
    """Whether a tokenizer joins pieces of text and cuts unknown characters into bytes."""
    steps = _steps(value.get("pre_tokenizer"), "pretokenizers")
    model = value["model"]
    joins = model["type"] == "BPE" and bool(model.get("byte_fallback"))
    return joins and all(step["type"] != "ByteLevel" for step in steps)


def _write_sentencepiece(
    value: Mapping[str, Any], folder: Path, texts: list[str], types: list[int], writer: Any
) -> None:
    """Write a BPE tokenizer of SentencePiece: llama.cpp's `llama`.

    The gguf package's own reader gives every piece the same score, which cuts texts into other
    tokens, so the scores are computed here. The ids of special tokens are those that it finds.
    """
    gguf = require("gguf", extra="hf", purpose=_PURPOSE)
    kind, where = gguf.TokenType, str(folder / _FILE)
    _check_model(value, texts, where)
    prefix = space_prefix(value, where)
    added = {a["content"] for a in value.get("added_tokens") or () if SPACE not in a["content"]}
    scores = piece_scores(_merges(value["model"], where), texts, added, where)
    with quiet_logger("gguf.vocab"):  # it warns of pairs of texts, which llama.cpp does not have
        special = gguf.SpecialVocab(folder, n_vocab=len(texts))
    unknown = value["model"].get("unk_token")
    if unknown in texts:
        special.special_token_ids.setdefault("unk", texts.index(unknown))
    _settle_ends(value, special, texts, where)
    types = [
        int(kind.BYTE) if found == kind.NORMAL and text in BYTES else found
        for text, found in zip(texts, types, strict=True)
    ]
    if "unk" in special.special_token_ids:
        types[special.special_token_ids["unk"]] = int(kind.UNKNOWN)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(prefix)
    special.add_to_gguf(writer, quiet=True)


def _check_model(value: Mapping[str, Any], texts: list[str], where: str) -> None:
    """Refuse settings of the model and of added tokens that llama.cpp does not have.

    Raises:
        UnsupportedError: such a setting is used, or a byte has no token.
    """
    settings = {name: value["model"][name] for name in _OFF if value["model"].get(name)}
    if settings:
        refuse(f"llama.cpp's tokenizer has no {json.dumps(settings)}", where)
    if missing := BYTES.difference(texts):
        refuse(f"there is no token for {len(missing)} bytes, {min(missing)} among them", where)
    for added in value.get("added_tokens") or ():
        strict = [name for name in ("single_word", "lstrip", "rstrip") if added.get(name)]
        # llama.cpp lets its caller choose whether special tokens are found in a text; it always
        # finds the other added tokens, in the text as it is given.
        if added.get("normalized") and not added["special"] and value.get("normalizer"):
            strict.append("normalized")
        if strict:
            refuse(f"llama.cpp finds {added['content']!r} without {', '.join(strict)}", where)


def space_prefix(value: Mapping[str, Any], where: str) -> bool:
    """Whether a space is put before a text; checks that spaces are written as ▁.

    llama.cpp puts it before every text and after every special token. The pre-tokenizer Metaspace
    puts none before a text that begins with a space, and, if its scheme is `first`, none after a
    special token; only in these cases do the two differ.

    Args:
        value: The contents of `tokenizer.json`.
        where: The file, for errors.

    Raises:
        UnsupportedError: the tokenizer changes texts further.
    """
    rules = [value.get("normalizer"), value.get("pre_tokenizer")]
    steps = [*_steps(rules[0], "normalizers"), *_steps(rules[1], "pretokenizers")]
    names = [_step(step) for step in steps]
    if names[1:] and names[0] == "replace" and names[1].startswith("metaspace"):
        del names[0]  # Metaspace does the same
    found = _SPACES.get(tuple(names))
    if found is None:
        refuse(
            f"llama.cpp's tokenizer only writes spaces as {SPACE}, but this one changes texts by "
            f"{json.dumps(rules, ensure_ascii=False)[:160]}",
            where,
        )
    return found


def tokenizer_notes(folder: Path) -> tuple[str, ...]:
    """Notes on texts that llama.cpp cuts into other tokens than the folder's tokenizer does."""
    value = read_json(folder / _FILE)
    if not _is_sentencepiece(value):
        return ()
    kinds = {_step(step) for step in _steps(value.get("pre_tokenizer"), "pretokenizers")}
    if not kinds & {"metaspace always", "metaspace first"}:
        return ()
    after = " and texts after a special token" if "metaspace first" in kinds else ""
    return (
        f"llama.cpp puts a space before texts that begin with one{after}, and the tokenizer does "
        "not: give llama.cpp the tokens of such texts",
    )


def _step(step: Mapping[str, Any]) -> str:
    """What a step of a normalizer or pre-tokenizer does: a word of `_SPACES`, or its type."""
    match step:
        case {"type": "Prepend", "prepend": "▁"}:
            return "prepend"
        case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
            return "replace"
        case {"type": "Replace", "pattern": {"Regex": r"\A▁"}, "content": "▁▁"}:
            return "double"
        case {"type": "Metaspace", "replacement": "▁", "split": False}:
            # older files use `add_prefix_space` instead
            plain = "never" if step.get("add_prefix_space") is False else "always"
            return f"metaspace {step.get('prepend_scheme', plain)}"
    return str(step.get("type"))


def _settle_ends(value: Mapping[str, Any], special: Any, texts: list[str], where: str) -> None:
    """Say whether BOS and EOS are put around a text: by default, llama.cpp adds BOS.

    Raises:
        UnsupportedError: other tokens than BOS and EOS are put around a text.
        UserInputError: the tokenizer adds one without saying which token it is.
    """
    numbers, adds = special.special_token_ids, special.add_special_token
    ends = {kind: texts[numbers[kind]] for kind in ("bos", "eos") if kind in numbers}
    first, last = ends.get("bos"), ends.get("eos")
    for step in _steps(value.get("post_processor"), "processors"):
        parts = tuple(part.get("SpecialToken", {}).get("id") for part in step.get("single", ()))
        if parts not in {(None,), (first, None), (None, last), (first, None, last)}:
            refuse(
                "llama.cpp puts BOS before a text and EOS after it, but this tokenizer puts "
                f"{json.dumps(step.get('single', step), ensure_ascii=False)[:160]}",
                where,
            )
    for kind in ("bos", "eos"):
        if adds.setdefault(kind, False) and kind not in ends:
            raise UserInputError(
                f"the tokenizer adds {kind.upper()} and does not say which token that is",
                where=where,
                hint=f"name {kind}_token in tokenizer_config.json",
            )


def _merges(model: Mapping[str, Any], where: str) -> list[Merge]:
    """The merges of a model; older files hold each merge as one text.

    Raises:
        UserInputError: a merge is not a pair.
    """
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    odd = next((pair for pair in pairs if len(pair) != 2), None)
    if odd is not None:
        raise UserInputError(f"the merge {odd} is not a pair", where=where)
    return [(left, right) for left, right in pairs]
