"""Speed next to float: the same model as floats in the same client, both run in turns.

Measured where rows of docs/reference/clients.md are recorded, and never asserted: a test that runs
without `QALORA_CLIENTS` takes no time for it.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import qalora_compile as qc
from benchmarks.ratios import ratios
from qalora_compile.capture.lazy_folder import capture_checkpoint
from qalora_compile.exporters.onnx.sentence_transformers import SETTINGS_FILE
from qalora_compile.files import write_json
from qalora_compile.untrusted import read_json
from tests.clients.record import FOLDER

ROUNDS = 7
"""Of which the first is not counted."""
FLOAT = qc.ExportSpec(allow_unfolded=True, fusion="standard", opset=23)
"""How the model is exported as floats, with ONNX's own attention."""


def recording() -> bool:
    """Whether rows are recorded, and speeds measured for them."""
    return bool(os.environ.get(FOLDER))


def write_float(source: Path, edge: Path, out: Path) -> Path:
    """The folder of clients for the model in `source` as floats, like `edge` but for the graph."""
    shutil.copytree(edge, out, ignore=shutil.ignore_patterns("model_q4.onnx*"))
    config = read_json(edge / "config.json")
    config["transformers.js_config"] = {"dtype": "fp32"}
    write_json(out / "config.json", config)
    if (edge / SETTINGS_FILE).is_file():
        settings = read_json(edge / SETTINGS_FILE) | {"model_args": {"file_name": "model.onnx"}}
        write_json(out / SETTINGS_FILE, settings)
    qc.export_model(capture_checkpoint(source, last_logits=None), out / "onnx/model.onnx", FLOAT)
    return out


def next_to_float(rounds: list[list[float]]) -> str:
    """Seconds of the exported and of the float model in each round → their ratio as a speed."""
    edge, base = zip(*rounds[1:], strict=True)
    return f"{ratios(base, edge)} × float"


def token_seconds(generate: Callable[[], Iterator[int]], tokens: int) -> float:
    """Seconds that a generator takes for `tokens` tokens after its first one."""
    found = generate()
    next(found)
    begin = time.perf_counter()
    made = sum(1 for _ in itertools.islice(found, tokens))
    assert made == tokens, "the text ended before"
    return time.perf_counter() - begin


def in_turns(
    edge: Callable[[], Iterator[int]], base: Callable[[], Iterator[int]], tokens: int
) -> str:
    """The speed of a generator of tokens next to that of the float model's."""
    both = (edge, base)
    return next_to_float([[token_seconds(g, tokens) for g in both] for _ in range(ROUNDS)])
