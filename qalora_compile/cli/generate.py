"""`generate`: continue a prompt with an exported model in ONNX Runtime."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qalora_compile.cli.edge import read_edge_record
from qalora_compile.cli.ui import console, megabytes, print_summary
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.runtime.encoder_decoder import EncoderDecoder
from qalora_compile.runtime.footprint import peak_memory
from qalora_compile.runtime.language_model import LanguageModel, Sampling
from qalora_compile.runtime.session import open_session
from qalora_compile.training.data.tokenize import prompt_tokens
from qalora_compile.untrusted.artifacts import ENCODER_FILE
from qalora_compile.untrusted.tokenizer import load_tokenizer, render_chat

NAME = "generate"
SUMMARY = "continue a prompt with an exported model, greedily or by sampling"
EXAMPLES = """examples:
  qalora-compile generate edge --prompt "The capital of France is"
  qalora-compile generate edge --prompt "Hi" --chat --temperature 0.7 --top-p 0.9 --seed 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", metavar="DIR", help="folder written by export")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (the default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, metavar="N", help="threads of ONNX Runtime")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    if options.max_new_tokens < 1:
        raise UserInputError(f"--max-new-tokens is {options.max_new_tokens}", hint="use 1 or more")
    folder = Path(options.folder)
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    record = read_edge_record(folder)
    model = _open(folder, record, options.threads)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise UserInputError(
            "the folder holds no tokenizer", where=str(folder), hint="export a model that has one"
        )
    prompt = _tokens(tokenizer, options, encodes=isinstance(model, EncoderDecoder))
    own = tokenizer.eos_token_id
    stop = [*record.get("end_tokens", ()), *([] if own is None else [own])]
    started = time.monotonic()
    tokens: list[int] = []
    shown = ""
    first = 0.0
    prompt_goes_on = isinstance(model, LanguageModel)
    for token in _generate(model, prompt, options.max_new_tokens, stop, sampling):
        first = first or time.monotonic() - started
        tokens.append(token)
        text = tokenizer.decode(tokens, skip_special_tokens=not prompt_goes_on)
        if not text.endswith("\ufffd"):  # a character that is not whole yet
            console.print(text[len(shown) :], end="", soft_wrap=True)
            shown = text
    console.print()
    seconds = time.monotonic() - started
    print_summary(
        "generate",
        {
            "prompt tokens": len(prompt),
            "new tokens": len(tokens),
            "first token": f"{first:.3f} s" if tokens else "none generated",
            "tokens/s after it": _rate(len(tokens) - 1, seconds - first),
            "key-value cache": _cache_state(model),
            "peak memory": megabytes(peak_memory()),
        },
    )
    return 0


def _open(
    folder: Path, record: Mapping[str, Any], threads: int | None
) -> LanguageModel | EncoderDecoder:
    """The model in an edge folder.

    Raises:
        UnsupportedError: it hears, and takes no text.
        UserInputError: a file is missing or broken.
    """
    length = record.get("context_length")
    if not (folder / ENCODER_FILE).is_file():
        session = open_session(folder / "model.onnx", threads=threads)
        return LanguageModel(session, context_length=length)
    start = record.get("decoder_start", ())
    model = EncoderDecoder.open(folder, threads=threads, start=start, context_length=length)
    if not model.reads:
        raise UnsupportedError(
            "the model takes features of sound, and --prompt is text",
            where=str(folder),
            hint="in code: qalora_compile.runtime.EncoderDecoder.open(DIR).generate("
            '{"audio_features": …}, prompt=[…], max_new_tokens=…)',
        )
    return model


def _cache_state(model: LanguageModel | EncoderDecoder) -> str:
    cached = isinstance(model, EncoderDecoder) or model.cached
    return "yes" if cached else "no: each token runs all before it again"


def _generate(
    model: LanguageModel | EncoderDecoder,
    prompt: list[int],
    count: int,
    stop: list[int],
    sampling: Sampling,
) -> Iterator[int]:
    """New tokens: after the prompt, or of the decoder that has the prompt's encoding."""
    if isinstance(model, LanguageModel):
        return model.generate(prompt, max_new_tokens=count, stop=stop, sampling=sampling)
    inputs = {"input_ids": np.array([prompt], np.int64)}
    return model.generate(inputs, max_new_tokens=count, stop=stop, sampling=sampling)


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds:.1f}" if count > 0 and seconds > 0 else "only one token"


def _tokens(tokenizer: Any, options: argparse.Namespace, *, encodes: bool) -> list[int]:
    """The tokens of the prompt, as training has them: an encoder reads a text with its end."""
    text = options.prompt
    if options.chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UserInputError("the tokenizer has no chat template", hint="leave --chat out")
        messages = [{"role": "user", "content": text}]
        text = render_chat(tokenizer, messages, prompt=True, where=options.folder)
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    if encodes:
        return list(tokenizer(text).input_ids)
    return prompt_tokens(tokenizer, text)
