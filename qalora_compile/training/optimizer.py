"""AdamW over adapters, with a separate learning rate for B, and the schedule of both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from qalora_compile.config.fit import FitSpec
from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.ir.stages import ADAPTER_NAMES

_B = ADAPTER_NAMES[1]


def trainable_parameters(trained: Program | nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The trained parameters by name: a program's adapters, or a module's that require gradients.

    Raises:
        UserInputError: there is nothing to train.
    """
    if isinstance(trained, Program):
        named = list(trained.named_adapter_parameters())
    else:
        named = [(n, p) for n, p in trained.named_parameters() if p.requires_grad]
    if not named:
        raise UserInputError(
            "there are no parameters to train", hint="insert adapters first: qc.insert_adapters"
        )
    return named


def make_optimizer(trained: Program | nn.Module, spec: FitSpec) -> torch.optim.AdamW:
    """AdamW over the adapters; with LoRA+, B has its own group (arXiv 2402.12354).

    Args:
        trained: A program, or a model with adapted modules (`qc.adapt_module_`).
        spec: Learning rate, ratio of the rates, weight decay.
    """
    groups: list[dict[str, Any]] = []
    named = trainable_parameters(trained)
    for of_b, ratio in ((False, 1.0), (True, spec.lora_plus_ratio)):
        parameters = [p for name, p in named if (name.rpartition(".")[2] == _B) == of_b]
        if parameters:
            groups.append({"params": parameters, "lr": spec.learning_rate * ratio})
    return torch.optim.AdamW(groups, weight_decay=spec.weight_decay, foreach=True)


def make_schedule(optimizer: torch.optim.Optimizer, spec: FitSpec) -> LambdaLR:
    """The rates of `spec` as torch's scheduler, for loops that are not `fit`."""
    return LambdaLR(optimizer, spec.factor_at)


def set_rates(optimizer: torch.optim.Optimizer, spec: FitSpec, step: int) -> float:
    """Give each group its rate at a step, counted from 0; returns that of A."""
    for group in optimizer.param_groups:
        peak = group.setdefault("initial_lr", group["lr"])
        group["lr"] = peak * spec.factor_at(step)
    return spec.rate_at(step)


def clip_gradients(parameters: Iterable[nn.Parameter], spec: FitSpec) -> float:
    """Scale gradients down to the norm `spec.clip`; returns the norm before scaling."""
    return float(torch.nn.utils.clip_grad_norm_(parameters, spec.clip))
