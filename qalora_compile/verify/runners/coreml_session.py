"""A Core ML package without Core ML: its operators by the values that coremltools infers.

coremltools computes the value of an operator whose operands are constants, to fold it. So each
operator of the package is built once more on constants. This is coremltools' reading of the model,
in NumPy, and not what an Apple device computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.coreml_package import (
    CONSTANT,
    coreml_metadata,
    coremltools,
    quiet,
    read_function,
    read_specification,
)
from qalora_compile.ir.onnx_metadata import explain_metadata
from qalora_compile.ir.signature import Signature


def _gather_nd(given: Mapping[str, Any]) -> Any:
    if given.get("batch_dims"):
        raise UnsupportedError(
            "gather_nd has batch dimensions", hint="compare the model on an Apple device"
        )
    return given["x"][tuple(np.moveaxis(given["indices"], -1, 0))]


def _silu(given: Mapping[str, Any]) -> Any:
    x = torch.from_numpy(given["x"])
    return torch.nn.functional.silu(x).numpy()


_OWN: dict[str, Callable[[Mapping[str, Any]], Any]] = {"gather_nd": _gather_nd, "silu": _silu}
"""Operators of language models that coremltools infers no value for."""


class CoremlSession:
    """A model of target `coreml`, run operator by operator in NumPy.

    Args:
        path: The `.mlpackage` folder.

    Raises:
        UserInputError: it cannot be read, or was not exported by this package; raised by `outputs`
            and `sites` too if an operator fails.
        UnsupportedError: `coremltools` is not installed; raised by `outputs` and `sites` if it
            infers no value for an operator.
    """

    def __init__(self, path: Path) -> None:
        metadata = coreml_metadata(read_specification(path), path)
        with explain_metadata(path):
            self.signature = Signature.from_json(metadata.signature)
        self._path, self._function = path, read_function(path)
        self._site_values = metadata.site_values

    def width(self, output: str) -> int | None:
        """None: only models with a key-value cache are asked, and a package has none."""
        return None

    def outputs(self, feed: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every output by name; inputs that the model lacks are ignored."""
        values = self._run(feed)
        names = [name for name in self.signature.outputs if name is not None]
        found = (values[var.name] for var in self._function.outputs)
        return {name: _tensor(value) for name, value in zip(names, found, strict=True)}

    def sites(self, feed: Mapping[str, Any]) -> dict[str, Tensor]:
        """The output of every site that the model has a value for, by its name, in graph order."""
        values = self._run(feed)
        return {s: _tensor(values[name]) for s, name in self._site_values.items() if name in values}

    def _run(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """The value of every variable, by its name."""
        mil = coremltools("converters.mil.mil")
        names = [leaf.name for leaf in self.signature.inputs if leaf.dtype is not None]
        given = (feed[name] for name in names)
        values = {
            name: x.astype(np.int32) if x.dtype == np.int64 else x
            for name, x in zip(self._function.inputs, given, strict=True)
        }
        version = coremltools().target.iOS18
        with quiet(), mil.Function({}, opset_version=version):
            for op in self._function.operations:
                made = self._values(mil.Builder, op, values)
                values |= {var.name: value for var, value in zip(op.outputs, made, strict=True)}
        return values

    def _values(self, builder: Any, op: Any, values: Mapping[str, Any]) -> list[Any]:
        """The results of an operator."""
        if op.op_type == "const":
            return [op.val.val]
        if op.op_type == CONSTANT:
            return [op.materialized_val_inference()]
        given = {name: _value(var, values) for name, var in op.inputs.items() if var is not None}
        if op.op_type in _OWN:
            return [_OWN[op.op_type](given)]
        try:
            made = getattr(builder, op.op_type)(**given)
        except Exception as error:  # of NumPy, or of the check of its operands: many types
            raise UserInputError(
                f"the operator {op.op_type} fails: {type(error).__name__}: {error}",
                where=f"{self._path.name}, {op.outputs[0].name}",
            ) from error
        made = made if isinstance(made, (list, tuple)) else [made]
        if any(var.val is None for var in made):
            raise UnsupportedError(
                f"coremltools infers no value for {op.op_type}, and Core ML is on Apple devices",
                where=f"{self._path.name}, {op.outputs[0].name}",
                hint="the weights were compared when the package was written; run it on a device",
            )
        return [var.val for var in made]


def _value(var: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(var, (list, tuple)):
        return [_value(one, values) for one in var]
    value = values.get(var.name, var.val)
    return bool(value) if isinstance(value, np.bool_) else value  # NumPy takes no other as an axis


def _tensor(value: Any) -> Tensor:
    return torch.from_numpy(np.array(value))
