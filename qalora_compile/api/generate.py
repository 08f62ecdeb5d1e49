"""`generate`: continue a prompt with an exported model in ONNX Runtime, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qalora_compile.api.edge import read_edge_record
from qalora_compile.api.text_model import edge_tokenizer, stop_tokens
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.runtime.encoder_decoder import EncoderDecoder
from qalora_compile.runtime.language_model import LanguageModel, Sampling
from qalora_compile.runtime.session import open_session
from qalora_compile.serving.text_stream import TextStream
from qalora_compile.training.data.tokenize import prompt_tokens
from qalora_compile.untrusted.artifacts import encoder_decoder_files, model_file
from qalora_compile.untrusted.tokenizer import render_chat


@dataclass(frozen=True, kw_only=True)
class GenerateSpec:
    """A prompt to continue.

    Attributes:
        folder: A folder written by `export_folder` or `quantize_folder`.
        prompt: The text.
        chat: Wrap the prompt in the chat template of the tokenizer.
        max_new_tokens: Largest number of tokens to add.
        temperature, top_p, seed: See `runtime.Sampling`; temperature 0 is greedy.
        threads: Number of threads of ONNX Runtime.
    """

    folder: Path
    prompt: str
    chat: bool = False
    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserInputError(f"--max-new-tokens is {self.max_new_tokens}", hint="use 1 or more")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A generation that has not started.

    Attributes:
        prompt: The tokens of the prompt.
        pieces: The text of each new token; "" if a character is not complete yet.
        cached: Whether the model has a key-value cache.
    """

    prompt: tuple[int, ...]
    pieces: Iterator[str]
    cached: bool


def generate(spec: GenerateSpec) -> Generation:
    """Open a model and encode the prompt; reading `pieces` generates the tokens.

    Raises:
        UserInputError: a value is out of range, a file is missing or broken, or the folder holds no
            tokenizer.
        UnsupportedError: the model takes audio instead of text.
    """
    folder, record = spec.folder, read_edge_record(spec.folder)
    sampling = Sampling(temperature=spec.temperature, top_p=spec.top_p, seed=spec.seed)
    model = _open(folder, record, spec.threads)
    tokenizer = edge_tokenizer(folder)
    decodes_alone = isinstance(model, EncoderDecoder)
    prompt = _tokens(tokenizer, spec, encodes=decodes_alone)
    stop = sorted(stop_tokens(record, folder, tokenizer))
    tokens = _generate(model, prompt, spec.max_new_tokens, stop, sampling)
    return Generation(
        prompt=tuple(prompt),
        pieces=map(TextStream(tokenizer, skip_special=decodes_alone).add, tokens),
        cached=isinstance(model, EncoderDecoder) or model.cached,
    )


def _open(
    folder: Path, record: Mapping[str, Any], threads: int | None
) -> LanguageModel | EncoderDecoder:
    """The model in an edge folder.

    Raises:
        UnsupportedError: the model takes audio instead of text.
        UserInputError: a file is missing or broken.
    """
    length = record.get("context_length")
    if encoder_decoder_files(folder) is None:
        session = open_session(model_file(folder), threads=threads)
        return LanguageModel(session, context_length=length)
    start = record.get("decoder_start", ())
    model = EncoderDecoder.open(folder, threads=threads, start=start, context_length=length)
    if not model.reads:
        raise UnsupportedError(
            "the model takes audio features, and --prompt is text",
            where=str(folder),
            hint="in code: qalora_compile.runtime.EncoderDecoder.open(DIR).generate("
            '{"audio_features": …}, prompt=[…], max_new_tokens=…)',
        )
    return model


def _generate(
    model: LanguageModel | EncoderDecoder,
    prompt: list[int],
    count: int,
    stop: list[int],
    sampling: Sampling,
) -> Iterator[int]:
    """The new tokens: after the prompt, or from the decoder given the encoded prompt."""
    if isinstance(model, LanguageModel):
        return model.generate(prompt, max_new_tokens=count, stop=stop, sampling=sampling)
    inputs = {"input_ids": np.array([prompt], np.int64)}
    return model.generate(inputs, max_new_tokens=count, stop=stop, sampling=sampling)


def _tokens(tokenizer: Any, spec: GenerateSpec, *, encodes: bool) -> list[int]:
    """The prompt's tokens as in training: an encoder reads a text with its end token."""
    text = spec.prompt
    if spec.chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UserInputError("the tokenizer has no chat template", hint="leave --chat out")
        messages = [{"role": "user", "content": text}]
        text = render_chat(tokenizer, messages, prompt=True, where=str(spec.folder))
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    if encodes:
        return list(tokenizer(text).input_ids)
    return prompt_tokens(tokenizer, text)
