"""`eval`: loss, perplexity, exact match and accuracy of models of any form on the same data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_compile.api.eval_models import Evaluated, opened
from qalora_compile.api.finetune_data import load_files, report_data
from qalora_compile.api.finetune_spec import ReadingSpec
from qalora_compile.api.run_folder import RUN_FILE, read_run_file
from qalora_compile.config.choices import CLASSIFICATION, LANGUAGE
from qalora_compile.errors import UserInputError
from qalora_compile.progress import say
from qalora_compile.training.data.example import IGNORED, Example
from qalora_compile.training.data.load_examples import first_labelled
from qalora_compile.training.data.row_forms import TEXT
from qalora_compile.training.evaluate import Metrics, evaluate

_DEFAULTS: Mapping[str, Any] = {"map": None, "learn": ReadingSpec.learn, "seq_len": 512}


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """Models, and the data to evaluate them on.

    Attributes:
        models: See `eval_models.opened`.
        data: Files, patterns or folders.
        task: `"language"` or `"classification"`; None infers it from the data.
        map, learn, seq_len: See `ReadingSpec`; None: as the first RUN or FOLDED of the models was
            trained, otherwise as `finetune` does by default.
        limit: Use the first so many examples; None: all.
        batch_size: Number of examples per batch.
        threads: Number of threads of ONNX Runtime.
    """

    models: tuple[str, ...]
    data: tuple[str, ...]
    task: str | None = None
    map: Mapping[str, str] | None = None
    learn: str | None = None
    seq_len: int | None = None
    limit: int | None = None
    batch_size: int = 4
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserInputError(f"--{name.replace('_', '-')} is {value}", hint="use 1 or more")

    def reading(self) -> ReadingSpec:
        """How the data are read: as given, as a run was trained, or by default.

        Raises:
            UserInputError: a record cannot be read.
        """
        runs = (Path(each) for each in self.models if (Path(each) / RUN_FILE).is_file())
        first = next(runs, None)
        known = {} if first is None else read_run_file(first).get("reading", {})
        chosen = {}
        for name, default in _DEFAULTS.items():
            given = getattr(self, name)
            chosen[name] = known.get(name, default) if given is None else given
        labelled = first_labelled(self.data, chosen["map"]) is not None
        task = self.task or (CLASSIFICATION if labelled else LANGUAGE)
        return ReadingSpec(data=self.data, task=task, **chosen)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of one model.

    Attributes:
        model: As it was given.
        form: See `eval_models.Evaluated`.
        task: `language` or `classification`.
        metrics: The figures; `exact_match` is the accuracy of a classifier.
        answers: Whether the data are prompts with answers, so that `exact_match` says something.
        targets: Number of predicted tokens or classes.
        truncated: How many examples were cut to fit.
        seconds: Time of the evaluation.
    """

    model: str
    form: str
    task: str
    metrics: Metrics
    answers: bool
    targets: int
    truncated: int
    seconds: float

    @property
    def perplexity(self) -> float | None:
        """`exp` of the loss, per predicted token; None for a classifier."""
        return math.exp(min(self.metrics.loss, 700.0)) if self.task == LANGUAGE else None


def evaluate_models(spec: EvalSpec) -> Iterator[Evaluation]:
    """Evaluate the models one after the other, each opened when its turn comes.

    Raises:
        UserInputError: data or a model cannot be read, or a model has no classes for the data.
        UnsupportedError: a form is not supported.
    """
    reading = spec.reading()
    counts: dict[int, str] = {}
    for reference in spec.models:
        say(f"load {reference}")
        with opened(reference, spec.threads) as model:
            result = _evaluate(spec, reading, reference, model)
        yield result
        counts.setdefault(result.targets, reference)
    if len(counts) > 1:
        said = ", ".join(f"{name} {count:,}" for count, name in counts.items())
        say(
            f"note: the models' tokenizers differ ({said} predicted tokens): compare exact match, "
            "not loss and perplexity, which are per token"
        )


def _evaluate(spec: EvalSpec, reading: ReadingSpec, reference: str, model: Evaluated) -> Evaluation:
    classes = model.classes if reading.task == CLASSIFICATION else ()
    if reading.task == CLASSIFICATION and not classes:
        raise UserInputError(
            "the data have labels, and the model has no classes",
            where=reference,
            hint="give a classifier; or write the rows as "
            '{"prompt": text, "completion": label}; for the perplexity of the texts alone, add '
            "--task language",
        )
    data = load_files(reading, reading.data, model.tokenizer, model.decoder_start, classes)
    report_data("data", data)
    examples: Sequence[Example] = data.examples[: spec.limit]
    started = time.monotonic()
    metrics = evaluate(model.forward, examples, batch_size=spec.batch_size)
    seconds = time.monotonic() - started
    metrics.check(f"for {reference}")
    forms = {form for file in data.files for form in file.forms}
    return Evaluation(
        model=reference,
        form=model.form,
        task=str(reading.task),
        metrics=metrics,
        answers=forms != {TEXT},
        targets=sum(_targets(example) for example in examples),
        truncated=data.truncated,
        seconds=seconds,
    )


def _targets(example: Example) -> int:
    if example.label is not None:
        return 1
    return sum(label != IGNORED for label in example.labels[1:])
