"""Speed and memory of an exported language model, compared with its unmerged and float forms."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qalora_compile.api.edge import read_edge_record
from qalora_compile.api.export import export_model
from qalora_compile.api.forms import add_kv_cache
from qalora_compile.api.run_folder import MODEL, load_run
from qalora_compile.api.steps import fold_adapters
from qalora_compile.config import ExportSpec
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.stages import ADAPTED
from qalora_compile.passes.dequantize_groups import DequantizeGroups
from qalora_compile.progress import announce, say
from qalora_compile.runtime.footprint import footprint, time_tokens
from qalora_compile.runtime.language_model import LanguageModel
from qalora_compile.runtime.library import kernel_level
from qalora_compile.runtime.session import open_session
from qalora_compile.untrusted.artifacts import (
    ORT_SUFFIX,
    encoder_decoder_files,
    model_file,
    onnx_parts,
)

LIBRARY, STOCK = "merged, operator library", "merged, stock kernels"
UNMERGED, FLOAT = "adapters unmerged, stock kernels", "float32"


@dataclass(frozen=True)
class Form:
    """One form of the model."""

    name: str
    path: Path
    library: bool

    def size(self) -> int:
        """Bytes of the model's files."""
        return sum(file.stat().st_size for file in onnx_parts(self.path))


@dataclass(frozen=True)
class Result:
    """Measurements of one form: medians, in tokens per second, seconds and bytes."""

    form: str
    prompts: dict[int, float]
    first_token: float
    decode: float
    memory: int
    size: int


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """What to measure.

    Attributes:
        folder: A folder written by `export_folder`.
        run: The RUN it was made from, for the unmerged and float forms; None leaves them out.
        prompts: Lengths of prompts, in tokens.
        decode: Number of tokens generated after a prompt.
        rounds: Number of measured rounds, in which the forms alternate; one more round warms up.
        threads: Number of threads of ONNX Runtime.
    """

    folder: Path
    run: Path | None = None
    prompts: tuple[int, ...] = (16, 128, 512)
    decode: int = 16
    rounds: int = 5
    threads: int | None = None

    def __post_init__(self) -> None:
        if min(*self.prompts, self.decode, self.rounds) < 1:
            raise UserInputError("prompts, decode and rounds must be 1 or more")


def bench(spec: BenchSpec) -> list[Result]:
    """Measure speed and memory of an exported language model and of its other forms.

    Raises:
        UserInputError: a length is out of range, or a folder cannot be read.
        UnsupportedError: the model has no key-value cache, or consists of two graphs.
    """
    length = read_edge_record(spec.folder).get("context_length")
    if length is not None and max(spec.prompts) + spec.decode > length:
        raise UserInputError(
            f"a prompt of {max(spec.prompts)} tokens and {spec.decode} new ones exceed the model's "
            f"context length of {length}",
            hint="use --prompts and --decode",
        )
    with _forms(spec.folder, spec.run) as forms:
        return _measure(forms, spec)


@contextmanager
def _forms(folder: Path, run_folder: Path | None) -> Iterator[list[Form]]:
    """The forms of the model; those made from RUN are deleted after the block."""
    path = model_file(folder)
    if encoder_decoder_files(folder) is not None:
        raise UnsupportedError(
            "bench measures models with a single graph, and this one has an encoder and a decoder",
            where=str(folder),
            hint="generate prints its speed",
        )
    forms = [Form(STOCK, path, library=False)]
    if kernel_level() is not None and path.suffix != ORT_SUFFIX:  # it has stock operators alone
        forms.insert(0, Form(LIBRARY, path, library=True))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".bench.") as scratch:
        if run_folder is not None:
            forms += _export_forms(run_folder, Path(scratch))
        yield forms


def _export_forms(source: Path, scratch: Path) -> list[Form]:
    """The unmerged form, and the folded weights in float32.

    Raises:
        UserInputError: the folder is not a RUN with adapters of a transformers model.
    """
    program, _ = load_run(source, lazy=True)
    if program.stage != ADAPTED or not (source / MODEL).is_dir():
        raise UserInputError(
            f"{source} is not a RUN of a transformers model with adapters", where=str(source)
        )
    say("export the unmerged and the float form")
    cached = add_kv_cache(program, source / MODEL)
    plain = DequantizeGroups()(fold_adapters(cached)).program
    made: list[Form] = []
    for name, form, target in ((UNMERGED, cached, "ort-stock"), (FLOAT, plain, "ort")):
        path = scratch / f"{len(made)}" / "model.onnx"
        export_model(form, path, ExportSpec(target=target, allow_unfolded=True))
        made.append(Form(name, path, library=False))
    return made


def _measure(forms: list[Form], spec: BenchSpec) -> list[Result]:
    """Alternate the forms, round by round; the first round warms up."""
    models = {
        form: LanguageModel(open_session(form.path, library=form.library, threads=spec.threads))
        for form in forms
    }
    if not all(model.cached for model in models.values()):
        raise UnsupportedError(
            "the model has no key-value cache", hint="export it without --no-kv-cache"
        )
    prompts: dict[Form, dict[int, list[float]]] = {f: {} for f in forms}
    decode: dict[Form, list[float]] = {f: [] for f in forms}
    for number in range(spec.rounds + 1):
        announce("rounds", number, spec.rounds + 1)
        for form, model in models.items():
            for length in spec.prompts:
                seconds, after = time_tokens(model, length, spec.decode)
                if number:
                    prompts[form].setdefault(length, []).append(seconds)
                    decode[form].append(after)
    announce("rounds", spec.rounds + 1, spec.rounds + 1)
    results = []
    for form in forms:
        times = {n: statistics.median(t) for n, t in prompts[form].items()}
        results.append(
            Result(
                form=form.name,
                prompts={n: n / seconds for n, seconds in times.items()},
                first_token=times[max(times)],
                decode=1 / statistics.median(decode[form]),
                memory=footprint(form.path, prompt=max(times), library=form.library),
                size=form.size(),
            )
        )
    return results
