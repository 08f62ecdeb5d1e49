"""The files of an edge folder: model, tokenizer, GenAI configuration, `qalora.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_compile.api.edge_choices import EdgeChoices
from qalora_compile.api.edge_graphs import written_file
from qalora_compile.api.export import export_model
from qalora_compile.api.model_card import write_card
from qalora_compile.api.pooling import Pooling
from qalora_compile.api.run_folder import (
    copy_preprocessor,
    read_record,
    versions,
)
from qalora_compile.config import ExportSpec
from qalora_compile.errors import UnsupportedError
from qalora_compile.exporters.capability import ExportReport
from qalora_compile.exporters.checkpoints.hf_folder import (
    copy_tokenizer,
    widen_tokenizer_config,
    with_former_names,
)
from qalora_compile.exporters.onnx.genai_config import (
    CONFIG_FILE,
    context_length,
    decoder_length,
    decoder_start,
    genai_config,
    genai_whisper_config,
)
from qalora_compile.exporters.openvino.tokenizer import write_tokenizers
from qalora_compile.files import atomic_folder, keep_parts, write_json
from qalora_compile.ir.end_tokens import (
    Ends,
    end_tokens,
    ends_from_json,
    ends_to_json,
    with_ends,
)
from qalora_compile.ir.program import Program
from qalora_compile.sealed import write_sealed
from qalora_compile.untrusted import read_json
from qalora_compile.untrusted.artifacts import (
    MERGED_FILE,
    data_file,
    onnx_parts,
)
from qalora_compile.untrusted.tokenizer import load_tokenizer

RECORD_FILE = "qalora.json"
MODEL_CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
FORMAT, VERSION = "qalora-edge", 2


@dataclass(frozen=True)
class EdgeParts:
    """What an edge folder is written from.

    Attributes:
        description: Folder with the model's `config.json`, which may be missing.
        tokenizer: Folder with the tokenizer's files, which may be missing.
        record: The content of `run.json`, or part of it.
        graphs: File name → program, lowered for the target of `spec`; encoder before decoder.
        spec: How the model is exported.
        library: The operator library to add, or None.
        weights: Folder with the safetensors files that are read while the model is written.
        pooling: The pooling of a sentence encoder.
        choices: How embeddings and parameters are written, and why.
    """

    description: Path
    tokenizer: Path
    record: dict[str, Any]
    graphs: Mapping[str, Program]
    spec: ExportSpec
    library: Path | None
    weights: Path
    pooling: Pooling = dataclasses.field(default_factory=Pooling)
    choices: EdgeChoices | None = None

    def key(self) -> str:
        """A hash of everything the model is made from, by which an interrupted run is recognized.

        Tensor files enter by name, size and modification time.
        """
        files = sorted(self.weights.resolve().glob("*.safetensors"))
        stats = [(str(file), file.stat()) for file in files]
        value = {
            "versions": versions(),
            "spec": self.spec.to_json(),
            "graphs": {file: _outline(program) for file, program in self.graphs.items()},
            "weights": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        }
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def files(self) -> list[str]:
        """The names under which the graphs are written."""
        return [written_file(file, self.spec) for file in self.graphs]

    @property
    def program(self) -> Program:
        """The graph that outputs logits: the only one, or the decoder."""
        return list(self.graphs.values())[-1]

    @property
    def pair(self) -> tuple[Program, Program] | None:
        """Encoder and decoder; None for a model with a single graph."""
        return (next(iter(self.graphs.values())), self.program) if len(self.graphs) > 1 else None

    def in_both(self) -> dict[str, int]:
        """Name → bytes of the weights that both files of an encoder-decoder model hold."""
        if self.pair is None:
            return {}
        first, second = (part.tensors() for part in self.pair)
        return {
            name: tensor.numel() * tensor.element_size()
            for name, tensor in first.items()
            if name in second and tensor.dim() > 1
        }


def _outline(program: Program) -> list[Any]:
    """What distinguishes a program from another with the same weights."""
    tensors = {name: [str(t.dtype), *t.shape] for name, t in program.tensors().items()}
    return [program.history, program.signature.to_json(), tensors]


def write_edge(out: Path, parts: EdgeParts, *, overwrite: bool) -> tuple[ExportReport, list[str]]:
    """Write an edge folder; returns the model's report and the names of the other files."""
    key = parts.key()
    with atomic_folder(out, overwrite=overwrite, resume=key) as folder:
        keep_parts(folder)
        for file in parts.graphs:
            (folder / file).parent.mkdir(exist_ok=True)
        first, *more = (
            export_model(program, folder / file, parts.spec, resume=key)
            for file, program in zip(parts.files, parts.graphs.values(), strict=True)
        )
        report = dataclasses.replace(first, path=out / parts.files[0])
        for other in more:
            report = report.joined(other, out)
        written = _write_parts(folder, parts, report.size_bytes)
        written.append(write_card(folder, read_edge_record(folder), before=out))
    return report, written


def _write_parts(folder: Path, parts: EdgeParts, size: int) -> list[str]:
    written = [RECORD_FILE]
    description = _description(parts.description)
    ends = _ends(parts, description)
    description["generation"] = with_ends(description["generation"], ends)
    if parts.library is not None:
        shutil.copy2(parts.library, folder / parts.library.name)
        written.append(parts.library.name)
    written.append("tokenizer" if copy_tokenizer(parts.tokenizer, folder) else "no tokenizer")
    widen_tokenizer_config(folder)
    if copy_preprocessor(parts.tokenizer, folder):
        written.append("preprocessor")
    genai = "no: needs a key-value cache"
    if MERGED_FILE in parts.graphs:
        genai = "no: it takes the keys and values of cross-attention from the encoder"
    elif not parts.spec.is_onnx:
        genai = "no: it runs ONNX models"
        if parts.spec.target == "openvino":
            written.append(write_tokenizers(parts.tokenizer, folder))
    elif parts.program.signature.cache:
        genai = _write_genai(folder, parts, description)
        written.append(CONFIG_FILE if genai == "yes" else f"no {CONFIG_FILE} ({genai})")
    written += _write_description(folder, parts, description)
    record = _edge_record(parts, description, genai)
    apart = [part for file in parts.files for part in onnx_parts(folder / file)[1:]]
    record["files"] += [file.relative_to(folder).as_posix() for file in apart]
    said: dict[str, Any] = {"end_tokens": list(ends), "end_tokens_from": ends_to_json(ends)}
    if parts.choices is not None:
        said["preset"] = parts.choices.record(parts.spec, size)
    write_sealed(folder / RECORD_FILE, record | said)
    return written


def _write_description(
    folder: Path, parts: EdgeParts, description: Mapping[str, Any]
) -> Iterator[str]:
    """Write what clients ask for next to the model; yields the names of the files.

    Those are optimum, transformers.js, sentence-transformers and OpenVINO GenAI.
    """
    model, generation = description["model"], description["generation"]
    if not model:
        return
    apart = {Path(file).name: 1 for file in parts.graphs if data_file(folder / file).is_file()}
    for_browsers = {"dtype": "q4", "use_external_data_format": apart or False}
    opened = parts.spec.is_onnx and parts.spec.format == "onnx"
    more = {"transformers.js_config": for_browsers} if opened else {}
    write_json(folder / MODEL_CONFIG_FILE, with_former_names(model | more))
    yield MODEL_CONFIG_FILE
    if generation:
        write_json(folder / GENERATION_FILE, generation)
        yield GENERATION_FILE
    if opened and parts.pair is None and parts.pooling.write(folder, model):
        yield "modules.json"


def _ends(parts: EdgeParts, description: Mapping[str, Any]) -> Ends:
    """The end tokens of a text, from the record of the training run and from the model."""
    recorded = ends_from_json(parts.record.get("ends"))
    tokenizer = None if recorded else load_tokenizer(parts.tokenizer)
    found = end_tokens(description["model"], description["generation"], tokenizer=tokenizer)
    return recorded | {token: found[token] for token in found if token not in recorded}


def read_edge_record(folder: Path) -> dict[str, Any]:
    """`qalora.json` of an edge folder; empty if there is none.

    Raises:
        UserInputError: it is of another kind or version.
    """
    path = folder / RECORD_FILE
    return read_record(path, FORMAT, VERSION) if path.is_file() else {}


def _description(folder: Path) -> dict[str, Any]:
    """`config.json` and `generation_config.json` of the model, each empty if missing."""
    return {
        name: read_json(folder / file) if (folder / file).is_file() else {}
        for name, file in (("model", "config.json"), ("generation", "generation_config.json"))
    }


def _write_genai(folder: Path, parts: EdgeParts, description: dict[str, Any]) -> str:
    """Write `genai_config.json`; returns `yes`, or why GenAI cannot run the model."""
    library = None if parts.library is None else parts.library.name
    described = (description["model"], description["generation"])
    try:
        if parts.pair is not None:
            encoder, decoder = (part.signature for part in parts.pair)
            files = (parts.files[0], parts.files[1])
            value = genai_whisper_config(encoder, decoder, *described, files=files, library=library)
        else:
            value = genai_config(
                parts.program.signature, *described, filename=parts.files[0], library=library
            )
    except UnsupportedError as error:
        return error.what
    write_json(folder / CONFIG_FILE, value)
    return "yes"


def _classes(parts: EdgeParts, model: Mapping[str, Any]) -> list[str]:
    """Class names in the order of the logits, from the training run or from `config.json`."""
    trained = parts.record.get("reading", {}).get("classes")
    if trained or not any(
        str(name).endswith("ForSequenceClassification") for name in model.get("architectures") or ()
    ):
        return list(trained or ())
    names = model.get("id2label")
    if not isinstance(names, dict) or not all(str(key).isdigit() for key in names):
        return []
    return [str(names[key]) for key in sorted(names, key=int)]


def _embeddings(parts: EdgeParts) -> Any:
    """Bits and group size of embeddings and head; None if they are in float."""
    step = None if parts.choices is None else parts.choices.embeddings.step
    if step is None:
        return parts.record.get("embeddings")
    return {"bits": step.bits, "group_size": step.group_size}


def _opset(spec: ExportSpec) -> dict[str, int]:
    """The opset that is written, for the record."""
    return {"opset": spec.onnx_opset} if spec.is_onnx else {}


def _edge_record(parts: EdgeParts, description: dict[str, Any], genai: str) -> dict[str, Any]:
    rows = [row for program in parts.graphs.values() for row in program.plan]
    cached = bool(parts.program.signature.cache)
    model, generation = description["model"], description["generation"]
    single = parts.pair is None
    limit = context_length(model) if single else decoder_length(model)
    widths = Counter(f"{row.bits} bits" for row in rows if row.bits is not None)
    return {
        "format": FORMAT,
        "version": VERSION,
        "versions": versions(),
        "model": parts.record.get("model"),
        "architecture": next(iter(model.get("architectures", [])), None),
        "context_length": limit if cached else None,
        "files": parts.files,
        "in_both_files": parts.in_both(),
        "decoder_start": [] if single else decoder_start(model, generation),
        "kv_cache": cached,
        "genai": genai,
        "export": parts.spec.to_json() | _opset(parts.spec),
        "quant": parts.record.get("quant"),
        "embeddings": _embeddings(parts),
        "adapter": parts.record.get("adapter"),
        "classes": _classes(parts, model),
        "pooling": parts.pooling.record(),
        "steps": parts.record.get("step"),
        **{name: parts.record.get(name) for name in ("fit", "data_figures", "base")},
        "passes": list(parts.program.history),
        "layers": {"quantized": sum(widths.values()), "by_width": dict(widths)},
        "kept_in_float": {row.name: row.reason for row in rows if row.bits is None},
        "verified": parts.record.get("verified", {}),
    }
