"""An exported OpenVINO model between its sites, for samples of a proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qalora_compile.ir.meta import OPENVINO_SETTINGS
from qalora_compile.optional import require
from qalora_compile.verify.proof.graphs.graph import Graph
from qalora_compile.verify.proof.graphs.read_openvino import CROSS
from qalora_compile.verify.runners.openvino_session import explain_openvino

_PRESENT = "present."


class CutOpenvino:
    """Runs an exported model with given values in place of its sites and of its state."""

    def __init__(self, graph: Graph, sites: Sequence[str], targets: Sequence[Any]) -> None:
        self._label = graph.label
        self._cuts = {graph.site_values[name]: name for name in sites}
        self._targets = [ref.name for ref in targets]
        given = self._cuts.keys() | graph.inputs.keys()
        self._computed = list(dict.fromkeys(n for n in self._targets if n not in given))
        self._request = self._open(graph.extra.clone()) if self._computed else None

    def run(self, inputs: Mapping[str, Tensor], sites: Mapping[str, Tensor]) -> list[Tensor]:
        """The targets, given inputs by name and the outputs of sites."""
        feed = {**inputs, **{value: sites[name] for value, name in self._cuts.items()}}
        found = dict(feed)
        if self._request is not None:
            taken = {name for leaf in self._request.model_inputs for name in leaf.get_names()}
            arrays = {n: v.numpy() for n, v in feed.items() if n in taken}
            with explain_openvino("run the model between its layers", self._label):
                values = self._request.infer(arrays)
            results = [torch.from_numpy(np.array(values[i])) for i in range(len(self._computed))]
            found |= dict(zip(self._computed, results, strict=True))
        return [found[name] for name in self._targets]

    def _open(self, model: Any) -> Any:
        """The model with parameters in place of sites and of state."""
        library = require("openvino", extra="openvino", purpose="cut an OpenVINO model")
        op = require("openvino.opset13", extra="openvino", purpose="cut an OpenVINO model")
        _forget_kept(model)
        nodes = {node.get_friendly_name(): node for node in model.get_ops()}
        results = [_output(nodes, value) for value in self._computed]
        cut = {value: _output(nodes, value) for value in self._cuts}
        cut |= _states(model)
        parameters = list(model.get_parameters())
        for name, output in cut.items():
            kind, shape = output.get_element_type(), output.get_partial_shape()
            made = op.parameter(shape, kind, name=name)
            made.output(0).get_tensor().set_names({name})
            for reader in output.get_target_inputs():
                if reader.get_node().get_type_name() not in ("Result", "Assign"):
                    reader.replace_source_output(made.output(0))
            parameters.append(made)
        with explain_openvino("load the model between its layers", self._label):
            between = library.Model([op.result(value) for value in results], parameters, "cut")
            core = library.Core()
            compiled = core.compile_model(between, "CPU", dict(OPENVINO_SETTINGS))
            return compiled.create_infer_request()


def _output(nodes: Mapping[str, Any], value: str) -> Any:
    """The output of a node that a value names."""
    name, _, index = value.partition(":")
    return nodes[name].output(int(index or 0))


def _forget_kept(model: Any) -> None:
    """Read what a state keeps from the node that computes it first; such states have no past."""
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue" and CROSS in node.get_variable_id():
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(node.input_value(0))


def _states(model: Any) -> dict[str, Any]:
    """Name of a past → the output that holds it: the rows of a state that `beam_idx` names."""
    found = {}
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue" and CROSS not in node.get_variable_id():
            (reader,) = node.output(0).get_target_inputs()
            past = node.get_variable_id().partition(_PRESENT)[0]
            found[past] = reader.get_node().output(0)
    return found
