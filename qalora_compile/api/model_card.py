"""The model card of an edge folder: `README.md` in the form of Hugging Face.

It is made from `qalora.json` and the files of the folder, and from `card.json`, which keeps what
was found out later: the verdict of a certificate, and measured speeds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_compile._version import __version__
from qalora_compile.api.card_clients import Traits, client_sections, traits_of
from qalora_compile.api.card_text import (
    CARD_FILE,
    SECOND_FILE,
    front_matter,
    put_card,
    table,
    words,
)
from qalora_compile.api.settings import settings_of, written_by
from qalora_compile.brief import megabytes
from qalora_compile.errors import UserInputError
from qalora_compile.sealed import read_sealed, write_sealed

if TYPE_CHECKING:
    from qalora_compile.verify.proof.certificate import Certificate

FINDINGS_FILE = "card.json"
_FORMAT, _VERSION = "qalora-card", 1
_HEAD_BYTES = 1 << 16
_LICENSE = re.compile(
    r"^license:\s*[\"']?([A-Za-z0-9][A-Za-z0-9.\-]{0,40})[\"']?\s*$", re.MULTILINE
)
_CACHED = re.compile(r"models--([\w.\-]+?)--([\w.\-]+)")
"""A folder in the cache of huggingface_hub, which names the model's repository."""


def base_facts(model: str) -> dict[str, str]:
    """License and repository of a base model, where its folder tells them; for a record.

    Args:
        model: The model as it was given: a folder, a file, or something else.
    """
    path, found = Path(model), dict[str, str]()
    if path.is_dir() and (license_name := _license(path / CARD_FILE)):
        found["license"] = license_name
    cached = next((m for part in path.resolve().parts if (m := _CACHED.fullmatch(part))), None)
    if cached is not None:
        found["base_model"] = f"{cached[1]}/{cached[2]}"
    return found


def _license(card: Path) -> str | None:
    """The license in the front matter of a card; None if it states none."""
    if not card.is_file():
        return None
    with card.open("rb") as file:
        head = file.read(_HEAD_BYTES).decode("utf-8", "replace")
    if not head.startswith("---"):
        return None
    stated = _LICENSE.search(head[3:].split("\n---", 1)[0])
    return None if stated is None else stated[1]


def write_card(folder: Path, record: Mapping[str, Any], before: Path | None = None) -> str:
    """Write the card of an edge folder; returns the name of its file.

    Args:
        folder: The folder, with all its other files.
        record: Its `qalora.json`.
        before: The folder that this one replaces; None: itself.

    Raises:
        OutputError: the file cannot be written.
    """
    return put_card(card_text(folder, record), folder, before or folder)


def add_findings(
    folder: Path,
    record: Mapping[str, Any],
    *,
    certificate: Certificate | None = None,
    speeds: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Write what was found out about an edge folder into its card; returns the file's name.

    Args:
        folder: The folder.
        record: Its `qalora.json`.
        certificate: A certificate with this folder as its candidate.
        speeds: Rows of measured speeds, each with the same names.

    Raises:
        UserInputError: `card.json` was changed, or the folder is no edge folder.
        OutputError: a file cannot be written.
    """
    if not record:
        raise UserInputError(
            f"{folder} is no edge folder, so it has no model card",
            where=str(folder),
            hint="give the folder that export or quantize wrote",
        )
    found = read_findings(folder)
    if certificate is not None:
        found["certificate"] = _proof_facts(certificate)
    if speeds:
        rows = [list(row.values()) for row in speeds]
        found["speeds"] = {"columns": list(speeds[0]), "rows": rows}  # JSON sorts its keys
    write_sealed(
        folder / FINDINGS_FILE, {"format": _FORMAT, "version": _VERSION, "findings": found}
    )
    return write_card(folder, record)


def read_findings(folder: Path) -> dict[str, Any]:
    """The findings in `card.json`; empty if there are none.

    Raises:
        UserInputError: the file was changed after it was written, or is of another kind.
    """
    path = folder / FINDINGS_FILE
    if not path.is_file():
        return {}
    value = read_sealed(path)
    found = value.get("findings")
    if value.get("format") != _FORMAT or not isinstance(found, dict):
        raise UserInputError(f"{FINDINGS_FILE} is of another kind", where=str(path))
    return found


def _proof_facts(certificate: Certificate) -> dict[str, str]:
    about = certificate.brief()
    return {
        "verdict": str(certificate.verdict),
        "for all inputs": str(about["for all inputs"]),
        "layers": str(about["layers"]),
        "between layers": str(about["between them"]),
        "conditions": "; ".join(certificate.conditions) or "none",
        "tokenizer": certificate.tokenizer,
        "first difference": str(about["first difference"] or "none"),
        **{f"SHA-256 of {name}": digest for name, digest in certificate.candidate.files.items()},
    }


def card_text(folder: Path, record: Mapping[str, Any]) -> str:
    """The card of an edge folder as Markdown, without its seal."""
    files = {
        str(file.relative_to(folder).as_posix()): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in (CARD_FILE, SECOND_FILE, FINDINGS_FILE)
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    }
    traits, name = traits_of(record, files), Path(str(record.get("model"))).name
    sections = [_head(record, traits), f"# {words(name)}, quantized\n", _about(record, traits)]
    sections += [f"## {title}\n\n{body}" for title, body in _sections(folder, record, files)]
    sections += ["## How to run it\n\nIn this folder:\n"]
    sections += [f"### {client}\n\n{how}" for client, how in client_sections(traits)]
    return "\n".join(sections)


_FORMS = {
    "onnx": "an ONNX model",
    "openvino": "an OpenVINO model",
    "torch": "a `.pt2` file of torch",
    "coreml": "a Core ML package",
}


def _head(record: Mapping[str, Any], traits: Traits) -> str:
    base = _part(record, "base")
    widths = _part(_part(record, "layers"), "by_width")
    tags = [traits.form, "quantized", "qalora-compile"]
    tags += ["qa-lora"] * bool(record.get("adapter"))
    tags += [f"{width.split()[0]}-bit" for width in widths if width.split()[0].isdigit()]
    return front_matter(
        {
            "license": _known(base, "license"),
            "base_model": _known(base, "base_model"),
            "base_model_relation": "quantized" if _known(base, "base_model") else None,
            "library_name": traits.library,
            "pipeline_tag": traits.task,
            "tags": tags,
        }
    )


def _known(base: Mapping[str, Any], name: str) -> str | None:
    value = base.get(name)
    return value if isinstance(value, str) else None


def _about(record: Mapping[str, Any], traits: Traits) -> str:
    made = "fine-tuned with QA-LoRA adapters, which are folded into the zero-points, and "
    trained = made if record.get("adapter") else ""
    form = _FORMS[traits.form]
    return (
        f"The model ({words(record.get('architecture') or 'of no known architecture')}) is "
        f"{trained}written as {form} by qalora-compile {__version__}.\n"
    )


def _sections(
    folder: Path, record: Mapping[str, Any], files: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    """Title and text of each section that has something to say."""
    yield "Base model", _rows({"base model": _base_name(record), **_part(record, "base")})
    data = _part(record, "data_figures")
    if data:
        yield "Training data", _rows(data) + "\nThe data themselves are not in this folder.\n"
    export = _part(record, "export")
    chosen = {n: export.get(n) for n in ("target", "accuracy_level", "parameter_dtype", "fusion")}
    yield "Settings", _rows(settings_of(record) | chosen | written_by(record))
    preset = _part(record, "preset")
    size = {"all files": megabytes(sum(files.values())), **_sizes(files)}
    if preset.get("bits_per_weight") is not None:
        size["bits per weight"] = str(preset["bits_per_weight"])
    yield "Size", _rows(size)
    findings = read_findings(folder)
    speeds = _part(findings, "speeds")
    if speeds:
        yield "Speed", table(list(map(words, speeds["columns"])), speeds["rows"])
    yield "What is proved", _proof(record, findings.get("certificate"))


def _base_name(record: Mapping[str, Any]) -> str:
    """The name of the model that was quantized, without the folders that it was in."""
    return Path(str(record.get("model"))).name


def _sizes(files: Mapping[str, int]) -> dict[str, str]:
    return {name: megabytes(size) for name, size in files.items()}


def _rows(values: Mapping[str, Any]) -> str:
    known = [(name.replace("_", " "), value) for name, value in values.items() if value is not None]
    return table(("", ""), known)


def _proof(record: Mapping[str, Any], certificate: object) -> str:
    checked = _part(_part(record, "verified"), "fold")
    text = ""
    if checked:
        outputs = checked.get("outputs")
        rows = (
            [row for row in outputs if isinstance(row, dict)] if isinstance(outputs, list) else []
        )
        found = [row["max_rel"] for row in rows if isinstance(row.get("max_rel"), float)]
        text = (
            "Folding was checked on inputs: the folded model differs from the trained one by at "
            f"most {max(found, default=0.0):.1e} of the largest output.\n\n"
        )
    if not isinstance(certificate, dict):
        return text + (
            "No certificate was made yet. In the folder that this one was exported from:\n\n"
            "```bash\nqalora-compile verify FOLDED EDGE --prove --card\n```\n"
        )
    return (
        f"{text}Verdict of the proof that this model equals the folded one: "
        f"**{words(certificate.get('verdict'))}**.\n\n{_rows(certificate)}\n"
        "Layers that are proved are equal for all inputs, coefficient by coefficient, up to the "
        "rounding of stored values. PROVED UNDER holds for inputs that meet the conditions. "
        "SAMPLED is no proof: parts of the model agree only on the samples that were tried.\n"
    )


def _part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}
