"""Training of adapters: data, a fit loop, evaluation, checkpoints. Helpers, not a Trainer."""

from __future__ import annotations

from qalora_compile.training.batches import Batches, Packed
from qalora_compile.training.data import Dataset, load_examples
from qalora_compile.training.evaluate import Metrics, evaluate
from qalora_compile.training.examples import Example
from qalora_compile.training.fit import FitResult, FitState, StepReport, fit
from qalora_compile.training.forward import TrainingForward
from qalora_compile.training.optimizer import make_optimizer, make_schedule
from qalora_compile.training.processes import find_processes
from qalora_compile.training.spec import FitSpec

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
