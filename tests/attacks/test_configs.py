"""Hostile configurations: code, sizes, files elsewhere, and settings of codes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qalora_compile.capture.lazy_folder import capture_checkpoint
from qalora_compile.capture.load_source import load_source
from qalora_compile.capture.skeleton import build_skeleton
from tests.attacks.support import attack, refused
from tests.fuzz.seeds import FORMATS

READERS: dict[str, Callable[[Path], Any]] = {
    "load": lambda folder: load_source(str(folder)).kind,
    "skeleton": lambda folder: type(build_skeleton(folder)).__name__,
}
every_reader = pytest.mark.parametrize("reader", READERS)


@pytest.fixture
def model(folder: Path) -> Path:
    """A small Llama, with a module of code that must not be run."""
    FORMATS["HF config"].build(folder)
    for name in ("canary.py", "modeling_canary.py", "configuration_canary.py"):
        (folder / name).write_text("import os\nos.system('touch canary-ran')\nclass Model: pass\n")
    return folder


def change(folder: Path, file: str = "config.json", **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CODE: dict[str, dict[str, Any]] = {
    "CVE-2026-22807: auto_map": {
        "auto_map": {"AutoConfig": "canary.Model", "AutoModelForCausalLM": "canary.Model"}
    },
    "CVE-2026-5241: trust_remote_code in the configuration": {
        "trust_remote_code": True,
        "auto_map": {"AutoModelForCausalLM": "canary.Model"},
    },
    "CVE-2026-4372: an attention implementation from a hub": {
        "_attn_implementation_internal": "someone/canary",
    },
    "CVE-2026-4372: the same under its public name": {"attn_implementation": "someone/canary"},
    "CVE-2026-4372: the same with a colon": {"_attn_implementation": "someone/canary:run"},
    "an architecture that is a module of Python": {"architectures": ["os"]},
    "an architecture that is a function": {"architectures": ["pipeline"]},
    "an architecture with a path": {"architectures": ["canary.Model"]},
    "a model type of another repository": {"model_type": "someone--canary"},
}


@every_reader
@pytest.mark.parametrize("kind", CODE)
def test_a_configuration_runs_no_code(kind: str, reader: str, model: Path) -> None:
    """A name in config.json makes some reader import or fetch code."""
    change(model, **CODE[kind])
    attack(lambda: READERS[reader](model), model)
    assert not (model / "canary-ran").exists()


SIZES: dict[str, dict[str, Any]] = {
    "ten million layers": {"num_hidden_layers": 10_000_000},
    "a width of 2**40": {"hidden_size": 2**40},
    "a vocabulary of 2**31": {"vocab_size": 2**31},
    "heads without number": {"num_attention_heads": 2**62},
    "a negative width": {"intermediate_size": -32},
    "layers that are negative": {"num_hidden_layers": -5},
    "a width that is a NaN": {"rms_norm_eps": float("nan")},
    "a base that is infinite": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e999}},
}


@every_reader
@pytest.mark.parametrize("kind", SIZES)
def test_sizes_beyond_the_tensors_are_refused(kind: str, reader: str, model: Path) -> None:
    """A model is built before its weights are read: the configuration alone said how large."""
    change(model, **SIZES[kind])
    refused(lambda: READERS[reader](model), model)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 16},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 0},
        {"hidden_act": "os.system"},
        {"num_hidden_layers": "1"},
        {"vocab_size": None},
        {"rope_parameters": {"rope_type": "canary"}},
        {"architectures": "LlamaForCausalLM"},
    ],
    ids=str,
)
def test_a_configuration_of_another_model_is_refused(changes: dict[str, Any], model: Path) -> None:
    """Values of other types, and sizes that the tensors do not have."""
    change(model, **changes)
    refused(lambda: READERS["load"](model), model)


TEXTS = {
    "nested 100,000 deep": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "an integer of 5,000 digits": '{"vocab_size": ' + "9" * 5000 + "}",
    "a key twice": '{"vocab_size": 32, "vocab_size": 64}',
    "no object": "[]",
    "no JSON": "{",
    "bytes": "\ud800",
}


@every_reader
@pytest.mark.parametrize("kind", TEXTS)
def test_text_that_parsers_fail_on_is_refused(kind: str, reader: str, model: Path) -> None:
    """Deep nesting exhausts stacks, digits take quadratic time, and of two keys one counts."""
    (model / "config.json").write_bytes(TEXTS[kind].encode("utf-8", "surrogatepass"))
    refused(lambda: READERS[reader](model), model)


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "a/../../secret.txt", "", 7])
def test_cve_2022_25882_kind_a_weight_map_that_leads_outside(name: object, model: Path) -> None:
    """The index of a checkpoint names the files of its tensors: `..` and absolute paths."""
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: capture_checkpoint(model), model)
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    refused(lambda: load_source(str(model)), model)


def _symbolic(source: Path, target: Path) -> None:
    target.symlink_to(source)


@pytest.mark.parametrize("link", [_symbolic, os.link], ids=["symbolic", "hard"])
def test_cve_2026_34446_kind_weights_that_are_links_out_of_the_folder(
    link: Callable[[Path, Path], None], model: Path
) -> None:
    """A model's folder whose safetensors file is another name of a file elsewhere."""
    outside = model.parent / "secret.safetensors"
    (model / "model.safetensors").rename(outside)
    link(outside, model / "model.safetensors")
    refused(lambda: load_source(str(model)), model, "link")


EXPLODING = "(a+)+$|(.*.*.*.*.*)*x|((((a*)*)*)*)*b"
CODES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPTQ: a rule that explodes": ("GPTQ", {"dynamic": {"-:" + EXPLODING: {}}}),
    "GPTQ: bits of 2**40": ("GPTQ", {"bits": 2**40}),
    "GPTQ: groups of 0": ("GPTQ", {"group_size": 0}),
    "GPTQ: bits that are a list": ("GPTQ", {"bits": [4]}),
    "AWQ: groups that are negative": ("AWQ", {"group_size": -7}),
    "AWQ: a layout of objects": ("AWQ", {"version": {"a": 1}}),
    "a method that is a path": ("GPTQ", {"quant_method": "../../canary"}),
    "a method that is a number": ("HQQ", {"quant_method": 7}),
}


@pytest.mark.parametrize("kind", CODES)
def test_settings_of_codes_are_refused_or_read(kind: str, folder: Path) -> None:
    """What a configuration says of codes: numbers of any size and type, and expressions."""
    name, changes = CODES[kind]
    FORMATS[name].build(folder)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    change(folder, quantization_config=said | changes)
    outcome = attack(lambda: load_source(str(folder)).kind, folder)
    assert outcome.kind == "typed" or "explodes" in kind
