"""Our exports next to ONNX Runtime, GenAI, llama.cpp and OpenVINO, on one model and one machine.

Each runtime loads the model in a process of its own; the processes are asked in turn, round by
round, so that whatever else the machine does falls on all of them. All read the same tokens. A cell
is the median of tokens a second, and its ratio to the fastest llama.cpp variant in the same round:
the median over the rounds, and the quartiles. Above 1 is faster. Runtimes and files are made on
first use and kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import processor
from benchmarks.peers import environments
from benchmarks.peers.artefacts import ROOT, artefact, model_file, stored_bytes
from benchmarks.peers.report import Report, Table, put_into
from benchmarks.peers.runner import Plan, children, measure
from benchmarks.peers.sources import MODELS, source_folder, text_tokens
from benchmarks.peers.variants import VARIANTS, Variant, usable
from qalora_compile.files import write_text
from qalora_compile.runtime import kernel_level

EXAMPLES = """examples:
  python -m benchmarks.peers --quick                       five minutes after the first run
  python -m benchmarks.peers --write                       all lengths, into its page
  python -m benchmarks.peers --quick --model random-1b
  python -m benchmarks.peers --quick --only default fast llama --threads 1
"""
PAGE = ROOT / "docs" / "design" / "benchmarks.md"
LENGTHS = {False: (16, 128, 512, 2048), True: (16, 128, 512)}
DECODE = {False: (16, 512, 2048), True: (16, 512)}


def chosen(words: Sequence[str] | None) -> list[Variant]:
    """The variants whose names contain one of the words."""
    if words is None:
        return list(VARIANTS)
    return [v for v in VARIANTS if any(word.lower() in v.name.lower() for word in words)]


def prepare(
    variants: Sequence[Variant], model: str, cache: Path
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What each variant needs to start, by name, and why others are skipped."""
    source, runtimes = source_folder(model, cache), cache / "runtimes"
    folder = cache / (model if model in MODELS else Path(model).name)
    ready: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for variant in variants:
        say(f"prepare {variant.name}")
        try:
            reason = usable(variant)
            if reason:
                raise environments.UnavailableError(reason)
            python = variant.python(runtimes)
            options = dict(variant.options)
            if variant.engine == "llama":
                options["folder"] = str(environments.llama_folder(runtimes).resolve())
            place = artefact(variant.artefact, source, folder, runtimes)
        except environments.UnavailableError as error:
            skipped[variant.name] = str(error)
            continue
        path = place if variant.engine == "genai" else model_file(variant.artefact, place)
        ready[variant.name] = {
            "python": python,
            "engine": variant.engine,
            "bytes": stored_bytes(place),
            "loading": int(variant.loading * stored_bytes(place)),
            "load": {"path": str(path.resolve()), "options": options},
        }
    return ready, skipped


def measured(ready: Mapping[str, dict[str, Any]], threads: int, plan: Plan) -> Table:
    """Start, measure and end all variants on a number of threads."""
    engines = {name: (one["python"], one["engine"]) for name, one in ready.items()}
    common = {"threads": threads, "context": plan.context}
    loads = {name: one["load"] | common for name, one in ready.items()}
    needs: dict[str, int] = {}
    for one in ready.values():  # one file may be run in several ways
        path = one["load"]["path"]
        needs[path] = max(needs.get(path, 0), one["loading"])
    with children(engines, threads=threads) as peers:
        return measure(peers, loads, plan, lambda what: say(f"threads {threads}: {what}"), needs)


def say(what: str) -> None:
    """One line on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument(
        "--model", default="smollm2", help=f"{', '.join(MODELS)}, or a Hugging Face folder"
    )
    found.add_argument("--quick", action="store_true", help="leave out the longest prompt")
    found.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    found.add_argument("--only", nargs="+", metavar="WORD", help="variants by parts of names")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--prompts", type=int, nargs="+", metavar="N", help="lengths of prompts")
    found.add_argument("--after", type=int, nargs="+", metavar="N", help="lengths to decode after")
    found.add_argument("--steps", type=int, default=16, help="tokens decoded in a round")
    found.add_argument("--scored", type=int, default=256, help="tokens that perplexity is from")
    found.add_argument("--cache", type=Path, default=ROOT / "build" / "peers", metavar="DIR")
    found.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    found.add_argument("--svg", type=Path, metavar="FILE", help="write the plot")
    found.add_argument("--write", action="store_true", help=f"put both into {PAGE.name}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare, measure, show; 1 if a variant failed or does not run the same model."""
    options = parser().parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    variants = chosen(options.only)
    ready, skipped = prepare(variants, options.model, options.cache)
    prompts = tuple(options.prompts or LENGTHS[options.quick])
    decode = tuple(options.after or DECODE[options.quick])
    text = max(*prompts, *decode) + options.steps
    plan = Plan(
        tokens=text_tokens(source_folder(options.model, options.cache), max(text, 512)),
        prompts=prompts,
        decode=decode,
        steps=options.steps,
        rounds=options.rounds,
        scored=options.scored,
    )
    tables = {threads: measured(ready, threads, plan) for threads in options.threads}
    versions = {found.version for table in tables.values() for found in table.values()} - {""}
    machine = {
        "cpu": processor(),
        "kernels": kernel_level(),
        "runtimes": sorted(versions),
        "model": options.model,
        "rounds": options.rounds,
    }
    sizes = {name: one["bytes"] for name, one in ready.items()}
    report = Report(machine=machine, variants=variants, sizes=sizes, tables=tables, skipped=skipped)
    show(report, options)
    failed = any(found.failed for table in tables.values() for found in table.values())
    return 1 if failed or report.implausible() else 0


def show(report: Report, options: argparse.Namespace) -> None:
    """Print the table and what it says of the targets; write the files that are asked for."""
    described = ", ".join([report.machine["cpu"], *report.machine["runtimes"]])
    text = f"{described}; kernels `{report.machine['kernels']}`.\n\n{report.markdown()}"
    print(text)
    print("\nTimes the speed of the fastest llama.cpp:")
    print("\n".join(report.reach()))
    name = Path(options.model).name
    plot = report.svg(f"{name}: {report.machine['cpu']}")
    if options.json:
        write_text(options.json, json.dumps(report.to_json(), indent=1) + "\n")
    if options.svg:
        write_text(options.svg, plot)
    if options.write:
        file = PAGE.with_name(f"peers_{name}.svg")
        write_text(file, plot)
        picture = f"![tokens per second of each runtime]({file.name})"
        page = put_into(PAGE.read_text("utf-8"), name, f"{text}\n\n{picture}")
        write_text(PAGE, page)


if __name__ == "__main__":
    sys.exit(main())
