"""Training of adapters: data, a fit loop, evaluation, checkpoints. Helpers, not a Trainer."""

from __future__ import annotations

from qalora_compile.training.data import Dataset, Example, load_examples
from qalora_compile.training.evaluate import Metrics, evaluate
from qalora_compile.training.fit import FitResult, FitSpec, fit
from qalora_compile.training.forward import TrainingForward

__all__ = [
    "Dataset",
    "Example",
    "FitResult",
    "FitSpec",
    "Metrics",
    "TrainingForward",
    "evaluate",
    "fit",
    "load_examples",
]
