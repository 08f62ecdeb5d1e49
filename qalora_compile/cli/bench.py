"""`bench`: speed and memory of an exported language model, beside its unmerged and float forms."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from qalora_compile.api import add_kv_cache, export_model, fold_adapters
from qalora_compile.cli.edge import MODEL_FILE, read_edge_record
from qalora_compile.cli.folders import MODEL, load_run
from qalora_compile.cli.ui import Steps, megabytes, print_json, print_table, steps
from qalora_compile.config import ExportSpec
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.stages import ADAPTED
from qalora_compile.passes.dequantize_groups import DequantizeGroups
from qalora_compile.runtime.footprint import footprint, time_tokens
from qalora_compile.runtime.language_model import LanguageModel
from qalora_compile.runtime.library import kernel_level
from qalora_compile.runtime.session import open_session
from qalora_compile.untrusted.artifacts import ENCODER_FILE

NAME = "bench"
SUMMARY = "speed and memory of an exported language model, beside its unmerged and float forms"
EXAMPLES = """examples:
  qalora-compile bench edge                      merged: operator library and stock kernels
  qalora-compile bench edge --run run            and adapters unmerged, and float32
  qalora-compile bench edge --prompts 16 --decode 16 --rounds 3

all forms are alternated in one process; memory is that of a process of its own for each
"""
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
        data = self.path.with_name(f"{self.path.name}.data")
        return sum(f.stat().st_size for f in (self.path, data) if f.is_file())


@dataclass(frozen=True)
class Result:
    """What was measured of a form: medians; tokens a second, seconds, bytes."""

    form: str
    prompts: dict[int, float]
    first_token: float
    decode: float
    memory: int
    size: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", metavar="DIR", help="folder written by export")
    parser.add_argument(
        "--run", dest="trained", metavar="RUN", help="its RUN, for the unmerged and float forms"
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 128, 512], metavar="T")
    parser.add_argument("--decode", type=int, default=16, metavar="N", help="tokens after a prompt")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of ONNX Runtime")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    folder = Path(options.folder)
    if min(*options.prompts, options.decode, options.rounds) < 1:
        raise UserInputError("prompts, decode and rounds must be 1 or more")
    record = read_edge_record(folder)
    length = record.get("context_length")
    if length is not None and max(options.prompts) + options.decode > length:
        raise UserInputError(
            f"a prompt of {max(options.prompts)} and {options.decode} new tokens are more than the "
            f"{length} that the model was made for",
            hint="use --prompts and --decode",
        )
    with steps() as shown, _forms(folder, options.trained, shown) as forms:
        results = _measure(forms, options, shown)
    if options.json:
        print_json([asdict(result) for result in results])
    else:
        _show(results)
    return 0


@contextmanager
def _forms(folder: Path, run_folder: str | None, shown: Steps) -> Iterator[list[Form]]:
    """The forms of the model; those made from RUN live as long as the block."""
    path = folder / MODEL_FILE
    if (folder / ENCODER_FILE).is_file():
        raise UnsupportedError(
            "bench measures models of one graph, and this one has an encoder and a decoder",
            where=str(folder),
            hint="generate says how fast it is",
        )
    forms = [Form(STOCK, path, library=False)]
    if kernel_level() is not None:
        forms.insert(0, Form(LIBRARY, path, library=True))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".bench.") as scratch:
        if run_folder is not None:
            forms += _export_forms(Path(run_folder), Path(scratch), shown)
        yield forms


def _export_forms(source: Path, scratch: Path, shown: Steps) -> list[Form]:
    """The unmerged form, and the folded weights in float32.

    Raises:
        UserInputError: the folder is no RUN with adapters of a transformers model.
    """
    program, _ = load_run(source, lazy=True)
    if program.stage != ADAPTED or not (source / MODEL).is_dir():
        raise UserInputError(
            f"{source} is no RUN of a transformers model with adapters", where=str(source)
        )
    shown.say("export the unmerged and the float form")
    cached = add_kv_cache(program, source / MODEL)
    plain = DequantizeGroups()(fold_adapters(cached)).program
    made: list[Form] = []
    for name, form, target in ((UNMERGED, cached, "ort-stock"), (FLOAT, plain, "ort")):
        path = scratch / f"{len(made)}" / "model.onnx"
        export_model(form, path, ExportSpec(target=target, allow_unfolded=True))
        made.append(Form(name, path, library=False))
    return made


def _measure(forms: list[Form], options: argparse.Namespace, shown: Steps) -> list[Result]:
    """Alternate the forms, round by round; the first round warms up."""
    models = {
        form: LanguageModel(open_session(form.path, library=form.library, threads=options.threads))
        for form in forms
    }
    if not all(model.cached for model in models.values()):
        raise UnsupportedError(
            "the model has no key-value cache", hint="export it without --no-kv-cache"
        )
    prompts: dict[Form, dict[int, list[float]]] = {f: {} for f in forms}
    decode: dict[Form, list[float]] = {f: [] for f in forms}
    for number in range(options.rounds + 1):
        shown.update("rounds", number, options.rounds + 1)
        for form, model in models.items():
            for length in options.prompts:
                seconds, after = time_tokens(model, length, options.decode)
                if number:
                    prompts[form].setdefault(length, []).append(seconds)
                    decode[form].append(after)
    shown.update("rounds", options.rounds + 1, options.rounds + 1)
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


def _show(results: list[Result]) -> None:
    """One table; ratios to the last form, which is the float one where there is a RUN."""
    lengths = sorted(results[0].prompts)
    columns = (
        "form",
        *(f"prompt {n}" for n in lengths),
        "after it",
        "ratio",
        f"first of {lengths[-1]}",
        "memory",
        "file",
    )
    last = results[-1].decode
    print_table(
        "bench: tokens a second of a prompt and after it, and the time to the first token",
        columns,
        [
            (
                result.form,
                *(f"{result.prompts[n]:.0f}" for n in lengths),
                f"{result.decode:.1f}",
                f"{result.decode / last:.2f}×",
                f"{result.first_token:.3f} s",
                megabytes(result.memory),
                megabytes(result.size),
            )
            for result in results
        ],
    )
