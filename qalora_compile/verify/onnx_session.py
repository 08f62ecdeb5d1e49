"""One exported file in ONNX Runtime: its outputs, and the values of its sites."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.ir.meta import ONNX_METADATA_KEY, QDQ_ACCURACY_KEY
from qalora_compile.ir.signature import Signature
from qalora_compile.optional import require

LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
"""How far ONNX Runtime optimizes a graph, and its own name for it; `all` is its default."""


class OnnxSession:
    """An exported file, run on the CPU exactly as a user's session would.

    The outputs come from the file as it is; inner values come from a second session in which they
    are additional outputs. Standard models compute in float32 (`QDQ_ACCURACY_KEY`).

    Args:
        path: The `.onnx` file.
        library: A library of custom operators that the sessions get.
        level: How far ONNX Runtime optimizes the graph, one of `LEVELS`.

    Raises:
        UserInputError: it cannot be loaded, or was not exported by this package. So do `outputs`
            and `values` where ONNX Runtime does not run it.
    """

    def __init__(self, path: Path, library: Path | None = None, level: str = "all") -> None:
        self._path, self._library, self._level = path, library, level
        self._runtime = require("onnxruntime", extra="onnx", purpose="run an ONNX model")
        self.session = self._open(str(path), self._options())
        text = self.session.get_modelmeta().custom_metadata_map.get(ONNX_METADATA_KEY)
        if text is None:
            raise UserInputError(
                f"{path.name} was not exported by this package: it has no signature to compare by",
                where=str(path),
            )
        metadata: Mapping[str, Any] = json.loads(text)
        self.signature = Signature.from_json(metadata["signature"])
        self._site_values: dict[str, str] = dict(metadata["site_values"])
        self._inner: tuple[frozenset[str], Any] | None = None

    def outputs(self, feed: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every output by name; inputs that the file does not take are left out."""
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, map(_tensor, self._run(self.session, names, feed)), strict=True))

    def sites(self, feed: Mapping[str, Any]) -> dict[str, Tensor]:
        """The outputs of every site, by its name, in graph order."""
        found = self.values(list(self._site_values.values()), feed)
        return {site: found[name] for site, name in self._site_values.items()}

    def values(self, names: Sequence[str], feed: Mapping[str, Any]) -> dict[str, Tensor]:
        """Values inside the graph, by name; what is not a tensor is left out."""
        if self._inner is None or self._inner[0] != frozenset(names):
            self._inner = (frozenset(names), self._open_inner(names))
        inner = list(dict.fromkeys(names))
        found = dict(zip(inner, self._run(self._inner[1], inner, feed), strict=True))
        return {name: _tensor(v) for name, v in found.items() if hasattr(v, "dtype")}

    def _run(self, session: Any, names: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        taken = {leaf.name for leaf in session.get_inputs()}
        given = {name: value for name, value in feed.items() if name in taken}
        try:
            values: list[Any] = session.run(list(names), given)
        except Exception as error:  # ONNX Runtime raises bare exception types of its own
            raise self._refused("run", error) from error
        return values

    def _open(self, model: str | bytes, options: Any) -> Any:
        try:
            return self._runtime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises bare exception types of its own
            raise self._refused("load", error) from error

    def _refused(self, what: str, error: Exception) -> UserInputError:
        library = "none" if self._library is None else self._library.name
        return UserInputError(
            f"ONNX Runtime cannot {what} {self._path.name}: {str(error).splitlines()[0]}",
            where=f"{self._path} (optimization level {self._level}, operator library {library})",
            hint="export the model again; if that does not help, it is a bug of the exporter",
        )

    def _options(self) -> Any:
        options = self._runtime.SessionOptions()
        options.add_session_config_entry(QDQ_ACCURACY_KEY, "0")
        levels = self._runtime.GraphOptimizationLevel
        options.graph_optimization_level = getattr(levels, LEVELS[self._level])
        if self._library is not None:
            options.register_custom_ops_library(str(self._library))
        return options

    def _open_inner(self, names: Sequence[str]) -> Any:
        onnx = require("onnx", extra="onnx", purpose="look inside an ONNX model")
        model = onnx.load(str(self._path), load_external_data=False)
        present = {output.name for output in model.graph.output}
        for name in dict.fromkeys(names):
            if name not in present:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
        options = self._options()
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._path.parent)
        )
        return self._open(model.SerializeToString(), options)


def _tensor(value: Any) -> Tensor:
    return torch.from_numpy(value)
