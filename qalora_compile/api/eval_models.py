"""Models of any form as a function from tokens to logits, for `eval`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qalora_compile.api.edge import GENERATION_FILE, MODEL_CONFIG_FILE, read_edge_record
from qalora_compile.api.run_folder import MODEL, TOKENIZER, load_run
from qalora_compile.capture.classifier import classes_of, load_media_classifier
from qalora_compile.capture.load_source import load_source
from qalora_compile.errors import UnsupportedError
from qalora_compile.exporters.onnx.genai_config import decoder_start
from qalora_compile.ir.stages import ADAPTED
from qalora_compile.runtime.encoder_decoder import EncoderDecoder
from qalora_compile.runtime.language_model import LanguageModel
from qalora_compile.runtime.session import open_session, run_values
from qalora_compile.training.evaluate import Forward, program_forward, rows_of
from qalora_compile.untrusted import read_object
from qalora_compile.untrusted.artifacts import ArtifactKind, encoder_decoder_files, find_artifact
from qalora_compile.untrusted.media_processor import MediaProcessor, load_preprocessor


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A model that can be evaluated.

    Attributes:
        form: `run`, `folded`, `edge`, `GGUF`, `quantized checkpoint` or `float`.
        forward: Tokens → logits.
        tokenizer: The tokenizer, a `MediaProcessor`, or None.
        decoder_start: The token with which a decoder begins that has an encoder; None without.
        classes: The classes of a classifier, in the order of its logits.
    """

    form: str
    forward: Forward
    tokenizer: Any
    decoder_start: int | None = None
    classes: tuple[str, ...] = ()


@contextmanager
def opened(reference: str, threads: int | None) -> Iterator[Evaluated]:
    """Open a model; in the block, nothing needs gradients.

    Args:
        reference: A Hugging Face folder, a quantized checkpoint, a `.gguf` file, a RUN, FOLDED or
            export folder, or `package.module:factory`.
        threads: Number of threads of ONNX Runtime.

    Raises:
        UserInputError: it is missing or broken.
        UnsupportedError: it is an export for OpenVINO or Core ML, or an ONNX model without its
            folder.
    """
    found = find_artifact(reference)
    kind = None if found is None else found.kind
    if kind is ArtifactKind.PROGRAM:
        with _program(Path(reference)) as model:
            yield model
    elif kind in (ArtifactKind.ONNX, ArtifactKind.ENCODER_DECODER):
        yield _edge(Path(reference), threads)
    elif kind is ArtifactKind.OPENVINO:
        raise UnsupportedError(
            "eval does not run OpenVINO models", where=reference, hint="export with target ort"
        )
    elif kind is ArtifactKind.COREML:
        raise UnsupportedError(
            "eval does not run Core ML packages", where=reference, hint="export with target ort"
        )
    else:
        yield _source(reference if found is None else str(found.path))


@contextmanager
def _program(folder: Path) -> Iterator[Evaluated]:
    program, record = load_run(folder)
    described = [folder / MODEL / name for name in (MODEL_CONFIG_FILE, GENERATION_FILE)]
    config, generation = (read_object(file) if file.is_file() else {} for file in described)
    encodes = bool(config.get("is_encoder_decoder"))
    with program.evaluating():
        yield Evaluated(
            form="run" if program.stage == ADAPTED else "folded",
            forward=program_forward(program),
            tokenizer=load_preprocessor(folder / TOKENIZER),
            decoder_start=decoder_start(config, generation)[0] if encodes else None,
            classes=tuple(record.get("reading", {}).get("classes", ())),
        )


def _source(reference: str) -> Evaluated:
    source = load_media_classifier(reference) or load_source(reference)
    media = isinstance(source.tokenizer, MediaProcessor)
    names = tuple(source.kwargs) if media else ("input_ids", "attention_mask")
    # As in training, whatever a checkpoint in float stores; the others are read as float32.
    model = source.model.float() if source.read_codes is None else source.model

    def forward(input_ids: Tensor, attention_mask: Tensor, *encoder: Tensor) -> Tensor:
        inputs = dict(zip(names, (input_ids, attention_mask), strict=False))
        if encoder:
            inputs = dict(zip(("input_ids", "attention_mask"), encoder, strict=True))
            inputs["decoder_input_ids"] = input_ids
        return rows_of(model(**inputs))

    classifies = type(model).__name__.endswith("ForSequenceClassification")
    forms = {"huggingface": "float" if source.read_codes is None else "quantized checkpoint"}
    return Evaluated(
        form=forms.get(source.kind, {"gguf": "GGUF"}.get(source.kind, "float")),
        forward=forward,
        tokenizer=source.tokenizer,
        decoder_start=source.decoder_start,
        classes=classes_of(source) if classifies or media else (),
    )


def _edge(path: Path, threads: int | None) -> Evaluated:
    folder = path if path.is_dir() else path.parent
    record = read_edge_record(folder)
    classes = tuple(record.get("classes", ()))
    start: int | None = None
    if encoder_decoder_files(folder) is not None:
        pair = EncoderDecoder.open(folder, threads=threads)
        forward, start = _by_pair(pair), next(iter(record.get("decoder_start", ())), None)
    else:
        session = open_session(path, threads=threads)
        forward = _by_classifier(session) if classes else _by_steps(LanguageModel(session))
    return Evaluated(
        form="edge",
        forward=forward,
        tokenizer=load_preprocessor(folder),
        decoder_start=start,
        classes=classes,
    )


def _by_steps(model: LanguageModel) -> Forward:
    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.from_numpy(model.logits(input_ids.numpy(), attention_mask.numpy()))

    return forward


def _by_pair(model: EncoderDecoder) -> Forward:
    def forward(input_ids: Tensor, _: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        given: dict[str, np.ndarray[Any, Any]] = {"input_ids": tokens.numpy()}
        encoded = model.encode(given | {"attention_mask": mask.numpy()})
        cache = model.empty_cache(encoded.batch)
        return torch.from_numpy(model.step(input_ids.numpy(), encoded, cache)[0])

    return forward


def _by_classifier(session: Any) -> Forward:
    from onnxruntime import OrtValue

    names = [each.name for each in session.get_inputs()]
    first = next(name for name in names if name != "attention_mask")  # or features of a file
    output = session.get_outputs()[0].name

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        feed = {first: input_ids, "attention_mask": attention_mask}
        values = {n: OrtValue.ortvalue_from_numpy(t.numpy()) for n, t in feed.items() if n in names}
        return torch.from_numpy(run_values(session, [output], values)[0].numpy())

    return forward
