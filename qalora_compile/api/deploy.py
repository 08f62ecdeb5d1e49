"""`export_folder`: write a FOLDED folder as an edge folder, or as another library's checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qalora_compile.api.edge import EdgeParts, write_edge
from qalora_compile.api.edge_choices import EdgeChoices, chosen_for
from qalora_compile.api.edge_graphs import (
    edge_graphs,
    graph_file,
    is_decoder,
    lowered,
    written_file,
)
from qalora_compile.api.export import export_model
from qalora_compile.api.pooling import chosen_pooling
from qalora_compile.api.run_folder import MODEL, TOKENIZER, load_run
from qalora_compile.config import AUTO, EMBEDDINGS, FLOAT, ExportSpec, one_of, preset_of
from qalora_compile.errors import UserInputError
from qalora_compile.exporters.capability import ExportReport
from qalora_compile.exporters.checkpoints.registry import Format
from qalora_compile.exporters.record import write_record
from qalora_compile.exporters.targets import LoweredTarget, get_target
from qalora_compile.files import atomic_folder, reserve
from qalora_compile.ir.program import Program
from qalora_compile.progress import say
from qalora_compile.runtime.library import library_path
from qalora_compile.untrusted.artifacts import GGUF_FILE

_TRANSLATE = {
    "openvino": "convert to OpenVINO IR",
    "torch": "export with torch",
    "coreml": "convert with coremltools",
}
_FOR_ONNX = ("no_kv_cache", "last_logits", "merged_decoder", "with_library", "preset", "embeddings")


@dataclass(frozen=True, kw_only=True)
class EdgeSpec:
    """The edge folder to write.

    Attributes:
        out: The folder to write.
        target: How the model is exported.
        no_kv_cache: Write a language model without its key-value cache.
        last_logits: Output the logits of the last token only, or of all; None: of the last one if
            the model is a decoder that can leave out the others.
        merged_decoder: Write an encoder-decoder model as transformers.js and optimum take it: the
            decoder computes the keys and values of cross-attention in its first step. The preset
            web does so too.
        preset: The preset that `target` was made from (`ExportSpec.from_preset`), which decides on
            embeddings too; None is the default.
        embeddings: How embeddings and heads that are in float are written, one of
            `config.EMBEDDINGS`; None takes the preset's. `"auto"` leaves them as they are in models
            other than decoders with a key-value cache.
        with_library: The operator library to copy into the folder: a file, "" for this machine's,
            or None for none.
        pooling, normalize: How the graph pools an encoder's tokens to one vector; None: not at all.
        overwrite: Replace an existing folder.
    """

    out: Path
    target: ExportSpec = field(default_factory=partial(ExportSpec.from_preset, None))
    no_kv_cache: bool = False
    last_logits: bool | None = None
    merged_decoder: bool = False
    preset: str | None = None
    embeddings: int | str | None = None
    with_library: str | None = None
    pooling: str | None = None
    normalize: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.last_logits and self.no_kv_cache:
            raise UserInputError(
                "--last-logits is given with --no-kv-cache",
                hint="leave out one of them: without a cache, all logits are outputs",
            )
        if self.merged_decoder and self.no_kv_cache:
            raise UserInputError(
                "--merged-decoder is given with --no-kv-cache",
                hint="leave out one of them: without a cache, the model is one graph",
            )

    @property
    def merged(self) -> bool | None:
        """`merged` of `edge_graphs`: required, where there is an encoder, or no."""
        return True if self.merged_decoder else None if self.preset == "web" else False

    def choose(
        self, program: Program, description: Path
    ) -> tuple[Program, ExportSpec, EdgeChoices]:
        """`chosen_for` by preset and options, for a model with this description.

        Raises:
            UserInputError: see `choose_embeddings`; or an option has no such value.
        """
        wanted = preset_of(self.preset).embeddings if self.embeddings is None else self.embeddings
        one_of("embeddings", wanted, EMBEDDINGS)
        release = self.target.release if self.target.target == "onnx" else None
        without = release is not None and not release.tables
        if wanted == AUTO and (self.no_kv_cache or without or not is_decoder(description)):
            wanted = FLOAT
        required = self.embeddings is not None
        return chosen_for(program, self.target, self.preset, wanted, required=required)

    def library(self) -> Path | None:
        """The operator library to copy into the folder.

        Raises:
            UserInputError: the file is missing, or the target does not use it.
            UnsupportedError: this machine's library was not built.
        """
        if self.with_library is None:
            return None
        if self.target.format == "ort":
            raise UserInputError(
                "--with-library has no effect with format ort, whose file holds stock operators",
                hint="use --format onnx, or leave the library out",
            )
        if self.target.target != "ort":
            raise UserInputError(
                f"--with-library has no effect with target {self.target.target}",
                hint="use --target ort",
            )
        path = Path(self.with_library) if self.with_library else library_path()
        if not path.is_file():
            raise UserInputError(f"there is no library {path}", where=str(path))
        return path


@dataclass(frozen=True, kw_only=True)
class DeploySpec(EdgeSpec):
    """An export.

    Attributes:
        folder: FOLDED, or RUN if the target allows unfolded adapters.
    """

    folder: Path


@dataclass(frozen=True, kw_only=True)
class EdgeResult:
    """The result of `export_folder`.

    Attributes:
        report: The exporter's report.
        parts: What the folder was made from; None for a checkpoint.
        written: Names of the files next to the model.
    """

    report: ExportReport
    parts: EdgeParts | None = None
    written: tuple[str, ...] = ()


def export_folder(spec: DeploySpec) -> EdgeResult:
    """Write a FOLDED folder as an edge folder, or as a checkpoint of another library.

    Raises:
        UserInputError: options conflict, a file is missing, or the output exists.
        PreconditionError: see `export.lower`.
        UnsupportedError: an operator, dtype or property has no form in the target.
        OutputError: the folder cannot be written.
    """
    inputs = [spec.folder, spec.with_library or None]
    with reserve(spec.out, overwrite=spec.overwrite, inputs=inputs):
        return _edge(spec) if spec.target.is_graph else _other(spec)


def _edge(spec: DeploySpec) -> EdgeResult:
    source, library = spec.folder, spec.library()
    _check_target(spec)
    program, record = load_run(source, lazy=True)
    pooling = chosen_pooling(spec.pooling, spec.normalize, source / MODEL)
    program = pooling.apply(program)
    program, target, choices = spec.choose(program, source / MODEL)
    file = graph_file(target)
    graphs = {file: program}
    if not spec.no_kv_cache and (source / MODEL).is_dir():
        say("capture for a device")
        graphs = edge_graphs(
            program,
            source / MODEL,
            last_logits=spec.last_logits,
            merged=spec.merged,
            file=file,
            stateful=target.stateful,
        )
    graphs, target = lowered(graphs, target)
    say(_TRANSLATE.get(target.target, "translate to ONNX"))
    parts = EdgeParts(
        description=source / MODEL,
        tokenizer=source / TOKENIZER,
        record=record,
        graphs=graphs,
        spec=target,
        library=library,
        weights=source,
        pooling=pooling,
        choices=choices,
    )
    report, written = write_edge(spec.out, parts, overwrite=spec.overwrite)
    return EdgeResult(report=report, parts=parts, written=tuple(written))


def _check_target(spec: DeploySpec) -> None:
    """Refuse what the target cannot write before any work.

    Raises:
        UnsupportedError: the library that the target needs is not installed.
    """
    target = get_target(spec.target.target)
    assert isinstance(target, LoweredTarget), "graph targets are lowered"
    file = written_file(graph_file(spec.target), spec.target)
    target.check_path(spec.out / file, spec.target)


def _other(spec: DeploySpec) -> EdgeResult:
    """Write another library's checkpoint, or the target of an extension.

    Raises:
        UserInputError: an option of ONNX models is given.
    """
    target = dataclasses.replace(spec.target, overwrite=spec.overwrite)
    if spec.pooling or spec.normalize:
        raise UserInputError(
            f"--pooling has no effect with target {target.target}",
            hint="leave it out: it is for ONNX models",
        )
    for option in _FOR_ONNX:
        if getattr(spec, option) not in (None, False):
            raise UserInputError(
                f"--{option.replace('_', '-')} has no effect with target {target.target}",
                hint="it is for ONNX models",
            )
    source, out, kind = spec.folder, spec.out, get_target(target.target)
    described = source / MODEL if (source / MODEL).is_dir() else None
    tokenizer = source / TOKENIZER if described and (source / TOKENIZER).is_dir() else None
    about: dict[str, Any] = {}
    if target.is_checkpoint:
        about = {"model": described, "tokenizer": tokenizer}
    program, _ = load_run(source, lazy=True)

    def write(path: Path) -> ExportReport:
        return export_model(program, path, target, **about)

    if not (isinstance(kind, Format) and kind.suffix):
        report = write(out)
    else:
        with atomic_folder(out, overwrite=spec.overwrite) as folder:
            report = write(folder / GGUF_FILE)
            write_record(folder, report, target)
        report = dataclasses.replace(report, path=out / GGUF_FILE)
    return EdgeResult(report=report)
