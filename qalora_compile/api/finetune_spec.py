"""The specification of `finetune`, and which of its fields determine the trained weights."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qalora_compile.api.codes import CodesSpec
from qalora_compile.config import AUTO, AdapterSpec, QuantSpec, Spec
from qalora_compile.config.choices import ARRANGEMENTS, CHECKPOINTS_KEPT, LEARN
from qalora_compile.config.fit import ADDED, FitSpec
from qalora_compile.errors import UserInputError
from qalora_compile.training.data.read_rows import find_files
from qalora_compile.training.records.run_identity import file_digest

_FILES = ("data", "eval_data", "calibration")
_OPTIONS = {
    "kind": "adapter",
    "use_rslora": "rslora",
    "learning_rate": "lr",
    "evaluate_every": "eval_every",
}
"""Field → option name, where the record of a run uses the latter."""
_UNUSED = {"no_verify"}
_WITHOUT_EFFECT = ("data_cache", "device", "save_every", "keep", "report_to")
"""Options that do not change the trained weights."""
_START_OPTIONS = "give the options of the first call, or start a new run"
_MORE_STEPS = (
    "a run takes more steps only if it was started with --schedule constant --warmup 0; to train "
    "on from its adapters, start a new run: finetune --init-from RUN --data FILE --out RUN2"
)
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
        model: Hugging Face folder, `.gguf` file, or `package.module:factory`; with `init_from`, the
            base of that run.
        out: The RUN folder to write.
        reading: Data and how they are read.
        codes: How the weights are quantized.
        adapter: The adapters to train.
        fit: How they are trained.
        epochs: How often all examples are read, in place of `fit.steps`; None takes the steps.
        init_from: A RUN folder whose program and trained adapters are trained on; its model, codes
            and adapters are kept.
        calibration: Files of calibration data; None takes the training data.
        calibration_samples: Number of calibration examples.
        device: The device to train on; None: the CPU, or the one that a launcher assigns.
        save_every: Number of steps between two checkpoints.
        keep: Number of checkpoints to keep.
        report_to: Further logs of the steps, such as `"tensorboard"`.
        resume: Resume from the last checkpoint in `out`.
        overwrite: Replace an existing RUN folder.
    """

    model: str = ""
    out: Path
    reading: ReadingSpec
    codes: CodesSpec = field(default_factory=CodesSpec)
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    fit: FitSpec = field(default_factory=FitSpec)
    epochs: float | None = None
    init_from: Path | None = None
    calibration: tuple[str, ...] | None = None
    calibration_samples: int = 128
    device: str | None = None
    save_every: int = 50
    keep: int = CHECKPOINTS_KEPT
    report_to: tuple[str, ...] = ()
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("save_every", "keep"):
            if getattr(self, name) < 1:
                raise UserInputError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}", hint="use 1 or more"
                )
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise UserInputError(f"--epochs is {self.epochs}", hint="use a number above 0")
        if self.init_from is None:
            if not self.model:
                raise UserInputError(
                    "there is no model to train",
                    hint="give finetune a MODEL, or a run as finetune --init-from RUN",
                )
        elif (self.codes, self.adapter) != (CodesSpec(), AdapterSpec()):
            raise UserInputError(
                "options of quantization or adapters are given with --init-from",
                where=str(self.init_from),
                hint="leave them out: the codes and adapters of that run are trained on",
            )
        if self.fit.evaluate_every and not self.reading.eval_data:
            raise UserInputError(
                "--eval-every has nothing to evaluate on", hint="give finetune --eval-data"
            )

    @property
    def inputs(self) -> list[str | None]:
        """The paths that are read, which are never overwritten."""
        reading = self.reading
        run = None if self.init_from is None else str(self.init_from)
        more = (*(reading.eval_data or ()), *(self.calibration or ()))
        return [self.model, run, *reading.data, *more]

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

    def check_files(self) -> None:
        """Check that every data file is there, before the model is loaded.

        Raises:
            UserInputError: one is missing or may not be read.
        """
        reading = self.reading
        for name, given in zip(
            _FILES, (reading.data, reading.eval_data, self.calibration), strict=True
        ):
            for path in find_files(given) if given else ():
                if not os.access(path, os.R_OK):
                    problem = "cannot be read" if path.exists() else "does not exist"
                    option = name.replace("_", "-")
                    raise UserInputError(f"the file of --{option} {problem}", where=str(path))

    def with_steps(self, batches: int, processes: int) -> FinetuneSpec:
        """This specification with the steps that its epochs take.

        Args:
            batches: Number of batches of an epoch.
            processes: Number of processes, each of which reads other batches.
        """
        if self.epochs is None:
            return self
        steps = math.ceil(self.epochs * batches / (self.fit.accumulate * processes))
        return dataclasses.replace(self, fit=dataclasses.replace(self.fit, steps=max(1, steps)))

    def length(self) -> dict[str, Any]:
        """The options that say how long to train, which a resumed run may raise."""
        if self.epochs is None:
            return {"steps": self.fit.steps, "epochs": None}
        return {"epochs": self.epochs}

    def options(self) -> dict[str, Any]:
        """Option name → value, in JSON types, of all that a call of the command line states.

        Paths are absolute. `out`, `resume` and `overwrite` are left out.
        """
        adapter, reading = self.adapter.to_json(), self.reading.to_json()
        del adapter["group_size"], adapter["seed"]
        parts = reading | self.codes.to_json() | adapter | self.fit.to_json()
        values = {_OPTIONS.get(name, name): value for name, value in parts.items()}
        values["map"] = _mapping_text(self.reading.map)
        if self.epochs is not None:
            del values["steps"]
        rest = ("epochs", "calibration", "calibration_samples", "device", "save_every", "keep")
        values |= {name: getattr(self, name) for name in rest}
        values["report_to"] = list(self.report_to)
        values["calibration"] = None if self.calibration is None else list(self.calibration)
        for name in _FILES:
            values[name] = _absolute(values[name])
        if reading["data_cache"]:
            values["data_cache"] = os.path.abspath(reading["data_cache"])
        if self.init_from is None:
            return {"model": _absolute(self.model)} | values
        return {"init_from": str(self.init_from.resolve())} | values

    def decisive(self) -> dict[str, Any]:
        """Option name → value, in JSON types, of all that determines the trained weights.

        A file is represented by the digest of its contents.

        Raises:
            UserInputError: a data file cannot be read.
        """
        values = {n: v for n, v in self.options().items() if n not in _WITHOUT_EFFECT}
        values |= {"model": _absolute(self.model), "map": self.reading.map}
        for name in _FILES:
            if values[name] is not None:
                values[name] = file_digest(find_files(values[name]))
        return values

    def check_resumed(self, then: Mapping[str, Any]) -> None:
        """Check that a run is resumed with what it was started with.

        Args:
            then: The result of `decisive` at that time.

        Raises:
            UserInputError: an option has another value, or a data file other contents; the first
                one is named.
        """
        now, then = self.decisive(), ADDED | dict(then)
        for name in [*now, *(then.keys() - now.keys() - _UNUSED)]:
            a, b = then.get(name), now.get(name)
            if a == b or self._lengthens(name, a):
                continue
            option = name if name == "model" else f"--{name.replace('_', '-')}"
            if name in _FILES and None not in (a, b):
                what = f"the contents of {option} have changed since the run was started"
            else:
                what = f"the run was started with {option} {_said(a)}, not {_said(b)}"
            raise UserInputError(
                what,
                where=str(self.out),
                hint=_MORE_STEPS if name in ("steps", "epochs") else _START_OPTIONS,
            )

    def _lengthens(self, name: str, then: Any) -> bool:
        """Whether an option that differs only asks for more steps than before."""
        if name == "epochs" and self.epochs is not None and isinstance(then, (int, float)):
            return self.fit.schedule == "constant" and then < self.epochs
        return name == "steps" and self.fit.lengthens(then)


def _absolute(value: Any) -> Any:
    """Paths that exist, or are patterns, as absolute ones; a model's other names as they are."""
    if isinstance(value, list):
        return [os.path.abspath(path) for path in value]
    if not value:
        return value
    return str(Path(value).resolve()) if Path(value).exists() else value


def _mapping_text(mapping: Mapping[str, str] | None) -> str | None:
    """A mapping of fields to columns as the command line takes it."""
    return None if mapping is None else ",".join(f"{f}={c}" for f, c in mapping.items())


def _said(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "unset" if value is None else str(value)
