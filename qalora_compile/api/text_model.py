"""Open an edge folder as a language model with its tokenizer, end tokens and sampling."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from qalora_compile.api.edge import GENERATION_FILE, MODEL_CONFIG_FILE, read_edge_record
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.end_tokens import end_tokens
from qalora_compile.progress import say
from qalora_compile.runtime.language_model import LanguageModel, Sampling
from qalora_compile.runtime.session import open_session
from qalora_compile.serving.text_model import TextModel
from qalora_compile.training.data.tokenize import prompt_tokens
from qalora_compile.untrusted import quoted, read_object
from qalora_compile.untrusted.artifacts import OPENVINO_FILE, encoder_decoder_files, model_file
from qalora_compile.untrusted.tokenizer import load_tokenizer

_NEUTRAL: dict[str, float] = {
    "min_p": 0.0,
    "typical_p": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
}
"""Settings of sampling that are not implemented here, and the values that change nothing."""


def open_text_model(folder: Path, *, threads: int | None = None) -> TextModel:
    """Open an edge folder with a language model.

    Raises:
        UserInputError: a file is missing or broken, or the folder holds no tokenizer.
        UnsupportedError: the folder holds a model of another kind.
    """
    if encoder_decoder_files(folder) is not None:
        raise UnsupportedError(
            "the model has an encoder and a decoder, and a conversation needs a decoder alone",
            where=str(folder),
            hint="qalora-compile generate runs it",
        )
    if (folder / OPENVINO_FILE).is_file() and not model_file(folder).is_file():
        raise UnsupportedError(
            "the folder is for OpenVINO",
            where=str(folder),
            hint="run it with OpenVINO GenAI, or export with target ort",
        )
    record = read_edge_record(folder)
    tokenizer = edge_tokenizer(folder)
    session = open_session(model_file(folder), threads=threads)
    settings = _settings(folder, GENERATION_FILE)
    sampling, ignored = folder_sampling(settings, str(folder))
    return TextModel(
        model=LanguageModel(session, context_length=record.get("context_length")),
        tokenizer=tokenizer,
        encode=partial(prompt_tokens, tokenizer),
        ends=stop_tokens(record, folder, tokenizer),
        sampling=sampling,
        ignored=ignored,
        where=str(folder),
    )


def edge_tokenizer(folder: Path) -> Any:
    """The tokenizer of an edge folder.

    Raises:
        UserInputError: there is none, or it is broken.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise UserInputError(
            "the folder holds no tokenizer", where=str(folder), hint="export a model that has one"
        )
    return tokenizer


def stop_tokens(record: Mapping[str, Any], folder: Path, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: of the record, the model's settings and the tokenizer."""
    config, generation = (_settings(folder, file) for file in (MODEL_CONFIG_FILE, GENERATION_FILE))
    found = end_tokens(config, generation, tokenizer=tokenizer)
    return frozenset([*record.get("end_tokens", ()), *found])


def folder_sampling(settings: Mapping[str, Any], where: str) -> tuple[Sampling, tuple[str, ...]]:
    """Sampling as `generation_config.json` has it, and its entries that have no effect here.

    Raises:
        UserInputError: an entry is out of range.
    """
    ignored = tuple(
        f"{name} {quoted(value)}"
        for name, neutral in _NEUTRAL.items()
        if (value := settings.get(name)) not in (None, neutral)
    )
    known = {"repetition_penalty": 1.0}
    if settings.get("do_sample") is True:
        known |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    for name in known:
        value = settings.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            known[name] = value
        elif value is not None:
            raise UserInputError(
                f"{name} is {quoted(value)}, not a number", where=f"{where}/{GENERATION_FILE}"
            )
    sampling = Sampling(
        temperature=known.get("temperature", 0.0),
        top_p=known.get("top_p", 1.0),
        top_k=int(known.get("top_k", 0)),
        repetition_penalty=known["repetition_penalty"],
    )
    return sampling, ignored


def say_ignored(model: TextModel) -> None:
    """Print the folder's settings of sampling that have no effect here."""
    if model.ignored:
        say(f"note: without effect here, from {GENERATION_FILE}: {', '.join(model.ignored)}")


def _settings(folder: Path, file: str) -> dict[str, Any]:
    """The content of a JSON file; empty if it is missing."""
    return read_object(folder / file) if (folder / file).is_file() else {}
