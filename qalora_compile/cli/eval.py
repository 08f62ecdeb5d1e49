"""`eval`: perplexity, exact match or accuracy of one or several models on the same data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qalora_compile.cli.data_options import add_map_argument
from qalora_compile.cli.options import spec_of
from qalora_compile.cli.ui import print_json, print_table, steps
from qalora_compile.config.choices import CLASSIFICATION, LEARN, TASKS

if TYPE_CHECKING:
    from qalora_compile.api.evaluate import Evaluation

EXAMPLES = """examples:
  qalora-compile eval ./SmolLM2 run folded edge --data test.jsonl
  qalora-compile eval model.gguf edge --data test.jsonl --limit 200
  qalora-compile eval edge --data reviews.jsonl --json

data, as for finetune:
  {"text": "…"}                       loss and perplexity of every token
  {"prompt": "…", "completion": "…"}  also exact match of the greedy answer
  {"messages": […]}                   likewise, of the answers
  {"text": "…", "label": "…"}         accuracy of classifiers

A model that was exported with the logits of the last token alone (the default)
reads one token after the other; --all-logits of export makes it quick.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="Hugging Face or quantized checkpoint, .gguf file, RUN, FOLDED or EDGE",
    )
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="FILE", help="files, patterns or folders"
    )
    parser.add_argument("--task", choices=TASKS, help="what is predicted (default: inferred)")
    add_map_argument(parser)
    trained = "default: as the first RUN or FOLDED was trained"
    parser.add_argument(
        "--learn",
        choices=LEARN,
        help=f"count answers only, or prompts too ({trained}, or {LEARN[0]})",
    )
    parser.add_argument(
        "--seq-len", type=int, metavar="N", help=f"most tokens of an example ({trained}, or 512)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="use the first N examples (default: all)"
    )
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="examples at once")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of ONNX Runtime (default: its own choice)"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from qalora_compile.api.evaluate import EvalSpec, evaluate_models

    spec = spec_of(EvalSpec, options)
    with steps():
        results = list(evaluate_models(spec))
    if options.json:
        print_json([_as_json(result) for result in results])
    else:
        _show(results)
    return 0


def _show(results: Sequence[Evaluation]) -> None:
    rows = [_figures(result) for result in results]
    print_table(
        f"eval: {results[0].metrics.examples} examples",
        ["model", "form", *rows[0]],
        [[r.model, r.form, *row.values()] for r, row in zip(results, rows, strict=True)],
        wrap=["model"],
    )


def _figures(result: Evaluation) -> dict[str, str]:
    metrics = result.metrics
    found = {"loss": f"{metrics.loss:.4f}"}
    if result.task == CLASSIFICATION:
        found["accuracy"] = f"{metrics.exact_match:.4f}"
    else:
        found["perplexity"] = f"{result.perplexity:.4g}"
        found["token accuracy"] = f"{metrics.token_accuracy:.4f}"
        if result.answers:
            found["exact match"] = f"{metrics.exact_match:.4f}"
    return found | {"predicted": str(result.targets), "seconds": f"{result.seconds:.1f}"}


def _as_json(result: Evaluation) -> dict[str, Any]:
    metrics = result.metrics
    classifies = result.task == CLASSIFICATION
    accuracy = {"accuracy": metrics.exact_match}
    tokens = {
        "perplexity": result.perplexity,
        "token_accuracy": metrics.token_accuracy,
        "exact_match": metrics.exact_match if result.answers else None,
    }
    return {
        "model": result.model,
        "form": result.form,
        "task": result.task,
        "examples": metrics.examples,
        "predicted": result.targets,
        "truncated": result.truncated,
        "loss": metrics.loss,
        **(accuracy if classifies else tokens),
        "seconds": result.seconds,
    }
