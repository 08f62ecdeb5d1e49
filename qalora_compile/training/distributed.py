"""Data-parallel training of one set of adapters in several processes, through accelerate."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qalora_compile.optional import require


class Processes:
    """The interface to the processes of a training; in this base class, there is only one.

    Attributes:
        rank: Number of this process, from 0.
        count: How many there are.
        device: The device on which this process computes.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and the terminal output."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """Wrap a module so that its backward pass averages gradients over all processes."""
        return module

    def apart(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Do not average the gradients of backward passes in the block."""
        return nullcontext()

    def sum(self, value: float) -> float:
        """The sum over all processes, which all of them receive."""
        return value

    def wait(self) -> None:
        """Wait until all processes have arrived."""


class AccelerateProcesses(Processes):
    """The processes that `torchrun` or `accelerate launch` started (DDP)."""

    def __init__(self) -> None:
        accelerate = require("accelerate", extra="train", purpose="train with several processes")
        # The codes do not change, so there is no need to send them before each step.
        options = accelerate.DistributedDataParallelKwargs(broadcast_buffers=False)
        self._accelerator = accelerate.Accelerator(
            cpu=not torch.cuda.is_available(), kwargs_handlers=[options]
        )
        self.rank = self._accelerator.process_index
        self.count = self._accelerator.num_processes
        self.device = self._accelerator.device

    def wrap(self, module: nn.Module) -> nn.Module:
        """See `Processes`; the module moves to the device of this process."""
        wrapped: nn.Module = self._accelerator.prepare_model(module)
        return wrapped

    def apart(self, module: nn.Module) -> AbstractContextManager[Any]:
        """See `Processes`."""
        apart: AbstractContextManager[Any] = self._accelerator.no_sync(module)
        return apart

    def sum(self, value: float) -> float:
        """See `Processes`; summed in float64."""
        own = torch.tensor(value, dtype=torch.float64, device=self.device)
        total: Tensor = self._accelerator.reduce(own, reduction="sum")
        return total.item()

    def wait(self) -> None:
        """See `Processes`."""
        self._accelerator.wait_for_everyone()


def find_processes() -> Processes:
    """The processes that a launcher started, according to the environment, or only this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return AccelerateProcesses()
    return Processes()
