"""Three ways to train the same thing have the same losses: `finetune`, a plain loop, trainers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import qalora_compile as qc
from qalora_compile.cli.main import main
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.training import (
    Example,
    FitSpec,
    load_examples,
    make_optimizer,
    make_schedule,
)
from qalora_compile.training.data.batches import Batches, Packed
from qalora_compile.training.hf_trainer import (
    trainer_arguments,
    trainer_collate,
    trainer_optimizers,
    trainer_rows,
)
from qalora_compile.training.records.log import read_log

SPEC = FitSpec(steps=6, batch_size=3, accumulate=2, learning_rate=1e-3, lora_plus_ratio=4.0, seed=1)
ADAPTER = qc.AdapterSpec(rank=4, seed=1)
CLOSE = 1e-5


@pytest.fixture(scope="module")
def expected(
    model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The losses of `finetune`."""
    out = tmp_path_factory.mktemp("cli") / "run"
    command = ["finetune", str(model_folder), "--data", str(data_file), "--out", str(out)]
    command += ["--steps", "6", "--batch-size", "3", "--accumulate", "2", "--lr", "1e-3"]
    command += ["--lora-plus-ratio", "4", "--seed", "1", "--rank", "4"]
    assert main(command) == 0
    losses = [row["loss"] for row in read_log(out / "log.jsonl")]
    assert losses[-1] < losses[0] - 0.05, "nothing is learned, so nothing is compared"
    return losses


def load(folder: Path, data: Path) -> tuple[Any, tuple[Example, ...], torch.Tensor]:
    """The model, the examples and an input to capture with."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    examples = load_examples(data, AutoTokenizer.from_pretrained(folder), max_length=512).examples
    return model.eval(), tuple(examples), torch.tensor([[2, 3, 4], [5, 6, 7]])


@pytest.mark.slow
def test_a_plain_loop_on_a_program(
    model_folder: Path, data_file: Path, expected: list[float]
) -> None:
    model, examples, ids = load(model_folder, data_file)
    mask = torch.ones_like(ids)
    program = qc.capture_model(model, (ids,), {"attention_mask": mask, "use_cache": False})
    program = qc.insert_adapters(qc.quantize_groups(program), ADAPTER).train()

    optimizer = make_optimizer(program, SPEC)
    schedule = make_schedule(optimizer, SPEC)
    batches = Batches(examples, batch_size=SPEC.batch_size, seed=SPEC.seed)
    losses = []
    for step in range(SPEC.steps):
        parts = [batches.at(step * SPEC.accumulate + i) for i in range(SPEC.accumulate)]
        tokens = sum(int(batch.targets.sum()) for batch in parts)
        total = 0.0
        for batch in parts:
            logits = program(
                batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
            )
            (loss / tokens).backward()
            total += loss.item() / tokens
        torch.nn.utils.clip_grad_norm_(program.adapter_parameters(), SPEC.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    assert losses == pytest.approx(expected, abs=CLOSE)


def adapted(model: Any, ids: torch.Tensor) -> qc.Program:
    mask = torch.ones_like(ids)
    kwargs = {"attention_mask": mask, "use_cache": False}
    return qc.adapt_module_(model, (ids,), kwargs, adapter=ADAPTER)


def trainer_losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def options(folder: Path) -> dict[str, Any]:
    return {
        **trainer_arguments(dataclasses.replace(SPEC, gradient_checkpointing=True)),
        "output_dir": str(folder),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }


@pytest.mark.slow
def test_the_hugging_face_trainer(
    model_folder: Path, data_file: Path, expected: list[float], tmp_path: Path
) -> None:
    from transformers import Trainer, TrainingArguments

    model, examples, ids = load(model_folder, data_file)
    adapted(model, ids)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**options(tmp_path)),
        train_dataset=trainer_rows(examples, SPEC),
        data_collator=trainer_collate,
        optimizers=trainer_optimizers(model, SPEC),
    )
    assert trainer_losses(trainer) == pytest.approx(expected, abs=CLOSE)
    assert model.is_gradient_checkpointing


@pytest.mark.slow
def test_the_trainer_of_trl(
    model_folder: Path, data_file: Path, expected: list[float], tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = tokenizer.eos_token
    model, examples, ids = load(model_folder, data_file)
    adapted(model, ids)
    config = trl.SFTConfig(
        **options(tmp_path),
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(trainer_rows(examples, SPEC)),
        data_collator=trainer_collate,
        processing_class=tokenizer,
        optimizers=trainer_optimizers(model, SPEC),
    )
    assert trainer_losses(trainer) == pytest.approx(expected, abs=CLOSE)


def test_what_a_trainer_does_otherwise_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="its own options"):
        trainer_arguments(FitSpec(evaluate_every=2))
    with pytest.raises(UserInputError, match="2 examples do not fill a batch of 3"):
        trainer_rows([Example((1, 2), (1, 2))] * 2, SPEC)


@pytest.mark.parametrize("kind", ["batches", "packed", "a packed row", "encoder", "classes"])
def test_examples_that_rows_cannot_hold_are_refused(kind: str) -> None:
    """Packed ones would see each other, a source would be dropped, a label has no place."""
    texts = [Example((1, 2, 3), (1, 2, 3))] * 6
    given: dict[str, Any] = {
        "batches": Batches(texts, batch_size=3, seed=1),
        "packed": Packed(texts, 6),
        "a packed row": list(Packed(texts, 6)),
        "encoder": [Example((0, 2), (0, 2), source=(5, 6))] * 3,
        "classes": [Example((1, 2), (), label=1)] * 3,
    }
    with pytest.raises(UnsupportedError, match="rows for a trainer cannot hold"):
        trainer_rows(given[kind], SPEC)
