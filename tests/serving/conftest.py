"""Edge folders of tiny models: a Llama with a tokenizer, once with a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qalora_compile.cli.main import main
from tests.cli.tiny import WORDS, write_model

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} <turn> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
"""`<turn>` ends each message, and no configuration names it."""


def add_template(folder: Path) -> None:
    """Give the tokenizer of a model's folder a chat template and the token that ends its turns."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = tokenizer.get_vocab()
    tokenizer.add_special_tokens({"additional_special_tokens": ["number"]})
    assert len(tokenizer) == len(words)
    tokenizer.chat_template = TEMPLATE.replace("<turn>", "number")
    tokenizer.save_pretrained(folder)


def write_talker(folder: Path) -> Path:
    """A tiny Llama that is unlikely to end a text at once: its end tokens have small logits."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(write_model(folder))
    with torch.no_grad():
        model.lm_head.weight[[0, 1, 2 + WORDS.index("number")]] *= 0.01
    model.save_pretrained(folder)
    return folder


def quantized(folder: Path, out: Path, *options: str) -> Path:
    """The edge folder of a model."""
    words = ["quantize", str(folder), "--group-size", "16", "--out", str(out), *options]
    assert main(words) == 0
    return out


@pytest.fixture(scope="session")
def plain_edge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model without a chat template."""
    root = tmp_path_factory.mktemp("plain")
    return quantized(write_talker(root / "model"), root / "edge")


@pytest.fixture(scope="session")
def chat_edge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with a chat template, whose generation settings say to sample."""
    root = tmp_path_factory.mktemp("chat")
    folder = write_talker(root / "model")
    add_template(folder)
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text("utf-8"))
    sampling = {"do_sample": True, "temperature": 0.5, "top_k": 5, "min_p": 0.0625}
    path.write_text(json.dumps(settings | sampling), "utf-8")
    return quantized(folder, root / "edge")
