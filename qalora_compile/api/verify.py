"""Comparison of RUN, FOLDED and export folders, `.onnx` and `.gguf` files, given by path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qalora_compile.api.edge import read_edge_record
from qalora_compile.api.edge_choices import with_recorded_embeddings
from qalora_compile.api.forms import add_kv_cache, split_encoder_decoder
from qalora_compile.api.pooling import recorded_pooling
from qalora_compile.api.run_folder import MODEL
from qalora_compile.api.settings import today
from qalora_compile.capture.load_source import load_source
from qalora_compile.errors import UserInputError
from qalora_compile.files import check_output
from qalora_compile.ir.meta import PAST
from qalora_compile.ir.onnx_metadata import read_onnx_metadata
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Call, Signature
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.passes.canonicalize.canonical_passes import canonical_passes
from qalora_compile.passes.framework.pipeline import Pipeline
from qalora_compile.progress import say
from qalora_compile.runtime.library import kernel_level, library_path
from qalora_compile.untrusted.artifacts import (
    CONFIG_FILE,
    GGUF_FILE,
    MERGED_FILE,
    ORT_MERGED_FILE,
    PROGRAM_FILE,
    encoder_decoder_files,
    ort_files,
)
from qalora_compile.verify.compare import Report, Tolerance
from qalora_compile.verify.debug.report_page import Outcome, verify_page
from qalora_compile.verify.equivalence import verify_equivalence
from qalora_compile.verify.inputs import sample_inputs
from qalora_compile.verify.numeric.compare_nodes import compare_nodes, named_inputs
from qalora_compile.verify.numeric.decoding_calls import sequence_calls
from qalora_compile.verify.numeric.report import NumericReport
from qalora_compile.verify.proof.certificate import Certificate
from qalora_compile.verify.proof.foreign.prove_foreign import (
    is_foreign,
    keeps_cache,
    prove_foreign,
    read_foreign,
)
from qalora_compile.verify.proof.graphs.graph import FX, ONNX, OPENVINO, Graph
from qalora_compile.verify.proof.open_graph import open_graph, open_graphs
from qalora_compile.verify.proof.prove import prove_equivalence
from qalora_compile.verify.runners.onnx_session import uses_library
from qalora_compile.verify.runners.reference_libraries import put_library_weights_

_ENDS = ("disabled", "all")


@dataclass(frozen=True, kw_only=True)
class VerifySpec:
    """Two models to compare.

    Attributes:
        a: RUN, FOLDED or export folder, `.onnx` or `.gguf` file.
        b: Likewise; one of the two is RUN or FOLDED.
        inputs: Number of random inputs, or of samples of a proof.
        seed: Seed of the inputs or samples.
        library: Run exported models with the operator library only.
        levels: For `compare_along`: optimization levels of ONNX Runtime; None means the two ends,
            `disabled` and `all`.
        html: File for an HTML page of the result; None writes none.
    """

    a: str
    b: str
    inputs: int = 4
    seed: int = 0
    library: bool = False
    levels: tuple[str, ...] | None = None
    html: str | None = None

    def __post_init__(self) -> None:
        if self.inputs < 1:
            raise UserInputError(f"--inputs is {self.inputs}", hint="use 1 or more")
        if self.html:
            check_output(Path(self.html), overwrite=True, inputs=[self.a, self.b], is_file=True)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The outcome of `compare_on_inputs`.

    Attributes:
        reports: Whether the operator library was used → report; either may be missing.
    """

    reports: Mapping[bool, Report]

    @property
    def decisive(self) -> Report:
        """The first report that did not pass, or else the first."""
        failed = (report for report in self.reports.values() if not report.passed)
        return next(failed, self.reports[min(self.reports)])


class _Named:
    """The model at a path; each form of it is read once."""

    def __init__(self, text: str) -> None:
        self.text, self.path = text, Path(text)
        if not self.path.exists():
            raise UserInputError(f"there is no file or folder {text}", where=text)

    @cached_property
    def thing(self) -> Program | Path:
        """A program, or the path of an ONNX model; other checkpoints are read as programs."""
        if (self.path / PROGRAM_FILE).exists():
            return Program.load(self.path)
        weights = _checkpoint(self.path)
        return self.path if weights is None else _read_back(weights)

    @cached_property
    def graph(self) -> Graph:
        """The single graph at the path."""
        return open_graph(self.path)

    @property
    def is_cached_ort(self) -> bool:
        """Whether this is a `.ort` file of a language model with a key-value cache."""
        files = ort_files(self.path) if isinstance(self.thing, Path) else []
        read = [read_onnx_metadata(file).signature for file in files]
        return len(read) == 1 and bool(Signature.from_json(read[0]).cache)

    @property
    def exported(self) -> list[Graph]:
        """The graphs of an exported model; none for anything else, or in a `.ort` file."""
        if not isinstance(self.thing, Path) or ort_files(self.path):
            return []
        graphs = open_graphs(self.path)
        return [graph for graph in graphs if graph.dialect != FX]


def compare_on_inputs(spec: VerifySpec, tolerance: Tolerance) -> Compared:
    """Run both on random inputs; ONNX models with operators of the library on all kernels.

    Raises:
        UserInputError: a path cannot be read, or neither names a program.
    """
    a, b = _Named(spec.a), _Named(spec.b)
    sides = [_written_as(a.thing, b.thing), _written_as(b.thing, a.thing)]
    program = next((side for side in sides if isinstance(side, Program)), None)
    if program is None:
        raise UserInputError(
            "neither A nor B is a RUN or FOLDED folder, whose signature defines the inputs",
            hint="compare each exported model with its FOLDED folder",
        )
    calls: list[Call] = list(sample_inputs(program, spec.inputs, seed=spec.seed))
    exported = [a.exported, b.exported]
    if any(map(_keeps_cache, exported)) or a.is_cached_ort or b.is_cached_ort:
        calls += sequence_calls(program, seed=spec.seed)
    both = not spec.library and any(map(_has_own_operators, exported))
    reports = {
        used: verify_equivalence(
            sides[0], sides[1], calls, tolerance, library=library_path() if used else None
        )
        for used in ([False, True] if both else [spec.library])
    }
    found = Compared(reports=reports)
    _write_page(spec, found.decisive, sides[0], sides[1])
    return found


def prove(spec: VerifySpec) -> Certificate:
    """Prove equivalence: compare every coefficient, and the graph around the quantized layers.

    B may also be an ONNX file that another program made of the Hugging Face folder A.

    Raises:
        UserInputError: a path cannot be read, or is of an encoder-decoder model (`prove_all`).
    """
    a, b = _Named(spec.a), _Named(spec.b)
    if is_foreign(b.path):
        return _prove_foreign(spec, a, b)
    cached = _with_cache(a, b)
    certificate = _proof(spec, a.path, cached, b.path)
    if spec.html:
        _write_page(spec, certificate, cached or a.thing, b.thing)
    return certificate


def prove_all(spec: VerifySpec) -> dict[str, Certificate]:
    """As `prove`, graph by graph: `encoder` and `decoder`, or "" for the only one.

    Raises:
        UserInputError: a path cannot be read, or a page is asked for two graphs.
    """
    if _two_graphs(spec.a, spec.b) is None:
        return {"": prove(spec)}
    if spec.html:
        raise UserInputError(
            "an HTML page shows one graph, and an encoder-decoder model has two",
            where=spec.b,
            hint="run verify --prove without --html",
        )
    return {
        half: _proof(spec, Path(spec.a), program, candidate)
        for half, (program, candidate) in proof_pairs(spec.a, spec.b).items()
    }


def proof_pairs(a: str, b: str) -> dict[str, tuple[Program | None, Path]]:
    """The program and the file of each graph of B: `encoder` and `decoder`, or "" for one.

    The program is captured again where B has a cache, or two graphs. It is None where A can be
    compared as it is.

    Raises:
        UserInputError: a path cannot be read.
    """
    halves, folder = _two_graphs(a, b), Path(a)
    if halves is None:
        one, other = _Named(a), _Named(b)
        return {"": (_with_cache(one, other), other.path)}
    merged = halves[1].name in (Path(MERGED_FILE).name, Path(ORT_MERGED_FILE).name)
    both = split_encoder_decoder(Program.load(folder), folder / MODEL, merged=merged)
    parts = zip(("encoder", "decoder"), both, halves, strict=True)
    return {half: (program, file) for half, program, file in parts}


def _two_graphs(a: str, b: str) -> tuple[Path, Path] | None:
    """The files of encoder and decoder if B has both, and A describes the model."""
    return encoder_decoder_files(Path(b)) if (Path(a) / MODEL).is_dir() else None


def _proof(spec: VerifySpec, folder: Path, program: Program | None, candidate: Path) -> Certificate:
    return prove_equivalence(
        folder if program is None else program,
        candidate,
        samples=spec.inputs,
        seed=spec.seed,
        folder=None if program is None else folder,
    )


def _prove_foreign(spec: VerifySpec, a: _Named, b: _Named) -> Certificate:
    """Prove a model's folder and an ONNX file that another program made of it equal."""
    if not (a.path / CONFIG_FILE).is_file() or (a.path / PROGRAM_FILE).exists():
        raise UserInputError(
            f"{b.path.name} was not exported by this package, and {a.text} is no model's folder",
            where=spec.b,
            hint="give the Hugging Face folder that the file was made from as A",
        )
    graph = read_foreign(b.path)
    program = a.thing
    assert isinstance(program, Program), "a checkpoint is read as a program"
    if keeps_cache(graph):
        program = add_kv_cache(program, a.path)
    certificate = prove_foreign(program, graph, a.path)
    _write_page(spec, certificate, program, b.path)
    return certificate


def compare_along(spec: VerifySpec) -> NumericReport:
    """Compare value by value along the graph, relative to float64; see `compare_nodes`.

    Raises:
        UserInputError: a path cannot be read, or `spec.a` names no program.
    """
    a, b = _Named(spec.a), _Named(spec.b)
    reference = _with_cache(a, b) or a.thing
    if isinstance(reference, Path):
        raise UserInputError(
            "A is not a program, and only a program runs in float64",
            where=spec.a,
            hint="give RUN or FOLDED first, then the model to compare with it",
        )
    calls = named_inputs(reference, spec.inputs, seed=spec.seed)
    built = kernel_level() is not None
    library = library_path() if built or spec.library else None  # raises if it is missing
    levels = spec.levels or _ENDS
    report = compare_nodes(reference, b.path, calls, levels=levels, library=library)
    if spec.html:
        _write_page(spec, report, reference, b.thing)
    return report


def _write_page(spec: VerifySpec, outcome: Outcome, a: Program | Path, b: Program | Path) -> None:
    """Write the page if one is requested."""
    if not spec.html:
        return
    if not isinstance(a, Program):
        raise UserInputError(
            "a page needs a program as A", where=spec.a, hint="give RUN or FOLDED first"
        )
    settings = {"inputs": spec.inputs, "seed": spec.seed, "date": today()}
    if spec.levels:
        settings["optimization levels"] = ", ".join(spec.levels)
    page = verify_page(outcome, a, b, title=f"{spec.a} → {spec.b}", settings=settings)
    page.write(spec.html)


def _keeps_cache(graphs: list[Graph]) -> bool:
    """Whether these are the graphs of an exported language model with a key-value cache."""
    return len(graphs) == 1 and any(n.startswith(PAST) for n, _ in graphs[0].inputs.values())


def _has_own_operators(graphs: list[Graph]) -> bool:
    """Whether the graphs have operators of the library, and it can run here."""
    own = any(graph.dialect == ONNX and uses_library(graph.extra) for graph in graphs)
    return own and kernel_level() is not None


def _with_cache(folder: _Named, model: _Named) -> Program | None:
    """The program of `folder` with a key-value cache, if the exported `model` has one.

    It is captured again from the model description in the folder. An encoder is pooled as the
    record of the exported model says. None if the program in the folder can be compared directly.
    """
    sides = folder.graph, model.graph
    if sides[0].dialect != FX or sides[1].dialect == FX:
        return None
    stored = Program.load(folder.path)
    program = _written_as(stored, model.path)
    assert isinstance(program, Program), "a program stays one"
    has_cache = [any(name.startswith(PAST) for name, _ in s.inputs.values()) for s in sides]
    described = folder.path / MODEL
    if has_cache != [False, True] or not described.is_dir():
        return None if program is stored else program
    return add_kv_cache(program, described, last_logits=_outputs_last(sides[1]))


def _outputs_last(graph: Graph) -> bool:
    """Whether an exported model outputs the logits of the last position only."""
    if graph.dialect == OPENVINO:
        return bool(graph.extra.output("logits").get_partial_shape()[1].max_length == 1)
    logits = next(o for o in graph.extra.graph.output if o.name == "logits")
    return bool(logits.type.tensor_type.shape.dim[1].dim_value == 1)


def _written_as(side: Program | Path, other: Program | Path) -> Program | Path:
    """A program with what `export` adds to it for the exported model `other`.

    That is the sentence embedding of an encoder, and the codes of embeddings that the program has
    in float. The program itself if it adds nothing.
    """
    if not isinstance(side, Program) or isinstance(other, Program):
        return side
    record = read_edge_record(other if other.is_dir() else other.parent)
    pooling = recorded_pooling(record)
    pooled = pooling.apply(side) if pooling.in_graph else side
    written = with_recorded_embeddings(pooled, record)
    if written is not pooled:
        say(f"note: embeddings are compared on codes, as {other.name} has them")
    return written


def _checkpoint(path: Path) -> Path | None:
    """The GGUF file or folder of weights at a path; None if it is something else."""
    if path.suffix == ".gguf":
        return path
    if (path / GGUF_FILE).is_file():
        return path / GGUF_FILE
    return path if any(path.glob("*.safetensors")) else None


def _read_back(path: Path) -> Program:
    """Read a checkpoint as a program, by its format's own library; its plan lists every layer."""
    source = load_source(str(path))
    reader = "gguf" if path.is_file() else put_library_weights_(source.model, path)
    say(f"note: {path} is read back by {reader}")
    captured = source.capture()
    return Pipeline([*canonical_passes(), AnnotateLinears()])(captured).program
