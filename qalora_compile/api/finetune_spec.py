"""What `finetune` is asked for, and which of it decides to which weights a run leads."""

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
"""Field → option, where a run's record has it by the name of the option."""
_UNUSED = {"no_verify"}
"""What older records have, and decides nothing."""


@dataclass(frozen=True, kw_only=True)
class ReadingSpec(Spec):
    """What is read, and how.

    Attributes:
        data, eval_data: Files, patterns or folders to train on, and held-out ones.
        task: `"language"` or `"classification"`; None: found from the data and the model.
        map: Field → column: which fields of the data are read, and as what.
        learn: Whether the loss counts completions alone, or prompts too.
        batches: How examples make a batch, see `training.data.batches`.
        seq_len: Longest example, in tokens.
        data_cache: Folder to tokenize into once and to read from.
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
    """A training, from a model to a RUN folder.

    Attributes:
        model: Hugging Face folder, `.gguf` file, or `package.module:factory`.
        out: The RUN folder to write.
        reading: Data and how they are read.
        codes: How the weights are quantized.
        adapter: What is trained.
        fit: How it is trained.
        calibration: Data to quantize for, where not the training data.
        calibration_samples: How many of them are taken.
        device: To train on; None: the CPU, or under a launcher the process's own.
        save_every: Steps between two checkpoints.
        keep: How many checkpoints are kept.
        report_to: Where else steps are recorded, such as `"tensorboard"`.
        resume: Go on from the last checkpoint in `out`.
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
        """What is read, which is never overwritten."""
        reading = self.reading
        return [self.model, *reading.data, *(reading.eval_data or ()), self.calibration]

    @property
    def quant(self) -> QuantSpec:
        """The codes, as the adapters need them.

        Raises:
            UserInputError: a value is out of range.
        """
        return self.codes.quant(
            zero_point="integer" if self.adapter.keeps_integer_zero_point else "real",
            refine_offsets=self.adapter.init != "svd",  # else nothing is left for the adapters
        )

    @property
    def quantizes_by_data(self) -> bool:
        """Whether codes are chosen by calibration data."""
        codes = self.codes
        given = self.calibration is not None
        return given or codes.needs_calibration or codes.bits == AUTO

    @property
    def needs_calibration(self) -> bool:
        """Whether calls of the model are needed before the training."""
        return self.quantizes_by_data or self.adapter.rank == AUTO or self.adapter.init == "svd"

    def decisive(self) -> dict[str, Any]:
        """What decides to which weights a run leads, by the name of the option, as JSON types.

        Files are digests of their contents.

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
        """See that a run goes on with what it was started with.

        Args:
            then: What `decisive` gave then.

        Raises:
            UserInputError: one has another value, or a data file other contents; the first is
                named.
        """
        now = self.decisive()
        for name in [*now, *(then.keys() - now.keys() - _UNUSED)]:
            a, b = then.get(name), now.get(name)
            if a == b:
                continue
            option = name if name == "model" else f"--{name.replace('_', '-')}"
            if name in _FILES and None not in (a, b):
                what = f"the contents of {option} are not those that the run was started with"
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
