"""Encoder-decoder models with random weights in transformers.js and optimum: torch's tokens."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import qalora_compile as qc
from qalora_compile.api.run_folder import TOKENIZER, save_description, write_run_file
from qalora_compile.cli.main import main
from qalora_compile.untrusted.artifacts import ENCODER_FILE, MERGED_FILE
from tests.capture.test_merged_decoder import NEW_TOKENS, tokens_of_torch
from tests.clients.conftest import WEB, run, script
from tests.clients.record import TOY, record_client
from tests.clients.test_clients import card_says, js_version, version_in
from tests.exporters.test_encoder_decoder import START, build
from tests.models import VOCABULARY, randomize_adapters
from tests.zoo.entries import ENTRIES

pytestmark = pytest.mark.slow
SENTENCE = "A sentence to read."
SHOWN = {"t5": "T5", "bart": "BART", "whisper": "Whisper"}


def edge_of(
    name: str, folder: Path, words: PreTrainedTokenizerFast | None = None
) -> tuple[Path, dict[str, Any], list[int]]:
    """An edge folder with a merged decoder, an input, and torch's tokens for it.

    With a tokenizer, the input is the sentence of the model card.
    """
    plain = build(name)
    model = copy.deepcopy(plain)
    adapted = qc.adapt_module_(model, (), ENTRIES[name].inputs(2, 7, 0)[1])
    program = qc.fold_adapters(randomize_adapters(adapted).eval())
    program.save(folder / "folded")
    save_description(plain, folder / "folded")
    write_run_file(folder / "folded", {"model": name})
    if words is not None:
        words.save_pretrained(folder / "folded" / TOKENIZER)
    edge = folder / name
    assert main(["export", str(folder / "folded"), "--out", str(edge), "--merged-decoder"]) == 0
    kwargs = dict(ENTRIES[name].inputs(1, 9, 3)[1])
    kwargs.pop("decoder_input_ids")
    if words is not None:
        kwargs = dict(words(SENTENCE, return_tensors="pt", return_token_type_ids=False))
    return edge, kwargs, [START[name], *tokens_of_torch(model.eval(), kwargs, START[name])]


def call_of(kwargs: dict[str, Any], start: int) -> str:
    """What sequences.mjs takes."""
    made: dict[str, Any] = {"start": start, "tokens": NEW_TOKENS}
    if "input_ids" in kwargs:
        made["ids"] = kwargs["input_ids"][0].tolist()
    else:
        features = kwargs["input_features"]
        made |= {"features": features.flatten().tolist(), "dims": list(features.shape)}
    return json.dumps(made)


@pytest.mark.parametrize("name", SHOWN)
def test_transformers_js_in_node_generates_torch_s_tokens(
    name: str, node: str, tmp_path: Path
) -> None:
    edge, kwargs, expected = edge_of(name, tmp_path)
    assert (edge / ENCODER_FILE).is_file()
    assert (edge / MERGED_FILE).is_file()
    call = call_of(kwargs, START[name])
    assert run([node, script("sequences.mjs"), WEB, edge, call]) == expected
    record_client(
        "transformers.js in Node.js, --merged-decoder",
        js_version(),
        "ort",
        f"{SHOWN[name]}, random weights",
        f"torch's {NEW_TOKENS} tokens",
        speed=TOY,
    )


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_optimum_generates_torch_s_tokens(name: str, python: Path, tmp_path: Path) -> None:
    edge, kwargs, expected = edge_of(name, tmp_path)
    words: list[str | Path] = ["optimum_sequence", edge, call_of(kwargs, START[name])]
    assert run([python, script("python_clients.py"), *words]) == expected
    record_client(
        "optimum-onnx, --merged-decoder",
        version_in(python, "optimum-onnx"),
        "ort",
        f"{SHOWN[name]}, random weights",
        f"torch's {NEW_TOKENS} tokens",
        speed=TOY,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token of the zoo's T5; those of the card's sentence are among them."""
    words = ["<start>", "<end>", "<unk>", "A", "sentence", "to", "read", "."]
    words += [f"w{number}" for number in range(VOCABULARY - len(words))]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<end>")


def test_the_code_of_the_card_writes_what_torch_writes(
    node: str, python: Path, tmp_path: Path
) -> None:
    words = tokenizer()
    edge, _, expected = edge_of("t5", tmp_path, words)
    assert 1 not in expected, "the end token would stop clients"
    text = words.decode(expected[1:])
    assert text in card_says(edge, "ONNX Runtime", [sys.executable, "-c"])
    assert text in card_says(edge, "optimum", [str(python), "-c"])
    moved = tmp_path / "moved"
    shutil.copytree(edge, moved)
    (moved / "node_modules").symlink_to(WEB / "node_modules")
    assert text in card_says(moved, "transformers.js", [node, "--input-type=module", "-e"])
