"""Write the table of docs/design/proof.md: which architectures are proved as complete exports.

Results are kept in a file with one JSON line per graph, so that a run can be resumed and single
architectures tried again. With `--keep FOLDER`, models and exports stay there and are not made
again.

    python -m scripts.write_proved RESULTS [--keep FOLDER]       # all without a result
    python -m scripts.write_proved RESULTS --keep FOLDER BloomForCausalLM resnet
    python -m scripts.write_proved RESULTS --table               # only write the table
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from qalora_compile.files import write_text
from qalora_compile.verdict import PROVEN
from scripts.write_supported import table
from tests.zoo.proofs import NAMES, Proved, prove

PAGE = Path("docs/design/proof.md")
BEGIN, END = "<!-- proved architectures -->", "<!-- end of proved architectures -->"
COLUMNS = ("architecture", "layers", "parts between", "verdict", "conditions", "what is left")
_LONGEST = 110


def read_results(path: Path) -> dict[str, list[Proved]]:
    """The last results of each architecture, one for each of its graphs."""
    rows = path.read_text("utf-8").splitlines() if path.is_file() else []
    found: dict[str, list[Proved]] = {}
    for row in map(json.loads, rows):
        tuples = {name: tuple(row["proved"][name]) for name in ("conditions", "left")}
        proved = Proved(**row["proved"] | tuples)
        kept = [p for p in found.get(row["of"], []) if p.name != proved.name]
        found[row["of"]] = [*kept, proved]
    return found


def is_proved(graphs: Sequence[Proved]) -> bool:
    """Whether all graphs of an architecture are proved, with nothing sampled."""
    return all(graph.verdict in PROVEN for graph in graphs)


def section(results: dict[str, list[Proved]]) -> str:
    """The table, with the number of architectures above it."""
    names = [name for name in NAMES if name in results]
    tried = [name for name in names if any(graph.verdict for graph in results[name])]
    proved = sum(is_proved(results[name]) for name in tried)
    said = f"{proved} of {len(tried)} architectures are proved, with 0 parts sampled.\n\n"
    rows = [_row(graph) for name in names for graph in results[name]]
    return f"{BEGIN}\n{said}{table(COLUMNS, rows)}\n{END}"


def _row(graph: Proved) -> list[str]:
    left = "; ".join(dict.fromkeys(_short(text) for text in graph.left))
    counts = (f"{graph.sites_proved} of {graph.sites}", f"{graph.parts_proved} of {graph.parts}")
    verdict = graph.verdict or "not exported"
    if verdict == "UNDECIDED":
        verdict = "not proved"
    which, _, half = graph.name.partition(" ")
    name = f"`{which}` {half}".strip()
    return [name, *(counts if graph.sites else ("", "")), verdict, _number(graph), left]


def _number(graph: Proved) -> str:
    return str(len(graph.conditions)) if graph.verdict in PROVEN else ""


def _short(text: str) -> str:
    """The operator at fault, or the reason."""
    operator = re.search(r"= ((?:aten|onnx|qalora|_operator)[\w.]*)", text)
    reason = text.rpartition("): ")[2] if "): " in text else text
    reason = reason.partition("\n")[0].replace("|", "\\|")[:_LONGEST]
    return f"`{operator[1]}`: {reason}" if operator else reason


def main(arguments: Sequence[str]) -> int:
    """Try the named architectures, or those without a result; write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--seconds", type=float, help="start nothing new after this time")
    options = parser.parse_intermixed_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results, begin = read_results(options.results), time.monotonic()
    todo = options.names or [name for name in NAMES if name not in results]
    for name in [] if options.table else todo:
        if options.seconds and time.monotonic() - begin > options.seconds:
            break
        _try(name, options.results, options.keep)
    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    write_text(PAGE, before + section(read_results(options.results)) + rest.partition(END)[2])
    return 0


def _try(name: str, results: Path, keep: Path | None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if keep is None else keep / name
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        graphs = list(prove(name, folder))
    with results.open("a", encoding="utf-8") as file:
        for graph in graphs:
            file.write(json.dumps({"of": name, "proved": graph.to_json()}) + "\n")
    said = ", ".join(graph.verdict or graph.left[0] for graph in graphs)
    print(f"{name}: {said} ({time.monotonic() - begin:.1f} s)", flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
