"""An exported OpenVINO model on the CPU, in float32: its outputs and the values of its sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.ir.meta import OPENVINO_SETTINGS, PAST
from qalora_compile.ir.onnx_metadata import explain_metadata
from qalora_compile.ir.openvino_metadata import openvino_metadata, read_openvino
from qalora_compile.ir.signature import Signature
from qalora_compile.optional import require

_PRESENT, _BEAMS = "present.", "beam_idx"
_INNER = "value "
"""Prefix of the names of outputs that are added to look inside."""


class OpenvinoSession:
    """An exported model, run exactly: with the settings that its file states.

    A key-value cache is given and returned by name, as by a model that has it as inputs and
    outputs: if it is state, the state is set before a run and read after it.

    Args:
        path: The `.xml` file.

    Raises:
        UserInputError: it cannot be read, or was not exported by this package; raised by `outputs`
            and `values` too if OpenVINO fails to run it.
        UnsupportedError: `openvino` is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._library = require("openvino", extra="openvino", purpose="run an OpenVINO model")
        self._model = read_openvino(path)
        metadata = openvino_metadata(self._model, path)
        with explain_metadata(path):
            self.signature = Signature.from_json(metadata.signature)
        self._site_values = metadata.site_values
        self._request = self._open(self._model)
        self._inner: tuple[frozenset[str], Any] | None = None

    def width(self, output: str) -> int | None:
        """The size of an output along axis 1, if it is fixed."""
        size = self._model.output(output).get_partial_shape()[1]
        return int(size.max_length) if size.max_length == 1 or size.is_static else None

    def outputs(self, feed: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every output by name, the cache included; inputs that the model lacks are ignored."""
        return self._run(self._request, feed)

    def sites(self, feed: Mapping[str, Any]) -> dict[str, Tensor]:
        """The output of every site, by its name, in graph order."""
        found = self.values(list(self._site_values.values()), feed)
        return {site: found[name] for site, name in self._site_values.items()}

    def values(self, names: Sequence[str], feed: Mapping[str, Any]) -> dict[str, Tensor]:
        """Values inside the graph, by name: `node`, or `node:1` for its second output."""
        if self._inner is None or self._inner[0] != frozenset(names):
            self._inner = (frozenset(names), self._open(self._with_outputs(names)))
        found = self._run(self._inner[1], feed)
        return {name: found[f"{_INNER}{name}"] for name in names}

    def _with_outputs(self, names: Sequence[str]) -> Any:
        model = self._model.clone()
        for name in dict.fromkeys(names):
            with self._explained("look inside"):
                node, _, index = name.partition(":")
                added = model.add_outputs((node, int(index or 0)))
                added[0].get_tensor().add_names({f"{_INNER}{name}"})
        return model

    def _open(self, model: Any) -> Any:
        with self._explained("load"):
            compiled = self._library.Core().compile_model(model, "CPU", dict(OPENVINO_SETTINGS))
            return compiled.create_infer_request()

    def _run(self, request: Any, feed: Mapping[str, Any]) -> dict[str, Tensor]:
        taken = {name for leaf in request.model_inputs for name in leaf.get_names()}
        given = {name: value for name, value in feed.items() if name in taken}
        if _BEAMS in taken and _BEAMS not in feed:
            batch = len(next(iter(given.values())))
            given[_BEAMS] = np.arange(batch, dtype=np.int32)
        with self._explained("run"):
            self._set_state(request, feed)
            request.infer(given)
            found = {
                name: torch.from_numpy(np.array(request.get_tensor(output).data))
                for output in request.model_outputs
                for name in output.get_names()
            }
            return found | self._state(request)

    def _set_state(self, request: Any, feed: Mapping[str, Any]) -> None:
        """Put the past into the state of the model."""
        for state in request.query_state():
            past = feed.get(_past_name(state.name))
            state.reset()
            if past is not None and past.shape[2]:
                state.state = self._library.Tensor(np.ascontiguousarray(past))

    def _state(self, request: Any) -> dict[str, Tensor]:
        return {
            _past_name(state.name).replace(PAST, _PRESENT): torch.from_numpy(
                np.array(state.state.data)
            )
            for state in request.query_state()
        }

    def _explained(self, what: str) -> AbstractContextManager[None]:
        return explain_openvino(f"{what} {self._path.name}", str(self._path))


@contextmanager
def explain_openvino(what: str, where: str) -> Iterator[None]:
    """Convert what OpenVINO raises in the block to an error that names action and file.

    Raises:
        UserInputError: OpenVINO raised an exception.
    """
    try:
        yield
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserInputError(
            f"OpenVINO cannot {what}: {lines[-1] if lines else error}",
            where=where,
            hint="export the model again; if that does not help, it is a bug of the exporter",
        ) from error


def _past_name(variable: str) -> str:
    """The input that a variable stands for: its name is that of the input and of the output."""
    return variable.partition(_PRESENT)[0]
