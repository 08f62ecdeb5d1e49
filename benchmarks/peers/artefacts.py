"""The files that the variants run, written once under the cache folder."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import qalora_compile as qc
from benchmarks.peers.engines.llama import FILE_TYPES, Library
from benchmarks.peers.engines.openvino import MODEL as OPENVINO_MODEL
from benchmarks.peers.environments import UnavailableError, llama_folder, openvino_python
from benchmarks.peers.variants import EDGES, Edge
from qalora_compile.api.codes import CodesSpec
from qalora_compile.api.quantize import QuantizeSpec, quantize_folder
from qalora_compile.capture.lazy_folder import capture_checkpoint
from qalora_compile.capture.load_source import load_source
from qalora_compile.files import atomic_files, atomic_folder
from qalora_compile.untrusted.artifacts import model_file as onnx_file
from qalora_compile.untrusted.artifacts import onnx_parts

ROOT = Path(__file__).parents[2]
CODES = qc.QuantSpec(bits=4, group_size=32)
"""How every edge folder and the Q4_1 file are quantized: a block of Q4_1."""


def artefact(name: str, source: Path, folder: Path, environments: Path) -> Path:
    """The file or folder that an engine loads, written if it is missing.

    Args:
        name: A key of `variants.EDGES`, a GGUF type, `"openvino"` or `"float"`.
        source: Hugging Face folder.
        folder: Where the model's files are kept.
        environments: Where runtimes are kept.

    Raises:
        UnavailableError: a tool that makes it is not to be had.
    """
    if name in EDGES:
        return _edge(EDGES[name], source, folder / name)
    if name == "q4_1":
        return _q4_1(source, folder / "q4_1.gguf")
    if name in FILE_TYPES:
        return _requantized(name, _q4_1(source, folder / "q4_1.gguf"), environments)
    if name == "openvino":
        made = artefact("q4_0", source, folder, environments)
        return _openvino(made, folder / name, environments)
    return _float(source, folder / name)


def model_file(name: str, place: Path) -> Path:
    """What the engine of ONNX Runtime opens: a file in the folder; others take the place."""
    return onnx_file(place) if place.is_dir() and name != "openvino" else place


def stored_bytes(place: Path) -> int:
    """Bytes of the model alone, without tokenizer and configuration."""
    if place.is_file():
        beside = place.with_suffix(".bin")
        return place.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)
    return sum(path.stat().st_size for path in onnx_parts(onnx_file(place)))


def _edge(edge: Edge, source: Path, target: Path) -> Path:
    """An edge folder of `quantize`."""
    if not target.is_dir():
        quantize_folder(
            QuantizeSpec(
                model=str(source),
                out=target,
                target=qc.ExportSpec.from_preset(edge.preset, **edge.export),
                preset=edge.preset,
                codes=CodesSpec(bits=CODES.bits, group_size=CODES.group_size),
                with_library="" if edge.library else None,
            )
        )
    return target


def _float(source: Path, target: Path) -> Path:
    """The model in float32, with its cache."""
    if not target.is_dir():
        with atomic_folder(target) as part:
            spec = qc.ExportSpec(allow_unfolded=True, fusion="standard", opset=23)
            qc.export_model(capture_checkpoint(source), part / "model.onnx", spec)
    return target


def _q4_1(source: Path, target: Path) -> Path:
    """The GGUF file of this package's exporter, its table in Q8_0 as llama.cpp has it."""
    if not target.is_file():
        program = qc.quantize_groups(load_source(str(source)).capture(), CODES)
        spec = qc.ExportSpec(target="gguf", float_type="q8_0")
        qc.export_model(program, target, spec, model=source, tokenizer=source)
    return target


def _requantized(name: str, source: Path, environments: Path) -> Path:
    """The same in another type, by llama.cpp's own quantizer."""
    target = source.with_name(f"{name}.gguf")
    if not target.is_file():
        with atomic_files(target) as part:
            Library(llama_folder(environments)).quantize(source, part, name)
    return target


def _openvino(source: Path, target: Path, environments: Path) -> Path:
    """The model that OpenVINO GenAI makes of a GGUF file.

    Raises:
        UnavailableError: it refuses the file.
    """
    if not target.is_dir():
        python = openvino_python(environments)
        with atomic_folder(target) as part:
            copy = part / source.name
            shutil.copyfile(source, copy)
            command = [str(python), "-m", "benchmarks.peers.engines.openvino", str(copy)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            copy.unlink()
            if done.returncode or not (part / OPENVINO_MODEL).is_file():
                raise UnavailableError(f"OpenVINO refuses the file: {done.stderr.strip()[-300:]}")
    return target / OPENVINO_MODEL
