"""What remains of a fine-tuning after quantization: the paper's claim at our scale.

A sentence encoder learns to judge film reviews, or a language model to name the topic of an article
(`benchmarks.accuracy_tasks`). For each width of codes and each seed, it prints the accuracy on
held-out texts of

* `ptq`: the quantized model; only the head, where the model has one, is fitted to it;
* `merged`: LoRA trained on the float weights, merged into them, then quantized;
* `qa-lora`: pooled adapters trained on the quantized weights, then folded: the same size and speed;
* `unmerged`: LoRA trained next to the quantized weights and kept in float: the upper reference;
* `scale`: only the scales are trained; zero-points stay integers, as some runtimes require;
* `integer`: pooled adapters whose zero-points are rounded to integers while they train;
* `affine`: as `qa-lora`, and each scale is multiplied by a trained factor;
* `qat`: as `affine`, and the codes train as well, by straight-through rounding;
* `adaptive`: as `qa-lora` with half as many ranks again, of which training takes a third away;
* `float`: LoRA on the float weights, never quantized.

All methods train on the same batches, with the same rank, alpha, steps and learning rate; heads are
trained along. Every finished cell is a line of the file `--cells`; a cell that is there is not run
again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import qalora_compile as qc
from benchmarks.accuracy_tasks import TASKS, load_task
from qalora_compile.ir.affine import dequantize
from qalora_compile.training.forward.adaptive_rank import RankAllocator
from qalora_compile.training.forward.training_forward import TrainingForward

EXAMPLES = """examples:
  python -m benchmarks.accuracy --cells accuracy.jsonl
  python -m benchmarks.accuracy --cells accuracy.jsonl --model smollm2
  python -m benchmarks.accuracy --cells accuracy.jsonl --bits 3 --seeds 0 --methods merged qa-lora
  python -m benchmarks.accuracy --cells accuracy.jsonl --table
"""
METHODS = (
    *("float", "ptq", "merged", "qa-lora", "affine", "qat", "adaptive", "unmerged", "scale"),
    "integer",
)
WHOLE = ("scale", "integer")
QUANTIZERS = ("minmax", "gptq")
RANK, ALPHA, HEAD_RATE = 16, 32, 5e-3
DEFAULTS = {
    "minilm": {"steps": 60, "batch_size": 32, "group_size": 32, "held_out": 600},
    "smollm2": {"steps": 30, "batch_size": 8, "group_size": 64, "held_out": 200},
}
"""What is not given; SmolLM2's checkpoint is 4-bit in groups of 32 itself, so it gets others."""
Forward = Callable[[Tensor, Tensor], Tensor]
"""Token ids and mask, `[B, T]` → vectors `[B, F]`."""


@dataclass(frozen=True)
class Cell:
    """One measurement, by what it is of."""

    method: str
    quantizer: str
    bits: int
    group_size: int
    seed: int

    def group(self) -> Cell:
        """What cells on the same codes have in common."""
        return replace(self, method="", seed=0)


class Bench:
    """The model, the data, and every way to train."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.task = load_task(options)

    def capture(self, model: nn.Module) -> qc.Program:
        """The graph of a model."""
        ids, mask, _ = self.task.train.part(slice(0, 4))
        return qc.capture_model(model, (), {"input_ids": ids, "attention_mask": mask})

    @cached_property
    def calibration(self) -> list[dict[str, Tensor]]:
        """Training texts, as calls."""
        parts = (self.task.train.part(slice(i, i + 32)) for i in range(0, 128, 32))
        return [{"input_ids": ids, "attention_mask": mask} for ids, mask, _ in parts]

    @cached_property
    def captured(self) -> qc.Program:
        """The graph of the model as it is."""
        return self.capture(self.task.model())

    @cache  # noqa: B019 - one bench a process
    def base(self, cell: Cell, zero_point: str = "real") -> qc.Program:
        """The model on codes, by a cell without seed."""
        return self.quantize(self.captured, cell, zero_point)

    def quantize(self, program: qc.Program, cell: Cell, zero_point: str = "real") -> qc.Program:
        """By the cell's quantizer."""
        spec = qc.QuantSpec(
            bits=cell.bits,
            group_size=cell.group_size,
            method=cell.quantizer,
            zero_point=zero_point,
        )
        calls = self.calibration if cell.quantizer == "gptq" else None
        return qc.quantize_groups(program, spec, targets=list(self.task.targets), calibration=calls)

    def run(self, cell: Cell) -> dict[str, float]:
        """Accuracy and loss of a cell, and what folding moved."""
        torch.manual_seed(cell.seed)
        forms: dict[str, Callable[[Cell], dict[str, float]]] = {
            "float": self._float,
            "ptq": self._ptq,
            "merged": self._merged,
            "qa-lora": self._qa_lora,
            "affine": partial(self._kind, kind="affine"),
            "qat": partial(self._kind, kind="qat"),
            "adaptive": self._adaptive,
            "unmerged": self._unmerged,
            "scale": self._scale,
            "integer": self._integer,
        }
        return forms[cell.method](cell)

    def _float(self, cell: Cell) -> dict[str, float]:
        return self.score(*self._lora(cell.seed))

    def _ptq(self, cell: Cell) -> dict[str, float]:
        program = self.base(cell.group())
        head = self.fit(program, [], cell.seed)
        return self.score(program, head)

    def _merged(self, cell: Cell) -> dict[str, float]:
        model, head = self._lora(cell.seed)
        return self.score(self.quantize(self.capture(model), cell), head)

    def _qa_lora(self, cell: Cell) -> dict[str, float]:
        return self._trained(self.base(cell.group()), cell, qc.AdapterSpec())

    def _kind(self, cell: Cell, kind: str) -> dict[str, float]:
        return self._trained(self.base(cell.group()), cell, qc.AdapterSpec(kind=kind))

    def _adaptive(self, cell: Cell) -> dict[str, float]:
        return self._trained(self.base(cell.group()), cell, qc.AdapterSpec(), more=1.5)

    def _trained(
        self, quantized: qc.Program, cell: Cell, spec: qc.AdapterSpec, more: float = 1.0
    ) -> dict[str, float]:
        """Adapters trained on codes, and folded; `fold_moved`: how far folding moved a vector.

        `more`: Factor of the rank to begin with, the scaling being the same; ranks beyond those of
        the other methods are taken away in training.
        """
        first, last = round(more * self.options.rank), self.options.rank
        spec = replace(spec, rank=first, alpha=ALPHA / RANK * first, seed=cell.seed)
        program = qc.insert_adapters(quantized, spec, source=self.captured)
        ranks = None
        if first > last:
            named = program.named_adapter_parameters()
            ranks = RankAllocator(named, last, self.options.steps)
        trained = program.adapter_parameters()
        head = self.fit(TrainingForward(program), trained, cell.seed, ranks)
        folded, (ids, mask, _) = qc.fold_adapters(program), self.task.test.part(slice(0, 50))
        with torch.no_grad():
            moved = (program(ids, mask) - folded(ids, mask)).abs().max()
        return self.score(folded, head) | {"fold_moved": float(moved)}

    def _unmerged(self, cell: Cell) -> dict[str, float]:
        model = self.task.model()
        put_back(self.base(cell.group()), model)
        parameters = self.add_lora(model, cell.seed)
        return self.score(model, self.fit(model, parameters, cell.seed))

    def _scale(self, cell: Cell) -> dict[str, float]:
        spec = qc.AdapterSpec(kind="scale")
        return self._trained(self.base(cell.group(), "integer"), cell, spec)

    def _integer(self, cell: Cell) -> dict[str, float]:
        spec = qc.AdapterSpec(zero_point="integer")
        return self._trained(self.base(cell.group(), "integer"), cell, spec)

    @cache  # noqa: B019 - one bench a process
    def _lora(self, seed: int) -> tuple[nn.Module, nn.Module]:
        """LoRA trained in float and merged, with its head; the same for all widths."""
        model = self.task.model()
        head = self.fit(model, self.add_lora(model, seed), seed)
        inner: Any = model.inner
        model.inner = inner.merge_and_unload()
        return model.eval(), head

    def add_lora(self, model: nn.Module, seed: int) -> list[nn.Parameter]:
        """Put PEFT's LoRA on the linear layers that are quantized elsewhere; its parameters."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        layers = r".*layers?\.\d+\..*(" + "|".join(self.task.targets) + ")"
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers)
        inner: Any = model.inner
        model.inner = get_peft_model(inner, config)
        return [p for p in model.parameters() if p.requires_grad]

    def fit(
        self,
        forward: Any,
        parameters: Iterable[nn.Parameter],
        seed: int,
        ranks: RankAllocator | None = None,
    ) -> nn.Module:
        """Train parameters and a head; the batches depend on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        head = self.task.head()
        adapters, own = list(parameters), list(head.parameters())
        rates = [rate for rate, found in ((HEAD_RATE, own), (self.options.rate, adapters)) if found]
        if not rates:
            return head
        sets = [found for found in (own, adapters) if found]
        groups = [{"params": p, "lr": rate} for p, rate in zip(sets, rates, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        steps, size = self.options.steps, self.options.batch_size
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rates, total_steps=steps, pct_start=0.1
        )
        train = self.task.train
        order = torch.randperm(len(train.labels), generator=generator)
        for step in range(steps):
            at = torch.arange(step * size, (step + 1) * size) % len(order)
            ids, mask, labels = train.part(order[at])
            with torch.set_grad_enabled(bool(adapters)):
                vectors = forward(ids, mask)
            loss = functional.cross_entropy(head(vectors), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(adapters, 1.0)
            optimizer.step()
            if ranks is not None:
                ranks.step(step + 1)
            schedule.step()
        return head

    @torch.no_grad()
    def score(self, forward: Any, head: nn.Module) -> dict[str, float]:
        """Accuracy and loss on the held-out texts."""
        test = self.task.test
        right, loss = 0, 0.0
        for start in range(0, len(test.labels), 100):
            ids, mask, labels = test.part(slice(start, start + 100))
            scores = head(forward(ids, mask))
            right += int((self.task.choose(scores) == labels).sum())
            loss += float(functional.cross_entropy(scores, labels, reduction="sum"))
        return {"accuracy": right / len(test.labels), "loss": loss / len(test.labels)}


def put_back(program: qc.Program, model: nn.Module) -> None:
    """Write what a program's codes stand for into the model that it was captured from."""
    tensors = program.tensors()
    for site in program.plan.weights_to_quantize():
        assert site.bits is not None and site.group_size is not None, "it is quantized"
        parts = (tensors[f"{site.path}.{part}"] for part in ("qweight", "scale", "offset"))
        weight = dequantize(*parts, bits=site.bits, group_size=site.group_size, k=site.k)
        model.get_parameter(site.weight).data.copy_(weight)


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Every cell asked for, seed by seed."""
    for seed in options.seeds:
        for bits in options.bits:
            for method in options.methods:
                if method == "float":
                    yield Cell(method, "", 0, 0, seed)
                    continue
                for quantizer in ("minmax",) if method in WHOLE else options.quantizers:
                    yield Cell(method, quantizer, bits, options.group_size, seed)


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Means over the seeds with standard deviations, accuracy and loss, as a Markdown table."""
    widths = sorted({line["bits"] for line in lines if line["bits"]}, reverse=True)
    forms = dict.fromkeys((line["method"], line["quantizer"]) for line in lines)
    head = ["", *(f"{bits} bits" for bits in widths), "seeds"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for form in sorted(forms, key=lambda f: (METHODS.index(f[0]), f[1])):
        texts, counts = [], set()
        for bits in widths:
            found = [
                line
                for line in lines
                if (line["method"], line["quantizer"]) == form and line["bits"] in (0, bits)
            ]
            counts.add(len(found))
            shown = (_mean(found, "accuracy", 100, 1) + " %", _mean(found, "loss", 1, 3))
            texts.append(", ".join(shown) if found else "")
        seeds = "-".join(map(str, sorted(counts - {0})))
        rows.append(f"| {' '.join(form).strip()} | {' | '.join(texts)} | {seeds} |")
    return "\n".join(rows)


def _mean(lines: Sequence[Mapping[str, Any]], what: str, factor: float, digits: int) -> str:
    values = [factor * line[what] for line in lines]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}" if values else ""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cells", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--model", default="minilm", choices=list(TASKS))
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=QUANTIZERS)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2, 4], choices=(2, 3, 4, 8))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rank", type=int, default=RANK, help="rank of adapters of ours")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of adapters")
    for name in ("group_size", "steps", "batch_size", "held_out"):
        shown = ", ".join(f"{model} {numbers[name]}" for model, numbers in DEFAULTS.items())
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, help=f"if not given: {shown}")
    options = parser.parse_args(arguments)
    for name, value in DEFAULTS[options.model].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells that are missing, then print the table of those with these settings."""
    options = parse(arguments)
    done = options.cells.read_text("utf-8").splitlines() if options.cells.exists() else []
    lines = [json.loads(line) for line in done]
    names = ("model", "steps", "batch_size", "rate", "held_out", "rank")
    settings = {name: getattr(options, name) for name in names}
    lines = [{"rank": RANK} | line for line in lines]
    bench = None if options.table else Bench(options)
    for cell in dict.fromkeys(cells(options)) if bench else ():
        wanted = asdict(cell) | settings
        if any(wanted.items() <= line.items() for line in lines):
            continue
        assert bench is not None
        started = time.perf_counter()
        measured = bench.run(cell) | {"seconds": round(time.perf_counter() - started, 1)}
        lines.append(wanted | measured)
        with options.cells.open("a", encoding="utf-8") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        print(json.dumps(lines[-1]), flush=True)
    groups = (0, options.group_size)
    print(table([x for x in lines if settings.items() <= x.items() and x["group_size"] in groups]))


if __name__ == "__main__":
    main()
