"""Convert an exported model to ONNX Runtime's own format, which its reduced builds read.

ONNX Runtime itself writes the file: it inlines functions, folds constants and fuses, and saves the
graph that it would run. The configurations next to it name the operators that are left (and the
types of their inputs), for `build.sh --include_ops_by_config`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from qalora_compile.config import ExportSpec
from qalora_compile.errors import UnsupportedError
from qalora_compile.exporters.onnx.one_file import ONE_FILE_LIMIT_BYTES, fits_in_one_file
from qalora_compile.ir.meta import QDQ_ACCURACY_KEY
from qalora_compile.ir.program import Program
from qalora_compile.optional import quiet_logger, require

CONFIGS = {"required_operators": False, "required_operators_and_types": True}
"""The name of a configuration, and whether it has types: as ONNX Runtime's converter names them."""
_NOT_PORTABLE = ["NchwcTransformer"]
"""It makes a file for x86 alone; ONNX Runtime's converter leaves it out too, but for `amd64`."""
_LOGGER = "ort_format_model.utils"
_SETTINGS = {
    "session.save_model_format": "ORT",
    "session.disable_prepacking": "1",
    QDQ_ACCURACY_KEY: "0",
}


def check_ort_format(program: Program, spec: ExportSpec) -> None:
    """Refuse what has no `.ort` file before it is translated.

    Raises:
        UnsupportedError: the weights exceed 1.9 GB, or the installed ONNX Runtime is of another
            release than the one that has to run the model.
    """
    runtime = require("onnxruntime", extra="onnx", purpose="write a .ort file")
    size = sum(t.numel() * t.element_size() for t in program.tensors().values())
    if not fits_in_one_file(size):
        raise UnsupportedError(
            f"the weights take {size / 1e9:.1f} GB, and a .ort file holds "
            f"{ONE_FILE_LIMIT_BYTES / 1e9:.1f}",
            hint="export with format onnx, whose weights may be in a second file",
        )
    release, installed = spec.release, ".".join(str(runtime.__version__).split(".")[:2])
    if release is not None and release.version != installed:
        raise UnsupportedError(
            f"ONNX Runtime {installed} writes .ort files for itself, not for {release.version}: "
            "it stores operators in the form that it runs",
            hint=f"install onnxruntime=={release.version}.* to write the file, or use format onnx",
        )


def convert_to_ort(model: Path, path: Path) -> None:
    """Write an `.onnx` file as `path`, and the configurations of a reduced build next to it.

    The file holds stock operators alone, also on machines with the operator library, and runs on
    x86 and Arm.

    Args:
        model: The `.onnx` file, which is left as it is.
        path: The `.ort` file.

    Raises:
        UnsupportedError: ONNX Runtime cannot load or save the model.
    """
    runtime = require("onnxruntime", extra="onnx", purpose="write a .ort file")
    tools = require("onnxruntime.tools.ort_format_model", extra="onnx", purpose="read a .ort file")
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    for key, value in _SETTINGS.items():
        options.add_session_config_entry(key, value)
    try:
        _session(runtime, model, options)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise UnsupportedError(
            f"ONNX Runtime cannot convert the model: {str(error).splitlines()[0]}",
            hint="export with format onnx",
        ) from error
    for name, with_types in CONFIGS.items():
        config = path.with_suffix(f".{name}.config")
        with quiet_logger(_LOGGER), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # it leaves the file to the collector
            tools.create_config_from_models([path], config, with_types)
        text = config.read_text("utf-8").replace(str(path), path.name)
        config.write_text(text, "utf-8")


def _session(runtime: Any, model: Path, options: Any) -> None:
    runtime.InferenceSession(
        str(model),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=_NOT_PORTABLE,
    )
