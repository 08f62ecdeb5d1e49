"""What an edge folder holds beside the model: tokenizer, GenAI configuration, `qalora.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_compile.api import export_model
from qalora_compile.cli.folders import copy_tokenizer, read_record, versions
from qalora_compile.config import ExportSpec
from qalora_compile.errors import UnsupportedError
from qalora_compile.exporters.base import ExportReport
from qalora_compile.exporters.genai import CONFIG_FILE, context_length, genai_config
from qalora_compile.files import atomic_folder, keep_parts, read_json, write_json
from qalora_compile.ir.program import Program

RECORD_FILE, MODEL_FILE = "qalora.json", "model.onnx"
FORMAT, VERSION = "qalora-edge", 1


@dataclass(frozen=True)
class EdgeParts:
    """What the parts are made from.

    Attributes:
        description: Folder with the model's `config.json`, which may be missing.
        tokenizer: Folder with the tokenizer's files, which may be missing.
        record: What is known of the model: `run.json`, or part of it.
        program: Lowered for the target of `spec`.
        spec: How it is exported.
        library: The operator library to add, or None.
        weights: Folder with the safetensors that are read while the model is written.
    """

    description: Path
    tokenizer: Path
    record: dict[str, Any]
    program: Program
    spec: ExportSpec
    library: Path | None
    weights: Path

    def key(self) -> str:
        """Says whether an interrupted run wrote the same: a hash of all that the model is made of.

        Files of tensors count by name, size and time of change.
        """
        files = sorted(self.weights.resolve().glob("*.safetensors"))
        stats = [(str(file), file.stat()) for file in files]
        value = {
            "versions": versions(),
            "spec": self.spec.to_json(),
            "passes": self.program.history,
            "signature": self.program.signature.to_json(),
            "tensors": {n: [str(t.dtype), *t.shape] for n, t in self.program.tensors().items()},
            "weights": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        }
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_edge(out: Path, parts: EdgeParts, *, overwrite: bool) -> tuple[ExportReport, list[str]]:
    """Write an edge folder; gives the model's report, and names of what lies beside it."""
    key = parts.key()
    with atomic_folder(out, overwrite=overwrite, resume=key) as folder:
        keep_parts(folder)
        report = export_model(parts.program, folder / MODEL_FILE, parts.spec, resume=key)
        written = _write_parts(folder, parts)
    return dataclasses.replace(report, path=out / MODEL_FILE), written


def _write_parts(folder: Path, parts: EdgeParts) -> list[str]:
    written = [RECORD_FILE]
    description = _description(parts.description)
    if parts.library is not None:
        shutil.copy2(parts.library, folder / parts.library.name)
        written.append(parts.library.name)
    written.append("tokenizer" if copy_tokenizer(parts.tokenizer, folder) else "no tokenizer")
    genai = "no: needs a key-value cache"
    if parts.program.signature.cache:
        genai = _write_genai(folder, parts, description)
        written.append(CONFIG_FILE if genai == "yes" else f"no {CONFIG_FILE} ({genai})")
    write_json(folder / RECORD_FILE, _edge_record(parts, description, genai))
    return written


def read_edge_record(folder: Path) -> dict[str, Any]:
    """`qalora.json` of an edge folder; empty where there is none.

    Raises:
        UserInputError: it is of another kind or version.
    """
    path = folder / RECORD_FILE
    return read_record(path, FORMAT, VERSION) if path.is_file() else {}


def _description(folder: Path) -> dict[str, Any]:
    """`config.json` and `generation_config.json` of the model, each empty where it is missing."""
    return {
        name: read_json(folder / file) if (folder / file).is_file() else {}
        for name, file in (("model", "config.json"), ("generation", "generation_config.json"))
    }


def _write_genai(folder: Path, parts: EdgeParts, description: dict[str, Any]) -> str:
    """Write `genai_config.json`; `yes`, or why GenAI cannot run the model."""
    library = None if parts.library is None else parts.library.name
    try:
        value = genai_config(
            parts.program.signature,
            description["model"],
            description["generation"],
            library=library,
        )
    except UnsupportedError as error:
        return error.what
    write_json(folder / CONFIG_FILE, value)
    return "yes"


def _edge_record(parts: EdgeParts, description: dict[str, Any], genai: str) -> dict[str, Any]:
    rows, cached = list(parts.program.plan), bool(parts.program.signature.cache)
    widths = Counter(f"{row.bits} bits" for row in rows if row.bits is not None)
    return {
        "format": FORMAT,
        "version": VERSION,
        "versions": versions(),
        "model": parts.record.get("model"),
        "architecture": next(iter(description["model"].get("architectures", [])), None),
        "context_length": context_length(description["model"]) if cached else None,
        "kv_cache": cached,
        "genai": genai,
        "export": parts.spec.to_json(),
        "quant": parts.record.get("quant"),
        "embeddings": parts.record.get("embeddings"),
        "adapter": parts.record.get("adapter"),
        "steps": parts.record.get("step"),
        "passes": list(parts.program.history),
        "layers": {"quantized": sum(widths.values()), "by_width": dict(widths)},
        "kept_in_float": {row.name: row.reason for row in rows if row.bits is None},
        "verified": parts.record.get("verified", {}),
    }
