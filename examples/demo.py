"""The complete workflow on a language model: quantize, adapt, train, fold, export, run, verify.

    python examples/demo.py                 six to eight minutes on two cores
    python examples/demo.py --quick         about two minutes
    python examples/demo.py --seed 1        another order of data, other initial adapters

SmolLM2-135M-Instruct learns to name the topic of a news article. Every figure of the closing table
is measured in this run; the exit code is 1 if one of the checks fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qalora_compile as qc
from qalora_compile.brief import megabytes
from qalora_compile.capture.load_source import Source, load_source
from qalora_compile.cli.ui import Steps, print_summary, steps
from qalora_compile.runtime import LanguageModel, kernel_level, library_path, open_session
from qalora_compile.training import FitSpec, Metrics, evaluate, fit, load_examples
from qalora_compile.training.data.example import IGNORED, Example
from qalora_compile.training.evaluate import Forward, logits_of, program_forward

sys.path.insert(0, str(Path(__file__).parent))
from assets import TOPICS, model_path, write_topic_data

TOLERANCE = qc.Tolerance(max_rel=1e-4, rounding=True)
"""Largest difference that a step may make, as a part of the scale of the logits."""
LEARNED = 0.15
"""Least gain of held-out accuracy that counts as having learned."""


@dataclass(frozen=True)
class Size:
    """How much of everything a run does."""

    train: int
    held_out: int
    steps: int
    batch: int
    calls: int
    new_tokens: int
    rounds: int


FULL = Size(train=480, held_out=200, steps=60, batch=8, calls=16, new_tokens=64, rounds=7)
QUICK = Size(train=160, held_out=24, steps=12, batch=4, calls=1, new_tokens=8, rounds=2)


LLAMA_CPP = (
    "prompts at 3.7, tokens at 1.6 of Q4_1's speed; 1.3 and 1.4 of Q4_0's, which is less exact"
)
"""The default export with a cache, one thread of a Xeon, prompt of 128, by `benchmarks.peers`."""


@dataclass
class Results:
    """Figures for the closing table, and the checks that failed."""

    rows: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def check(self, name: str, holds: bool) -> None:
        """Note a check that does not hold."""
        if not holds:
            self.failed.append(name)


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less data and fewer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the results")
    options = parser.parse_args()
    started = time.monotonic()
    results = Results()
    with steps() as shown:
        run(options, QUICK if options.quick else FULL, results, shown)
    results.rows["minutes"] = f"{(time.monotonic() - started) / 60:.1f}"
    results.rows["checks"] = "all hold" if not results.failed else f"FAILED: {results.failed}"
    print_summary("qalora-compile demo: SmolLM2-135M-Instruct, topics of news", results.rows)
    (options.out / "results.json").write_text(json.dumps(results.rows, indent=1) + "\n", "utf-8")
    return 1 if results.failed else 0


def run(options: argparse.Namespace, size: Size, results: Results, shown: Steps) -> None:
    """All steps, in the order of the README."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    shown.say("1. load SmolLM2-135M-Instruct from its GGUF file")
    source = load_source(str(model_path()))
    train, held_out, choices = load_data(source, out, size)

    shown.say("2. capture, quantize to 4 bits in groups of 32, insert adapters")
    original = source.capture()
    program = qc.quantize_groups(original, qc.QuantSpec(bits=4, group_size=32))
    program = qc.insert_adapters(program, qc.AdapterSpec(rank=16, alpha=32, seed=options.seed))

    shown.say("3. fine-tune the adapters on the quantized weights")
    before = evaluate(program_forward(program), held_out, choices=choices)
    shown.say(f"   held-out before: {describe(before)}")
    train_adapters(program, train, options.seed, size, shown)
    after = evaluate(program_forward(program), held_out, choices=choices)
    shown.say(f"   held-out after:  {describe(after)}")
    record_training(results, before, after, options.seed)

    shown.say("4. fold the adapters into the zero-points")
    folded = qc.fold_adapters(program)
    calls = as_calls(held_out[: size.calls])
    report = qc.verify_equivalence(program, folded, calls, TOLERANCE)
    results.check("folded equals trained", report.passed)
    results.rows["largest difference, trained and folded"] = (
        f"{report.max_abs:.2g} of logits up to {report.outputs[0].scale:.3g}"
    )

    shown.say("5. export to ONNX and run in ONNX Runtime")
    edge, plain = out / "model.onnx", out / "float.onnx"
    overwrite = qc.ExportSpec(overwrite=True)
    exported = qc.export_model(folded, edge, overwrite)
    unfolded = qc.ExportSpec(overwrite=True, allow_unfolded=True)
    floating = qc.export_model(original, plain, unfolded)
    stock = dataclasses.replace(unfolded, target="ort-stock")
    qc.export_model(program, out / "unmerged.onnx", stock)
    source.tokenizer.save_pretrained(out)
    check_kernels(results, folded, edge, calls)
    int4 = LanguageModel(open_session(edge))
    compare_metrics(results, folded, int4, held_out, choices)
    compare_greedy(results, source, folded, int4, held_out, size)
    results.rows["size, float32 → INT4"] = (
        f"{megabytes(floating.size_bytes)} → {megabytes(exported.size_bytes)}"
    )
    variants = {
        "float32": open_session(plain),
        "adapters unmerged, stock kernels": open_session(out / "unmerged.onnx"),
        "merged, stock kernels": open_session(edge, library=False),
    }
    if kernel_level() is not None:
        variants["merged, operator library"] = int4.session
    compare_speed(results, {name: LanguageModel(s) for name, s in variants.items()}, size)


def check_kernels(
    results: Results, folded: qc.Program, edge: Path, calls: list[dict[str, Tensor]]
) -> None:
    """The one file on stock kernels, and with the operator library where it was built."""
    kernels: dict[str, Path | None] = {"stock kernels": None}
    if kernel_level() is not None:
        kernels[f"operator library ({kernel_level()})"] = library_path()
    for name, library in kernels.items():
        report = qc.verify_equivalence(folded, edge, calls, TOLERANCE, library=library)
        results.check(f"ONNX Runtime equals folded, {name}", report.passed)
        results.rows[f"largest difference, folded and {name}"] = f"{report.max_abs:.2g}"


def load_data(
    source: Source, out: Path, size: Size
) -> tuple[Sequence[Example], Sequence[Example], list[int]]:
    """Training and held-out examples, and the first token of each topic."""
    files = write_topic_data(source.tokenizer, out, train=size.train)
    train, held_out = (load_examples(f, source.tokenizer, max_length=128) for f in files)
    choices = [source.tokenizer(f" {topic}").input_ids[0] for topic in TOPICS]
    return train.examples, held_out.examples[: size.held_out], choices


def train_adapters(
    program: qc.Program, train: Sequence[Example], seed: int, size: Size, shown: Steps
) -> None:
    """Train, with a progress bar."""
    spec = FitSpec(steps=size.steps, batch_size=size.batch, learning_rate=1e-3, seed=seed)
    shown.update("train", 0, spec.steps)

    def on_step(report: Any, _: Any) -> bool:
        shown.update("train", report.step, spec.steps, f"loss {report.loss:.3f}")
        return False

    losses = fit(program, train, spec, on_step=on_step).losses
    shown.say(f"   loss: {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last")


def record_training(results: Results, before: Metrics, after: Metrics, seed: int) -> None:
    """The held-out figures before and after."""
    assert before.choice_accuracy is not None
    assert after.choice_accuracy is not None
    results.rows["seed"] = seed
    results.rows["held-out topic accuracy"] = (
        f"{before.choice_accuracy:.1%} → {after.choice_accuracy:.1%} of {after.examples}"
    )
    results.rows["held-out loss"] = f"{before.loss:.3f} → {after.loss:.3f}"
    results.check("learned", after.choice_accuracy >= before.choice_accuracy + LEARNED)
    results.check("held-out loss fell", after.loss < before.loss)


def compare_metrics(
    results: Results,
    folded: qc.Program,
    int4: LanguageModel,
    held_out: Sequence[Example],
    choices: list[int],
) -> None:
    """The held-out metric of the folded program and of ONNX Runtime."""
    reference = evaluate(program_forward(folded), held_out, choices=choices)
    deployed = evaluate(session_forward(int4), held_out, choices=choices)
    results.rows["held-out accuracy, folded and ONNX Runtime"] = (
        f"{reference.choice_accuracy:.1%} and {deployed.choice_accuracy:.1%}"
    )
    results.check("metric equal", reference.choice_accuracy == deployed.choice_accuracy)
    results.check("loss equal", abs(reference.loss - deployed.loss) < 1e-4)


def compare_greedy(
    results: Results,
    source: Source,
    folded: qc.Program,
    int4: LanguageModel,
    held_out: Sequence[Example],
    size: Size,
) -> None:
    """The greedy continuation of torch and of ONNX Runtime, token by token."""
    example = held_out[0]
    prompt = [
        t for t, label in zip(example.tokens, example.labels, strict=True) if label == IGNORED
    ]
    forward = program_forward(folded)
    tokens = list(prompt)
    for _ in range(size.new_tokens):
        ids = torch.tensor([tokens])
        with torch.no_grad():
            tokens.append(int(forward(ids, torch.ones_like(ids))[0, -1].argmax()))
    reference = tokens[len(prompt) :]
    deployed = list(int4.generate(prompt, max_new_tokens=size.new_tokens))
    same = sum(a == b for a, b in zip(reference, deployed, strict=True))
    results.rows["greedy tokens equal, torch and ONNX Runtime"] = f"{same} of {len(reference)}"
    end = source.tokenizer.eos_token_id
    answer = deployed[: deployed.index(end)] if end in deployed else deployed
    results.rows["answer"] = repr(source.tokenizer.decode(answer)[:120])
    results.check("greedy equal", same == len(reference))


def compare_speed(results: Results, models: dict[str, LanguageModel], size: Size) -> None:
    """Tokens a second of all files, alternated in one process: medians."""
    for title, length in (("128-token prompt", 128), ("one token", 1)):
        ids = torch.randint(
            0, 1000, (1, length), generator=torch.Generator().manual_seed(0)
        ).numpy()
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(size.rounds + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model.logits(ids)
                times[name].append(time.perf_counter() - start)
        rates = {name: length / statistics.median(t[1:]) for name, t in times.items()}
        first = next(iter(rates.values()))
        for name, rate in rates.items():
            results.rows[f"tokens/s, {title}, {name}"] = f"{rate:.0f} ({rate / first:.2f}×)"
    results.rows["next to llama.cpp (docs/design/benchmarks.md)"] = LLAMA_CPP


def session_forward(model: LanguageModel) -> Forward:
    """Logits of an ONNX Runtime session as torch tensors."""

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return logits_of(torch.from_numpy(model.logits(input_ids.numpy(), attention_mask.numpy())))

    return forward


def as_calls(examples: Sequence[Example]) -> list[dict[str, Tensor]]:
    """Held-out texts as calls of the program, one text each."""
    rows = [torch.tensor([e.tokens]) for e in examples]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]


def describe(metrics: Metrics) -> str:
    """Metrics as one line."""
    return f"loss {metrics.loss:.3f}, topic accuracy {metrics.choice_accuracy:.1%}"


if __name__ == "__main__":
    sys.exit(main())
