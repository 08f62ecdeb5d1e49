"""What an edge folder holds beside the model: tokenizer, GenAI configuration, `qalora.json`."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_compile.cli.folders import copy_tokenizer, versions
from qalora_compile.config import ExportSpec
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.exporters.genai import CONFIG_FILE, context_length, genai_config
from qalora_compile.files import read_json, write_json
from qalora_compile.ir.program import Program

RECORD_FILE = "qalora.json"
FORMAT, VERSION = "qalora-edge", 1


@dataclass(frozen=True)
class EdgeParts:
    """What the parts are made from.

    Attributes:
        description: Folder with the model's `config.json`, which may be missing.
        tokenizer: Folder with the tokenizer's files, which may be missing.
        record: What is known of the model: `run.json`, or part of it.
        program: As it was exported.
        spec: How it was.
        cached: Whether it has a key-value cache.
        library: The operator library to add, or None.
    """

    description: Path
    tokenizer: Path
    record: dict[str, Any]
    program: Program
    spec: ExportSpec
    cached: bool
    library: Path | None


def write_edge_parts(folder: Path, parts: EdgeParts) -> list[str]:
    """Write everything but the model into an edge folder; gives the names for a summary."""
    written = [RECORD_FILE]
    description = _description(parts.description)
    if parts.library is not None:
        shutil.copy2(parts.library, folder / parts.library.name)
        written.append(parts.library.name)
    written.append("tokenizer" if copy_tokenizer(parts.tokenizer, folder) else "no tokenizer")
    genai = "no: needs a key-value cache"
    if parts.cached:
        genai = _write_genai(folder, parts, description)
        written.append(CONFIG_FILE if genai == "yes" else f"no {CONFIG_FILE} ({genai})")
    write_json(folder / RECORD_FILE, _edge_record(parts, description, genai))
    return written


def read_edge_record(folder: Path) -> dict[str, Any]:
    """`qalora.json` of an edge folder; empty where there is none.

    Raises:
        UserInputError: it is of another kind or version.
    """
    if not (folder / RECORD_FILE).is_file():
        return {}
    record = read_json(folder / RECORD_FILE)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserInputError(f"{RECORD_FILE} is of another kind", where=str(folder / RECORD_FILE))
    if record.get("version") != VERSION:
        raise UserInputError(
            f"the folder has version {record.get('version')}, this package reads {VERSION}",
            where=str(folder),
            hint="use the qalora-compile that wrote it",
        )
    return record


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
    rows = list(parts.program.plan)
    widths = Counter(f"{row.bits} bits" for row in rows if row.bits is not None)
    return {
        "format": FORMAT,
        "version": VERSION,
        "versions": versions(),
        "model": parts.record.get("model"),
        "architecture": next(iter(description["model"].get("architectures", [])), None),
        "context_length": context_length(description["model"]) if parts.cached else None,
        "kv_cache": parts.cached,
        "genai": genai,
        "export": parts.spec.to_json(),
        "quant": parts.record.get("quant"),
        "adapter": parts.record.get("adapter"),
        "steps": parts.record.get("step"),
        "passes": list(parts.program.history),
        "layers": {"quantized": sum(widths.values()), "by_width": dict(widths)},
        "kept_in_float": {row.name: row.reason for row in rows if row.bits is None},
        "verified": parts.record.get("verified", {}),
    }
