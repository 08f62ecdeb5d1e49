"""One GroupQuantLinear layer: its arrays, its model, and what it has to compute."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from qalora_compile.ir.packing.kernel_layouts import pack_groups
from qalora_compile.runtime.library import register

Array = NDArray[Any]
EPSILON = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Everything about one layer and its input; the arrays follow from it."""

    bits: int = 4
    group_size: int = 32
    k: int = 64
    n: int = 8
    m: int = 1
    compute: str = "fp32"
    half_x: bool = False
    half_parameters: bool = False
    bias: bool = False
    scale: float = 1.0
    far: float = 0.0
    seed: int = 0

    @property
    def groups(self) -> int:
        return -(-self.k // self.group_size)

    def codes(self) -> Array:
        generator = np.random.default_rng(self.seed)
        return generator.integers(0, 2**self.bits, (self.n, self.k), dtype=np.uint8)

    def arrays(self) -> dict[str, Array]:
        """x, codes (packed), scale, zero_point and, if any, bias."""
        generator = np.random.default_rng(self.seed + 1)
        kind = np.float16 if self.half_x else np.float32
        parameter = np.float16 if self.half_parameters else np.float32
        shape = (self.n, self.groups)
        zero = generator.uniform(0, 2**self.bits - 1, shape)
        packed = pack_groups(
            torch.from_numpy(self.codes()), bits=self.bits, group_size=self.group_size
        )
        arrays: dict[str, Array] = {
            "x": generator.standard_normal((self.m, self.k)).astype(kind),
            "codes": packed.numpy(),
            "scale": (self.scale * generator.uniform(0.5, 1.5, shape)).astype(parameter),
            "zero_point": (zero + self.far * generator.standard_normal(shape)).astype(parameter),
        }
        if self.bias:
            arrays["bias"] = generator.standard_normal(self.n).astype(kind)
        return arrays

    def weight(self, arrays: dict[str, Array]) -> tuple[Array, Array]:
        """W in float64, and the largest magnitudes that its terms reach: `[N, K]` both."""
        scale, zero = (
            np.repeat(arrays[name].astype(np.float64), self.group_size, 1)[:, : self.k]
            for name in ("scale", "zero_point")
        )
        codes = self.codes().astype(np.float64)
        return scale * (codes - zero), np.abs(scale) * (codes + np.abs(zero))

    def seen(self, x: Array) -> Array:
        """x as the layer computes with it, float64: itself, or quantized to int8 per block."""
        if self.compute == "fp32":
            return x.astype(np.float64)
        block = 32 if self.group_size % 32 == 0 else 16
        wide = np.pad(x.astype(np.float32), ((0, 0), (0, -self.k % block)))
        blocks = wide.reshape(self.m, -1, block)
        largest = np.abs(blocks).max(-1, keepdims=True)
        safe = np.where(largest == 0, np.float32(1), largest)
        codes = np.rint(blocks * (np.float32(127) / safe))
        seen = codes.astype(np.float64) * (largest / np.float32(127))
        return seen.reshape(self.m, -1)[:, : self.k]

    def reference(self, arrays: dict[str, Array]) -> tuple[Array, Array]:
        """y in float64 `[M, N]`, and by how much float32 arithmetic may differ from it."""
        weight, size = self.weight(arrays)
        x = self.seen(arrays["x"])
        y = x @ weight.T
        bound = 16 * EPSILON * (np.abs(x) @ size.T)
        if self.bias:
            y = y + arrays["bias"].astype(np.float64)
        bound += 4 * EPSILON * np.abs(y) + 1e-37
        if self.half_x:
            bound += np.abs(y) * 2.0**-11 + 2.0**-24
        return y, bound

    def model(self, **attributes: Any) -> onnx.ModelProto:
        """The layer as a model with constant weights; `attributes` replace the node's."""
        return make_model(self.arrays(), self.attributes() | attributes)

    def attributes(self) -> dict[str, Any]:
        return {
            "K": self.k,
            "N": self.n,
            "bits": self.bits,
            "group_size": self.group_size,
            "compute": self.compute,
        }

    def but(self, **changes: Any) -> Layer:
        return replace(self, **changes)


def make_model(
    arrays: dict[str, Array], attributes: dict[str, Any], *, constant: bool = True
) -> onnx.ModelProto:
    """A model of one node; weights are constants, or inputs like x."""
    make = onnx.helper
    node = make.make_node(
        "GroupQuantLinear",
        list(arrays),
        ["y"],
        domain="qalora",
        **{name: value for name, value in attributes.items() if value is not None},
    )
    kind = make.np_dtype_to_tensor_dtype(arrays["x"].dtype)

    def info(name: str) -> onnx.ValueInfoProto:
        dtype = make.np_dtype_to_tensor_dtype(arrays[name].dtype)
        return make.make_tensor_value_info(name, dtype, [None] * arrays[name].ndim)

    fed = ["x"] if constant else list(arrays)
    graph = make.make_graph(
        [node],
        "layer",
        [info(name) for name in fed],
        [make.make_tensor_value_info("y", kind, [None] * arrays["x"].ndim)],
        [onnx.numpy_helper.from_array(a, name) for name, a in arrays.items() if name not in fed],
    )
    opsets = [make.make_opsetid("", 20), make.make_opsetid("qalora", 1)]
    return make.make_model(graph, opset_imports=opsets, ir_version=10)


def open_model(model: onnx.ModelProto, *, threads: int = 1) -> Any:
    """A session with the library."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # failures are the point of some tests
    register(options)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@contextmanager
def forced(environment: MutableMapping[str, str], level: str) -> Iterator[None]:
    """Sessions made inside take the kernels of `level`."""
    before = environment.get("QALORA_KERNEL")
    environment["QALORA_KERNEL"] = level
    try:
        yield
    finally:
        if before is None:
            del environment["QALORA_KERNEL"]
        else:
            environment["QALORA_KERNEL"] = before
