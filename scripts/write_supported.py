"""Write docs/reference/supported.md: the result of every check of the zoo on every model.

A failed check stops the script, and nothing is written. It takes a few minutes.

    python -m scripts.write_supported          # or: make supported
"""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qalora_compile.files import write_text
from qalora_compile.ir.site_plan import KEEP, QUANTIZE, Site, SitePlan
from tests.zoo.checks import CAUSAL, CHECKS, run_checks
from tests.zoo.entries import ENTRIES, Entry

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "supported.md"
ARCHITECTURES = "## Architectures on the command line"
"""Heading of the section that `scripts.write_architectures` writes."""
MODELS, REASONS, PATTERNS = "Models", "Why weights stay in float", "Operator patterns"
COLUMNS = ("model", "sites quantized", "kept", *CHECKS, "axes that the model fixes")
CACHE = COLUMNS[-2]
MOST_EXAMPLES = 3

INTRODUCTION = f"""# What is supported

This page shows which models and operator patterns are supported, and why some weights stay in
float. `make supported` writes it from a run of the zoo (`tests/zoo`): small models with random
weights, built from configuration, end to end from capture to ONNX Runtime. Do not edit it by hand.

Any model that `torch.export` accepts can be captured. Its linear maps by a parameter are quantized.
Every other weight with two or more dimensions, even one that the forward pass never reads, has a
row in the plan with a reason.

## {MODELS}

*sites quantized* and *kept* count rows of the plan. Numbers are the largest error found, relative
to the output's largest value, with one significant digit; ✓ marks a check that measures no error.

* **capture**: the captured program against the model, at three sizes, and in training mode
* **plan**: every weight has a row with a reason
* **quantized**: the 4-bit program against the model with its weights dequantized in place
* **training**: only adapters get gradients, all of them do, and nothing else changes in ten steps
* **modules**: `adapt_module_` on the model itself: the program's names, outputs, gradients and fold
* **fold**: the folded program against the one with adapters, at two sizes that were never captured
* **stored**: saved and loaded again, bit for bit the same
* **inspect**: `qalora-compile inspect` shows the complete plan
* **onnx**: the exported file in ONNX Runtime against torch, at another size that was never captured
* **kv_cache**: models with a key-value cache, prompt and later tokens, in ONNX Runtime against
  torch; encoder-decoder models as two files; other models have none (–)
"""


@dataclass(frozen=True)
class Row:
    """The results of the zoo for one model."""

    entry: Entry
    plan: SitePlan
    seen: dict[str, float | None]


@dataclass(frozen=True)
class Pattern:
    """A pattern in which models use weights, and how to recognize it in a plan."""

    what: str
    how: str
    fits: Callable[[Site], bool]


def _kept(*kinds: str) -> Callable[[Site], bool]:
    return lambda site: site.decision == KEEP and site.kind.startswith(kinds)


def _quantized(*kinds: str) -> Callable[[Site], bool]:
    return lambda site: site.decision == QUANTIZE and site.kind in kinds


KNOWN = (
    Pattern("`linear`", "quantized", _quantized("linear")),
    Pattern("`addmm` by a weight stored `[K, N]` (GPT-2)", "quantized", _quantized("addmm")),
    Pattern(
        "`mm`, `matmul` by a parameter, also through t, transpose, permute, view, select, slice",
        "quantized as the matrix that the views produce",
        _quantized("matmul"),
    ),
    Pattern(
        "1×1 convolution with stride and groups 1",
        "rewritten as a linear map along the channels (`canonicalize-pointwise`), quantized",
        _quantized("pointwise"),
    ),
    Pattern("other convolutions", "kept, with the kernel, stride or groups", _kept("conv")),
    Pattern(
        "attention's packed `in_proj_weight`",
        "quantized: one site where q, k and v read one tensor, else one site a part (`.q`, `.kv`)",
        lambda site: site.decision == QUANTIZE and site.weight.endswith("in_proj_weight"),
    ),
    Pattern(
        "stacked experts, 3-D (`grouped_mm`, `bmm`)",
        "quantized expert by expert, one adapter each",
        _quantized("experts"),
    ),
    Pattern(
        "router of experts (its outputs reach `topk`)",
        "kept: a small error sends a token elsewhere; `targets` forces it",
        lambda site: site.reason.startswith("router"),
    ),
    Pattern(
        "output projection tied to an embedding",
        "kept: the table is needed in float anyway; `targets` forces it",
        lambda site: site.reason.startswith("tied"),
    ),
    Pattern("embedding", "kept", _kept("embedding")),
    Pattern(
        "LSTM, GRU", "kept: one operator reads the weights at every step", _kept("lstm", "gru")
    ),
    Pattern(
        "one weight used several times",
        "one site for each use (`@2`, `@3`); codes and adapter are shared",
        lambda site: site.decision == QUANTIZE and "@" in site.name,
    ),
)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def number(value: float | None) -> str:
    """One significant digit, so that another run usually writes the same page."""
    if value is None:
        return "✓"
    if value == 0:
        return "0"
    return f"{value:.0e}".replace("e-0", "e-")


def model_row(row: Row) -> list[str]:
    """The table cells of one model."""
    counts = row.plan.counts()
    fixed = "; ".join(f"{axis}: {why}" for axis, why in (row.entry.fixed or {}).items())
    seen = [number(row.seen[name]) for name in CHECKS if name != CACHE]
    seen.append(number(row.seen[CACHE]) if row.entry.name in CAUSAL else "–")
    return [row.entry.name, str(counts[QUANTIZE]), str(counts[KEEP]), *seen, fixed]


def reason_rows(rows: Sequence[Row]) -> list[list[str]]:
    """Each reason, without names of sites, with how often it was given and where."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        names = sorted((site.name for site in row.plan), key=len, reverse=True)
        for site in row.plan:
            if site.decision == KEEP:
                words = site.reason.replace(",", " ,").split()
                plain = " ".join("…" if word in names else word for word in words)
                found[plain.replace(" ,", ",")].append(f"{row.entry.name}: `{site.name}`")
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    return [[reason, str(len(places)), examples(places)] for reason, places in ordered]


def pattern_rows(rows: Sequence[Row]) -> list[list[str]]:
    """Each known pattern with models that use it.

    Raises:
        SystemExit: no model of the zoo uses a pattern, so the page would claim what nothing tests.
    """
    cells = []
    for known in KNOWN:
        models = [row.entry.name for row in rows if any(map(known.fits, row.plan))]
        if not models:
            raise SystemExit(f"no model of the zoo shows the pattern: {known.what}")
        cells.append([known.what, known.how, examples(models)])
    return cells


def examples(places: Sequence[str]) -> str:
    """The first few examples, from different models if possible, and the number of others."""
    first: dict[str, str] = {}
    for place in places:
        first.setdefault(place.split(":")[0], place)
    chosen = list(first.values())[:MOST_EXAMPLES]
    more = len(places) - len(chosen)
    return ", ".join(chosen) + (f" and {more} more" if more else "")


def page(rows: Sequence[Row]) -> str:
    """The complete page."""
    return "\n".join(
        [
            INTRODUCTION,
            table(COLUMNS, map(model_row, rows)),
            f"## {REASONS}\n",
            table(("reason", "weights", "for example"), reason_rows(rows)),
            f"## {PATTERNS}\n",
            table(("weight or operator", "how it is handled", "seen in"), pattern_rows(rows)),
        ]
    )


def study(entries: Sequence[Entry], console: Console) -> list[Row]:
    """Run all checks on all models, up to the first failure."""
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn())
    rows = []
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=len(entries))
        for entry in entries:
            bar.update(task, description=entry.name)
            with tempfile.TemporaryDirectory() as scratch:
                done, seen = run_checks(entry, Path(scratch))
            assert not any(math.isnan(value) for value in seen.values() if value is not None)
            rows.append(Row(entry, done.quantized.plan, seen))
            bar.advance(task)
    return rows


def main() -> None:
    """Run the zoo and write the page."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = study(list(ENTRIES.values()), Console(stderr=True))
    others = PAGE.read_text("utf-8").partition(f"\n{ARCHITECTURES}")
    write_text(PAGE, page(rows) + "".join(others[1:]))
    print(f"wrote {PAGE.name}: {len(rows)} models × {len(CHECKS)} checks, all passed")


if __name__ == "__main__":
    main()
