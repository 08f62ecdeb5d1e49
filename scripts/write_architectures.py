"""Write the table of architectures in docs/reference/supported.md: which commands work for each.

Results are kept in a file with one JSON line per architecture, so that a run can be resumed and
single architectures tried again. All of them take about forty minutes on one core.

    python -m scripts.write_architectures RESULTS           # or: make architectures
    python -m scripts.write_architectures RESULTS BloomForCausalLM Lfm2ForCausalLM
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from qalora_compile.files import write_text
from scripts.write_supported import ARCHITECTURES as HEADING
from scripts.write_supported import PAGE, table
from tests.zoo.architectures import (
    ARCHITECTURES,
    DECODERS,
    ENCODER_DECODERS,
    ENCODERS,
    IMAGES,
    LOADED_OTHERWISE,
    SOUNDS,
    WITHOUT_CACHE,
)
from tests.zoo.road import STEPS, walk

MEDIA = (*IMAGES, *SOUNDS)
ON_THE_ROAD = (*DECODERS, *ENCODER_DECODERS, *ENCODERS, *MEDIA)
COLUMNS = ("architecture", "loaded", *STEPS, "refused because")
INTRODUCTION = f"""{HEADING}

`make architectures` writes this section: classes of transformers, built small from configuration
(`tests/zoo/architectures.py`), saved with `save_pretrained`, and run end to end
(`tests/zoo/road.py`). ✓ means done; **refused** means an error that says why, with nothing written;
– means not tried, because an earlier step was refused.

* **loaded**: every tensor that `quantize` reads is that of `from_pretrained`, bit for bit
  (`tests/capture/test_architectures.py`)
* **quantize**: at 8 bits; **quantized**: its file against the model in float, prompt, chunks and
  single tokens, by 0.2 of the largest output (0.9 with experts, since rounding may choose another)
* **finetune**, one step at 4 bits; **fold**; **export**; **verify**: the file against the folded
  program, by 1e-3

Models that keep a state other than keys and values are written with `--no-kv-cache`. Models of
images and audio are fine-tuned on files; `quantize` takes models of texts.
"""

Results = dict[str, dict[str, str]]
"""Architecture → step → its error message, empty if it succeeded."""


def read_results(path: Path) -> Results:
    """The last line of each architecture."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {row["name"]: row["steps"] for row in rows}


def steps_of(name: str) -> dict[str, str]:
    """Run one architecture end to end."""
    with tempfile.TemporaryDirectory() as folder:
        return {r.step: r.reason() if r.code else "" for r in walk(name, Path(folder))}


def page_section(results: Mapping[str, Mapping[str, str]]) -> str:
    """The section as Markdown."""
    rows = [_row(name, results.get(name, {})) for name in ARCHITECTURES]
    passed = sum(all(mark in ("✓", "") for mark in row[1:-1]) for row in rows if any(row[2:-1]))
    tried = sum(any(row[2:-1]) for row in rows)
    exact = len(rows) - len(LOADED_OTHERWISE)
    said = f"\n{passed} of {tried} pass end to end; {exact} of {len(rows)} are loaded.\n\n"
    return INTRODUCTION + said + table(COLUMNS, rows)


def _row(name: str, steps: Mapping[str, str]) -> list[str]:
    loaded = "**refused**" if name in LOADED_OTHERWISE else "✓"
    absent = "" if name in MEDIA else "–"
    marks = [
        absent if step not in steps else "**refused**" if steps[step] else "✓" for step in STEPS
    ]
    reasons = dict.fromkeys(
        said.removeprefix("error: ").replace("|", "\\|") for said in steps.values() if said
    )
    cache = " (no cache)" if name in WITHOUT_CACHE else ""
    return [f"`{name}`{cache}", loaded, *marks, "; ".join(reasons)]


def write_section(section: str) -> None:
    """Put the section at the end of the page, replacing an older one."""
    text = PAGE.read_text("utf-8").partition(HEADING)[0].rstrip("\n")
    write_text(PAGE, f"{text}\n\n{section}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what libraries print."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def main(arguments: Sequence[str]) -> int:
    """Try the named architectures, or those without a result; write the section."""
    path, chosen = Path(arguments[0]), arguments[1:]
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results = read_results(path)
    todo = list(chosen) or [name for name in ON_THE_ROAD if name not in results]
    for index, name in enumerate(todo, 1):
        print(f"{index}/{len(todo)} {name}", flush=True)
        with _quiet():
            results[name] = steps_of(name)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "steps": results[name]}) + "\n")
    missing = [name for name in ON_THE_ROAD if name not in results]
    if missing:
        print(f"not tried yet, so nothing is written: {', '.join(missing)}")
        return 1
    write_section(page_section(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
