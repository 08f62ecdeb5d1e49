"""How to run an edge folder in each client that its target and its model fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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

_ORT = """
# pip install onnxruntime transformers
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
session = onnxruntime.InferenceSession("onnx/model_q4.onnx")
encoded = tokenizer(["A sentence to read."], return_tensors="np")
wanted = {one.name for one in session.get_inputs()}
feeds = {name: array.astype(np.int64) for name, array in encoded.items() if name in wanted}
for output, array in zip(session.get_outputs(), session.run(None, feeds)):
    print(output.name, array.shape)
"""
_ORT_CACHE = """
# pip install onnxruntime transformers
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
session = onnxruntime.InferenceSession("onnx/model_q4.onnx")
inputs, outputs = session.get_inputs(), [one.name for one in session.get_outputs()]
types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
cache = {
    one.name: np.zeros([1, one.shape[1], 0, one.shape[3]], types[one.type])
    for one in inputs
    if one.name.startswith("past_key_values.")
}
ids = tokenizer("The capital of France is", return_tensors="np")["input_ids"].astype(np.int64)
length, text = 0, ids
for _ in range(16):
    length += ids.shape[1]
    positions = np.arange(length - ids.shape[1], length)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones([1, length], np.int64)}
    feeds |= {"position_ids": positions} if "position_ids" in [i.name for i in inputs] else {}
    found = dict(zip(outputs, session.run(None, feeds | cache)))
    cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
    ids = found["logits"][:, -1:].argmax(-1)
    text = np.concatenate([text, ids], axis=1)
print(tokenizer.decode(text[0]))
"""
_ORT_PAIR = """
# pip install onnxruntime transformers
import json
from pathlib import Path

import numpy as np
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
files = ("onnx/encoder_model_q4.onnx", "onnx/decoder_model_merged_q4.onnx")
encoder, decoder = map(onnxruntime.InferenceSession, files)
encoded = tokenizer("A sentence to read.", return_tensors="np")
read = {name: encoded[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
(states,) = encoder.run(None, read)
constant = {"encoder_hidden_states": states, "encoder_attention_mask": read["attention_mask"]}
outputs = [one.name for one in decoder.get_outputs()]
cache = {
    one.name: np.zeros([1, one.shape[1], 0, one.shape[3]], np.float32)
    for one in decoder.get_inputs()
    if one.name.startswith("past_key_values.")
}
ids = np.array([[json.loads(Path("config.json").read_text())["decoder_start_token_id"]]])
text = ids
for _ in range(16):
    found = dict(zip(outputs, decoder.run(None, {"input_ids": ids} | constant | cache)))
    cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
    ids = found["logits"][:, -1:].argmax(-1)
    text = np.concatenate([text, ids], axis=1)
print(tokenizer.decode(text[0]))
"""
_ORT_ANY = """
# pip install onnxruntime
import onnxruntime

session = onnxruntime.InferenceSession("onnx/model_q4.onnx")
for one in [*session.get_inputs(), *session.get_outputs()]:
    print(one.name, one.type, one.shape)
"""
_ORT_IMAGE = """
# pip install onnxruntime pillow transformers
import json
from pathlib import Path

import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained(".", backend="pil")
session = onnxruntime.InferenceSession("onnx/model_q4.onnx")
picture = Image.open("picture.jpg").convert("RGB")
(logits,) = session.run(None, dict(processor(images=[picture], return_tensors="np")))
classes = json.loads(Path("config.json").read_text())["id2label"]
print(classes[str(logits.argmax())])
"""
_ORT_AUDIO = """
# pip install onnxruntime soundfile transformers
import json
from pathlib import Path

import onnxruntime
import soundfile
from transformers import AutoFeatureExtractor

extractor = AutoFeatureExtractor.from_pretrained(".")
session = onnxruntime.InferenceSession("onnx/model_q4.onnx")
samples, rate = soundfile.read("recording.wav", dtype="float32")  # of one channel
inputs = extractor([samples], sampling_rate=rate, return_tensors="np")
types = {"tensor(float)": "float32", "tensor(int64)": "int64"}
feeds = {one.name: inputs[one.name].astype(types[one.type]) for one in session.get_inputs()}
(logits,) = session.run(None, feeds)
classes = json.loads(Path("config.json").read_text())["id2label"]
print(classes[str(logits.argmax())])
"""
_OWN = """
# pip install 'qalora-compile[onnx,hf]'
qalora-compile generate . --prompt "The capital of France is" --max-new-tokens 32
"""
_GENAI = """
# pip install onnxruntime-genai
import onnxruntime_genai

model = onnxruntime_genai.Model(".")
tokenizer = onnxruntime_genai.Tokenizer(model)
ids = tokenizer.encode("The capital of France is")
params = onnxruntime_genai.GeneratorParams(model)
params.set_search_options(max_length=len(ids) + 32, do_sample=False)
generator = onnxruntime_genai.Generator(model, params)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
"""
_JS = """
// npm install --ignore-scripts @huggingface/transformers
import {{ basename, dirname }} from "node:path";
import process from "node:process";
import {{ env, pipeline }} from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = dirname(process.cwd());
const run = await pipeline("{task}", basename(process.cwd()));
console.log(await run("{text}"{more}));
"""
_OPTIMUM = """
# pip install 'optimum-onnx[onnxruntime]'
from optimum.onnxruntime import {kind}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = {kind}.from_pretrained(".")
{use}
"""
_OPTIMUM_GENERATE = """\
inputs = tokenizer("The capital of France is", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))"""
_OPTIMUM_SEQUENCE = """\
inputs = tokenizer("A sentence to read.", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))"""
_OPTIMUM_CLASSIFY = """\
inputs = tokenizer("A sentence to read.", return_tensors="pt")
print(model.config.id2label[int(model(**inputs).logits.argmax(-1))])"""
_SENTENCES = """
# pip install 'sentence-transformers[onnx]'
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".", backend="onnx")
print(model.encode(["A sentence to read.", "Another one."]).shape)
"""
_OPENVINO_LM = """
# pip install openvino-genai
import openvino_genai

pipeline = openvino_genai.LLMPipeline(".", "CPU", INFERENCE_PRECISION_HINT="f32")
print(pipeline.generate("The capital of France is", max_new_tokens=32))
"""
_OPENVINO_ANY = """
# pip install openvino
import openvino

model = openvino.Core().compile_model("openvino_model.xml", "CPU")
for one in [*model.inputs, *model.outputs]:
    print(one.any_name, one.element_type, one.partial_shape)
"""
_OPENVINO_PAIR = """
# pip install openvino
import openvino

for file in ("openvino_encoder_model.xml", "openvino_decoder_model.xml"):
    model = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    print(file, [one.any_name for one in [*model.inputs, *model.outputs]])
"""
_TORCH = """
# pip install torch
import torch

model = torch.export.load("model.pt2").module()
print(model)
"""
_COREML = """
# on macOS 15 or newer: pip install coremltools
import coremltools

model = coremltools.models.MLModel("model.mlpackage")
print(model.get_spec().description)
"""
_OTHERS = {
    "openvino": ("OpenVINO", _OPENVINO_ANY),
    "torch": ("torch", _TORCH),
    "coreml": ("Core ML", _COREML),
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
_SEQUENCES = "text2text-generation"
_FEATURES, _SENTENCES_TASK = "feature-extraction", "sentence-similarity"
_TASKS = {
    "ForCausalLM": _GENERATION,
    "LMHeadModel": _GENERATION,
    "ForSequenceClassification": _CLASSIFICATION,
    "ForTokenClassification": "token-classification",
    "ForImageClassification": _IMAGES,
    "ForAudioClassification": _AUDIO,
    "WhisperForConditionalGeneration": "automatic-speech-recognition",
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


_OF_FILES = {_IMAGES: _ORT_IMAGE, _AUDIO: _ORT_AUDIO}


def client_sections(traits: Traits) -> Iterator[tuple[str, str]]:
    """The name of each client that runs the folder, and how, as Markdown.

    The commands run in the folder itself.
    """
    if traits.form in _OTHERS:
        how = _OTHERS[traits.form]
        if traits.form == "openvino" and traits.cache and traits.tokens:
            how = ("OpenVINO GenAI", _OPENVINO_LM)
        if traits.form == "openvino" and not traits.single:
            how = (how[0], _OPENVINO_PAIR)
        yield how[0], code("python", how[1])
        return
    if traits.single:
        yield "ONNX Runtime", code("python", _onnx_runtime(traits))
    if traits.merged and traits.tokens:
        yield "ONNX Runtime", code("python", _ORT_PAIR)
    if (traits.cache or traits.pair) and traits.tokens:
        yield "qalora-compile", code("bash", _OWN)
    if traits.genai and traits.single:
        yield "ONNX Runtime GenAI", code("python", _GENAI)
    if traits.described and traits.tokens and (traits.single or traits.merged):
        yield from _of_transformers(traits)


def _onnx_runtime(traits: Traits) -> str:
    if traits.cache and traits.tokens:
        return _ORT_CACHE
    if traits.task in _OF_FILES:
        return _OF_FILES[traits.task]
    reads_texts = traits.task in (_CLASSIFICATION, _FEATURES, _SENTENCES_TASK)
    return _ORT if traits.tokens and reads_texts else _ORT_ANY


def _of_transformers(traits: Traits) -> Iterator[tuple[str, str]]:
    """The clients that read `config.json`: transformers.js, sentence-transformers, optimum."""
    if traits.cache:
        text, more = "The capital of France is", ", { max_new_tokens: 32 }"
        yield "transformers.js", code("js", _JS.format(task=_GENERATION, text=text, more=more))
        use = _OPTIMUM_GENERATE
        yield "optimum", code("python", _OPTIMUM.format(kind="ORTModelForCausalLM", use=use))
    elif traits.merged:
        text, more = "A sentence to read.", ", { max_new_tokens: 32 }"
        yield "transformers.js", code("js", _JS.format(task=_SEQUENCES, text=text, more=more))
        use = _OPTIMUM_SEQUENCE
        yield "optimum", code("python", _OPTIMUM.format(kind="ORTModelForSeq2SeqLM", use=use))
    elif traits.task == _CLASSIFICATION:
        text = "A sentence to read."
        yield "transformers.js", code("js", _JS.format(task=_CLASSIFICATION, text=text, more=""))
        kind = "ORTModelForSequenceClassification"
        yield "optimum", code("python", _OPTIMUM.format(kind=kind, use=_OPTIMUM_CLASSIFY))
    elif traits.sentences:
        yield "sentence-transformers", code("python", _SENTENCES)
