"""The paper's claim at our scale: what fine-tuning is left with after quantization.

all-MiniLM-L6-v2 (22.7 million weights, true float32) with a linear head judges sentences of film
reviews. For each width of codes and seed, accuracy on held-out sentences of

* `ptq`: the quantized model, the head alone fitted to it;
* `merged`: LoRA trained beside the float weights, merged into them, then quantized;
* `qa-lora`: pooled adapters trained on the quantized weights, then folded: the same size and speed;
* `beside`: LoRA trained beside the quantized weights and kept there in float: the upper reference;
* `scale`: the scales alone trained, zero-points whole numbers, as some runtimes want them;
* `integer`: pooled adapters whose zero-points are rounded to whole numbers while they train;
* `float`: LoRA beside the float weights, never quantized.

All train on the same batches, with the same rank, alpha, steps and learning rate; heads are trained
along. Every finished cell is a line of the file `--cells`; a cell that is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import qalora_compile as qc
from qalora_compile.ir.affine import dequantize
from qalora_compile.training.forward import TrainingForward

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from assets import encoder_path, reviews

EXAMPLES = """examples:
  python -m benchmarks.accuracy --cells accuracy.jsonl
  python -m benchmarks.accuracy --cells accuracy.jsonl --bits 3 --seeds 0 --methods merged qa-lora
  python -m benchmarks.accuracy --cells accuracy.jsonl --table
"""
METHODS = ("float", "ptq", "merged", "qa-lora", "beside", "scale", "integer")
WHOLE = ("scale", "integer")
QUANTIZERS = ("minmax", "gptq")
RANK, ALPHA, HEAD_RATE = 16, 32, 5e-3
_WIDTH = 24
"""Most tokens of a sentence: longer ones are left out, the machine being small."""
_TARGETS = ("query", "key", "value", "dense")
Forward = Callable[[Tensor, Tensor], Tensor]
"""Token ids and mask, `[B, T]` → sentence vectors `[B, 384]`."""


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


@dataclass(frozen=True)
class Texts:
    """Tokenized sentences: ids and mask `[n, T]`, labels `[n]`."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def part(self, rows: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Some rows, without the columns that are padding in all of them."""
        mask = self.mask[rows]
        used = int(mask.sum(1).max())
        return self.ids[rows][:, :used], mask[:, :used], self.labels[rows]


class Sentences(nn.Module):
    """A sentence encoder: the mean of the last states."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[B, T]` twice → `[B, 384]`."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask[..., None].to(states.dtype)
        total: Tensor = (states * mask).sum(1)
        return total / mask.sum(1)


class Bench:
    """The model, the data, and every way to train."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.train, self.test = self._texts()

    def _texts(self) -> tuple[Texts, Texts]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(encoder_path(), local_files_only=True)
        sizes = tokenizer([text for text, _ in reviews()]).input_ids
        rows = [row for row, ids in zip(reviews(), sizes, strict=True) if len(ids) <= _WIDTH]
        parts = rows[self.options.held_out :], rows[: self.options.held_out]
        made = []
        for part in parts:
            found = tokenizer(
                [text for text, _ in part],
                padding="max_length",
                max_length=_WIDTH,
                return_tensors="pt",
            )
            labels = torch.tensor([label for _, label in part])
            made.append(Texts(found.input_ids, found.attention_mask, labels))
        return made[0], made[1]

    def encoder(self) -> nn.Module:
        """A fresh copy of the model, in float."""
        from transformers import AutoModel

        model: nn.Module = AutoModel.from_pretrained(encoder_path(), local_files_only=True)
        return model.eval()

    def capture(self, encoder: nn.Module) -> qc.Program:
        """Its graph."""
        ids, mask, _ = self.train.part(slice(0, 4))
        return qc.capture_model(
            Sentences(encoder).eval(), (), {"input_ids": ids, "attention_mask": mask}
        )

    @cached_property
    def calibration(self) -> list[dict[str, Tensor]]:
        """Training sentences, as calls."""
        parts = (self.train.part(slice(i, i + 32)) for i in range(0, 128, 32))
        return [{"input_ids": ids, "attention_mask": mask} for ids, mask, _ in parts]

    @cached_property
    def captured(self) -> qc.Program:
        """The graph of the model as it is."""
        return self.capture(self.encoder())

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
        return qc.quantize_groups(program, spec, calibration=calls)

    def run(self, cell: Cell) -> dict[str, float]:
        """Accuracy and loss of a cell, and what folding moved."""
        torch.manual_seed(cell.seed)
        forms = {
            "float": self._float,
            "ptq": self._ptq,
            "merged": self._merged,
            "qa-lora": self._qa_lora,
            "beside": self._beside,
            "scale": self._scale,
            "integer": self._integer,
        }
        return forms[cell.method](cell)

    def _float(self, cell: Cell) -> dict[str, float]:
        encoder, head = self._lora(cell.seed)
        return self.score(Sentences(encoder), head)

    def _ptq(self, cell: Cell) -> dict[str, float]:
        program = self.base(cell.group())
        head = self.fit(program, [], cell.seed)
        return self.score(program, head)

    def _merged(self, cell: Cell) -> dict[str, float]:
        encoder, head = self._lora(cell.seed)
        return self.score(self.quantize(self.capture(encoder), cell), head)

    def _qa_lora(self, cell: Cell) -> dict[str, float]:
        return self._trained(self.base(cell.group()), cell, qc.AdapterSpec())

    def _trained(self, quantized: qc.Program, cell: Cell, spec: qc.AdapterSpec) -> dict[str, float]:
        """Adapters trained on codes, and folded; `fold_moved`: how far folding moved a vector."""
        spec = replace(spec, rank=RANK, alpha=ALPHA, seed=cell.seed)
        program = qc.insert_adapters(quantized, spec)
        head = self.fit(TrainingForward(program), program.adapter_parameters(), cell.seed)
        folded, (ids, mask, _) = qc.fold_adapters(program), self.test.part(slice(0, 50))
        with torch.no_grad():
            moved = (program(ids, mask) - folded(ids, mask)).abs().max()
        return self.score(folded, head) | {"fold_moved": float(moved)}

    def _beside(self, cell: Cell) -> dict[str, float]:
        encoder = self.encoder()
        put_back(self.base(cell.group()), encoder)
        adapted, parameters = add_lora(encoder, cell.seed)
        head = self.fit(Sentences(adapted), parameters, cell.seed)
        return self.score(Sentences(adapted), head)

    def _scale(self, cell: Cell) -> dict[str, float]:
        spec = qc.AdapterSpec(kind="scale")
        return self._trained(self.base(cell.group(), "integer"), cell, spec)

    def _integer(self, cell: Cell) -> dict[str, float]:
        spec = qc.AdapterSpec(zero_point="integer")
        return self._trained(self.base(cell.group(), "integer"), cell, spec)

    @cache  # noqa: B019 - one bench a process
    def _lora(self, seed: int) -> tuple[nn.Module, nn.Module]:
        """LoRA trained in float and merged, with its head; the same for all widths."""
        adapted, parameters = add_lora(self.encoder(), seed)
        head = self.fit(Sentences(adapted), parameters, seed)
        return adapted.merge_and_unload().eval(), head

    def fit(self, forward: Any, parameters: Iterable[nn.Parameter], seed: int) -> nn.Linear:
        """Train parameters and a head; the batches depend on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        head = nn.Linear(384, 2)
        parameters = list(parameters)
        rates = [HEAD_RATE, self.options.rate][: 2 if parameters else 1]
        groups = zip((list(head.parameters()), parameters), rates, strict=False)
        optimizer = torch.optim.AdamW(
            [{"params": group, "lr": rate} for group, rate in groups], weight_decay=0.0
        )
        steps, size = self.options.steps, self.options.batch_size
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rates, total_steps=steps, pct_start=0.1
        )
        order = torch.randperm(len(self.train.labels), generator=generator)
        for step in range(steps):
            at = torch.arange(step * size, (step + 1) * size) % len(order)
            ids, mask, labels = self.train.part(order[at])
            with torch.set_grad_enabled(bool(parameters)):
                vectors = forward(ids, mask)
            loss = functional.cross_entropy(head(vectors), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
        return head

    @torch.no_grad()
    def score(self, forward: Any, head: nn.Module) -> dict[str, float]:
        """Accuracy and loss on the held-out sentences."""
        logits, labels = [], []
        for start in range(0, len(self.test.labels), 100):
            ids, mask, wanted = self.test.part(slice(start, start + 100))
            logits.append(head(forward(ids, mask)))
            labels.append(wanted)
        found, right = torch.cat(logits), torch.cat(labels)
        accuracy = (found.argmax(-1) == right).float().mean()
        loss = functional.cross_entropy(found, right)
        return {"accuracy": float(accuracy), "loss": float(loss)}


def add_lora(encoder: nn.Module, seed: int) -> tuple[Any, list[nn.Parameter]]:
    """PEFT's LoRA on every linear layer of the encoder, and its parameters."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=r".*encoder\.layer.*\.(" + "|".join(_TARGETS) + ")"
    )
    adapted = get_peft_model(encoder, config)
    return adapted, [p for p in adapted.parameters() if p.requires_grad]


def put_back(program: qc.Program, encoder: nn.Module) -> None:
    """Write what a program's codes stand for into the model that it was captured from."""
    tensors = program.tensors()
    for site in program.plan.weights_to_quantize():
        assert site.bits is not None and site.group_size is not None, "it is quantized"
        parts = (tensors[f"{site.path}.{part}"] for part in ("qweight", "scale", "offset"))
        weight = dequantize(*parts, bits=site.bits, group_size=site.group_size, k=site.k)
        encoder.get_parameter(site.weight.removeprefix("encoder.")).data.copy_(weight)


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


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Mean accuracy over the seeds, and their standard deviation, as a Markdown table."""
    widths = sorted({line["bits"] for line in lines if line["bits"]}, reverse=True)
    forms = dict.fromkeys((line["method"], line["quantizer"]) for line in lines)
    head = ["", *(f"{bits} bits" for bits in widths), "seeds"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method, quantizer in sorted(forms, key=lambda f: (METHODS.index(f[0]), f[1])):
        texts = []
        count = 0
        for bits in widths:
            found = [
                100 * line["accuracy"]
                for line in lines
                if (line["method"], line["quantizer"]) == (method, quantizer)
                and line["bits"] in (0, bits)
            ]
            count = max(count, len(found))
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            texts.append(f"{statistics.mean(found):.1f}{spread}" if found else "")
        rows.append(f"| {method} {quantizer} | {' | '.join(texts)} | {count} |")
    return "\n".join(rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cells", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=QUANTIZERS)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2, 4], choices=(2, 3, 4, 8))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of adapters")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=600)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells that are missing, then print the table."""
    options = parse(arguments)
    done = options.cells.read_text("utf-8").splitlines() if options.cells.exists() else []
    lines = [json.loads(line) for line in done]
    settings = {"steps": options.steps, "batch_size": options.batch_size, "rate": options.rate}
    known = [
        {key: line[key] for key in (*asdict(Cell("", "", 0, 0, 0)), *settings)} for line in lines
    ]
    bench = None if options.table else Bench(options)
    for cell in dict.fromkeys(cells(options)) if bench else ():
        if asdict(cell) | settings in known:
            continue
        assert bench is not None
        started = time.perf_counter()
        measured = bench.run(cell) | {"seconds": round(time.perf_counter() - started, 1)}
        lines.append(asdict(cell) | settings | measured)
        with options.cells.open("a", encoding="utf-8") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        print(json.dumps(lines[-1]), flush=True)
    print(table(lines))


if __name__ == "__main__":
    main()
