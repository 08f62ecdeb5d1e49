"""One exported file in ONNX Runtime: its outputs, and the values of its sites."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.ir.meta import ONNX_METADATA_KEY, QDQ_ACCURACY_KEY
from qalora_compile.ir.signature import Signature
from qalora_compile.optional import require


class OnnxSession:
    """An exported file, run on the CPU exactly as a user's session would.

    The outputs come from the file as it is; site values come from a second session in which they
    are additional outputs. Standard models compute in float32 (`QDQ_ACCURACY_KEY`).

    Args:
        path: The `.onnx` file.
        library: A library of custom operators that the sessions get.

    Raises:
        UserInputError: it cannot be loaded, or was not exported by this package.
    """

    def __init__(self, path: Path, library: Path | None = None) -> None:
        self._path, self._library = path, library
        self._runtime = require("onnxruntime", extra="onnx", purpose="run an ONNX model")
        try:
            self.session = self._runtime.InferenceSession(
                str(path), self._options(), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises bare exception types of its own
            raise UserInputError(
                f"ONNX Runtime cannot load {path.name}: {str(error).splitlines()[0]}",
                where=str(path),
            ) from error
        text = self.session.get_modelmeta().custom_metadata_map.get(ONNX_METADATA_KEY)
        if text is None:
            raise UserInputError(
                f"{path.name} was not exported by this package: it has no signature to compare by",
                where=str(path),
            )
        metadata: Mapping[str, Any] = json.loads(text)
        self.signature = Signature.from_json(metadata["signature"])
        self._site_values: dict[str, str] = dict(metadata["site_values"])
        self._site_session: Any = None

    def outputs(self, feed: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every output by name; inputs that the file does not take are left out."""
        taken = {leaf.name for leaf in self.session.get_inputs()}
        values = {name: value for name, value in feed.items() if name in taken}
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, map(_tensor, self.session.run(None, values)), strict=True))

    def sites(self, feed: Mapping[str, Any]) -> dict[str, Tensor]:
        """The outputs of every site, by its name, in graph order."""
        if self._site_session is None:
            self._site_session = self._open_site_session()
        taken = {leaf.name for leaf in self.session.get_inputs()}
        values = {name: value for name, value in feed.items() if name in taken}
        inner = list(self._site_values.values())
        found = dict(zip(inner, map(_tensor, self._site_session.run(inner, values)), strict=True))
        return {site: found[name] for site, name in self._site_values.items()}

    def _options(self) -> Any:
        options = self._runtime.SessionOptions()
        options.add_session_config_entry(QDQ_ACCURACY_KEY, "0")
        if self._library is not None:
            options.register_custom_ops_library(str(self._library))
        return options

    def _open_site_session(self) -> Any:
        onnx = require("onnx", extra="onnx", purpose="look inside an ONNX model")
        model = onnx.load(str(self._path), load_external_data=False)
        present = {output.name for output in model.graph.output}
        for name in dict.fromkeys(self._site_values.values()):
            if name not in present:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
        options = self._options()
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._path.parent)
        )
        return self._runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def _tensor(value: Any) -> Tensor:
    return torch.from_numpy(value)
