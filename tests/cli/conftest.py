"""A tiny Hugging Face language model with a tokenizer, and data for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qalora_compile.cli.ui import WIDE, console
from tests.cli.tiny import write_data, write_encoder, write_model


@pytest.fixture(autouse=True)
def _wide_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as wide as where the output is no terminal, whatever COLUMNS says (xdist sets 80)."""
    monkeypatch.setattr(console, "width", WIDE)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers as a folder of config, safetensors and tokenizer."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words and their kind."""
    return write_data(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT encoder of one layer, without a head, as a folder."""
    return write_encoder(tmp_path_factory.mktemp("encoder"))
