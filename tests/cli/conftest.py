"""A tiny Hugging Face language model with a tokenizer, and data for it."""

from __future__ import annotations

import io
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qalora_compile.cli.ui import WIDE, console
from tests.cli.tiny import write_data, write_encoder, write_model


@pytest.fixture(autouse=True)
def _wide_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as wide as where the output is no terminal, whatever COLUMNS says (xdist sets 80)."""
    monkeypatch.setattr(console, "width", WIDE)


def _words(axes: Any) -> Hashable:
    legend = axes.get_legend()
    named = () if legend is None else tuple(text.get_text() for text in legend.get_texts())
    return axes.get_xlabel(), axes.get_ylabel(), named


@pytest.fixture(scope="package", autouse=True)
def _rendered_once() -> Iterator[None]:
    """Charts are drawn, and one of each kind is rendered; tests/pages looks at what is seen."""
    from matplotlib.figure import Figure

    save, rendered = Figure.savefig, dict[Hashable, str]()

    def savefig(self: Figure, file: io.StringIO, **options: Any) -> None:
        key = tuple(map(_words, self.axes))
        if key not in rendered:
            text = io.StringIO()
            save(self, text, **options)
            rendered[key] = text.getvalue()
        file.write(rendered[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield


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
