"""Training of adapters: data, a fit loop, evaluation and checkpoints."""

from __future__ import annotations

from qalora_compile.config.fit import FitSpec
from qalora_compile.training.data.batches import Batches, Packed
from qalora_compile.training.data.dataset import Dataset
from qalora_compile.training.data.example import Example
from qalora_compile.training.data.load_examples import load_examples
from qalora_compile.training.distributed import find_processes
from qalora_compile.training.evaluate import Metrics, evaluate
from qalora_compile.training.fit import FitResult, FitState, StepReport, fit
from qalora_compile.training.forward.training_forward import TrainingForward
from qalora_compile.training.optimizer import make_optimizer, make_schedule

__all__ = [
    "Batches",
    "Dataset",
    "Example",
    "FitResult",
    "FitSpec",
    "FitState",
    "Metrics",
    "Packed",
    "StepReport",
    "TrainingForward",
    "evaluate",
    "find_processes",
    "fit",
    "load_examples",
    "make_optimizer",
    "make_schedule",
]
