"""`FitSpec`: the options of a training, and the learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qalora_compile.config.base import LARGEST_SEED, Spec, check_int, one_of
from qalora_compile.config.choices import CROSS_ENTROPY, LOSSES, PAIR_LOSSES
from qalora_compile.errors import UserInputError

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("float32", "bfloat16")


ADDED = {"neftune_alpha": 0.0, "loss": CROSS_ENTROPY, "beta": 0.1, "adaptive_rank": None}
"""Options that records of earlier versions lack → what those versions did."""


@dataclass(frozen=True, kw_only=True)
class FitSpec(Spec):
    """How to train. docs/design/training.md says how the defaults were chosen.

    Attributes:
        steps: Optimizer steps.
        batch_size: Examples per micro-batch and process, which are computed at once.
        accumulate: Micro-batches per step and process. The loss of a step is the mean over the
            tokens of all of them, so that 2 of 4 examples give the same as 1 of 8.
        learning_rate: Peak rate of AdamW.
        lora_plus_ratio: Learning rate of B divided by that of A (LoRA+, arXiv 2402.12354).
        weight_decay: Decoupled weight decay of AdamW.
        schedule: After the warm-up, `"cosine"` and `"linear"` fall to zero; `"constant"` stays.
        warmup: Fraction of the steps in which the rate rises from zero to its peak.
        clip: Largest norm of the gradient; larger gradients are scaled down to it.
        precision: `"bfloat16"` computes linear maps and attention in bfloat16 (autocast), where the
            device has it; adapters, their moments and the loss stay in float32.
        evaluate_every: Steps between two evaluations on held-out examples; 0: no evaluation.
        patience: Number of evaluations without a new lowest held-out loss after which training
            stops. The adapters with the lowest loss are kept, also if all steps are done. 0: no
            early stop, and the last adapters are kept.
        seed: Seed of the order of the data, of dropout and of noise.
        gradient_checkpointing: Recompute each layer in the backward pass instead of keeping its
            activations: less memory, about a third more time.
        neftune_alpha: In training, the embeddings of the input tokens `[L, d]` get uniform noise in
            ±neftune_alpha / √(L · d) (NEFTune, arXiv 2310.05914); 0: none.
        loss: `"cross-entropy"` of the tokens; or, of pairs of answers, `"dpo"` (arXiv 2305.18290)
            or `"orpo"` (arXiv 2403.07691), see `training.losses`.
        beta: β of DPO, λ of ORPO.
        adaptive_rank: Mean rank of an adapter that remains in use. Training begins with the ranks
            of the adapters, and takes them away where they matter least, see
            `training.forward.adaptive_rank`. None: all ranks stay.
    """

    steps: int = 60
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-3
    lora_plus_ratio: float = 1.0
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.1
    clip: float = 1.0
    precision: str = "float32"
    evaluate_every: int = 0
    patience: int = 0
    seed: int = 0
    gradient_checkpointing: bool = False
    neftune_alpha: float = 0.0
    loss: str = CROSS_ENTROPY
    beta: float = 0.1
    adaptive_rank: float | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 0),
            ("batch_size", 1),
            ("accumulate", 1),
            ("evaluate_every", 0),
            ("patience", 0),
        ):
            check_int(name, getattr(self, name), least=least)
        check_int("seed", self.seed, least=0, most=LARGEST_SEED)
        for name in ("learning_rate", "lora_plus_ratio", "clip", "beta"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserInputError(f"{name} is {getattr(self, name)}", hint="use e.g. 1e-3")
        for name, example in (("weight_decay", "0.01"), ("neftune_alpha", "5")):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserInputError(f"{name} is {getattr(self, name)}", hint=f"use e.g. {example}")
        if self.adaptive_rank is not None and not 0 < self.adaptive_rank < math.inf:
            raise UserInputError(f"adaptive_rank is {self.adaptive_rank}", hint="use e.g. 8")
        if not 0 <= self.warmup <= 1:
            raise UserInputError(f"warmup is {self.warmup}", hint="give a fraction, such as 0.1")
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("precision", self.precision, PRECISIONS)
        one_of("loss", self.loss, LOSSES)
        if self.patience and not self.evaluate_every:
            raise UserInputError(
                f"patience is {self.patience}, and training does not evaluate",
                hint="set evaluate_every to a number of steps",
            )

    @property
    def learns_pairs(self) -> bool:
        """Whether the examples are pairs of answers."""
        return self.loss in PAIR_LOSSES

    def lengthens(self, steps: object) -> bool:
        """Whether this training goes on from one of `steps` steps and otherwise the same options.

        It does if every earlier step had the learning rate, and the budget of ranks, that it has
        here.
        """
        if not isinstance(steps, int) or steps > self.steps or self.adaptive_rank is not None:
            return False
        same = self._warm_steps(steps) == self._warm_steps(self.steps)
        return self.schedule == "constant" and same

    def _warm_steps(self, steps: int) -> int:
        return max(1, round(self.warmup * steps))

    def factor_at(self, step: int) -> float:
        """The factor of the peak rate at a step, which counts from 0; between 0 and 1."""
        warm = self._warm_steps(self.steps)
        if step < warm:
            return (step + 1) / warm
        if self.schedule == "constant":
            return 1.0
        left = 1 - (step - warm) / max(1, self.steps - warm)
        return left if self.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))

    def rate_at(self, step: int) -> float:
        """Learning rate of A at a step, which counts from 0; B's is `lora_plus_ratio` times it."""
        return self.learning_rate * self.factor_at(step)
