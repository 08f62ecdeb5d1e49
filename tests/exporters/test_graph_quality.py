"""The contents of a file: nothing dead or duplicated, no weight next to its codes; metadata."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

import qalora_compile as qc
from qalora_compile.capture.causal_lm import capture_causal_lm
from tests.models import llama

LAYERS = 2
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
JOINED_WITH = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
KERNELS = {"ort": "GroupQuantLinear", "ort-stock": "MatMulNBits", "onnx": "MatMul"}


@dataclass(frozen=True)
class Made:
    """An exported model, and what it was made from."""

    target: str
    program: qc.Program
    model: onnx.ModelProto

    @property
    def stored(self) -> dict[str, NDArray[Any]]:
        """Its initializers."""
        tensors = self.model.graph.initializer
        return {t.name: onnx.numpy_helper.to_array(t) for t in tensors}


@pytest.fixture(
    scope="module",
    params=[("ort", "standard"), ("ort", "ort"), ("ort-stock", "ort"), ("onnx", "standard")],
    ids="-".join,
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.manual_seed(0)
    program = qc.quantize_groups(capture_causal_lm(llama()))
    target, fusion = request.param
    path = tmp_path_factory.mktemp("made") / "model.onnx"
    qc.export_model(program, path, qc.ExportSpec(target=target, fusion=fusion))
    return Made(target, program, onnx.load(path))


def owner(target: str, name: str) -> str:
    """The layer whose tensors hold those of a layer: q's hold k's and v's, the gate's hold up's."""
    if target != "ort":
        return name
    for part, first in JOINED_WITH.items():
        name = f"{name.removesuffix(part)}{first}" if name.endswith(part) else name
    return name


def dead(model: onnx.ModelProto) -> set[str]:
    """Initializers and results of nodes that nothing reads."""
    graph = model.graph
    read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    unread = {t.name for t in graph.initializer} - read
    return unread | {n.output[0] for n in graph.node if not set(n.output) & read}


def twice(stored: dict[str, NDArray[Any]]) -> list[list[str]]:
    """Names of tensors of equal bytes, but for small constants and for norms, which begin as 1."""
    names: dict[bytes, list[str]] = {}
    for name, values in stored.items():
        if values.size > 64:
            names.setdefault(values.tobytes(), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def float_copies(made: Made) -> list[str]:
    """Float tensors with as many elements as a quantized weight has."""
    sizes = {site.n * site.k for site in made.program.plan if site.bits is not None}
    floats = {n: v for n, v in made.stored.items() if v.dtype in (np.float32, np.float16)}
    kept = {site.weight for site in made.program.plan if site.bits is None}
    return [name for name, v in floats.items() if v.size in sizes and name not in kept]


def test_nothing_is_dead(made: Made) -> None:
    assert dead(made.model) == set()
    planted = onnx.ModelProto.FromString(made.model.SerializeToString())
    planted.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3), "unread"))
    assert dead(planted) == {"unread"}


def test_no_tensor_is_stored_twice(made: Made) -> None:
    assert twice(made.stored) == []
    ends = ("q_proj.qweight", "q_proj.joined.qweight")
    weight = next(name for name in made.stored if name.endswith(ends))
    assert twice(made.stored | {"again": made.stored[weight]}) == [[weight, "again"]]


def test_no_weight_is_stored_next_to_its_codes(made: Made) -> None:
    assert float_copies(made) == []
    copy = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "copy")
    planted = onnx.ModelProto.FromString(made.model.SerializeToString())
    planted.graph.initializer.append(copy)
    assert float_copies(Made(made.target, made.program, planted)) == ["copy"]


def test_sums_of_groups_are_shared(made: Made) -> None:
    """Attention's and the gate's inputs have one for all that read them: four for each layer."""
    sums = [node for node in made.model.graph.node if node.op_type == "ReduceSum"]
    assert len(sums) == (0 if made.target == "ort" else 4 * LAYERS)  # or in the functions
    readers = Counter(name for node in made.model.graph.node for name in node.input)
    if sums:
        assert sorted(readers[node.output[0]] for node in sums) == sorted([3, 1, 2, 1] * LAYERS)


def test_names_follow_module_paths(made: Made) -> None:
    sites = [site.name for site in made.program.plan if site.bits is not None]
    assert len(sites) == len(PARTS) * LAYERS
    assert all(name.startswith("model.layers.") and name.endswith(PARTS) for name in sites)
    named = {node.name for node in made.model.graph.node}
    owners = {owner(made.target, name) for name in sites}
    assert {f"{name}/{KERNELS[made.target]}" for name in owners} <= named
    modules = {name.rpartition(".")[0] for name in made.program.tensors()} | set(sites)
    modules |= {f"{name}.joined" for name in owners}
    large = [name for name, values in made.stored.items() if values.size > 64]
    assert large
    assert all(name.rpartition(".")[0] in modules for name in large)


def test_metadata_says_what_each_layer_is(made: Made) -> None:
    (entry,) = [p.value for p in made.model.metadata_props if p.key == "qalora"]
    value = json.loads(entry)
    assert made.model.producer_name == "qalora-compile"
    assert value["version"] == qc.__version__
    rows = {row["site"]: row for row in value["layers"]}
    assert rows.keys() == {site.name for site in made.program.plan}
    weights, held = dict(llama().named_parameters()), Counter[str]()
    for site in made.program.plan:
        row = rows[site.name]
        assert row["reason"]
        if site.bits is None:
            assert row["bits"] is None
            continue
        assert (row["k"], row["n"]) == tuple(reversed(weights[row["weight"]].shape))  # its source
        assert (row["bits"], row["group_size"], row["weight"]) == (4, 32, f"{site.name}.weight")
        held[owner(made.target, site.path)] += row["bytes"]
    for path, size in held.items():
        parts = [t for t in made.model.graph.initializer if t.name.startswith(f"{path}.")]
        assert sum(len(tensor.raw_data) for tensor in parts) == size
