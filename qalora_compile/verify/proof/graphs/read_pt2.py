"""`.pt2` files of this package as graphs without nodes: their inputs and stored floats."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from qalora_compile.ir.onnx_metadata import explain_metadata, metadata_of
from qalora_compile.untrusted.pt2_file import Pt2File, Pt2Tensor, read_pt2
from qalora_compile.verify.proof.graphs.graph import TORCH, Graph
from qalora_compile.verify.proof.graphs.stored_tensor import Array, StoredTensor

_FLOATS = {6: ("float16", 2), 7: ("float32", 4), 8: ("float64", 8), 13: ("bfloat16", 2)}
"""Element types by their numbers in torch's schema, and their bytes."""


def read_pt2_graph(path: Path) -> Graph:
    """Inputs, and tensors of floats as flat arrays; they stay in the file until they are read.

    Raises:
        UserInputError: see `read_pt2`.
    """
    file = read_pt2(path)
    metadata = metadata_of(file.metadata, path)
    with explain_metadata(path):
        leaves = metadata.signature["inputs"]
        inputs = {leaf["name"]: (leaf["name"], leaf.get("dtype")) for leaf in leaves}
        tensors = {}
        for name, row in file.tensors.items():
            if row.meta["dtype"] in _FLOATS:
                dtype, width = _FLOATS[row.meta["dtype"]]
                size = row.size // width
                read = partial(_read, file, row, dtype)
                tensors[name] = StoredTensor(name, dtype, (size,), read)
        return Graph(TORCH, str(path), metadata.target, {}, inputs, {}, tensors, {}, {})


def _read(file: Pt2File, row: Pt2Tensor, dtype: str) -> Array:
    kind = "uint16" if dtype == "bfloat16" else dtype
    return np.frombuffer(file.bytes_of(row), kind)
