"""The code of a model card: one text for each client and kind of model."""

from __future__ import annotations

ORT = """
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
ORT_CACHE = """
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
ORT_PAIR = """
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
ORT_ANY = """
# pip install onnxruntime
import onnxruntime

session = onnxruntime.InferenceSession("onnx/model_q4.onnx")
for one in [*session.get_inputs(), *session.get_outputs()]:
    print(one.name, one.type, one.shape)
"""
ORT_IMAGE = """
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
ORT_AUDIO = """
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
OWN = """
# pip install 'qalora-compile[onnx,hf]'
qalora-compile generate . --prompt "The capital of France is" --max-new-tokens 32
"""
GENAI = """
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
JS = """
// npm install --ignore-scripts @huggingface/transformers
import {{ basename, dirname }} from "node:path";
import process from "node:process";
import {{ env, pipeline }} from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = dirname(process.cwd());
const run = await pipeline("{task}", basename(process.cwd()));
console.log(await run("{text}"{more}));
"""
OPTIMUM = """
# pip install 'optimum-onnx[onnxruntime]'
from optimum.onnxruntime import {kind}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = {kind}.from_pretrained(".")
{use}
"""
OPTIMUM_GENERATE = """\
inputs = tokenizer("The capital of France is", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))"""
OPTIMUM_SEQUENCE = """\
inputs = tokenizer("A sentence to read.", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))"""
OPTIMUM_CLASSIFY = """\
inputs = tokenizer("A sentence to read.", return_tensors="pt")
print(model.config.id2label[int(model(**inputs).logits.argmax(-1))])"""
SENTENCES = """
# pip install 'sentence-transformers[onnx]'
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".", backend="onnx")
print(model.encode(["A sentence to read.", "Another one."]).shape)
"""
OPENVINO_LM = """
# pip install openvino-genai
import openvino_genai

pipeline = openvino_genai.LLMPipeline(".", "CPU", INFERENCE_PRECISION_HINT="f32")
print(pipeline.generate("The capital of France is", max_new_tokens=32))
"""
OPENVINO_WHISPER = """
# pip install openvino-genai soundfile
import openvino_genai
import soundfile

samples, rate = soundfile.read("recording.wav", dtype="float32")  # of one channel, 16000 a second
pipeline = openvino_genai.WhisperPipeline(".", "CPU", INFERENCE_PRECISION_HINT="f32")
print(pipeline.generate(samples.tolist(), max_new_tokens=64))
"""
OPENVINO_ANY = """
# pip install openvino
import openvino

model = openvino.Core().compile_model("openvino_model.xml", "CPU")
for one in [*model.inputs, *model.outputs]:
    print(one.any_name, one.element_type, one.partial_shape)
"""
OPENVINO_PAIR = """
# pip install openvino
import openvino

for file in ("openvino_encoder_model.xml", "openvino_decoder_model.xml"):
    model = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    print(file, [one.any_name for one in [*model.inputs, *model.outputs]])
"""
TORCH = """
# pip install torch
import torch

model = torch.export.load("model.pt2").module()
print(model)
"""
COREML = """
# on macOS 15 or newer: pip install coremltools
import coremltools

model = coremltools.models.MLModel("model.mlpackage")
print(model.get_spec().description)
"""
