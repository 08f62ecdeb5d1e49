"""A program as a checkpoint: its tensors under the names that the model gives them.

All formats share this: which weights are quantized, under which names, and how a group is cut into
smaller ones if a format has no groups of its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qalora_compile.errors import PreconditionError, UnsupportedError, UserInputError
from qalora_compile.exporters.capability import StoredTensor
from qalora_compile.ir.activation_order import column_orders, unsorted
from qalora_compile.ir.affine import GroupAffine, group_count, has_integer_zero_points
from qalora_compile.ir.lazy_tensor import materialize
from qalora_compile.ir.model_description import Description
from qalora_compile.ir.packing.bitstream import unpack_codes
from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import EMBEDDING, UNUSED, Site
from qalora_compile.ir.stages import CODE_NAMES, FOLDED, QUANTIZED
from qalora_compile.progress import track

WEIGHT = ".weight"
FLOAT16_MAX = float(torch.finfo(torch.float16).max)
_PARTS = (*CODE_NAMES, "order")
_PLAIN_KINDS = ("linear", "addmm", "matmul", EMBEDDING)
"""Kinds of sites whose weight is a matrix `[N, K]`, or `[K, N]`, under one name."""


@dataclass(frozen=True)
class Layer:
    """A quantized weight.

    Attributes:
        name: Module path in the model: its weight is `<name>.weight`.
        site: Its first row in the plan.
        tensors: Packed codes, scale and offset; they may be lazy.
        order: The order of the columns if it is not the model's (`ir.activation_order`).
    """

    name: str
    site: Site
    tensors: tuple[Tensor, Tensor, Tensor]
    order: Tensor | None = None

    @property
    def bits(self) -> int:
        """Width of a code."""
        assert self.site.bits is not None
        return self.site.bits

    @property
    def group_size(self) -> int:
        """Weights of a full group."""
        assert self.site.group_size is not None
        return self.site.group_size

    @property
    def unit(self) -> int:
        """The largest size of equal groups that the groups can be cut into: gcd(g, K)."""
        k = self.site.k
        return k if self.group_size >= k else math.gcd(self.group_size, k)

    def parameters(self) -> tuple[Tensor, Tensor]:
        """Scale and offset, `[N, L]`."""
        return materialize(self.tensors[1]).detach(), materialize(self.tensors[2]).detach()

    def affine(self) -> GroupAffine:
        """Codes `[N, K]`, scale and offset; columns in `order`."""
        codes = unpack_codes(materialize(self.tensors[0]), self.bits, self.site.k)
        return GroupAffine(codes, *self.parameters(), self.bits, self.group_size)

    def weight(self) -> Tensor:
        """The weight as floats `[N, K]`, its columns in the model's order."""
        return unsorted(self.affine().dequantize(), self.order)

    def cut(self, size: int) -> GroupAffine:
        """The same weight in groups of `size`, a divisor of `unit`: scales and offsets repeated."""
        uncut = self.affine()
        scale, offset = (self._repeat(values, size) for values in (uncut.scale, uncut.offset))
        return GroupAffine(uncut.codes, scale, offset, self.bits, size)

    def _repeat(self, values: Tensor, size: int) -> Tensor:
        """Repeat one value per group for its smaller groups; a tail group has fewer of them."""
        assert self.unit % size == 0, f"{self.name}: {size} does not divide {self.unit}"
        k = self.site.k
        times = min(self.group_size, k) // size
        return values.repeat_interleave(times, dim=1)[:, : group_count(k, size)].contiguous()

    def cut_zero_points(self, size: int) -> Tensor:
        """`zero_points` of the smaller groups of `cut`."""
        return self._repeat(self.zero_points(), size)

    def zero_points(self) -> Tensor:
        """The zero-points `[N, L]` as uint8.

        Raises:
            UnsupportedError: one of them is not an integer from 0 to 2^bits − 1.
        """
        scale, offset = self.parameters()
        is_integer = has_integer_zero_points(scale, offset, self.bits)
        if not bool(is_integer.all()):
            part = float((~is_integer).double().mean())
            raise UnsupportedError(
                f"zero-points have to be integers from 0 to {2**self.bits - 1} in this "
                f"format, and {part:.1%} of this layer's are not: rounding them would change the "
                "model",
                where=self.name,
                hint="a folded QA-LoRA adapter makes them real: use target gguf, mlx or hqq, "
                "which hold them, or a training variant with integer zero-points",
            )
        return (-offset.double() / scale.double()).round().to(torch.uint8)


Misfit = Callable[[Layer], str]
"""Why a format cannot hold the codes of a layer; empty if it can."""


def refuse_if_none_fits(layers: tuple[Layer, ...], misfit: Misfit) -> None:
    """Refuse to write a quantized checkpoint in which every layer would be stored as floats.

    Raises:
        UnsupportedError: the format cannot hold the codes of any layer.
    """
    if layers and all(map(misfit, layers)):
        raise UnsupportedError(
            f"the format cannot hold the codes of any layer: {misfit(layers[0])}",
            where=layers[0].name,
            hint="quantize with other bits or --group-size, or use target float or safetensors",
        )


def refuse_transposed(layers: tuple[Layer, ...], reader: str) -> None:
    """Refuse weights that the model stores `[K, N]`, as GPT-2 does.

    Raises:
        UnsupportedError: there is one.
    """
    for layer in layers:
        if layer.site.transposed:
            raise UnsupportedError(
                f"the model stores this weight as [K, N], which {reader} does not read on codes",
                where=layer.name,
                hint="target float or safetensors writes it",
            )


def refuse_sorted(layers: tuple[Layer, ...], misfit: Misfit, reader: str) -> None:
    """Refuse codes in activation order: without the order, a reader would permute the columns.

    Raises:
        UnsupportedError: a layer whose codes are written has such an order.
    """
    for layer in layers:
        if layer.order is not None and not misfit(layer):
            raise UnsupportedError(
                f"the weight was quantized in activation order, and {reader} has no place for it",
                where=layer.name,
                hint="target float writes the weight as floats; safetensors keeps its codes, and "
                "so does gptq if all zero-points are integers",
            )


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a program for a checkpoint.

    Attributes:
        layers: The quantized weights, in graph order.
        floats: All other parameters and buffers, by name; they may be lazy.
        left_out: Weights that the model has and the program does not.
        description: The description of the model, if it was given.
        is_untied: Whether tensors that the model ties have different values: a quantized head and
            an embedding table in float.
    """

    layers: tuple[Layer, ...]
    floats: dict[str, Tensor]
    left_out: tuple[str, ...]
    description: Description | None
    is_untied: bool = False

    def float_values(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the floats, one after another."""
        for name, tensor in track(list(self.floats.items()), "write floats"):
            yield name, materialize(tensor).detach()

    def untied(self) -> dict[str, Any]:
        """The entry of `config.json` that unties the weights, if they are not tied any more."""
        return {"tie_word_embeddings": False} if self.is_untied else {}

    def lacks(self, name: str) -> bool:
        """Whether the program does not have one of `capability.PROPERTIES`."""
        some = {
            "codes of 4, 3 and 2 bits": any(layer.bits < 8 for layer in self.layers),
            "codes of 8 bits": any(layer.bits == 8 for layer in self.layers),
            "tail groups": any(layer.site.k % layer.group_size for layer in self.layers),
            "activation order": any(layer.order is not None for layer in self.layers),
            "other architectures": False,  # such a model is refused
        }
        return not some.get(name, True)

    def notes(self) -> tuple[str, ...]:
        """Notes for the report."""
        if not self.left_out:
            return ()
        names = ", ".join(self.left_out[:3])
        return (f"{len(self.left_out)} weights that the graph does not read are left out: {names}",)


def read_checkpoint(program: Program, description: Description | None) -> Checkpoint:
    """Sort the tensors of a folded or quantized program by the names that the model gives them.

    Args:
        program: Without adapters.
        description: Determines which name of a tied tensor is the first, and which buffers the
            model's checkpoint holds. Without it, every buffer is written.

    Raises:
        PreconditionError: the program is at another stage.
        UnsupportedError: a weight is a slice of a parameter, or a stack of experts.
        UserInputError: the description is of another model.
    """
    if program.stage not in (FOLDED, QUANTIZED):
        raise PreconditionError(
            f"a program at stage {program.stage} cannot be written as a checkpoint",
            hint="fold its adapters first: qc.fold_adapters(program), or `fold RUN`",
        )
    tensors = program.tensors()
    layers = tuple(_layers(program, tensors))
    on_codes = {f"{layer.site.path}.{part}" for layer in layers for part in _PARTS}
    names = _first_names(program, description)
    floats = {}
    for name, tensor in tensors.items():
        first = names.get(name, name)
        stored = description is None or first in description.shapes
        if name not in on_codes and (stored or isinstance(tensor, nn.Parameter)):
            floats[first] = tensor
    unused = [site.weight for site in program.plan if site.kind == UNUSED]
    if description is None:
        return Checkpoint(layers, floats, tuple(dict.fromkeys(unused)), None)
    shapes = _shapes(layers, floats)
    _check_names(shapes, description)
    untied = any(alias in shapes and first in shapes for alias, first in description.ties.items())
    found = {description.ties.get(name, name) for name in shapes}
    left_out = tuple(name for name in description.shapes if name not in found)
    return Checkpoint(layers, floats, left_out, description, untied)


def _layers(program: Program, tensors: dict[str, Tensor]) -> Iterator[Layer]:
    orders = column_orders(program)
    for site in program.plan.weights_to_quantize():
        if site.bits is None:
            continue
        if site.kind not in _PLAIN_KINDS or site.experts or not site.weight.endswith(WEIGHT):
            raise UnsupportedError(
                f"a weight of kind {site.kind} ({site.weight}) cannot be stored in a checkpoint",
                where=site.name,
                hint="targets ort and onnx hold it; or exclude it when the model is quantized: "
                f"finetune --exclude {site.name}",
            )
        name = site.name if site.kind == EMBEDDING else site.weight.removesuffix(WEIGHT)
        parts = [tensors[f"{site.path}.{part}"] for part in CODE_NAMES]
        yield Layer(name, site, (parts[0], parts[1], parts[2]), orders.get(site.path))


def _first_names(program: Program, description: Description | None) -> dict[str, str]:
    """Name in the program → the model's first name for the tensor, where the two differ."""
    names = {}
    for site in program.plan:  # a table is named by its owner, not by the head that is tied to it
        if site.kind == EMBEDDING and site.bits is None:
            names[site.weight] = f"{site.name}{WEIGHT}"
    if description is not None:
        names |= description.ties
    return names


def _shapes(layers: tuple[Layer, ...], floats: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name → shape of all weights, as the model has them."""
    shapes = {name: tuple(tensor.shape) for name, tensor in floats.items()}
    for layer in layers:
        shape = (layer.site.n, layer.site.k)
        shapes[f"{layer.name}{WEIGHT}"] = shape[::-1] if layer.site.transposed else shape
    return shapes


def _check_names(shapes: dict[str, tuple[int, ...]], description: Description) -> None:
    """Compare names and shapes with those of the model.

    Raises:
        UserInputError: they differ; the first difference is named.
    """
    for name, shape in shapes.items():
        wanted = description.shapes.get(description.ties.get(name, name))
        if wanted != shape:
            has = "no such tensor" if wanted is None else f"{list(wanted)}"
            raise UserInputError(
                f"the program has {name} of shape {list(shape)}, and the described model has {has}",
                where=name,
                hint="give the model that the program was made from",
            )


def check_half_range(name: str, what: str, values: Tensor) -> None:
    """Refuse values that float16 cannot hold.

    Raises:
        UserInputError: one of them is beyond ±65504.
    """
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest > FLOAT16_MAX:
        raise UserInputError(
            f"the {what} reaches {largest:.6g}, and float16 holds at most {FLOAT16_MAX:.0f}",
            where=name,
            hint="use a target that keeps float32: mlx, hqq, float or safetensors",
        )


def stored_error(
    name: str, source: str, form: str, stored: Tensor, wanted: Tensor, remark: str = ""
) -> StoredTensor:
    """A row of the report: how much storing changed a tensor."""
    difference = float((stored.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    relative = difference / largest if largest else 0.0
    return StoredTensor(name, source, form, difference, relative, remark)


def stored_affine(
    name: str, form: str, affine: GroupAffine, scale: Tensor, offset: Tensor
) -> StoredTensor:
    """A row of the report on a quantized weight, whose scale and offset were rounded."""
    exact, stored = (
        replace(affine, scale=parts[0].double(), offset=parts[1].double())
        for parts in ((affine.scale, affine.offset), (scale, offset))
    )
    return stored_error(name, name, form, stored.dequantize(), exact.dequantize())
