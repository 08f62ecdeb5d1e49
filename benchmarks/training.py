"""A training step compared with PEFT's: time and peak memory, same model, tokens, rank and threads.

SmolLM2-135M-Instruct in float32, adapters of rank 16 on every linear layer, AdamW. Each form runs
in a process of its own, which loads what it trains, makes one step at a time on request, and reads
its peak resident set of the steps from the operating system (VmHWM, reset after loading). PEFT's
LoRA in float32, by its usual path (`model(input_ids, labels=…)`), is alternated with every other
form; a ratio is that of two neighbouring steps. Seconds are those of the processor, which a busy
machine does not stretch as it does those of the clock.

Loss is on every token. `all logits at once` trains a form with the logits of all tokens made
together, as PEFT does; `rows at a time` gives PEFT our loss on its hidden states.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

import qalora_compile as qc
from qalora_compile.runtime.footprint import peak_memory, resident_memory

EXAMPLES = """examples:
  python -m benchmarks.training
  python -m benchmarks.training --forms program "program, checkpointed" --steps 5 --json out.json
  python -m benchmarks.training --batch 1 --length 128 --bits 3
"""
REACH_TIME, REACH_MEMORY = 1.15, 0.5
REFERENCE = "PEFT LoRA, fp32"
RANK, ALPHA = 16, 32
Step = Callable[[Tensor], Tensor]
"""Token ids `[B, T]` → mean loss."""


@dataclass(frozen=True)
class Row:
    """One form; ratios to PEFT's LoRA in float32, bytes."""

    form: str
    seconds: float
    ratio: float
    low: float
    high: float
    loaded: int
    peak: int
    memory: float


def _peft(folder: Path, dtype: torch.dtype, *, checkpointed: bool = False) -> tuple[Any, list[Any]]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    adapted = get_peft_model(model, config).train()
    return adapted, [p for p in adapted.parameters() if p.requires_grad]


def peft_usual(
    folder: Path, dtype: torch.dtype = torch.float32, *, checkpointed: bool = False
) -> tuple[Step, list[Any]]:
    """PEFT, and the loss of the model itself."""
    model, parameters = _peft(folder, dtype, checkpointed=checkpointed)

    def step(ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    return step, parameters


def peft_rows(folder: Path) -> tuple[Step, list[Any]]:
    """PEFT, and our loss: a few rows of logits at a time."""
    from qalora_compile.training.forward.chunked_loss import Head, mean_loss

    model, parameters = _peft(folder, torch.float32)
    causal = model.get_base_model()
    head = Head(causal.lm_head)

    def step(ids: Tensor) -> Tensor:
        states = causal.model(input_ids=ids).last_hidden_state
        return mean_loss(states[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), head)

    return step, parameters


def program(folder: Path, *, checkpointed: bool = False) -> tuple[Step, list[Any]]:
    """Our program, as `fit` runs it."""
    from qalora_compile.training.data.example import Batch
    from qalora_compile.training.forward.training_forward import TrainingForward

    loaded = qc.Program.load(folder / "program").train()
    forward = TrainingForward(loaded, gradient_checkpointing=checkpointed)

    def step(ids: Tensor) -> Tensor:
        return forward.loss(Batch(ids, torch.ones_like(ids), ids))

    return step, loaded.adapter_parameters()


def program_all_logits(folder: Path) -> tuple[Step, list[Any]]:
    """Our program, and all logits at once."""
    from qalora_compile.training.evaluate import logits_of
    from qalora_compile.training.forward.training_forward import TrainingForward

    loaded = qc.Program.load(folder / "program").train()
    forward = TrainingForward(loaded)

    def step(ids: Tensor) -> Tensor:
        logits = logits_of(forward(input_ids=ids, attention_mask=torch.ones_like(ids)))
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return step, loaded.adapter_parameters()


def module(folder: Path, *, checkpointed: bool = False) -> tuple[Step, list[Any]]:
    """Our layers in the model's own modules, and the loss of the model itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    bits = json.loads((folder / "bits.json").read_text("ascii"))
    qc.adapt_module_(
        model,
        (torch.zeros(2, 16, dtype=torch.long),),
        {"use_cache": False},
        quant=qc.QuantSpec(bits=bits),
        adapter=qc.AdapterSpec(rank=RANK, alpha=ALPHA),
    )
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()

    def step(ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    return step, [p for p in model.parameters() if p.requires_grad]


FORMS: dict[str, Callable[[Path], tuple[Step, list[Any]]]] = {
    REFERENCE: peft_usual,
    "PEFT LoRA, bf16 base": lambda folder: peft_usual(folder, torch.bfloat16),
    "PEFT LoRA, fp32, rows at a time": peft_rows,
    "PEFT LoRA, fp32, checkpointed": lambda folder: peft_usual(folder, checkpointed=True),
    "program": program,
    "program, all logits at once": program_all_logits,
    "program, checkpointed": lambda folder: program(folder, checkpointed=True),
    "module": module,
    "module, checkpointed": lambda folder: module(folder, checkpointed=True),
}


def child(folder: Path, form: str, threads: int) -> None:
    """Load a form, then make a step for every line read, and say what it took."""
    torch.set_num_threads(threads)
    ids = load_file(folder / "tokens.safetensors")["ids"]
    step, parameters = FORMS[form](folder)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    gc.collect()
    if sys.platform == "linux":  # memory freed by loading goes back, and the peak starts anew
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    print(json.dumps({"loaded": resident_memory()}), flush=True)
    for number, _ in enumerate(sys.stdin):
        begin = time.process_time()
        loss = step(ids[number % len(ids)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.process_time() - begin
        answer = {"seconds": seconds, "peak": peak_memory(), "loss": loss.item()}
        print(json.dumps(answer), flush=True)


class Worker:
    """A form in a process of its own."""

    def __init__(self, folder: Path, form: str, threads: int) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training"]
        command += ["--child", form, "--folder", str(folder), "--threads", str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.loaded = int(self._answer()["loaded"])

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args)} died")  # type: ignore[arg-type]
        answer: dict[str, float] = json.loads(line)
        return answer

    def step(self) -> dict[str, float]:
        """One step."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()


@contextmanager
def worker(folder: Path, form: str, threads: int) -> Iterator[Worker]:
    """A worker that is gone afterwards."""
    made = Worker(folder, form, threads)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()


def measure(folder: Path, form: str, reference: Worker, steps: int, threads: int) -> Row:
    """Alternate a form with the reference; the first step of each is not counted."""
    with worker(folder, form, threads) as made:
        pairs = [(made.step(), reference.step()) for _ in range(steps + 1)]
        ratios = sorted(a["seconds"] / b["seconds"] for a, b in pairs[1:])
        mine, theirs = (max(int(pair[i]["peak"]) for pair in pairs) for i in (0, 1))
        return Row(
            form=form,
            seconds=statistics.median(a["seconds"] for a, _ in pairs[1:]),
            ratio=statistics.median(ratios),
            low=ratios[len(ratios) // 4],
            high=ratios[-1 - len(ratios) // 4],
            loaded=made.loaded,
            peak=mine,
            memory=mine / theirs,
        )


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Write what the forms load: the model in float32, our program, and tokens `[S, B, T]`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qalora_compile.capture.load_source import load_source

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from assets import articles, model_path

    source = load_source(str(model_path()))
    config: Any = source.model.config
    settings = config.to_dict()
    settings.pop("quantization_config", None)  # of the file; its weights are float here
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(source.model.state_dict())
    model.save_pretrained(folder / "model")
    adapter = qc.AdapterSpec(rank=RANK, alpha=ALPHA)
    quantized = qc.quantize_groups(source.capture(), qc.QuantSpec(bits=options.bits))
    qc.insert_adapters(quantized, adapter).save(folder / "program")
    (folder / "bits.json").write_text(json.dumps(options.bits), "ascii")
    wanted = 4 * options.batch * options.length
    ids: list[int] = []
    for text, _ in articles():
        if len(ids) < wanted:
            ids += source.tokenizer(text).input_ids
    tokens = torch.tensor(ids[:wanted]).reshape(4, options.batch, options.length)
    save_file({"ids": tokens}, folder / "tokens.safetensors")


def show(row: Row) -> None:
    """One line."""
    print(
        f"{row.form:34} {row.seconds:7.2f} s  × {row.ratio:.2f} ({row.low:.2f}-{row.high:.2f})  "
        f"loaded {row.loaded / 1e6:6.0f} MB  peak {row.peak / 1e6:6.0f} MB  × {row.memory:.2f}",
        flush=True,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--forms", nargs="+", default=list(FORMS)[1:], choices=list(FORMS))
    parser.add_argument("--steps", type=int, default=7, help="pairs of steps that count")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--folder", type=Path, help="keep what is prepared, or use what is there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare, measure, print; exit code 1 where a program misses the design's targets."""
    options = parse(arguments)
    if options.child:
        child(options.folder, options.child, options.threads)
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if not (folder / "tokens.safetensors").exists():
            folder.mkdir(parents=True, exist_ok=True)
            prepare(folder, options)
        with worker(folder, REFERENCE, options.threads) as reference:
            for form in options.forms:
                rows.append(measure(folder, form, reference, options.steps, options.threads))
                show(rows[-1])
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), "utf-8")
    ours = [row for row in rows if row.form in ("program", "program, checkpointed")]
    reached = [row for row in ours if row.ratio <= REACH_TIME and row.memory <= REACH_MEMORY]
    if ours:
        names = ", ".join(row.form for row in reached) or "no form"
        print(f"time ≤ {REACH_TIME} × and memory ≤ {REACH_MEMORY} ×: {names}")
    if ours and not reached:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
