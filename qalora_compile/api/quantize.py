"""`quantize_folder`: quantize a model of any size into an edge folder, without training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qalora_compile.api.calibration import calls_from_files, work_folder
from qalora_compile.api.codes import CodesSpec, stored_codes
from qalora_compile.api.deploy import EdgeResult, EdgeSpec
from qalora_compile.api.edge import EdgeParts, write_edge
from qalora_compile.api.edge_graphs import check_merged, edge_graphs, lowered
from qalora_compile.api.finetune_spec import ReadingSpec
from qalora_compile.api.model_card import base_facts
from qalora_compile.api.pooling import chosen_pooling
from qalora_compile.api.steps import quantize_groups
from qalora_compile.capture.causal_lm import capture_causal_lm
from qalora_compile.capture.checkpoints.open_folder import is_quantized
from qalora_compile.capture.lazy_folder import capture_checkpoint
from qalora_compile.capture.load_source import load_source
from qalora_compile.capture.sentence import encoder_folder
from qalora_compile.capture.skeleton import generates
from qalora_compile.errors import UserInputError
from qalora_compile.files import reserve
from qalora_compile.ir.checkpoint_codes import CheckpointCodes
from qalora_compile.ir.finite import check_program
from qalora_compile.ir.program import Program
from qalora_compile.progress import say
from qalora_compile.quantizers.report import QuantReport, collecting_reports
from qalora_compile.untrusted.artifacts import MODEL_FILE


@dataclass(frozen=True, kw_only=True)
class QuantizeSpec(EdgeSpec):
    """A quantization without adapters.

    Attributes:
        model: Hugging Face folder with safetensors files.
        codes: How its weights are quantized.
        calibration: Files of calibration data, for which the complete model is held in memory;
            None uses none.
        calibration_samples: Number of calibration examples.
        seq_len: Length of the longest calibration example, in tokens.
    """

    model: str
    codes: CodesSpec = field(default_factory=CodesSpec)
    calibration: tuple[str, ...] | None = None
    calibration_samples: int = 128
    seq_len: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codes.needs_calibration and self.calibration is None:
            raise UserInputError(
                f"the method {self.codes.method} needs calibration data",
                hint="give texts of the kinds that the model is for: quantize --calibration FILE; "
                "or use --method hqq",
            )
        if not self.target.is_onnx:
            raise UserInputError(
                f"quantize writes ONNX models, not target {self.target.target}",
                hint="finetune --steps 0, fold, then export with that target",
            )


@dataclass(frozen=True, kw_only=True)
class QuantizeResult(EdgeResult):
    """The result of `quantize_folder`.

    Attributes:
        reports: The quantization error of each layer.
        generates: Whether the model generates text.
    """

    reports: tuple[QuantReport, ...]
    generates: bool


def quantize_folder(spec: QuantizeSpec) -> QuantizeResult:
    """Read, quantize and write a model layer by layer; memory does not grow with the model.

    With calibration data, the model runs on them, so it is held in memory in float32.

    Raises:
        UserInputError: the folder cannot be read, options conflict, or the output exists.
        UnsupportedError: an operator, dtype or property has no form in the target.
        OutputError: the folder cannot be written.
    """
    inputs = [spec.model, spec.with_library or None, *(spec.calibration or ())]
    with reserve(spec.out, overwrite=spec.overwrite, inputs=inputs):
        return _quantize(spec)


def _quantize(spec: QuantizeSpec) -> QuantizeResult:
    quant, embeddings, library = spec.codes.quant(), spec.codes.embedding_quant, spec.library()
    folder = Path(spec.model)
    _check_folder(folder)
    pooling, source = chosen_pooling(spec.pooling, spec.normalize, folder), encoder_folder(folder)
    check_merged(spec.merged, source)
    say("capture")
    with collecting_reports() as reports:
        program, stored, calls = _captured(spec, source)
        for note in program.notes:
            say(f"note: {note}")
        program = quantize_groups(
            pooling.apply(program),
            quant,
            targets=spec.codes.layers,
            exclude=spec.codes.exclude,
            embeddings=embeddings,
            calibration=calls,
            stored=stored,
            checkpoints=work_folder(spec.out),
        )
        program, target, choices = spec.choose(program, source)
        graphs = {MODEL_FILE: program}
        if not program.signature.cache and not spec.no_kv_cache:
            graphs = edge_graphs(program, source, last_logits=spec.last_logits, merged=spec.merged)
        graphs, target = lowered(graphs, target)
        say("translate to ONNX, then read, quantize and write the weights")
        record = {"model": spec.model, "quant": quant.to_json(), "base": base_facts(spec.model)}
        record |= spec.codes.embedding_record()
        parts = EdgeParts(
            description=source,
            tokenizer=source,
            record=record,
            graphs=graphs,
            spec=target,
            library=library,
            weights=source,
            pooling=pooling,
            choices=choices,
        )
        report, written = write_edge(spec.out, parts, overwrite=spec.overwrite)
    return QuantizeResult(
        report=report,
        parts=parts,
        written=tuple(written),
        reports=tuple(reports),
        generates=generates(source),
    )


_Captured = tuple[Program, CheckpointCodes | None, list[dict[str, Any]] | None]


def _captured(spec: QuantizeSpec, source: Path) -> _Captured:
    """The program, the codes to keep of a quantized checkpoint, and the calibration calls.

    The weights are lazy, except with calibration data, on which the model runs, and those of a
    quantized checkpoint: their rows identify the codes.

    Raises:
        UserInputError: the folder cannot be read; or options describe the codes of a checkpoint
            that is not quantized.
    """
    if spec.calibration is not None:
        return _captured_to_run(spec, source, spec.calibration)
    cache, last_logits = not spec.no_kv_cache, spec.last_logits
    if not is_quantized(source):
        if spec.codes.stored_zero_points is not None:
            raise UserInputError(
                "--stored-zero-points is for quantized checkpoints, and this one is not quantized",
                where=str(source),
                hint="leave it out",
            )
        return capture_checkpoint(source, last_logits=last_logits, cache=cache), None, None
    loaded = load_source(str(source), zero_points=spec.codes.stored_zero_points)
    say("note: the checkpoint is quantized already: its weights are in memory, in float32")
    codes = stored_codes(spec.codes, loaded)
    if loaded.decoder_start is not None or not cache or not generates(source):
        return loaded.capture(), codes, None
    return capture_causal_lm(loaded.model, last_logits=last_logits), codes, None


def _captured_to_run(
    spec: QuantizeSpec, source: Path, files: tuple[str, ...]
) -> tuple[Program, CheckpointCodes | None, list[dict[str, Any]]]:
    """The program of a model in memory, without a cache, and calibration calls."""
    loaded = load_source(str(source), zero_points=spec.codes.stored_zero_points)
    program = loaded.capture()
    check_program(program)
    say("note: the model runs on calibration data: its weights are in memory, in float32")
    reading = ReadingSpec(data=files, seq_len=spec.seq_len)
    calls = calls_from_files(program, files, spec.calibration_samples, loaded, reading)
    return program, stored_codes(spec.codes, loaded), calls


def _check_folder(source: Path) -> None:
    """Require that the model is a folder.

    Raises:
        UserInputError: it is not.
    """
    if not source.is_dir():
        raise UserInputError(
            f"there is no folder {source}",
            where=str(source),
            hint="quantize takes a Hugging Face folder; finetune also takes .gguf files",
        )
