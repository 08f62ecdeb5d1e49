"""An exported `.pt2` model on the CPU: its outputs and the values of its sites."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora_compile.ir.onnx_metadata import explain_metadata, metadata_of
from qalora_compile.ir.signature import Signature
from qalora_compile.untrusted.pt2_file import read_pt2
from qalora_compile.verify.runners.aten_graph import AtenGraph


class TorchSession:
    """A model of target `torch`, run operator by operator, see `AtenGraph`.

    Args:
        path: The `.pt2` file.

    Raises:
        UserInputError: it cannot be read, or was not exported by this package; raised by `outputs`
            and `sites` too if an operator fails.
    """

    def __init__(self, path: Path) -> None:
        file = read_pt2(path)
        metadata = metadata_of(file.metadata, path)
        with explain_metadata(path):
            self.signature = Signature.from_json(metadata.signature)
            self._graph = AtenGraph(file)
            self._inputs = {
                leaf.name: name
                for leaf, name in zip(self.signature.inputs, self._graph.inputs, strict=True)
                if name is not None
            }
            self._outputs = {
                name: value
                for name, value in zip(self.signature.outputs, self._graph.outputs, strict=True)
                if value is not None
            }
            self._widths = {
                name: _width(file.graph["tensor_values"].get(value, {}))
                for name, value in self._outputs.items()
            }
        self._site_values = metadata.site_values

    def width(self, output: str) -> int | None:
        """The size of an output along axis 1, if it is fixed."""
        return self._widths[output]

    def outputs(self, feed: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every output by name, the cache included; inputs that the model lacks are ignored."""
        return self._run(self._outputs, feed)

    def sites(self, feed: Mapping[str, Any]) -> dict[str, Tensor]:
        """The output of every site, by its name, in graph order."""
        return self._run(self._site_values, feed)

    def _run(self, names: Mapping[str, str], feed: Mapping[str, Any]) -> dict[str, Tensor]:
        given = {
            self._inputs[name]: torch.from_numpy(value)
            for name, value in feed.items()
            if name in self._inputs
        }
        found = self._graph.run(given, names.values())
        return {name: found[value] for name, value in names.items() if value in found}


def _width(meta: Mapping[str, Any]) -> int | None:
    sizes = meta.get("sizes", ())
    size = sizes[1].get("as_int") if len(sizes) > 1 else None
    return size if isinstance(size, int) else None
