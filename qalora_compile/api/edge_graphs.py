"""The graphs of an edge folder: which there are, and under which names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from torch import fx

from qalora_compile.api.export import complete_spec, lower
from qalora_compile.api.forms import add_kv_cache, split_encoder_decoder
from qalora_compile.capture.skeleton import generates, has_encoder
from qalora_compile.config import ExportSpec
from qalora_compile.errors import UnsupportedError
from qalora_compile.exporters.onnx.write import SUFFIXES
from qalora_compile.ir.meta import shape_of
from qalora_compile.ir.ops.views import output_value
from qalora_compile.ir.program import Program
from qalora_compile.untrusted.artifacts import (
    CONFIG_FILE,
    COREML_FILE,
    DECODER_FILE,
    ENCODER_FILE,
    MERGED_FILE,
    MODEL_FILE,
    OPENVINO_DECODER_FILE,
    OPENVINO_ENCODER_FILE,
    OPENVINO_FILE,
    TORCH_FILE,
)


def is_decoder(description: Path) -> bool:
    """Whether the model in a folder, which may be missing, generates text with a decoder alone."""
    described = (description / CONFIG_FILE).is_file()
    return described and generates(description) and not has_encoder(description)


def outputs_last_logits(program: Program) -> bool:
    """Whether a graph with a key-value cache outputs the logits of one position only."""
    node = output_value(program.graph)[program.signature.outputs.index("logits")]
    shape = shape_of(node) if isinstance(node, fx.Node) else None
    return shape is not None and shape[1] == 1


def graph_file(spec: ExportSpec) -> str:
    """Name of the file of a model with a single graph, as its clients look for it."""
    others = {"openvino": OPENVINO_FILE, "torch": TORCH_FILE, "coreml": COREML_FILE}
    return others.get(spec.target, MODEL_FILE)


def written_file(file: str, spec: ExportSpec) -> str:
    """The name under which the graph `file` is written, in the format of `spec`."""
    return str(PurePosixPath(file).with_suffix(SUFFIXES["ort"])) if spec.format == "ort" else file


def check_merged(merged: bool | None, description: Path) -> None:
    """Refuse `merged` of `edge_graphs` where it is required and has no effect.

    Raises:
        UnsupportedError: the model has no encoder and decoder.
    """
    if merged and not (generates(description) and has_encoder(description)):
        raise UnsupportedError(
            "--merged-decoder is for models with an encoder and a decoder, and this is another one",
            hint="export or quantize it without --merged-decoder",
        )


def edge_graphs(
    program: Program,
    description: Path,
    *,
    last_logits: bool | None = None,
    merged: bool | None = False,
    file: str = MODEL_FILE,
    stateful: bool = False,
) -> dict[str, Program]:
    """File name → graph that a device runs, for a model trained as a single forward pass.

    Args:
        program: The program captured on complete sequences.
        description: Folder with the `config.json` of the transformers model.
        last_logits: As for `add_kv_cache`.
        merged: As for `split_encoder_decoder`; None: for a model with an encoder. It has no effect
            on the files of OpenVINO.
        file: Name of the file of a single graph, see `graph_file`.
        stateful: The files of OpenVINO hold caches as state.

    Raises:
        UnsupportedError: `last_logits` is set for an encoder-decoder model, or its target has no
            form of two graphs; `merged` is set for another model; or see `add_kv_cache` and
            `split_encoder_decoder`.
    """
    check_merged(merged, description)
    if not generates(description):
        if last_logits:
            raise UnsupportedError(
                "the model does not generate text token by token",
                hint="export or quantize it without --last-logits",
            )
        return {file: program}
    if not has_encoder(description):
        return {file: add_kv_cache(program, description, last_logits=last_logits)}
    if file not in (MODEL_FILE, OPENVINO_FILE):
        raise UnsupportedError(
            f"encoder-decoder models have no form in a target that writes {file}",
            hint="targets ort and openvino hold them",
        )
    if last_logits:
        raise UnsupportedError(
            "the decoder of an encoder-decoder model outputs the logits of all its tokens",
            hint="export without --last-logits: its prompt is only a few tokens",
        )
    names = ENCODER_FILE, DECODER_FILE if merged is False else MERGED_FILE
    if file == OPENVINO_FILE:
        names = OPENVINO_ENCODER_FILE, OPENVINO_DECODER_FILE
    state = file == OPENVINO_FILE and stateful
    pair = split_encoder_decoder(program, description, merged=names[1] == MERGED_FILE, state=state)
    return dict(zip(names, pair, strict=True))


def lowered(
    graphs: Mapping[str, Program], spec: ExportSpec
) -> tuple[dict[str, Program], ExportSpec]:
    """The graphs as exported, and `spec` with its open fields decided for them."""
    spec = complete_spec(list(graphs.values())[-1], spec)
    return {file: lower(program, spec) for file, program in graphs.items()}, spec
