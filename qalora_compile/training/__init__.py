"""Training of adapters: data, a fit loop, evaluation, checkpoints. Helpers, not a Trainer."""

from __future__ import annotations

from qalora_compile.training.batches import Batches, Packed
from qalora_compile.training.data import Dataset, load_examples
from qalora_compile.training.evaluate import Metrics, evaluate
from qalora_compile.training.examples import Example
from qalora_compile.training.fit import FitResult, FitSpec, fit

__all__ = [
    "Batches",
    "Dataset",
    "Example",
    "FitResult",
    "FitSpec",
    "Metrics",
    "Packed",
    "evaluate",
    "fit",
    "load_examples",
]
