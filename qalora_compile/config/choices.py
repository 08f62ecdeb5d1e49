"""The alternatives that options offer by name, without the code that carries them out.

The command line reads them before it knows what to run, so nothing here imports torch.
"""

from __future__ import annotations

LANGUAGE, CLASSIFICATION = "language", "classification"
TASKS = (LANGUAGE, CLASSIFICATION)

SHUFFLED, BY_LENGTH, PACKED = "shuffled", "by-length", "packed"
ARRANGEMENTS = (SHUFFLED, BY_LENGTH, PACKED)
"""How examples are arranged in batches."""

COMPLETIONS, EVERYTHING = "completions", "everything"
LEARN = (COMPLETIONS, EVERYTHING)
"""Which parts of a prompt with its completion, or of a chat, carry loss."""

CROSS_ENTROPY, DPO, ORPO = "cross-entropy", "dpo", "orpo"
LOSSES = (CROSS_ENTROPY, DPO, ORPO)
PAIR_LOSSES = (DPO, ORPO)
"""Losses of pairs of answers, of which one is preferred."""

TENSORBOARD, WANDB, MLFLOW, TRACKIO = "tensorboard", "wandb", "mlflow", "trackio"
REPORT_TO = (TENSORBOARD, WANDB, MLFLOW, TRACKIO)
"""Where the steps of a training are logged in addition to `log.jsonl`."""

CHECKPOINTS_KEPT = 2

REFUSE, APPROXIMATE, MERGE = "refuse", "approximate", "merge"
"""How updates that do not fold are treated."""

MEAN, SUM, CLS = "mean", "sum", "cls"
PEFT_POOLINGS = (MEAN, SUM)
"""The pooling of the QA-LoRA authors' script, and that of the paper's algorithm."""
TOKEN_POOLINGS = (MEAN, CLS)
"""How the vectors of a text's tokens become one: their mean, or that of the first token."""

V1, V2, FLOAT_ZERO, FLOAT_OFFSET = "v1", "v2", "float", "offset"
STORED_ZERO_POINTS = (V1, V2, FLOAT_ZERO, FLOAT_OFFSET)
"""How GPTQ checkpoints store zero-points."""

LEARNED = "learned"
"""The method that trains scales and offsets."""

EMBEDDING_BITS = (8, 4)
EMBEDDING_GROUP = 32
"""Default group size of embeddings."""
