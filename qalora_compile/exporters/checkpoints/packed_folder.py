"""The common part of all formats that are a Hugging Face folder with packed codes.

A format states its differences in a `PackedFormat`: which layers it can hold, how a layer is
packed, and what `config.json` says of them. Here, layers are refused, measured and written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora_compile.config import ExportSpec
from qalora_compile.exporters.capability import (
    EXACT,
    NO_ORDER,
    PROPERTIES,
    Capability,
    StoredTensor,
    rounds,
)
from qalora_compile.exporters.checkpoints.hf_folder import (
    DTYPES,
    FolderWriter,
    add_floats,
    add_layer_as_floats,
)
from qalora_compile.exporters.checkpoints.named_tensors import (
    Checkpoint,
    Layer,
    Misfit,
    check_half_range,
    refuse_if_none_fits,
    refuse_sorted,
    refuse_transposed,
)
from qalora_compile.progress import track

Pack = Callable[[Layer, torch.dtype], tuple[Mapping[str, Tensor], StoredTensor]]
"""Returns a layer's tensors, by the suffix of their names, and its row of the report."""


@dataclass(frozen=True)
class PackedFormat:
    """A folder of packed codes.

    Attributes:
        reader: The library that reads it, for messages.
        misfit: Why a layer is written as floats; empty if it is not.
        pack: Packs a layer; its parameters are stored in the dtype given.
        config: The entries of `config.json` that describe the layers.
        has_transposed: Whether it can hold weights that the model stores `[K, N]`.
        has_order: Whether it can hold codes in activation order.
        has_real_zeros: Whether it can hold zero-points that are not integers.
        tag: See `FolderWriter`.
    """

    reader: str
    misfit: Misfit
    pack: Pack
    config: Callable[[tuple[Layer, ...]], Mapping[str, Any]]
    has_transposed: bool = False
    has_order: bool = False
    has_real_zeros: bool = True
    tag: str = "pt"

    def write(self, checkpoint: Checkpoint, folder: Path, spec: ExportSpec) -> list[StoredTensor]:
        """Write weights, configuration and tokenizer; returns a row of the report for each tensor.

        Raises:
            UnsupportedError: the format cannot hold a quantized layer, because it is stored
                `[K, N]`, is in activation order or has real zero-points; or no layer has groups
                that fit.
            UserInputError: float16 was asked for and cannot hold a value.
        """
        dtype = DTYPES[spec.parameter_dtype]
        self._check(checkpoint.layers, dtype)
        writer, rows = FolderWriter(folder, tag=self.tag), []
        for layer in track(checkpoint.layers, "write weights"):
            remark = self.misfit(layer)
            if remark:
                rows.append(add_layer_as_floats(writer, layer, dtype, remark))
                continue
            tensors, row = self.pack(layer, dtype)
            for ending, tensor in tensors.items():
                writer.add(f"{layer.name}{ending}", tensor)
            rows.append(row)
        rows += add_floats(writer, checkpoint, dtype)
        changes = {"dtype": spec.parameter_dtype, **self.config(checkpoint.layers)}
        writer.finish(checkpoint.description, changes | checkpoint.untied())
        return rows

    def _check(self, layers: tuple[Layer, ...], dtype: torch.dtype) -> None:
        """Refuse what cannot be written, before any file is opened."""
        if not self.has_transposed:
            refuse_transposed(layers, self.reader)
        refuse_if_none_fits(layers, self.misfit)
        if not self.has_order:
            refuse_sorted(layers, self.misfit, self.reader)
        for layer in layers:
            if self.misfit(layer):
                continue
            if dtype == torch.float16:
                for what, values in zip(("scale", "offset"), layer.parameters(), strict=True):
                    check_half_range(layer.name, what, values)
            if not self.has_real_zeros:
                layer.zero_points()


def exactness(spec: ExportSpec) -> Capability:
    """How exactly the dtype of the parameters keeps them."""
    return EXACT if spec.parameter_dtype == "float32" else rounds(spec.parameter_dtype)


def packed_capabilities(spec: ExportSpec, own: Mapping[str, Capability]) -> dict[str, Capability]:
    """How exactly such a format keeps each property; `own` has the rows that differ."""
    exact = exactness(spec)
    shared = dict.fromkeys(("scale", "real zero-point", "matrices of floats", "vectors"), exact)
    shared["activation order"] = NO_ORDER
    shared["other architectures"] = Capability("exact", "linear layers stored [N, K]")
    return dict.fromkeys(PROPERTIES, EXACT) | shared | dict(own)


def first_divisor(layer: Layer, sizes: Iterable[int]) -> int:
    """The first of some group sizes that a layer's groups can be cut into; 0 if there is none."""
    return next((size for size in sizes if layer.unit % size == 0), 0)


def most_common(shapes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The pair of bits and group size that most layers have."""
    return Counter(shapes).most_common(1)[0][0]
