"""Training of adapters: data, a fit loop, evaluation and checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qalora_compile.optional import lazy_attribute

if TYPE_CHECKING:
    from qalora_compile.training.data.batches import Batches, Packed
    from qalora_compile.training.data.dataset import Dataset
    from qalora_compile.training.data.example import Example
    from qalora_compile.training.data.load_examples import load_examples
    from qalora_compile.training.distributed import find_processes
    from qalora_compile.training.evaluate import Metrics, evaluate
    from qalora_compile.training.fit import FitResult, FitState, StepReport, fit
    from qalora_compile.training.forward.training_forward import TrainingForward
    from qalora_compile.training.optimizer import make_optimizer, make_schedule
    from qalora_compile.training.spec import FitSpec

_HOMES = {
    "Batches": "data.batches",
    "Dataset": "data.dataset",
    "Example": "data.example",
    "FitResult": "fit",
    "FitSpec": "spec",
    "FitState": "fit",
    "Metrics": "evaluate",
    "Packed": "data.batches",
    "StepReport": "fit",
    "TrainingForward": "forward.training_forward",
    "evaluate": "evaluate",
    "find_processes": "distributed",
    "fit": "fit",
    "load_examples": "data.load_examples",
    "make_optimizer": "optimizer",
    "make_schedule": "optimizer",
}

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


if not TYPE_CHECKING:  # otherwise every misspelt name would have a type

    def __getattr__(name: str) -> Any:
        return lazy_attribute(__name__, name, _HOMES)
