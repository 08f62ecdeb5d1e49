"""Tiny valid inputs of every format, built once for a run; and the doors that read them.

A door reads an input as a user's command does and gives a digest of what it made of it: tensors,
graph, configuration. Two inputs with one digest mean the same.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.errors import CaptureError, VerificationError

TEXTS = ("red is a colour", "one", "three : green")


@dataclass(frozen=True)
class Format:
    """A format that is fuzzed.

    Attributes:
        name: For the table.
        build: Writes a valid input into a folder.
        door: Reads the folder, and gives the digest of what it read.
        files: Patterns of the files that are mutated.
        own: Whether this package writes it with checksums: not even a changed bit may be read as
            another model then.
    """

    name: str
    build: Callable[[Path], object]
    door: Callable[[Path], str]
    files: tuple[str, ...]
    own: bool = False


def digest(*parts: Any) -> str:
    """SHA-256 of values, tensors among them, whatever containers they stand in."""
    hashed = hashlib.sha256()
    for part in parts:
        _add(hashed, part)
    return hashed.hexdigest()


def _add(hashed: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        plain = value.detach().contiguous()
        hashed.update(f"{plain.dtype}{list(plain.shape)}".encode())
        hashed.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        hashed.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            hashed.update(f"{key!s}=".encode("utf-8", "surrogatepass"))
            _add(hashed, value[key])
    elif isinstance(value, (list, tuple)):
        hashed.update(f"[{len(value)}]".encode())
        for each in value:
            _add(hashed, each)
    else:
        hashed.update(repr(value).encode("utf-8", "surrogatepass"))


def tiny_llama() -> Any:
    """One layer, 32 wide, a vocabulary of 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["red", "green", "blue", "one", "two", "three", "is", "a", "colour", "number", ":"]
    words += ["<user>", "<bot>"]
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<end>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    made.chat_template = (
        "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}"
        "{{ m.content }} {% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
    )
    made.save_pretrained(folder)


def _hf(folder: Path) -> None:
    tiny_llama().save_pretrained(folder)
    write_tokenizer(folder)


def _load_source(path: Path) -> str:
    from qalora_compile.capture.load_source import load_source

    source = load_source(str(path))
    codes, _ = source.stored()
    try:
        with torch.no_grad():
            logits = source.model(torch.arange(8)[None]).logits
    except Exception as error:  # `capture` runs the model too, and says so of any error in it
        raise CaptureError(f"the model does not run: {error}") from error
    return digest(logits, len(codes), _tokens(source.tokenizer))


def _tokens(tokenizer: Any) -> Any:
    return None if tokenizer is None else [tokenizer(text).input_ids for text in TEXTS]


def _read_tokenizer(folder: Path) -> str:
    from qalora_compile.training.data.parse_line import LineReader
    from qalora_compile.untrusted.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return digest(None)
    reader = LineReader(tokenizer=tokenizer, max_length=32)
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "a colour"}]
    rows = [{"prompt": "red is", "completion": " a colour"}, {"messages": turns}]
    return digest([reader.read(row, "row") for row in rows])


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both."""
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


@cache
def _adapted() -> qc.Program:
    torch.manual_seed(0)
    captured = qc.capture_model(_Two().eval(), (torch.randn(2, 32),))
    program = qc.quantize_groups(captured, qc.QuantSpec(group_size=16))
    return qc.insert_adapters(program, qc.AdapterSpec(rank=2))


@cache
def folded_program() -> qc.Program:
    """Two layers on codes, folded."""
    return qc.fold_adapters(_adapted())


def _run(folder: Path) -> None:
    from qalora_compile.api.run_folder import write_run_file
    from qalora_compile.ir.storage import write_program

    folder.mkdir(parents=True, exist_ok=True)
    write_program(_adapted(), folder)
    write_run_file(folder, {"model": "tiny", "quant": {"bits": 4}, "step": 3, "verified": {}})


def _read_run(folder: Path) -> str:
    from qalora_compile.api.run_folder import load_run

    program, record = load_run(folder)
    return digest(_of_program(program), {k: v for k, v in record.items() if k != "versions"})


def _of_program(program: qc.Program) -> str:
    with torch.no_grad():
        outputs = program(*program.example[0], **program.example[1])
    return digest(str(program), program.tensors(), program.stage, outputs)


def _read_program(folder: Path) -> str:
    from qalora_compile.verify.proof.graphs.read_fx import read_program_graph

    graph = read_program_graph(folder)
    stored = {name: tensor.digest for name, tensor in graph.tensors.items()}
    return digest(_of_program(qc.Program.load(folder)), stored, str(graph.nodes))


def _checkpoint(folder: Path) -> None:
    from qalora_compile.training import FitSpec, FitState
    from qalora_compile.training.records.checkpoint import save_checkpoint
    from qalora_compile.training.records.run_identity import Identity

    program, spec = _adapted(), FitSpec(steps=2)
    state = FitState.fresh(program, spec)
    for parameter in program.adapter_parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    state.optimizer.step()
    for parameter in program.adapter_parameters():
        parameter.grad = None
    save_checkpoint(folder, program, state, Identity.of(program, spec))


def _read_checkpoint(folder: Path) -> str:
    from qalora_compile.training import FitSpec, FitState
    from qalora_compile.training.records.checkpoint import list_checkpoints, restore_checkpoint
    from qalora_compile.training.records.run_identity import Identity

    program, spec = _adapted(), FitSpec(steps=2)
    found = list_checkpoints(folder)
    if not found:
        return digest(None)
    state = FitState.fresh(program, spec)
    restore_checkpoint(found[-1], program, state, Identity.of(program, spec))
    moments = [state.optimizer.state[p] for p in program.adapter_parameters()]
    best = None if state.best is None else (state.best.loss, state.best.step)
    return digest(program.tensors(), moments, state.step, state.stale, best)


def _edge(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    qc.export_model(folded_program(), folder / "model.onnx")


def _edge_with_data(folder: Path) -> None:
    """The same with every weight in a file of its own: those of a tiny model else are inside."""
    import onnx

    _edge(folder)
    model = onnx.load(folder / "model.onnx")
    onnx.save(
        model,
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=64,
    )


def _read_edge(folder: Path) -> str:
    from qalora_compile.api.inspect import _inspect_file
    from qalora_compile.verify.proof.graphs.read_onnx import read_onnx_graph
    from qalora_compile.verify.runners.onnx_session import OnnxSession

    path = folder / "model.onnx"
    rows = _inspect_file(path)
    graph = read_onnx_graph(path)
    stored = {name: tensor.digest for name, tensor in graph.tensors.items()}
    session = OnnxSession(path)
    feed = {name: _input(leaf) for name, leaf in _inputs(session).items()}
    outputs = session.outputs(feed)
    return digest(rows[0], stored, [str(n) for n in graph.nodes.values()], outputs)


def _inputs(session: Any) -> dict[str, Any]:
    return {leaf.name: leaf for leaf in session.session.get_inputs()}


def _input(leaf: Any) -> Any:
    shape = [axis if isinstance(axis, int) and 0 < axis < 1000 else 2 for axis in leaf.shape]
    kind = np.int64 if leaf.type == "tensor(int64)" else np.float32
    return np.linspace(0, 1, int(np.prod(shape)), dtype=np.float64).reshape(shape).astype(kind)


def _ort(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    qc.export_model(folded_program(), folder / "model.ort", qc.ExportSpec(format="ort"))


def _read_ort(folder: Path) -> str:
    from qalora_compile.api.inspect import _inspect_file
    from qalora_compile.untrusted.ort_file import check_ort
    from qalora_compile.verify.runners.onnx_session import OnnxSession

    path = folder / "model.ort"
    found = check_ort(path)
    rows = _inspect_file(path)
    session = OnnxSession(path)
    feed = {name: _input(leaf) for name, leaf in _inputs(session).items()}
    shapes = {name: (row.kind, row.shape) for name, row in found.tensors.items()}
    return digest(rows[0], shapes, found.nodes, session.outputs(feed))


def _pt2(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    qc.export_model(folded_program(), folder / "model.pt2", qc.ExportSpec(target="torch"))


def _read_pt2(folder: Path) -> str:
    from qalora_compile.api.inspect import _inspect_file
    from qalora_compile.verify.proof.graphs.read_pt2 import read_pt2_graph
    from qalora_compile.verify.runners.torch_session import TorchSession

    path = folder / "model.pt2"
    rows = _inspect_file(path)
    stored = {name: tensor.digest for name, tensor in read_pt2_graph(path).tensors.items()}
    session = TorchSession(path)
    x = np.linspace(0, 1, 64, dtype=np.float32).reshape(2, 32)
    feed = {leaf.name: x for leaf in session.signature.inputs}
    return digest(rows[0], stored, session.outputs(feed), session.sites(feed))


def _certificate(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folded_program().save(folder / "folded", overwrite=True)
    _edge(folder / "edge")
    qc.prove_equivalence(folder / "folded", folder / "edge").write(folder / "equal.json")


def _read_certificate(folder: Path) -> str:
    from qalora_compile.verify.proof.certificate import Certificate
    from qalora_compile.verify.proof.prove import check_certificate

    stated = Certificate.read(folder / "equal.json")
    certificate, problems = check_certificate(folder / "equal.json")
    if problems:
        raise VerificationError("the certificate does not hold", report=certificate)
    return digest(certificate.verdict, [s.status for s in stated.parts], stated.proved)


def _safetensors(folder: Path) -> None:
    from qalora_compile.ir.safetensors_io import save_tensors

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "a.weight": torch.arange(32.0).reshape(4, 8),
        "b": torch.arange(6, dtype=torch.int64),
        "c": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "flag": torch.tensor(True),
    }
    save_tensors(tensors, folder / "model.safetensors")


def _read_safetensors(folder: Path) -> str:
    from qalora_compile.ir.safetensors_io import load_tensors, read_headers, read_tensor
    from qalora_compile.verify.proof.graphs.stored_tensor import read_safetensors

    path = folder / "model.safetensors"
    found = load_tensors(path)
    like = {name: list(t.shape) for name, t in read_headers(path).items()}
    again = {name: read_tensor(path, name) for name in like}
    proof = {name: stored.read() for name, stored in read_safetensors(path).items()}
    return digest(found, like, again, proof)


def _gguf(folder: Path) -> None:
    from tests.capture.checkpoints.gguf_files import write_llama

    folder.mkdir(parents=True, exist_ok=True)
    write_llama(folder / "model.gguf", "Q4_1", embedding="Q8_0")


def _read_gguf(folder: Path) -> str:
    """The model, its codes, and its metadata as they are copied."""
    from qalora_compile.capture.checkpoints.gguf import read_gguf_codes
    from qalora_compile.exporters.checkpoints.gguf.metadata import write_metadata_file

    path = folder / "model.gguf"
    _, notes = read_gguf_codes(path)
    write_metadata_file(path, folder / "metadata.gguf")
    metadata = (folder / "metadata.gguf").read_bytes()
    return digest(_load_source(path), notes, metadata)


def _quantized(kind: str, folder: Path) -> None:
    from tests.capture.checkpoints.test_folders import config_of, hqq_layer, mlx_layer
    from tests.capture.checkpoints.test_gptq import AWQ, awq_layer, gptq_config, gptq_layer

    layers: dict[str, tuple[Any, dict[str, Any]]] = {
        "gptq": (gptq_layer([]), gptq_config()),
        "awq": (awq_layer([]), AWQ),
        "hqq": (hqq_layer(4, []), config_of("hqq", 4)),
        "mlx": (mlx_layer(4, []), config_of("mlx", 4)),
    }
    layer, config = layers[kind]
    _write_quantized(folder, layer, config)


def _write_quantized(folder: Path, layer: Any, config: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    from tests.capture.checkpoints.models import linears

    model = tiny_llama()
    stored = {n: t.detach().clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    for name, module in linears(model):
        del stored[f"{name}.weight"]
        stored |= {f"{name}.{part}": t for part, t in layer(module).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in stored.items()}, folder / "model.safetensors")
    known = model.config.to_dict() | {"architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps({**known, **config}))


def _peft(folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in ("q_proj", "v_proj"):
        name = f"base_model.model.model.layers.0.self_attn.{layer}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, 32, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(32, 2, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 8},
        "use_rslora": False,
        "base_model_name_or_path": "tiny",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


@cache
def _base() -> Any:
    return tiny_llama()


def _read_peft(folder: Path) -> str:
    from qalora_compile.capture.peft_adapters import (
        as_pooled,
        merge_,
        put_saved_,
        read_peft_adapter,
    )

    model = copy.deepcopy(_base())
    adapter = as_pooled(read_peft_adapter(folder), model, None)
    put_saved_(model, [adapter])
    merge_(model, {path: [update] for path, update in adapter.updates.items()})
    return digest(model.state_dict())


def _jsonl(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": "red is a", "completion": " colour"},
        {"text": "one is a number"},
        {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "a"}]},
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    write_tokenizer(folder / "tokenizer")


@cache
def tokenizer() -> Any:
    """That of `write_tokenizer`, in memory."""
    import tempfile

    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as name:
        write_tokenizer(Path(name))
        return AutoTokenizer.from_pretrained(name, local_files_only=True)


def _read_jsonl(folder: Path) -> str:
    from qalora_compile.training.data.load_examples import load_examples

    data = load_examples(folder / "train.jsonl", tokenizer(), max_length=16)
    return digest([tuple(vars(example).items()) for example in data.examples], data.token_range)


FORMATS: dict[str, Format] = {
    made.name: made
    for made in (
        Format("program", _run, _read_program, ("program.json", "*.safetensors"), own=True),
        Format("run", _run, _read_run, ("run.json", "program.json", "*.safetensors"), own=True),
        Format("checkpoint", _checkpoint, _read_checkpoint, ("*/*",), own=True),
        Format("certificate", _certificate, _read_certificate, ("equal.json",), own=True),
        Format("HF config", _hf, _load_source, ("config.json", "generation_config.json")),
        Format("HF tokenizer", _hf, _read_tokenizer, ("tokenizer*.json", "*.jinja")),
        Format("safetensors", _safetensors, _read_safetensors, ("*.safetensors",)),
        Format("GGUF", _gguf, _read_gguf, ("*.gguf",)),
        *(
            Format(
                name.upper(),
                partial(_quantized, name),
                _load_source,
                ("config.json", "*.safetensors"),
            )
            for name in ("gptq", "awq", "hqq", "mlx")
        ),
        Format("PEFT", _peft, _read_peft, ("*.json", "*.safetensors")),
        Format("JSONL", _jsonl, _read_jsonl, ("*.jsonl",)),
        Format("ONNX", _edge, _read_edge, ("*.onnx",)),
        Format("ONNX data", _edge_with_data, _read_edge, ("*.data", "*.onnx")),
        Format("ORT", _ort, _read_ort, ("*.ort",)),
        Format("PT2", _pt2, _read_pt2, ("*.pt2",)),
    )
}


def import_all(names: Iterable[str], scratch: Path) -> dict[str, str]:
    """Build every input below `scratch` and read it once, so that children find all imported.

    Returns:
        The digest of each valid input.
    """
    found = {}
    for name in names:
        made = FORMATS[name]
        folder = scratch / name.replace(" ", "-")
        made.build(folder)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            found[name] = made.door(folder)
    sys.stdout.flush()
    return found
