"""Hostile RUN and FOLDED folders: containers and operators of a graph, records, files elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qalora_compile as qc
from qalora_compile.sealed import read_sealed, write_sealed
from qalora_compile.verify.proof.graphs.read_fx import read_program_graph
from tests.attacks.support import attack, cli, refused
from tests.fuzz.seeds import FORMATS

READERS: dict[str, Callable[[Path], Any]] = {
    "load": lambda folder: qc.Program.load(folder).stage,
    "proof": lambda folder: len(read_program_graph(folder).nodes),
    "inspect": lambda folder: cli("inspect", folder)(),
}
every_reader = pytest.mark.parametrize("reader", READERS)


@pytest.fixture
def run(folder: Path) -> Path:
    folder.rmdir()
    FORMATS["run"].build(folder)
    (folder / "canary.py").write_text("import os\nos.system('touch canary-ran')\n")
    (folder / "canary.so").write_bytes(b"\x7fELF")
    return folder


def change(folder: Path, edit: Callable[[str], str]) -> None:
    """Edit program.json as its author could, who seals it again."""
    path = folder / "program.json"
    text = edit(json.dumps(read_sealed(path)))
    write_sealed(path, json.loads(text))


@every_reader
def test_a_program_that_was_changed_is_noticed(reader: str, run: Path) -> None:
    """A bit in a weight, without a word."""
    path = run / "quantized.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(lambda: READERS[reader](run), run, "SHA-256")


@pytest.mark.parametrize("reader", ["load", "inspect"])
@pytest.mark.parametrize(
    "operator",
    [
        "aten.from_file.default",
        "aten.save.default",
        "prims.inductor_seeds.default",
        "os.system",
        "profiler._record_function_enter_new.default",
        "canary.run.default",
        "../canary.so",
    ],
)
def test_case_24_an_operator_that_capture_does_not_write(
    operator: str, reader: str, run: Path
) -> None:
    """An operator of torch that touches files, or of any library that is loaded."""
    text = json.dumps(read_sealed(run / "program.json"))
    known = next(name for name in ("aten.relu.default", "aten.relu") if name in text)
    change(run, lambda text: text.replace(known, operator))
    refused(lambda: READERS[reader](run), run)
    assert not list(run.parent.rglob("canary-ran"))


LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
CONTAINERS = (
    {"type": "canary.Enum", "context": '[["a"], []]', "children_spec": [LEAF]},
    {
        "type": "builtins.dict",
        "context": '[{"__enum__": true, "fqn": "canary:Color", "name": "RED"}]',
        "children_spec": [LEAF],
    },
    {
        "type": "collections.defaultdict",
        "context": '{"default_factory_module": "canary", "default_factory_name": "T", '
        '"dict_context": ["a"]}',
        "children_spec": [LEAF],
    },
    {"type": "collections.namedtuple", "context": '"canary.T"', "children_spec": [LEAF]},
    {
        "type": "transformers.models.canary.modeling_canary.Output",
        "context": '["a"]',
        "children_spec": [LEAF],
    },
)


@pytest.mark.parametrize("reader", ["load", "inspect"])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("container", CONTAINERS, ids=range(len(CONTAINERS)))
def test_case_23_a_container_that_names_a_module(
    container: Any, side: str, reader: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader of torch's tree specs imports what an enum or a default factory names."""
    monkeypatch.syspath_prepend(str(run))  # as in a shell that stands in the folder

    def edit(text: str) -> str:
        value = json.loads(text)
        value["graph"]["tree"][side] = json.dumps([1, container])
        return json.dumps(value)

    change(run, edit)
    refused(lambda: READERS[reader](run), run)
    assert not list(run.parent.rglob("canary-ran"))


@every_reader
@pytest.mark.parametrize("file", ["quantized.safetensors", "program.json"])
@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_cve_2026_34446_kind_a_file_that_is_a_link_out_of_the_folder(
    kind: str, file: str, reader: str, run: Path
) -> None:
    """A program's file that is another name of a file elsewhere."""
    outside = run.parent / f"secret-{file}"
    (run / file).rename(outside)
    if kind == "symbolic":
        (run / file).symlink_to(outside)
    else:
        os.link(outside, run / file)
    refused(lambda: READERS[reader](run), run, "link")


@every_reader
def test_a_valid_program_is_read(reader: str, run: Path) -> None:
    assert attack(lambda: READERS[reader](run), run).kind == "value"


def test_a_certificate_that_says_proved_of_what_is_not(folder: Path) -> None:
    """A certificate is checked again, not believed."""
    FORMATS["certificate"].build(folder)
    path = folder / "equal.json"
    value = json.loads(path.read_text())
    value["sites"][0]["status"] = "sampled"
    path.write_text(json.dumps(value))
    refused(cli("verify", "--certificate", path), folder, "states proved")


@pytest.mark.parametrize("place", ["../secret.txt", "/etc/hostname", "\0", "a" * 5000])
def test_a_certificate_of_files_elsewhere(place: str, folder: Path) -> None:
    """It names what it was made for; nothing but a program or a model is read there."""
    FORMATS["certificate"].build(folder)
    path = folder / "equal.json"
    value = json.loads(path.read_text())
    value["candidate"]["path"] = place
    path.write_text(json.dumps(value))
    refused(cli("verify", "--certificate", path), folder)
