"""One exported file in ONNX Runtime: its outputs and the values of its sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.ir.meta import QDQ_ACCURACY_KEY
from qalora_compile.ir.onnx_metadata import explain_metadata, read_onnx_metadata
from qalora_compile.ir.signature import Signature
from qalora_compile.optional import require
from qalora_compile.untrusted.artifacts import ORT_SUFFIX

LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
"""Optimization levels and ONNX Runtime's own names for them; `all` is its default."""

_WEIGHTS_KEY = "session.model_external_initializers_file_folder_path"
_MICROSOFT, _SPELLED = "com.microsoft", "qalora.spelled_out"
_LIBRARY_DOMAIN = "qalora"
_DROPOUT_INPUTS = 3
_DROPOUT = f"""
<domain: "{_SPELLED}", opset_import: ["" : 18]>
Dropout (data, ratio, training_mode) => (output, mask) {{
    draws = RandomUniformLike (data)
    chance = CastLike (ratio, data)
    mask = GreaterOrEqual (draws, chance)
    factor = CastLike (mask, data)
    one = Constant <value: tensor = float {{1}}> ()
    unit = CastLike (one, data)
    rest = Sub (unit, chance)
    kept = Mul (data, factor)
    larger = Div (kept, rest)
    output = Where (training_mode, larger, data)
}}
"""
"""Dropout as defined by ONNX's specification."""


class OnnxSession:
    """An exported file, run on the CPU exactly as in a user's session.

    The outputs come from the file as it is; inner values come from a second session in which they
    are additional outputs. Standard models compute in float32 (`QDQ_ACCURACY_KEY`).

    Args:
        path: The `.onnx` file, or one in ONNX Runtime's own format (`.ort`).
        library: A library of custom operators for the sessions.
        level: ONNX Runtime's optimization level, one of `LEVELS`.
        spelled_out: Use the file's functions for operators for which this runtime has kernels, as
            a runtime without them does; see `spell_out`.

    Raises:
        UserInputError: it cannot be loaded, or was not exported by this package; raised by
            `outputs` and `values` too if ONNX Runtime fails to run it.
    """

    def __init__(
        self,
        path: Path,
        library: Path | None = None,
        level: str = "all",
        *,
        spelled_out: bool = False,
    ) -> None:
        self._path, self._library, self._level = path, library, level
        self._spelled_out = spelled_out
        metadata = read_onnx_metadata(path)
        with explain_metadata(path):
            self.signature = Signature.from_json(metadata.signature)
        self._site_values = metadata.site_values
        self.session = self._open_changed(()) if spelled_out else self._open(str(path))
        self._inner: tuple[frozenset[str], Any] | None = None

    def width(self, output: str) -> int | None:
        """The size of an output along axis 1, if it is fixed."""
        found = next(out for out in self.session.get_outputs() if out.name == output)
        size = found.shape[1]
        return size if isinstance(size, int) else None

    def outputs(self, feed: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every output by name; inputs that the file does not have are ignored."""
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, map(_tensor, self._run(self.session, names, feed)), strict=True))

    def sites(self, feed: Mapping[str, Any]) -> dict[str, Tensor]:
        """The output of every site, by its name, in graph order.

        A file in ONNX Runtime's own format gives none: no value can be added to its outputs.
        """
        if self._path.suffix == ORT_SUFFIX:
            return {}
        found = self.values(list(self._site_values.values()), feed)
        return {site: found[name] for site, name in self._site_values.items()}

    def values(self, names: Sequence[str], feed: Mapping[str, Any]) -> dict[str, Tensor]:
        """Values inside the graph, by name, without those that are not tensors."""
        if self._inner is None or self._inner[0] != frozenset(names):
            self._inner = (frozenset(names), self._open_changed(names))
        inner = list(dict.fromkeys(names))
        found = dict(zip(inner, self._run(self._inner[1], inner, feed), strict=True))
        return {name: _tensor(v) for name, v in found.items() if hasattr(v, "dtype")}

    def _run(self, session: Any, names: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        with self._explained("run"):
            return run_session(session, names, feed)

    def _open(self, model: str | bytes) -> Any:
        with self._explained("load"):
            return open_model(model, self._path.parent, self._level, self._library)

    def _explained(self, what: str) -> AbstractContextManager[None]:
        library = "none" if self._library is None else self._library.name
        where = f"{self._path} (optimization level {self._level}, operator library {library})"
        return explain_refusal(f"{what} {self._path.name}", where)

    def _open_changed(self, names: Sequence[str]) -> Any:
        """The file with these values as additional outputs, spelled out if that was asked for."""
        onnx = require("onnx", extra="onnx", purpose="look inside an ONNX model")
        model = onnx.load(str(self._path), load_external_data=False)
        if self._spelled_out:
            spell_out(model)
        present = {output.name for output in model.graph.output}
        for name in dict.fromkeys(names):
            if name not in present:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
        return self._open(model.SerializeToString())


def open_model(
    model: str | bytes, folder: Path, level: str = "all", library: Path | None = None
) -> Any:
    """A session on the CPU that computes in float32.

    Args:
        model: The path of a file, or the bytes of a model.
        folder: The folder of the model's weight file.
        level: How far ONNX Runtime optimizes the graph, one of `LEVELS`.
        library: A library of custom operators.
    """
    runtime = require("onnxruntime", extra="onnx", purpose="run an ONNX model")
    options = runtime.SessionOptions()
    options.add_session_config_entry(QDQ_ACCURACY_KEY, "0")
    if isinstance(model, bytes):
        options.add_session_config_entry(_WEIGHTS_KEY, str(folder))
    options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, LEVELS[level])
    if library is not None:
        options.register_custom_ops_library(str(library))
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_session(session: Any, names: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
    """The values of some outputs; entries of `feed` that are not inputs are ignored."""
    taken = {leaf.name for leaf in session.get_inputs()}
    given = {name: value for name, value in feed.items() if name in taken}
    values: list[Any] = session.run(list(names), given)
    return values


@contextmanager
def explain_refusal(what: str, where: str) -> Iterator[None]:
    """Convert what ONNX Runtime raises in the block to an error that names action and file.

    Raises:
        UserInputError: ONNX Runtime raised an exception.
    """
    try:
        yield
    except Exception as error:  # ONNX Runtime raises its own types, derived from Exception only
        raise UserInputError(
            f"ONNX Runtime cannot {what}: {str(error).splitlines()[0]}",
            where=where,
            hint="export the model again; if that does not help, it is a bug of the exporter",
        ) from error


def uses_library(model: Any) -> bool:
    """Whether a model uses operators of this package's library."""
    return any(node.domain == _LIBRARY_DOMAIN for node in model.graph.node)


def hides(model: Any) -> bool:
    """Whether ONNX Runtime ignores a part of the model that `spell_out` makes visible."""
    return bool(_unused(model) or _training(model))


def spell_out(model: Any) -> None:
    """Rewrite a model in place so that ONNX Runtime uses its functions and training Dropouts.

    ONNX Runtime ignores a file's function for an operator for which it has a kernel, and its
    inference build never applies Dropout. Therefore operators with a function get a domain without
    kernels, and a Dropout with a training flag becomes a function that applies it.
    """
    subgraphs, trained = _unused(model), _training(model)
    names = {function.name for function in subgraphs}
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            if node.domain == _MICROSOFT and node.op_type in names:
                node.domain = _SPELLED
    for function in subgraphs:
        function.domain = _SPELLED
    if trained:
        parser = require("onnx.parser", extra="onnx", purpose="run an ONNX model")
        model.functions.append(parser.parse_function(_DROPOUT))
    for node in trained:
        node.domain = _SPELLED
        del node.attribute[:]
        if len(node.output) == 1:
            node.output.append(f"{node.output[0]}/kept")
    for importing in (model, *model.functions):
        importing.opset_import.add(domain=_SPELLED, version=1)


def _unused(model: Any) -> list[Any]:
    """Functions of operators for which ONNX Runtime has kernels."""
    return [function for function in model.functions if function.domain == _MICROSOFT]


def _training(model: Any) -> list[Any]:
    """Dropouts with all of their inputs, the last of which is the training flag."""
    found = (node for node in model.graph.node if node.op_type == "Dropout" and not node.domain)
    return [node for node in found if len(node.input) == _DROPOUT_INPUTS and all(node.input)]


def _tensor(value: Any) -> Tensor:
    return torch.from_numpy(value)
