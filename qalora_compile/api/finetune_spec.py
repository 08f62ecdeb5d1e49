"""The specification of `finetune`, and which of its fields determine the trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qalora_compile.api.codes import CodesSpec
from qalora_compile.config import AUTO, AdapterSpec, QuantSpec, Spec
from qalora_compile.errors import UserInputError
from qalora_compile.training.data.batches import ARRANGEMENTS
from qalora_compile.training.data.parse_line import LEARN
from qalora_compile.training.data.read_rows import find_files
from qalora_compile.training.records.checkpoint import KEPT
from qalora_compile.training.records.run_identity import file_digest
from qalora_compile.training.spec import FitSpec

_FILES = ("data", "eval_data", "calibration")
_OPTIONS = {
    "kind": "adapter",
    "use_rslora": "rslora",
    "learning_rate": "lr",
    "evaluate_every": "eval_every",
}
"""Field → option name, where the record of a run uses the latter."""
_UNUSED = {"no_verify"}
"""Entries of older records that do not affect the weights."""


@dataclass(frozen=True, kw_only=True)
class ReadingSpec(Spec):
    """The data to read, and how.

    Attributes:
        data, eval_data: Files, patterns or folders of training and of held-out data.
        task: `"language"` or `"classification"`; None infers it from the data and the model.
        map: Field → column of the data that it is read from.
        learn: Whether the loss covers completions only, or prompts too.
        batches: How examples are arranged in batches, see `training.data.batches`.
        seq_len: Length of the longest example, in tokens.
        data_cache: Folder that holds the tokenized data, so that they are tokenized once.
    """

    data: tuple[str, ...]
    eval_data: tuple[str, ...] | None = None
    task: str | None = None
    map: Mapping[str, str] | None = None
    learn: str = LEARN[0]
    batches: str = ARRANGEMENTS[0]
    seq_len: int = 512
    data_cache: str | None = None


@dataclass(frozen=True, kw_only=True)
class FinetuneSpec:
    """A training run, from a model to a RUN folder.

    Attributes:
        model: Hugging Face folder, `.gguf` file, or `package.module:factory`.
        out: The RUN folder to write.
        reading: Data and how they are read.
        codes: How the weights are quantized.
        adapter: The adapters to train.
        fit: How they are trained.
        calibration: Calibration data; None takes the training data.
        calibration_samples: Number of calibration examples.
        device: The device to train on; None: the CPU, or the one that a launcher assigns.
        save_every: Number of steps between two checkpoints.
        keep: Number of checkpoints to keep.
        report_to: Further logs of the steps, such as `"tensorboard"`.
        resume: Resume from the last checkpoint in `out`.
        overwrite: Replace an existing RUN folder.
    """

    model: str
    out: Path
    reading: ReadingSpec
    codes: CodesSpec = field(default_factory=CodesSpec)
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    fit: FitSpec = field(default_factory=FitSpec)
    calibration: str | None = None
    calibration_samples: int = 128
    device: str | None = None
    save_every: int = 50
    keep: int = KEPT
    report_to: tuple[str, ...] = ()
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("save_every", "keep"):
            if getattr(self, name) < 1:
                raise UserInputError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}", hint="use 1 or more"
                )
        if self.fit.evaluate_every and not self.reading.eval_data:
            raise UserInputError("--eval-every has nothing to evaluate on", hint="give --eval-data")

    @property
    def inputs(self) -> list[str | None]:
        """The paths that are read, which are never overwritten."""
        reading = self.reading
        return [self.model, *reading.data, *(reading.eval_data or ()), self.calibration]

    @property
    def quant(self) -> QuantSpec:
        """The `QuantSpec` that suits the adapters.

        Raises:
            UserInputError: a value is out of range.
        """
        return self.codes.quant(
            zero_point="integer" if self.adapter.keeps_integer_zero_point else "real",
            refine_offsets=self.adapter.init != "svd",  # else nothing is left for the adapters
        )

    @property
    def quantizes_by_data(self) -> bool:
        """Whether quantization uses calibration data."""
        codes = self.codes
        given = self.calibration is not None
        return given or codes.needs_calibration or codes.bits == AUTO

    @property
    def needs_calibration(self) -> bool:
        """Whether the model is run on calibration data before training."""
        return self.quantizes_by_data or self.adapter.rank == AUTO or self.adapter.init == "svd"

    def decisive(self) -> dict[str, Any]:
        """Option name → value, in JSON types, of all that determines the trained weights.

        A file is represented by the digest of its contents.

        Raises:
            UserInputError: a data file cannot be read.
        """
        adapter, reading = self.adapter.to_json(), self.reading.to_json()
        del adapter["group_size"], adapter["seed"], reading["data_cache"]
        parts = reading | self.codes.to_json() | adapter | self.fit.to_json()
        values = {_OPTIONS.get(name, name): value for name, value in parts.items()}
        values |= {name: getattr(self, name) for name in ("calibration", "calibration_samples")}
        for name in _FILES:
            if values[name] is not None:
                values[name] = file_digest(find_files(values[name]))
        path = Path(self.model)
        return values | {"model": str(path.resolve()) if path.exists() else self.model}

    def check_resumed(self, then: Mapping[str, Any]) -> None:
        """Check that a run is resumed with what it was started with.

        Args:
            then: The result of `decisive` at that time.

        Raises:
            UserInputError: an option has another value, or a data file other contents; the first
                one is named.
        """
        now = self.decisive()
        for name in [*now, *(then.keys() - now.keys() - _UNUSED)]:
            a, b = then.get(name), now.get(name)
            if a == b:
                continue
            option = name if name == "model" else f"--{name.replace('_', '-')}"
            if name in _FILES and None not in (a, b):
                what = f"the contents of {option} have changed since the run was started"
            else:
                what = f"the run was started with {option} {_said(a)}, not {_said(b)}"
            raise UserInputError(
                what,
                where=str(self.out),
                hint="give the options of the first call, or start a new run",
            )


def _said(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "unset" if value is None else str(value)
