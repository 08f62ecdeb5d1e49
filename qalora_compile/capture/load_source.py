"""Models by reference: a Hugging Face folder, a `.gguf` file, or `package.module:factory`."""

from __future__ import annotations

import importlib
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qalora_compile.capture.checkpoints.gguf import read_gguf_codes
from qalora_compile.capture.checkpoints.gguf_complete import check_complete
from qalora_compile.capture.checkpoints.open_folder import is_quantized, load_stored
from qalora_compile.capture.encoder_decoder import (
    TOKENS,
    disable_cache,
    full_example,
    is_encoder_decoder,
)
from qalora_compile.capture.loading import check_report, unreadable
from qalora_compile.capture.model import capture_model
from qalora_compile.capture.sentence import encoder_folder
from qalora_compile.capture.sizes import check_gguf_sizes
from qalora_compile.capture.skeleton import model_class, transformers_module
from qalora_compile.capture.transformers_internals import gguf_read_once
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.checkpoint_codes import CheckpointCodes
from qalora_compile.ir.program import Program
from qalora_compile.optional import require
from qalora_compile.untrusted import check_folder
from qalora_compile.untrusted.gguf_header import check_gguf
from qalora_compile.untrusted.tokenizer import load_tokenizer

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_GGUF_MAGIC = b"GGUF"
_NO_VOCABULARY = "no_vocab"
"""The tokenizer model of a GGUF file without a tokenizer (llama.cpp)."""
_EXAMPLE_SHAPE = (2, 16)
_WEIGHTS = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OF_TRAINING = ("training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin", "scaler.pt")
"""Pickles of a trainer that may be next to a model's."""
_CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "t = {k: v for f in sys.argv[2:] for k, v in torch.load(f, map_location='cpu', "
    "weights_only=True).items()}; save_file({k: v.contiguous().clone() for k, v in t.items()}, "
    "sys.argv[1], {'format': 'pt'})"
)
"""A program that reads only tensors from pickles and writes safetensors."""


@dataclass(frozen=True)
class Source:
    """A loaded model with everything needed to capture and use it.

    Attributes:
        reference: As the user wrote it.
        kind: `huggingface`, `gguf` or `factory`.
        model: The model in evaluation mode.
        args, kwargs: Example inputs.
        tokenizer: The tokenizer of a language model, the `MediaProcessor` of a classifier of images
            or audio, or None.
        decoder_start: The token with which the decoder of an encoder-decoder model begins, or None.
        read_codes: Reads the codes of a quantized checkpoint, see `stored`.
        head: Names of the parameters that the checkpoint does not hold and that must be trained.
    """

    reference: str
    kind: str
    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    decoder_start: int | None = None
    head: tuple[str, ...] = ()
    read_codes: Callable[[], tuple[CheckpointCodes, tuple[str, ...]]] | None = None

    def stored(self) -> tuple[CheckpointCodes, tuple[str, ...]]:
        """The codes of the checkpoint, and notes on those that could not be kept.

        Raises:
            UserInputError: the file is broken.
        """
        return (CheckpointCodes(), ()) if self.read_codes is None else self.read_codes()

    def capture(self) -> Program:
        """Capture the model with its example inputs."""
        return capture_model(self.model, self.args, self.kwargs)


def load_source(reference: str, *, zero_points: str | None = None) -> Source:
    """Load a model by reference.

    Args:
        reference: A folder with `config.json` and safetensors, a `.gguf` file, or
            `package.module:factory`, where the factory takes no argument and returns
            `(model, example_args, example_kwargs)`.
        zero_points: How a GPTQ checkpoint stores its zero-points, if its tag is wrong or
            inconclusive: `"v1"`, `"v2"`, `"float"` or `"offset"`
            (`capture.checkpoints.gptq_zeros`).

    Raises:
        UserInputError: the model is missing, a file is truncated or malformed, or the factory
            fails.
        UnsupportedError: the architecture or the checkpoint format is not supported.
    """
    path = Path(reference)
    if path.is_dir():
        check_folder(path)
        return _load_folder(reference, encoder_folder(path), zero_points)
    if path.suffix == ".gguf":
        return _load_gguf(reference, path)
    if _FACTORY.fullmatch(reference):
        return _load_factory(reference)
    if path.suffix in _PICKLES and path.is_file():
        raise _pickled(f"{path.name} is a pickle", path, [path])
    raise UserInputError(
        f"there is no model {reference!r}",
        where=reference,
        hint="give a Hugging Face folder, a .gguf file, or package.module:factory",
    )


def check_safetensors(path: Path) -> None:
    """Check that a model's folder holds readable weights.

    Raises:
        UserInputError: it holds none, or only pickled ones.
    """
    if any(path.glob("*.safetensors")):
        return
    pickled = [each for each in sorted(path.iterdir()) if each.suffix in _PICKLES]
    pickled = [each for each in pickled if each.name not in _OF_TRAINING]
    if pickled:
        raise _pickled("the folder holds no safetensors file, only pickled weights", path, pickled)
    raise UserInputError(
        "the folder holds no safetensors file",
        where=str(path),
        hint="give the complete folder",
    )


def _pickled(what: str, where: Path, files: list[Path]) -> UserInputError:
    """The error for pickles, with a command that writes safetensors next to the first file."""
    words = ["python", "-c", _CONVERT, str(files[0].with_name(_WEIGHTS)), *map(str, files)]
    return UserInputError(
        what,
        where=str(where),
        hint="pickles can run code and are never loaded; this reads only tensors and writes "
        f"{_WEIGHTS}, for the folder to be given: {shlex.join(words)}",
    )


def _load_folder(reference: str, path: Path, zero_points: str | None) -> Source:
    check_safetensors(path)
    stored = load_stored(path, zero_points=zero_points) if is_quantized(path) else None
    model = _load_float(path) if stored is None else stored.model
    source = _language_model(reference, "huggingface", model, load_tokenizer(path))
    if stored is None:
        return source
    return replace(source, read_codes=lambda: (stored.codes(), stored.notes))


def _load_float(path: Path) -> Any:
    """A model in float whose parameters are all in its checkpoint.

    Raises:
        UserInputError: a file is broken, or a parameter is missing and would be random.
    """
    kind = model_class(path)
    try:
        model, found = kind.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # mismatches are refused by name later
        )
    except Exception as error:  # transformers and safetensors raise exceptions of many types
        raise unreadable(path, error) from error
    check_report(found, model, path)
    return model


def _load_gguf(reference: str, path: Path) -> Source:
    if not path.is_file():
        raise UserInputError(f"there is no file {path}", where=str(path))
    with path.open("rb") as file:
        magic = file.read(len(_GGUF_MAGIC))
    if magic != _GGUF_MAGIC:
        raise UserInputError(f"{path.name} is not a GGUF file", where=str(path))
    header = check_gguf(path)
    check_gguf_sizes(header, path)
    require("gguf", extra="hf", purpose="read GGUF files")
    transformers = transformers_module()
    options = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    with gguf_read_once():
        try:
            with redirect_stderr(io.StringIO()):  # the reader shows a progress bar at any verbosity
                tokenizer = _gguf_tokenizer(transformers, path, options)
                model, found = transformers.AutoModelForCausalLM.from_pretrained(
                    path.parent, dtype=torch.float32, output_loading_info=True, **options
                )
        except Exception as error:  # a broken offset can cause any exception in the reader
            raise unreadable(path, error) from error
        check_complete(header, model, found["missing_keys"], path)
    source = _language_model(reference, "gguf", model, tokenizer)
    return replace(source, read_codes=partial(read_gguf_codes, path))


def _gguf_tokenizer(transformers: Any, path: Path, options: Mapping[str, Any]) -> Any:
    """The tokenizer of a GGUF file, or None if the file states that it has none."""
    try:
        return transformers.AutoTokenizer.from_pretrained(path.parent, **options)
    except ValueError as error:
        if _NO_VOCABULARY in str(error):
            return None
        raise


def _load_factory(reference: str) -> Source:
    module_name, _, name = reference.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UserInputError(
            f"cannot find {reference}: {error}", hint="give package.module:factory"
        ) from error
    try:
        made = factory()
    except Exception as error:  # the user's own code
        raise UserInputError(
            f"the factory {reference} failed: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module)):
        raise UserInputError(
            f"the factory {reference} returned a {type(made).__name__}",
            hint="return (model, example_args, example_kwargs)",
        )
    model, args, kwargs = made
    return Source(reference, "factory", model.eval(), tuple(args), dict(kwargs or {}))


def _language_model(reference: str, kind: str, model: Any, tokenizer: Any) -> Source:
    disable_cache(model)
    if is_encoder_decoder(model):
        return _with_encoder(reference, kind, model, tokenizer)
    return Source(reference, kind, model.eval(), (), text_example(model), tokenizer)


def text_example(model: Any) -> dict[str, Tensor]:
    """Random keyword inputs of a model that reads tokens, without padding.

    Raises:
        UnsupportedError: the model reads something else.
    """
    if getattr(model, "main_input_name", TOKENS) != TOKENS or not hasattr(
        model.config, "vocab_size"
    ):
        raise UnsupportedError(
            f"{type(model).__name__} reads {model.main_input_name}, and not texts",
            hint='for classes of images or audio, train on rows of {"image": path, "label": …} or '
            '{"audio": path, "label": …}; for anything else, capture it in code: '
            "qc.capture_model(model, (), inputs)",
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, _EXAMPLE_SHAPE, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _with_encoder(reference: str, kind: str, model: Any, tokenizer: Any) -> Source:
    """The source of a model that reads one text and writes another.

    Raises:
        UnsupportedError: it does not read text.
        UserInputError: it does not name a start token for its decoder.
    """
    kwargs = full_example(model)
    if TOKENS not in kwargs:
        raise UnsupportedError(
            f"{type(model).__name__} takes audio features, but the data are text",
            where=reference,
            hint="train it with a loop of your own: qc.capture_model(model, (), inputs)",
        )
    settings = (model.generation_config, model.config)
    starts = [getattr(where, "decoder_start_token_id", None) for where in settings]
    start = next((token for token in starts if token is not None), None)
    if start is None:
        raise UserInputError(
            "the model does not name a start token for its decoder",
            where=f"{reference}/config.json",
            hint="add decoder_start_token_id",
        )
    return Source(reference, kind, model.eval(), (), kwargs, tokenizer, start)
