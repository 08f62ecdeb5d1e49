"""A Whisper of random weights in OpenVINO GenAI: the text that torch's tokens are."""

from __future__ import annotations

import copy
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

import qalora_compile as qc
from qalora_compile.api.run_folder import TOKENIZER, save_description, write_run_file
from qalora_compile.cli.main import main
from tests.clients.record import TOY, record_client
from tests.exporters.test_encoder_decoder import lively
from tests.models import randomize_adapters

openvino = pytest.importorskip("openvino", reason="openvino is not installed")
genai = pytest.importorskip("openvino_genai", reason="openvino-genai is not installed")
pytestmark = pytest.mark.slow

NEW_TOKENS, RATE = 8, 16000
END, START, PLAIN = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the tokens that Whisper begins and ends with."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END, START, PLAIN]
    made = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, bos_token=END)
    fast.add_special_tokens({"additional_special_tokens": [START, PLAIN]})
    return fast


def whisper(words: PreTrainedTokenizerFast) -> Any:
    """A tiny model that takes what GenAI gives: 80 bins of 3,000 frames."""
    end, start, plain = (words.convert_tokens_to_ids(name) for name in (END, START, PLAIN))
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in SIZES.items()}
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    ends["decoder_start_token_id"] = start
    config = WhisperConfig(
        vocab_size=len(words), d_model=64, max_target_positions=64, **sizes, **ends
    )
    torch.manual_seed(0)
    model: Any = lively(WhisperForConditionalGeneration(config).eval())
    kept = {words.convert_tokens_to_ids(letter) for letter in LETTERS}
    model.generation_config = GenerationConfig(
        **ends,
        is_multilingual=False,
        no_timestamps_token_id=plain,
        max_initial_timestamp_index=50,
        begin_suppress_tokens=[],
        suppress_tokens=[i for i in range(len(words)) if i not in kept],
        max_length=64,
    )
    return model


SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 96}


def test_the_pipeline_writes_the_tokens_of_torch(tmp_path: Path) -> None:
    words, extractor = tokenizer(), WhisperFeatureExtractor()
    plain = whisper(words)
    model = copy.deepcopy(plain)
    sample = {
        "input_features": torch.randn(2, 80, 3000),
        "decoder_input_ids": torch.zeros(2, 3, dtype=torch.int64),
        "use_cache": False,
    }
    adapted = qc.adapt_module_(model, (), sample)
    folded = tmp_path / "folded"
    qc.fold_adapters(randomize_adapters(adapted).eval()).save(folded)
    save_description(plain, folded)
    words.save_pretrained(folded / TOKENIZER)
    extractor.save_pretrained(folded / TOKENIZER)
    write_run_file(folded, {"model": "whisper"})
    edge = tmp_path / "edge"
    assert main(["export", str(folded), "--out", str(edge), "--target", "openvino"]) == 0

    sound = np.sin(np.arange(RATE * 2) / 9) + np.random.default_rng(0).normal(size=RATE * 2) / 3
    pipeline = genai.WhisperPipeline(str(edge), "CPU", INFERENCE_PRECISION_HINT="f32")
    found = pipeline.generate(sound.astype(np.float32).tolist(), max_new_tokens=NEW_TOKENS)
    features = extractor(sound, sampling_rate=RATE, return_tensors="pt").input_features
    expected = words.decode(letters_of_torch(model.eval(), words, features))
    assert found.texts[0].strip() == expected
    assert len(set(expected)) > 1, "a degenerate continuation would show nothing"
    record_client(
        "OpenVINO GenAI, WhisperPipeline",
        metadata.version("openvino-genai"),
        "openvino",
        "Whisper, random weights",
        f"torch's {NEW_TOKENS} tokens",
        speed=TOY,
    )


def letters_of_torch(model: Any, words: PreTrainedTokenizerFast, features: Any) -> list[int]:
    """Greedy tokens that are letters, each from a complete forward pass."""
    tokens = [words.convert_tokens_to_ids(name) for name in (START, PLAIN)]
    letters = torch.tensor([words.convert_tokens_to_ids(letter) for letter in LETTERS])
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            call = {"decoder_input_ids": torch.tensor([tokens]), "use_cache": False}
            logits = model(input_features=features, **call).logits[0, -1]
        tokens.append(int(letters[logits[letters].argmax()]))
    return tokens[2:]
