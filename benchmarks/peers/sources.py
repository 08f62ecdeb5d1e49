"""The models that are compared, as Hugging Face folders of floats, and the text they read."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qalora_compile.capture.load_source import load_source
from qalora_compile.files import atomic_folder
from qalora_compile.untrusted import read_json
from qalora_compile.untrusted.tokenizer import load_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def assets() -> Any:
    """The module that fetches the demo's model and texts."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    import assets as module

    return module


def write_smollm2(folder: Path, _: Path) -> None:
    """SmolLM2-135M-Instruct in float32: the values of its Q4_1 file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    source = load_source(str(assets().model_path()))
    config: Any = source.model.config
    settings = config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(source.model.state_dict())
    model.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)


def write_random_1b(folder: Path, cache: Path) -> None:
    """A Llama of 1.07 billion random weights in bfloat16, with the tokenizer of SmolLM2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    smollm2 = source_folder("smollm2", cache)
    settings = {name: read_json(smollm2 / "config.json").get(name) for name in _TOKENS}
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
        **settings,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in _TOKENIZER:
        if (smollm2 / name).is_file():
            shutil.copyfile(smollm2 / name, folder / name)


_TOKENS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
MODELS: dict[str, Callable[[Path, Path], None]] = {
    "smollm2": write_smollm2,
    "random-1b": write_random_1b,
}


def source_folder(model: str, cache: Path) -> Path:
    """The Hugging Face folder of a model: one of `MODELS`, or a folder itself."""
    if model not in MODELS:
        return Path(model)
    folder = cache / model / "source"
    if not folder.is_dir():
        with atomic_folder(folder) as scratch:
            MODELS[model](scratch, cache)
    return folder


def text_tokens(folder: Path, count: int) -> list[int]:
    """The first tokens of news articles; random ones for a model without a tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        size = read_json(folder / "config.json")["vocab_size"]
        generator = random.Random(0)
        return [generator.randrange(size) for _ in range(count)]
    tokenizer = load_tokenizer(folder)
    tokens: list[int] = []
    for text, _ in assets().articles():
        tokens += tokenizer(text).input_ids
        if len(tokens) >= count:
            break
    return tokens[:count]
