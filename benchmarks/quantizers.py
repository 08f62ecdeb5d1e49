"""What each quantizer loses and what it costs: methods × bits × groups on two real models.

SmolLM2-135M-Instruct (its weights are themselves 4-bit in groups of 32, so min-max at 4 bits and 32
gives them back) is judged by its perplexity on news articles. all-MiniLM-L6-v2 (true float32) is
judged by the topic accuracy of its sentence embeddings (the nearest mean of 128 articles) and by
their cosine to the float model's. `+ data` has calibration data, by which offsets are refined;
`gptq` always has. Calibration, means and test use different articles. `learned`, of the language
model alone, has longer data of two kinds: articles and the manual that Python carries. Texts of two
other kinds, film reviews and torch's docstrings, show whether it fits one kind only. The float
model and its dynamic INT8 form by ONNX Runtime (`quantize_dynamic`, int8 activations) are the
references.

Megabytes are those of the layers that are quantized, scales and offsets in float32, and of all that
is stored; seconds are those of quantizing, including calibration and measuring what is lost.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

import qalora_compile as qc
from benchmarks.scatter import Point, scatter_svg
from qalora_compile.config import SUPPORTED_BITS
from qalora_compile.ir.stages import CODE_NAMES
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.quantizers import needs_data
from qalora_compile.quantizers.report import QuantReport, collecting_reports

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from assets import TOPICS, articles, encoder_path, model_path, reviews

EXAMPLES = """examples:
  python -m benchmarks.quantizers --quick
  python -m benchmarks.quantizers --models minilm --json minilm.json --plot docs
  python -m benchmarks.quantizers --models smollm2 --bits 3 --groups 64 --methods minmax gptq
"""
METHODS = ("minmax", "minmax + data", "mse", "hqq", "hqq + data", "gptq", "learned")
BITS, GROUPS = (2, 3, 4), (32, 64, 128)
_COLUMNS = (
    "method", "bits", "group", "score", "reviews", "docstrings", "cosine", "output dB",
    "layers MB", "all MB", "CPU s",
)  # fmt: skip
_WIDTH = 120
_LESSONS = 4
"""Windows of each kind for `learned`, per window of the test."""
_LONG = 200
LEARNED = "learned"
FLOAT, INT8 = "float32", "dynamic INT8"
Run = Callable[..., Any]
"""A model: called with `input_ids` and `attention_mask`, gives its first output."""


@dataclass(frozen=True)
class Row:
    """One form of a model.

    Attributes:
        model: `smollm2` or `minilm`.
        method, bits, group_size: How it was quantized; 0 where that says nothing.
        score: Perplexity, or accuracy.
        cosine: Mean cosine to the float model's embeddings, of the encoder.
        output_db: Mean over the layers of the signal to noise of their outputs, where measured.
        layers_mb: Megabytes of the quantized layers.
        megabytes: Of everything stored.
        seconds: CPU time to quantize.
        reviews, docstrings: The language model's perplexity on texts of other kinds.
    """

    model: str
    method: str
    bits: int
    group_size: int
    score: float
    cosine: float | None
    output_db: float | None
    layers_mb: float
    megabytes: float
    seconds: float
    reviews: float | None = None
    docstrings: float | None = None


class Subject(ABC):
    """A model with data: the captured program, calibration calls, and a score."""

    name: str
    better: str
    program: qc.Program
    calibration: list[dict[str, Tensor]]

    def calls_for(self, method: str) -> list[dict[str, Tensor]]:
        """The calibration calls of a method."""
        return self.calibration

    def other_scores(self, run: Run) -> dict[str, float]:
        """Scores on texts of other kinds, by column."""
        return {}

    @abstractmethod
    def score(self, run: Run) -> tuple[float, float | None]:
        """The score, and for an encoder the cosine, of one form of the model."""


class LanguageModel(Subject):
    """SmolLM2: perplexity over windows of joined articles."""

    name, better = "smollm2", "perplexity (lower is better)"

    def __init__(self, windows: int, width: int = 256) -> None:
        from qalora_compile.capture.load_source import load_source

        source = load_source(str(model_path()))
        self.program = source.capture()
        parts = (articles()[:200], articles()[200:])
        self._test, self.calibration = (
            _windows(source.tokenizer, [text for text, _ in part], count, width)
            for part, count in zip(parts, (windows, windows * 2), strict=True)
        )
        kinds = {"reviews": [text for text, _ in reviews()], "docstrings": _docstrings()}
        self._others = {
            kind: _windows(source.tokenizer, texts, windows, width) for kind, texts in kinds.items()
        }
        manual = list(topics.topics.values())
        self._lessons = [
            _windows(source.tokenizer, texts, windows * _LESSONS, width)
            for texts in ([text for text, _ in parts[1]], manual)
        ]

    def calls_for(self, method: str) -> list[dict[str, Tensor]]:
        """More for `learned`: windows of articles and of the manual in turn."""
        if method != LEARNED:
            return self.calibration
        return [call for pair in zip(*self._lessons, strict=True) for call in pair]

    def score(self, run: Run) -> tuple[float, float | None]:
        """Perplexity."""
        return _perplexity(run, self._test), None

    def other_scores(self, run: Run) -> dict[str, float]:
        """Perplexity on the other kinds."""
        return {kind: _perplexity(run, calls) for kind, calls in self._others.items()}


def _perplexity(run: Run, calls: Iterable[dict[str, Tensor]]) -> float:
    total, count = 0.0, 0
    for call in calls:
        logits = run(**call)
        targets = call["input_ids"][:, 1:].flatten()
        rows = logits[:, :-1].flatten(0, 1).float()
        total += float(functional.cross_entropy(rows, targets, reduction="sum"))
        count += len(targets)
    return float(torch.tensor(total / count).exp())


def _docstrings() -> list[str]:
    """The docstrings of torch.Tensor's methods."""
    found = (inspect.getdoc(getattr(Tensor, name)) for name in dir(Tensor) if name[0] != "_")
    return [text for text in found if text and len(text) > _LONG]


def _windows(tokenizer: Any, texts: list[str], count: int, width: int) -> list[dict[str, Tensor]]:
    """`count` windows of `width` tokens, four at a time."""
    ids: list[int] = []
    for text in texts:
        if len(ids) < count * width:
            ids += tokenizer(text + "\n\n").input_ids
    rows = torch.tensor(ids[: count * width]).reshape(count, width)
    return [{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows.split(4)]


class Encoder(Subject):
    """MiniLM: topics by the nearest mean embedding."""

    name, better = "minilm", "topic accuracy (higher is better)"

    def __init__(self, tests: int, width: int = 96) -> None:
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(encoder_path(), local_files_only=True)
        model = AutoModel.from_pretrained(encoder_path(), local_files_only=True).eval()
        rows = articles()[: 192 + tests]
        options = {"max_length": width, "truncation": True, "padding": "max_length"}
        found = tokenizer([text for text, _ in rows], return_tensors="pt", **options)
        calls = [
            {"input_ids": ids, "attention_mask": mask}
            for ids, mask in zip(
                found.input_ids.split(16), found.attention_mask.split(16), strict=True
            )
        ]
        labels = torch.tensor([TOPICS.index(topic) for _, topic in rows])
        self.program = qc.capture_model(model, (), {k: v[:2] for k, v in calls[0].items()})
        self.calibration, means, self._test = calls[:4], calls[4:12], calls[12:]
        known = self._embed(_runner(self.program), means)
        sorts = labels[64:192]
        self._means = torch.stack([known[sorts == t].mean(0) for t in range(len(TOPICS))])
        self._labels = labels[192:]
        self._float = self._embed(_runner(self.program), self._test)

    @staticmethod
    def _embed(run: Run, calls: Sequence[dict[str, Tensor]]) -> Tensor:
        found = []
        for call in calls:
            mask = call["attention_mask"][..., None]
            states = run(**call)
            found.append(functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(found)

    def score(self, run: Run) -> tuple[float, float | None]:
        """Accuracy and cosine."""
        embedded = self._embed(run, self._test)
        right = (embedded @ self._means.T).argmax(-1) == self._labels
        return float(right.float().mean()), float((embedded * self._float).sum(-1).mean())


def _runner(program: qc.Program) -> Run:
    def run(**call: Tensor) -> Any:
        with program.evaluating():
            return next(iter(program(**call).values()))

    return run


def measure(
    subject: Subject,
    console: Console,
    method: str,
    bits: int,
    group_size: int,
    *,
    exported: bool = False,
) -> Row:
    """Quantize and score; with `exported`, in ONNX Runtime too."""
    name, _, data = method.partition(" + ")
    calibrated = bool(data) or needs_data(name)
    annotated = AnnotateLinears()(subject.program).program
    started = time.process_time()
    with collecting_reports() as reports:
        program = qc.quantize_groups(
            annotated,
            qc.QuantSpec(bits=bits, group_size=group_size, method=name),
            calibration=subject.calls_for(name) if calibrated else None,
        )
    spent = time.process_time() - started
    score, cosine = subject.score(_runner(program))
    size = _size(program, {f".{name}" for name in CODE_NAMES}), _size(program)
    output_db = None if name == LEARNED else _mean_db(reports)  # that would be of its start
    others = subject.other_scores(_runner(program))
    row = Row(
        subject.name, method, bits, group_size, score, cosine, output_db, *size, spent, **others
    )
    console.print(f"{method}, {bits} bits, {group_size}: {score:.4g} in {spent:.0f} s")
    if exported:
        console.print(f"  in ONNX Runtime: {in_onnx_runtime(subject, program):.4g}")
    return row


def in_onnx_runtime(subject: Subject, program: qc.Program) -> float:
    """The score of the program, exported for stock ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        qc.export_model(program, path, qc.ExportSpec(target="ort-stock", allow_unfolded=True))
        return subject.score(_session(path))[0]


def _mean_db(reports: Sequence[QuantReport]) -> float | None:
    found = [r.output_sqnr_db for r in reports if r.output_sqnr_db is not None]
    return sum(found) / len(found) if found else None


def _size(program: qc.Program, ends: Iterable[str] = ("",)) -> float:
    """Megabytes of the tensors whose names end so, each memory once."""
    tensors = [t for name, t in program.tensors().items() if name.endswith(tuple(ends))]
    owned = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(owned.values()) / 1e6


def baselines(subject: Subject, console: Console) -> list[Row]:
    """The float model, and its dynamic INT8 form in ONNX Runtime."""
    score, cosine = subject.score(_runner(subject.program))
    name, plan = subject.name, AnnotateLinears()(subject.program).program.plan
    weights = sum(site.n * site.k for site in plan.weights_to_quantize()) / 1e6
    size = 4 * weights, _size(subject.program)
    others = subject.other_scores(_runner(subject.program))
    rows = [Row(name, FLOAT, 0, 0, score, cosine, None, *size, 0.0, **others)]
    console.print(f"{FLOAT}: {score:.4g}")
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        source, target = (Path(folder) / f"{part}.onnx" for part in ("float", "int8"))
        qc.export_model(subject.program, source, qc.ExportSpec(target="onnx", allow_unfolded=True))
        started = time.process_time()
        quantize_dynamic(source, target, use_external_data_format=False)
        spent = time.process_time() - started
        score, cosine = subject.score(_session(target))
        size = weights, target.stat().st_size / 1e6
        rows.append(Row(name, INT8, 8, 0, score, cosine, None, *size, spent))
    console.print(f"{INT8}: {score:.4g}")
    return rows


def _session(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    taken = {each.name for each in session.get_inputs()}

    def run(**call: Tensor) -> Tensor:
        feed = {name: value.numpy() for name, value in call.items() if name in taken}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def table_of(rows: Sequence[Row], better: str) -> Table:
    """All forms of one model."""
    table = Table(title=f"{rows[0].model}: {better}", title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "method" else "right")
    for r in rows:
        optional = [
            "" if v is None else f"{v:.4g}"
            for v in (r.reviews, r.docstrings, r.cosine, r.output_db)
        ]
        shown = [str(v or "") for v in (r.bits, r.group_size)]
        numbers = [f"{r.layers_mb:.1f}", f"{r.megabytes:.1f}", f"{r.seconds:.0f}"]
        table.add_row(r.method, *shown, f"{r.score:.4f}", *optional, *numbers)
    return table


def plot(rows: Sequence[Row], better: str, path: Path) -> None:
    """What is lost against megabytes, as SVG: perplexity, or the encoder's 1 − cosine."""
    encoder = rows[0].cosine is not None
    points = [
        Point(
            r.layers_mb,
            r.score if r.cosine is None else 1 - r.cosine,
            r.method,
            f"{r.bits} bits" + (f", group {r.group_size}" if r.group_size else ""),
        )
        for r in rows
        if r.method != FLOAT
    ]
    text = scatter_svg(
        points,
        title=f"{rows[0].model}: what is lost (lower is better)",
        x="megabytes of the quantized layers",
        y="1 − cosine to the float model" if encoder else better,
        line=None if encoder else rows[0].score,
    )
    path.write_text(text, "utf-8")


def run(options: argparse.Namespace, console: Console) -> list[Row]:
    """Measure everything asked for; the rows so far are written after each."""
    rows: list[Row] = []
    for name in options.models:
        small = options.quick
        subject = (
            LanguageModel(4 if small else 8) if name == "smollm2" else Encoder(64 if small else 192)
        )
        mine = baselines(subject, console)
        for bits in options.bits:
            for group in options.groups:
                for method in options.methods:
                    if method == LEARNED and name != "smollm2":
                        continue  # it needs logits
                    mine.append(
                        measure(subject, console, method, bits, group, exported=options.exported)
                    )
                    if options.json:
                        everything = [asdict(row) for row in [*rows, *mine]]
                        options.json.write_text(json.dumps(everything, indent=1), "utf-8")
        Console(width=_WIDTH).print(table_of(mine, subject.better))
        if options.plot:
            plot(mine, subject.better, options.plot / f"quantizers_{name}.svg")
        rows += mine
    return rows


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantizers",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ("smollm2", "minilm")
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--bits", nargs="+", type=int, choices=SUPPORTED_BITS, default=BITS)
    parser.add_argument("--groups", nargs="+", type=int, default=GROUPS, metavar="G")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--quick", action="store_true", help="3 bits, group 64, MiniLM, few texts")
    parser.add_argument(
        "--exported", action="store_true", help="score the exported model in ONNX Runtime too"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write quantizers_<model>.svg")
    options = parser.parse_args(words)
    if min(options.groups) < 1:
        parser.error("groups are 1 or more")
    if options.quick:
        options.models, options.bits, options.groups = ("minilm",), (3,), (64,)
    run(options, Console(stderr=True))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
