"""Apply an adapted program's plan to the model that it was captured from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from qalora_compile.eager.layers import PARTS, AdaptedLinear, AdaptedWeight, register_parts
from qalora_compile.eager.weights import Geometry, Piece, parametrize_weight
from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.adapters.find import find_adapters
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.pattern import get_tensor, match_linear
from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import KEEP, UNUSED, Site
from qalora_compile.ir.stages import ADAPTER_NAMES
from qalora_compile.ir.tensor_identity import storage_key

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Undo:
    """The changes made to a model, to be undone in reverse order."""

    steps: list[Callable[[], object]] = field(default_factory=list)

    def add(self, step: Callable[[], object]) -> None:
        """Record how to undo the last change."""
        self.steps.append(step)

    def run(self) -> None:
        """Restore the model."""
        while self.steps:
            self.steps.pop()()


def apply_adapters(model: nn.Module, annotated: Program, adapted: Program, undo: Undo) -> None:
    """Replace every quantized weight of `model` by the tensors of `adapted`, and freeze the rest.

    Args:
        model: What both programs were captured from; changed in place.
        annotated: The program with its plan, its weights still float.
        adapted: The same program, quantized and with adapters.
        undo: Records how to restore the model, also if this function fails halfway.

    Raises:
        UnsupportedError: a module reads one weight both quantized and in float, or has an attribute
            where our tensor must go; or the adapters keep zero-points integers.
    """
    weights = _adapted_weights(adapted)
    tensors = adapted.tensors()
    for parameter, rows in _rows_by_parameter(model, annotated):
        readings = {row.path: place for row, place in rows}
        parts = {path: {p: tensors[f"{path}.{p}"] for p in PARTS} for path in readings}
        kept = next(
            (s for s in adapted.plan if s.storage == rows[0][0].storage and _is_kept(s)), None
        )
        owners = _owners(model, parameter)
        linear = [
            owner
            for owner, name in owners
            if owner is not model and _is_linear(owner, name, readings)
        ]
        if kept is not None and not linear:
            raise UnsupportedError(
                f"the weight is quantized here but read in float by {kept.name}, and its module "
                "cannot give both",
                where=rows[0][0].name,
                hint="exclude it, or adapt the captured program instead of the module",
            )
        for owner in linear:
            (path,) = readings
            _replace(model, owner, weights[path], parts[path], undo)
        for path in readings:
            _hold(model, path, parts[path], undo)
        if kept is None:
            for owner, name in owners:
                if owner not in linear:
                    pieces = [
                        Piece(weights[path], model.get_submodule(path), place)
                        for path, place in readings.items()
                    ]
                    _check_dropout(rows[0][0], weights)
                    undo.add(parametrize_weight(owner, name, pieces))
    _freeze(model, undo)


def _check_dropout(site: Site, weights: dict[str, AdaptedWeight]) -> None:
    if weights[site.path].dropout:
        raise UnsupportedError(
            "adapter dropout acts on what a layer reads, and this module only takes a weight",
            where=site.name,
            hint="set dropout to 0, exclude the site, or train the captured program instead",
        )


def share_tensors(model: nn.Module, program: Program) -> Program:
    """The program with the model's own parameters, under the names that the model has now.

    Moving the model to another device or dtype then moves the program's parameters as well. A tied
    weight may no longer have the name that capture chose.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    by_storage = {storage_key(tensor): name for name, tensor in reversed(own.items())}
    tensors, renamed = {}, {}
    for name, tensor in program.tensors().items():
        new = name if name in own else by_storage.get(storage_key(tensor), name)
        renamed[name] = new
        tensors[new] = own.get(new, tensor)
    graph = program.copy_graph()
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = renamed.get(str(node.target), node.target)
    plan = program.plan.update(
        {s.name: {"weight": renamed[s.weight]} for s in program.plan if s.weight in renamed}
    )
    return program.evolve(graph=graph, tensors=tensors, plan=plan)


def _is_kept(site: Site) -> bool:
    return site.decision == KEEP and site.kind != UNUSED


def _adapted_weights(adapted: Program) -> dict[str, AdaptedWeight]:
    """How the weight of each path is computed, from the graph's own nodes."""
    found = {}
    for adapter in find_adapters(adapted.graph):
        if adapter.unlike_pooled:
            raise UnsupportedError(
                f"modules have no adapters that {adapter.unlike_pooled}",
                where=adapter.site,
                hint="adapt the captured program: qc.insert_adapters(program, adapter)",
            )
        site, own, layer = adapted.plan[adapter.site or ""], adapter.settings, adapter.layer
        found[site.path] = AdaptedWeight(
            layer.bits,
            layer.group_size,
            own.pool,
            own.scaling,
            site.k,
            getattr(torch, site.dtype),
            own.dropout,
        )
    return found


def _rows_by_parameter(
    model: nn.Module, annotated: Program
) -> list[tuple[nn.Parameter, list[tuple[Site, Geometry]]]]:
    """The quantized rows of each parameter of the model, with the geometry of each reading."""
    nodes = {site_of(node): node for node in annotated.graph.nodes}
    found: dict[nn.Parameter, list[tuple[Site, Geometry]]] = {}
    for site in annotated.plan.to_quantize():
        parameter = get_tensor(model, site.weight)
        linear = match_linear(nodes[site.name])
        if not isinstance(parameter, nn.Parameter) or linear is None:
            raise UnsupportedError(
                f"the model has no parameter {site.weight}",
                where=site.name,
                hint="adapt the captured program instead of the module",
            )
        place = Geometry.of(linear.matrix(parameter.detach()), parameter)
        found.setdefault(parameter, []).append((site, place))
    return list(found.items())


def _owners(model: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Every module that owns the parameter, and its name there."""
    return [
        (module, name)
        for module in model.modules()
        for name, value in module.named_parameters(recurse=False, remove_duplicate=False)
        if value is parameter
    ]


def _conv1d() -> type[nn.Module] | None:
    """GPT-2's transposed linear layer, if its library is imported."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def _is_flipped(module: nn.Module) -> bool:
    conv1d = _conv1d()
    return conv1d is not None and isinstance(module, conv1d)


def _is_linear(module: nn.Module, name: str, readings: dict[str, Geometry]) -> bool:
    """Whether a module is exactly a linear layer that reads the complete weight."""
    conv1d = _conv1d() if _is_flipped(module) else None
    forwards = [nn.Linear.forward, *([] if conv1d is None else [conv1d.forward])]
    plain = type(module).forward in forwards
    own = "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)
    if not plain or own or name != "weight" or len(readings) != 1:
        return False
    weight = module.weight
    assert isinstance(weight, Tensor)
    matrix = weight.t() if _is_flipped(module) else weight
    return next(iter(readings.values())) == Geometry.of(matrix, weight)


def _replace(
    model: nn.Module,
    old: nn.Module,
    weight: AdaptedWeight,
    parts: dict[str, Tensor],
    undo: Undo,
) -> None:
    """Replace a linear layer by an adapted one wherever the model uses it."""
    bias = old.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    new = AdaptedLinear(weight, parts, bias, flipped=_is_flipped(old)).train(old.training)
    for path, child in list(model.named_modules(remove_duplicate=False)):
        if child is old:
            parent_path, _, name = path.rpartition(".")
            parent = model.get_submodule(parent_path)
            setattr(parent, name, new)
            undo.add(partial(setattr, parent, name, old))


def _hold(model: nn.Module, path: str, parts: dict[str, Tensor], undo: Undo) -> None:
    """Register tensors below their path, so that a state dict has the names of the program."""
    holder = model
    for name in path.split("."):
        child = getattr(holder, name, None)
        if child is None:
            child = nn.Module()
            holder.add_module(name, child)
            undo.add(partial(delattr, holder, name))
        if not isinstance(child, nn.Module):
            raise _taken(path, name)
        holder = child
    if isinstance(holder, AdaptedLinear):
        return
    for part in PARTS:
        if hasattr(holder, part):
            raise _taken(path, part)
    register_parts(holder, parts)
    for part in PARTS:
        undo.add(partial(delattr, holder, part))


def _taken(path: str, name: str) -> UnsupportedError:
    return UnsupportedError(
        f"the module has an attribute {name} of its own, where the quantized weight must go",
        where=path,
        hint="exclude the site, or adapt the captured program instead of the module",
    )


def _freeze(model: nn.Module, undo: Undo) -> None:
    """Leave only the adapters trainable."""
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] not in ADAPTER_NAMES and parameter.requires_grad:
            parameter.requires_grad_(False)
            undo.add(partial(parameter.requires_grad_, True))
