"""How to run an edge folder in each client that its target and its model fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qalora_compile.api import card_snippets as snippets
from qalora_compile.api.card_text import code
from qalora_compile.untrusted.artifacts import (
    CONFIG_FILE,
    COREML_FILE,
    MERGED_FILE,
    MODEL_FILE,
    OPENVINO_ENCODER_FILE,
    OPENVINO_FILE,
    PREPROCESSOR_FILE,
    TORCH_FILE,
)

_OTHERS = {
    "openvino": ("OpenVINO", snippets.OPENVINO_ANY),
    "torch": ("torch", snippets.TORCH),
    "coreml": ("Core ML", snippets.COREML),
}
"""Target → the client of its files, and how it runs them; targets of ONNX have several."""


@dataclass(frozen=True)
class Traits:
    """What the record of an edge folder says of its model.

    Attributes:
        task: The `pipeline_tag` of Hugging Face; None if none is known.
        library: The `library_name` of Hugging Face.
        cache: Whether it is a language model with a key-value cache in one graph.
        form: `"onnx"`, or the target: `"openvino"`, `"torch"` or `"coreml"`.
        single: Whether it is one graph, at the place that clients look at.
        pair: Whether it is an encoder and a decoder that read and write texts.
        merged: Whether they are in the form of transformers.js and optimum.
        described: Whether the model is of transformers, so that there is a `config.json`.
        genai: Whether ONNX Runtime GenAI runs it.
        tokens: Whether the folder has a tokenizer.
        sentences: Whether there are files of sentence-transformers.
    """

    task: str | None
    library: str
    cache: bool
    form: str
    single: bool
    pair: bool
    merged: bool
    described: bool
    genai: bool
    tokens: bool
    sentences: bool


def traits_of(record: Mapping[str, Any], files: Mapping[str, int]) -> Traits:
    """The traits of an edge folder.

    Args:
        record: Its `qalora.json`.
        files: Name → bytes of its files.
    """
    marks = {
        OPENVINO_FILE: "openvino",
        OPENVINO_ENCODER_FILE: "openvino",
        TORCH_FILE: "torch",
        COREML_FILE: "coreml",
    }
    form = next((marks[top] for name in files if (top := name.split("/")[0]) in marks), "onnx")
    sentences = "modules.json" in files
    cache = bool(record.get("kv_cache"))
    reads_files = PREPROCESSOR_FILE in files
    task = _task(str(record.get("architecture")), record, cache=cache, reads_files=reads_files)
    single = (form != "onnx" or MODEL_FILE in files) and OPENVINO_ENCODER_FILE not in files
    pair = task == _SEQUENCES and form == "onnx" and not single
    described = CONFIG_FILE in files
    library = "sentence-transformers" if sentences and form == "onnx" else form
    opens = MERGED_FILE in files or (single and task and (cache or task != _GENERATION))
    if library == "onnx" and described and opens:
        library = "transformers.js"
    return Traits(
        task=task,
        library=library,
        cache=cache and single,
        form=form,
        single=single,
        pair=pair,
        merged=pair and MERGED_FILE in files,
        described=described,
        genai=record.get("genai") == "yes",
        tokens="tokenizer.json" in files,
        sentences=sentences,
    )


_GENERATION, _CLASSIFICATION = "text-generation", "text-classification"
_IMAGES, _AUDIO = "image-classification", "audio-classification"
_SEQUENCES, _SPEECH = "text2text-generation", "automatic-speech-recognition"
_FEATURES, _SENTENCES_TASK = "feature-extraction", "sentence-similarity"
_TASKS = {
    "ForCausalLM": _GENERATION,
    "LMHeadModel": _GENERATION,
    "ForSequenceClassification": _CLASSIFICATION,
    "ForTokenClassification": "token-classification",
    "ForImageClassification": _IMAGES,
    "ForAudioClassification": _AUDIO,
    "WhisperForConditionalGeneration": _SPEECH,
    "T5ForConditionalGeneration": _SEQUENCES,
    "BartForConditionalGeneration": _SEQUENCES,
    "ForMaskedLM": "fill-mask",
}


def _task(
    architecture: str, record: Mapping[str, Any], *, cache: bool, reads_files: bool
) -> str | None:
    if record.get("pooling"):
        return _SENTENCES_TASK
    if record.get("classes") and reads_files:
        return _IMAGES if architecture.endswith("ForImageClassification") else _AUDIO
    if record.get("classes"):
        return _CLASSIFICATION
    named = next((task for end, task in _TASKS.items() if architecture.endswith(end)), None)
    if named is None and architecture.endswith("Model") and not cache:
        return _FEATURES
    return named


_OF_FILES = {_IMAGES: snippets.ORT_IMAGE, _AUDIO: snippets.ORT_AUDIO}


def client_sections(traits: Traits) -> Iterator[tuple[str, str]]:
    """The name of each client that runs the folder, and how, as Markdown.

    The commands run in the folder itself.
    """
    if traits.form in _OTHERS:
        how = _OTHERS[traits.form]
        if traits.form == "openvino" and traits.cache and traits.tokens:
            how = ("OpenVINO GenAI", snippets.OPENVINO_LM)
        if traits.form == "openvino" and not traits.single:
            how = (how[0], snippets.OPENVINO_PAIR)
            if traits.task == _SPEECH and traits.tokens:
                how = ("OpenVINO GenAI", snippets.OPENVINO_WHISPER)
        yield how[0], code("python", how[1])
        return
    if traits.single:
        yield "ONNX Runtime", code("python", _onnx_runtime(traits))
    if traits.merged and traits.tokens:
        yield "ONNX Runtime", code("python", snippets.ORT_PAIR)
    if (traits.cache or traits.pair) and traits.tokens:
        yield "qalora-compile", code("bash", snippets.OWN)
    if traits.genai and traits.single:
        yield "ONNX Runtime GenAI", code("python", snippets.GENAI)
    if traits.described and traits.tokens and (traits.single or traits.merged):
        yield from _of_transformers(traits)


def _onnx_runtime(traits: Traits) -> str:
    if traits.cache and traits.tokens:
        return snippets.ORT_CACHE
    if traits.task in _OF_FILES:
        return _OF_FILES[traits.task]
    reads_texts = traits.task in (_CLASSIFICATION, _FEATURES, _SENTENCES_TASK)
    return snippets.ORT if traits.tokens and reads_texts else snippets.ORT_ANY


def _of_task(traits: Traits) -> tuple[str, str, str, str, str] | None:
    """Task, text and options of transformers.js, and class and calls of optimum."""
    text, more = "A sentence to read.", ", { max_new_tokens: 32 }"
    if traits.cache:
        begin = "The capital of France is"
        return _GENERATION, begin, more, "ORTModelForCausalLM", snippets.OPTIMUM_GENERATE
    if traits.merged:
        return _SEQUENCES, text, more, "ORTModelForSeq2SeqLM", snippets.OPTIMUM_SEQUENCE
    if traits.task == _CLASSIFICATION:
        kind = "ORTModelForSequenceClassification"
        return _CLASSIFICATION, text, "", kind, snippets.OPTIMUM_CLASSIFY
    return None


def _of_transformers(traits: Traits) -> Iterator[tuple[str, str]]:
    """The clients that read `config.json`: transformers.js, sentence-transformers, optimum."""
    chosen = _of_task(traits)
    if chosen is not None:
        task, text, more, kind, use = chosen
        yield "transformers.js", code("js", snippets.JS.format(task=task, text=text, more=more))
        yield "optimum", code("python", snippets.OPTIMUM.format(kind=kind, use=use))
    elif traits.sentences:
        yield "sentence-transformers", code("python", snippets.SENTENCES)
