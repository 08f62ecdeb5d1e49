"""SentencePiece's BPE in a GGUF file: the sentencepiece library cuts texts as transformers does."""

from __future__ import annotations

import importlib
import io
import json
import logging
import random
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import qalora_compile as qc
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.exporters.checkpoints.gguf.tokenizers import space_prefix
from tests.exporters.checkpoint_cases import causal_lm, folded

PIECES, VOCABULARY = 600, 608
TEXTS = [
    "The railway line opened in 1923, and 45 trains ran on it each day; it's gone.",
    "", "a", "  two  spaces   three    four ", "\n\n new\nlines\r\n\ttabs", "0123456789 3.14159",
    "naïve café — “quoted” … ₿ ½", "😀 a \U0001f469\u200d\U0001f467 b \U0001f1e9\U0001f1ea",
    "日本語の文章、中文", "Ελληνικά и русский עברית", "▁▁ written ▁ out ▁", "<0x0A> <0x41>",
    "anana banana nanana ababa aabaa", "\u00a0\u2003\u200b\ufeff\u0301", "\x01\x7f",
    *(" " * n + "hi" for n in range(1, 40)), *(" " * n for n in range(1, 40)),
]  # fmt: skip
KINDS = ["metaspace", "normalizer"]
CHARACTERS = st.one_of(
    st.sampled_from("aaeinnorst aaeinnorst AB01\n▁😀é "), st.characters(exclude_categories=["Cs"])
)


def sentences() -> Iterator[str]:
    """Words of few letters, some of them often, in a fixed order; numbers, indented lines."""
    draw = random.Random(5)
    words = ["".join(draw.choices("aaeinnorst", k=draw.randint(2, 8))) for _ in range(300)]
    often = [1 / rank for rank in range(1, 301)]
    for number in range(400):
        line = " " * draw.choice((0, 0, 2, 4, 8)) + " ".join(draw.choices(words, often, k=9))
        yield f"{line.capitalize()}, {number}; the café is in {draw.choice('äöü')}rn."


@cache
def trained() -> bytes:
    """A model of sentencepiece as Llama's: BPE, bytes for what is unknown, texts as they are."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(), model_writer=model, model_type="bpe", vocab_size=PIECES,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, split_digits=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def proto(data: bytes = b"") -> Any:
    messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    model = messages.ModelProto()
    model.ParseFromString(data)
    return model


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Edit the tokenizer.json of a folder."""
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text("utf-8"))
    edit(value)
    path.write_text(json.dumps(value), "utf-8")
    return folder


def with_normalizer(value: dict[str, Any]) -> None:
    """Write a tokenizer as older versions of transformers did: by a normalizer, merges by score."""
    from transformers.tokenization_utils_base import generate_merges

    scores = {piece.piece: piece.score for piece in proto(trained()).pieces}
    value["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]}  # fmt: skip
    value["pre_tokenizer"] = None
    value["model"]["unk_token"] = "<unk>"
    merges = generate_merges(value["model"]["vocab"], scores)
    value["model"]["merges"] = [" ".join(pair) for pair in merges]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained tokenizer as transformers writes it, of both kinds."""
    from transformers import LlamaTokenizer

    root = tmp_path_factory.mktemp("tokenizers")
    (root / "tokenizer.model").write_bytes(trained())
    tokenizer = LlamaTokenizer.from_pretrained(root, add_bos_token=True)
    for kind in KINDS:
        tokenizer.save_pretrained(root / kind)
    change(root / "normalizer", with_normalizer)
    config = root / "normalizer" / "tokenizer_config.json"
    config.write_text(config.read_text("utf-8").replace("LlamaTokenizer", "TokenizersBackend"))
    return {kind: root / kind for kind in KINDS}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(
        folders["metaspace"], tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.gguf")
    )


@cache
def model_and_program() -> tuple[nn.Module, qc.Program]:
    model = causal_lm(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
    return model, folded(model)


def export(tokenizer: Path, path: Path | None = None) -> dict[str, Any]:
    """The metadata of a model exported with a tokenizer."""
    (model, program), path = model_and_program(), path or tokenizer / "model.gguf"
    spec = qc.ExportSpec(target="gguf")
    qc.export_model(program, path, spec, model=model, tokenizer=tokenizer)
    fields = gguf.GGUFReader(str(path)).fields
    return {
        name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()
    }


@pytest.fixture(scope="module")
def exported(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {kind: export(path) for kind, path in folders.items()}


def hugging_face(folder: Path) -> Callable[[str], list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids


def pieces(fields: dict[str, Any], *, prefix: bool) -> Callable[[str], list[int]]:
    """A model of the sentencepiece library from what the file says."""
    import sentencepiece

    model = proto()
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id = fields["unknown_token_id"]
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    rows = zip(fields["tokens"], fields["scores"], fields["token_type"], strict=True)
    for piece, score, kind in rows:
        model.pieces.add(piece=piece, score=score, type=kind)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    encode: Callable[[str], list[int]] = processor.encode
    return encode


def llama_cpp(fields: dict[str, Any]) -> Callable[[str], list[int]]:
    """As llama.cpp: special and added tokens are cut out, then each part is a text of its own."""
    cut = pieces(fields, prefix=fields["add_space_prefix"])
    kinds = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.UNKNOWN)
    rows = enumerate(zip(fields["tokens"], fields["token_type"], strict=True))
    added = {text: number for number, (text, kind) in rows if kind in kinds}
    pattern = f"({'|'.join(map(re.escape, sorted(added, key=len, reverse=True)))})"

    def encode(text: str) -> list[int]:
        parts = filter(None, re.split(pattern, text))
        return [n for part in parts for n in ([added[part]] if part in added else cut(part))]

    return encode


@pytest.mark.parametrize("kind", KINDS)
def test_the_sentencepiece_library_gives_the_same_tokens(
    folders: dict[str, Path], exported: dict[str, dict[str, Any]], kind: str
) -> None:
    own, again = hugging_face(folders[kind]), llama_cpp(exported[kind])
    # Metaspace puts no space before one
    texts = [text for text in TEXTS if kind == "normalizer" or text[:1] not in (" ", "▁")]
    assert len(texts) >= 12
    assert [again(text) for text in texts] == [own(text) for text in texts]
    byte_tokens = [n for text in texts for n in own(text) if 3 <= n < 259]
    assert len(byte_tokens) > 50
    assert 0 not in [n for text in texts for n in own(text)]


def test_any_text_gives_the_same_tokens(
    folders: dict[str, Path], exported: dict[str, dict[str, Any]]
) -> None:
    functions = {k: (hugging_face(folders[k]), llama_cpp(exported[k])) for k in KINDS}
    bare = pieces(exported["metaspace"], prefix=False)

    @given(st.text(CHARACTERS))
    def check(text: str) -> None:
        assume("<" not in text)
        own, again = functions["normalizer"]
        assert again(text) == own(text)
        own, again = functions["metaspace"]
        # where alone llama.cpp differs from this kind: a text that begins with a space
        assert own(text) == (bare if text[:1] in (" ", "▁") else again)(text)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_the_older_kind_is_the_model_that_was_trained(
    exported: dict[str, dict[str, Any]], kind: str
) -> None:
    import sentencepiece

    original = sentencepiece.SentencePieceProcessor(model_proto=trained())
    again = llama_cpp(exported[kind])
    texts = TEXTS if kind == "normalizer" else [text for text in TEXTS if "  " not in text]
    assert [again(text) for text in texts] == [original.encode(text) for text in texts]
    scores = {p.piece: p.score for p in proto(trained()).pieces if p.type == 1 and p.score > -1e9}
    written = dict(zip(exported[kind]["tokens"], exported[kind]["scores"], strict=True))
    joined = [piece for piece in scores if len(piece) > 1 and piece.strip("▁")]
    assert len(joined) > 200
    assert sorted(joined, key=scores.__getitem__) == sorted(joined, key=written.__getitem__)


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_says_which_texts_are_cut_otherwise(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    model, program = model_and_program()
    to, spec = tmp_path / "model.gguf", qc.ExportSpec(target="gguf")
    report = qc.export_model(program, to, spec, model=model, tokenizer=folders[kind])
    said = [note for note in report.notes if "before texts that begin with one" in note]
    assert len(said) == (kind == "metaspace")


def test_transformers_reads_the_same_tokenizer(
    folders: dict[str, Path], exported: dict[str, dict[str, Any]]
) -> None:
    from transformers import AutoTokenizer

    assert exported["metaspace"]["scores"]
    own = AutoTokenizer.from_pretrained(folders["metaspace"])
    again = AutoTokenizer.from_pretrained(folders["metaspace"], gguf_file="model.gguf")
    texts = [text for text in TEXTS if "  " not in text]  # it orders runs of spaces anew
    assert again(texts).input_ids == own(texts).input_ids
    assert again("a").input_ids[0] == again.bos_token_id == 1


def test_equal_scores_would_be_noticed(
    folders: dict[str, Path], exported: dict[str, dict[str, Any]]
) -> None:
    own = hugging_face(folders["normalizer"])
    flat = exported["normalizer"] | {"scores": [-1000.0] * VOCABULARY}
    texts = list(islice(sentences(), 20))
    assert [llama_cpp(exported["normalizer"])(text) for text in texts] == list(map(own, texts))
    same = [llama_cpp(flat)(text) == own(text) for text in texts]
    assert sum(same) < 10


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_types(exported: dict[str, dict[str, Any]], kind: str) -> None:
    fields = exported[kind]
    names = ("model", "add_space_prefix", "bos_token_id", "eos_token_id", "unknown_token_id",
             "add_bos_token", "add_eos_token")  # fmt: skip
    assert [fields.get(name) for name in names] == ["llama", True, 1, 2, 0, True, False]
    assert not {"pre", "merges", "padding_token_id"} & set(fields)
    assert fields["tokens"][:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert fields["tokens"][-1] == f"[PAD{VOCABULARY - 1}]"
    kinds = [2, 3, 3] + [6] * 256 + [1] * (PIECES - 259) + [5] * (VOCABULARY - PIECES)
    assert fields["token_type"] == kinds
    assert set(fields["scores"][:259]) == {min(fields["scores"])}
    assert max(fields["scores"]) == 0


def test_added_tokens_are_cut_out_first(folders: dict[str, Path], tmp_path: Path) -> None:
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders["normalizer"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "extra_special_tokens": ["[INST]"]})
    tokenizer.add_tokens([AddedToken("kana", normalized=False), AddedToken("no", normalized=False)])
    tokenizer.save_pretrained(tmp_path)
    fields = export(tmp_path)
    added = dict(zip(fields["tokens"], fields["token_type"], strict=True))
    assert [added[text] for text in ("[PAD]", "[INST]", "kana", "no")] == [3, 3, 4, 4]
    assert fields["padding_token_id"] == fields["tokens"].index("[PAD]")
    again = llama_cpp(fields)
    for text in ("[INST] sakana kanano[INST]  bana", "no", "<s> a</s>", "kanasnookana nanas"):
        assert again(text) == tokenizer(text, add_special_tokens=False).input_ids


def test_no_bos_and_no_prefix_are_said(folder: Path) -> None:
    def edit(value: dict[str, Any]) -> None:
        value["post_processor"] = None
        value["pre_tokenizer"]["prepend_scheme"] = "never"

    fields = export(change(folder, edit))
    assert (fields["add_bos_token"], fields["add_eos_token"]) == (False, False)
    assert fields["add_space_prefix"] is False
    again, bare = llama_cpp(fields), pieces(fields, prefix=False)
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        assert again(text) == bare(text) == own.encode(text, add_special_tokens=False).ids


def test_an_end_that_is_added_is_said(folder: Path) -> None:
    def edit(value: dict[str, Any]) -> None:
        step = value["post_processor"]
        step["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
        value["post_processor"] = {"type": "Sequence", "processors": [step]}

    fields = export(change(folder, edit))
    assert (fields["add_bos_token"], fields["add_eos_token"]) == (True, True)


def test_steps_are_known_by_what_they_do() -> None:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    double = {"type": "Replace", "pattern": {"Regex": r"\A▁"}, "content": "▁▁"}
    space = {"type": "Metaspace", "replacement": "▁", "split": False}

    def prefix(before: list[dict[str, Any]], cut: dict[str, Any] | None) -> bool:
        normalizer = {"type": "Sequence", "normalizers": before}
        return space_prefix({"normalizer": normalizer, "pre_tokenizer": cut}, "here")

    assert prefix([], space | {"prepend_scheme": "always"})
    assert prefix([replace], space | {"prepend_scheme": "first"})
    assert not prefix([replace], space | {"prepend_scheme": "never"})
    assert not prefix([], space | {"add_prefix_space": False})
    assert prefix([], space | {"add_prefix_space": True})
    assert prefix([prepend, replace], None)
    assert not prefix([replace], None)
    assert prefix([replace, double], {"type": "Sequence", "pretokenizers": [space]})
    others: list[tuple[list[dict[str, Any]], dict[str, Any] | None]] = [
        ([], None), ([prepend], None), ([prepend, replace], space), ([double], space),
        ([prepend | {"prepend": "_"}, replace], None), ([], space | {"split": True}),
        ([], {"type": "Metaspace", "replacement": "▁"}),
    ]  # fmt: skip
    for before, cut in others:
        with pytest.raises(UnsupportedError, match="only writes spaces as ▁") as caught:
            prefix(before, cut)
        assert (caught.value.where, bool(caught.value.hint)) == ("here", True)


# Bad input: refused before anything is written.


def refused(folder: Path, kind: type[Exception], words: str) -> None:
    target = folder.parent / "out"
    target.mkdir(exist_ok=True)
    with pytest.raises(kind, match=words) as caught:
        export(folder, target / "model.gguf")
    assert str(folder) in str(caught.value)
    assert list(target.iterdir()) == []


def unigram(value: dict[str, Any]) -> None:
    vocabulary = [[token, 0.0] for token in value["model"]["vocab"]]
    value["model"] = {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": True}


def out_of_order(value: dict[str, Any]) -> None:
    """Put the last of several merges that make a piece behind those of all other pieces."""
    merges = value["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    piece = next(piece for piece in made if made.count(piece) > 2 and piece.strip("▁"))
    merges.append(merges.pop(max(n for n, text in enumerate(made) if text == piece)))


def normalized(value: dict[str, Any]) -> None:
    with_normalizer(value)
    added = {"id": 600, "content": "[kana]", "normalized": True, "special": False}
    value["added_tokens"].append(added)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (unigram, "for a Unigram tokenizer"),
        (lambda value: value.update(normalizer={"type": "NFKC"}), "changes texts by .*NFKC"),
        (out_of_order, "come between those that make"),
        (lambda value: value["model"]["merges"].pop(50), "there is no merge of"),
        (lambda value: value.update(post_processor={"type": "Bert"}), "this tokenizer .*Bert"),
        (
            lambda value: value["model"].update(byte_fallback=False),
            "no rule of llama.cpp is known for a BPE",
        ),
        (lambda value: value["model"].update(ignore_merges=True), "has no .*ignore_merges"),
        (lambda value: value["model"].update(dropout=0.1), "has no .*dropout"),
        (lambda value: value["model"]["vocab"].pop("<0x41>"), "no token for 1 bytes, <0x41>"),
        (lambda value: value["added_tokens"][1].update(rstrip=True), "finds '<s>' without rstrip"),
        (normalized, "finds '.kana.' without normalized"),
        (lambda value: value["post_processor"].update(single=[]), "puts BOS before a text"),
    ],
)
def test_other_tokenizers_are_refused(
    folder: Path, edit: Callable[[dict[str, Any]], object], words: str
) -> None:
    refused(change(folder, edit), UnsupportedError, words)


@pytest.mark.parametrize(
    ("number", "text", "words"),
    [
        (VOCABULARY, "[kana]", f"has token {VOCABULARY}, and the model has {VOCABULARY}"),
        (600, "[PAD601]", r"tokens 600 and 601 are both '\[PAD601\]'"),
    ],
)
def test_tokens_without_a_place_are_refused(
    folder: Path, number: int, text: str, words: str
) -> None:
    added = {"id": number, "content": text, "normalized": False, "special": False}
    change(folder, lambda value: value["added_tokens"].append(added))
    refused(folder, UserInputError, words)


def test_an_end_without_a_name_and_odd_files_are_refused(folder: Path) -> None:
    config, path = folder / "tokenizer_config.json", folder / "tokenizer.json"
    before = path.read_text("utf-8")
    change(folder, lambda value: value["model"]["merges"].append("abc"))
    refused(folder, UserInputError, r"the merge .'abc'. is not a pair")
    path.write_text(before, "utf-8")
    config.write_text(json.dumps({"add_bos_token": True, "eos_token": "</s>"}))
    change(folder, lambda value: value.update(post_processor=None))
    refused(folder, UserInputError, "adds BOS and does not say which")
    path.unlink()
    (folder / "tokenizer.model").write_bytes(trained())
    refused(folder, UnsupportedError, "the tokenizer has no tokenizer.json")


def test_warnings_of_the_gguf_package_are_kept_from_the_terminal(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gguf.SpecialVocab(folder)
    assert "Unknown separator" in caplog.text
    caplog.clear()
    export(folder)
    assert caplog.text == ""
    assert logging.getLogger("gguf.vocab").level == 0
