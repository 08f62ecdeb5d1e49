"""`capture_model`: captures any `nn.Module` as a `Program` by `torch.export(strict=False)`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from qalora_compile.capture.export import check_example, export_model_graph
from qalora_compile.errors import CaptureError, UserInputError
from qalora_compile.ir.meta import PAST
from qalora_compile.ir.module import (
    ProgramModule,
    build_module,
    copy_graph,
    erase_unread,
    program_tensors,
)
from qalora_compile.ir.pattern import get_tensor
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import (
    InputLeaf,
    Signature,
    SizeRange,
    argument_names,
    dtype_name,
    input_spec,
    leaf_name,
    output_names,
    output_spec,
)
from qalora_compile.ir.site_plan import KEEP, UNUSED, Site, SitePlan
from qalora_compile.ir.stages import FLOAT
from qalora_compile.ir.tensor_identity import storage_key
from qalora_compile.ir.torch_internals import (
    ASSERT_METADATA,
    BatchNormBase,
    is_concrete_int,
    pytree,
    size_bounds,
)

_DROPOUTS = (torch.ops.aten.dropout.default, torch.ops.aten.dropout_.default)


AxisNames = Mapping[str, Mapping[int, str]]
"""Input → axis → name."""

_ASSUMED_LEAST = 2
_NO_LIMIT = 2**31


def capture_model(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Program:
    """Capture a model to a program at stage `float`.

    The program shares the model's weights and starts in the model's own mode (train or eval).

    Args:
        model: Any module that `torch.export` accepts, a `torch.fx` GraphModule included.
        args: Example positional arguments. Give dynamic dimensions a size of 2 or more: torch
            treats 0 and 1 as constants.
        kwargs: Example keyword arguments.
        dynamic_shapes: As for `torch.export.export`. None makes the first dimension of every tensor
            and the second of sequences dynamic if the model allows it; `notes` of the program name
            those that are not, and why.

    Raises:
        CaptureError: `torch.export` refused the model; the error names the line of the model.
        UserInputError: `model` is not a module, no example input was given, or the model does not
            run on it.
    """
    if not isinstance(model, nn.Module):
        raise UserInputError(f"the model is a {type(model).__name__}, not a torch.nn.Module")
    args, kwargs = tuple(args), dict(kwargs or {})
    check_example(model, args, kwargs)
    notes: list[str] = []
    module = _capture_both_modes(model, args, kwargs, dynamic_shapes, notes)
    return make_program(model, module, args, kwargs, notes)


def make_program(
    model: nn.Module,
    module: ProgramModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    notes: Sequence[str] = (),
    axes: AxisNames | None = None,
) -> Program:
    """A program at stage `float` from the captured graph of a model.

    Args:
        model: The captured model.
        module: Its graph.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        notes: Notes of the capture.
        axes: Names of dynamic axes without a limit; names of others are chosen.
    """
    graph = module.graph
    signature = _read_signature(graph, args, kwargs, axes or {})
    return Program(
        module=module,
        stage=FLOAT,
        plan=SitePlan(tuple(_unused_weights(model, module))),
        signature=signature,
        example=_canonical_example(graph, args, kwargs),
        notes=(*notes, *_static_notes(signature)),
    )


def _unused_weights(model: nn.Module, module: ProgramModule) -> Iterator[Site]:
    """Plan rows for the weights of the model that the graph does not read."""
    read = {storage_key(tensor) for tensor in program_tensors(module).values()}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.dim() >= 2 and storage_key(parameter) not in read:
            yield Site(
                name=name.removesuffix(".weight"),
                path=name.removesuffix(".weight"),
                weight=name,
                storage=-1 - number,
                kind=UNUSED,
                k=0,
                n=0,
                dtype=dtype_name(parameter.dtype),
                decision=KEEP,
                reason="the captured forward pass does not read it; it is omitted",
            )


def _capture_both_modes(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    notes: list[str],
) -> ProgramModule:
    """A module with training and evaluation mode, set to the model's own mode.

    A graph captured in evaluation mode lacks attention dropout, so a model without batch statistics
    is captured in training mode. That graph is used if in evaluation mode it computes the same as
    the model. Otherwise the model's own mode is captured.
    """
    own_mode = model.training
    if not own_mode and not any(isinstance(m, BatchNormBase) for m in model.modules()):
        modes = {name: m.training for name, m in model.named_modules()}
        model.train()
        try:
            module = to_module(
                export_model_graph(model, args, kwargs, dynamic_shapes, notes), training=True
            )
        except CaptureError:
            module = None
        finally:
            for name, submodule in model.named_modules():
                submodule.training = modes[name]
        if module is not None and _agrees(model, module.train(False), args, kwargs):
            return module
        notes.clear()
    return to_module(
        export_model_graph(model, args, kwargs, dynamic_shapes, notes), training=own_mode
    )


def to_module(exported: ExportedProgram, *, training: bool) -> ProgramModule:
    """The exported graph as a module of this package that shares its tensors."""
    with torch.no_grad():
        unlifted = exported.module(check_guards=False)
    graph = copy_graph(unlifted.graph)
    _drop_metadata_checks(graph)
    tensors = {
        str(node.target): tensor
        for node in graph.nodes
        if node.op == "get_attr" and (tensor := get_tensor(unlifted, str(node.target))) is not None
    }
    return build_module(graph, tensors, submodules=unlifted, training=training)


def _agrees(
    model: nn.Module, module: ProgramModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether model and graph, both in evaluation mode, return the same on the example."""
    _, call_kwargs = _canonical_example(module.graph, args, kwargs)
    with torch.no_grad():
        expected = pytree.tree_leaves(model(*args, **kwargs))
        found = pytree.tree_leaves(module(*args, *call_kwargs.values()))
    return len(expected) == len(found) and all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else a == b
        for a, b in zip(expected, found, strict=True)
    )


def _drop_metadata_checks(graph: torch.fx.Graph) -> None:
    """Remove export's dtype and device assertions: `Signature.check` guards the inputs."""
    for node in list(graph.nodes):
        if node.target is ASSERT_METADATA:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _read_signature(
    graph: torch.fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any], axes: AxisNames
) -> Signature:
    names = argument_names(graph)
    paths, _ = pytree.tree_flatten_with_path(_canonical_example(graph, args, kwargs))
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    leaves, sizes = [], _DimNames(axes)
    for (path, leaf), node in zip(paths, placeholders, strict=True):
        name = leaf_name(path, names)
        if isinstance(leaf, Tensor):
            value = node.meta.get("val")
            shape = value.shape if isinstance(value, Tensor) else leaf.shape
            dims = tuple(sizes.name(d, axis, name, leaf) for axis, d in enumerate(shape))
            leaves.append(InputLeaf(name, dtype_name(leaf.dtype), dims))
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            leaves.append(InputLeaf(name, None, (), leaf))
        else:
            raise UserInputError(
                f"the input {name} is a {type(leaf).__name__}",
                hint="pass tensors, numbers, booleans, strings or containers of them",
            )
    return Signature(tuple(leaves), output_names(output_spec(graph)), sizes.ranges())


class _DimNames:
    """Readable names for symbolic sizes: the given ones, otherwise one for each symbol.

    Leading axes of equal example size are all `batch`, although export may keep separate symbols
    where broadcasting would allow different sizes.
    """

    def __init__(self, given: AxisNames) -> None:
        self._given = given
        self._names: dict[str, str] = {}
        self._batch: int | None = None
        self._limits: dict[str, tuple[int, int | None]] = {}

    def name(self, size: int | torch.SymInt, axis: int, leaf: str, tensor: Tensor) -> int | str:
        """A fixed size as a number, a symbolic one as a name."""
        if not isinstance(size, torch.SymInt) or is_concrete_int(
            size
        ):  # a symbol that export has specialized is a number
            return int(size)
        symbol = str(size)
        name = self._given.get(leaf, {}).get(axis) or self._names.get(symbol)
        if name is None or symbol not in self._names:
            given = name is not None
            name = name or self._choose(axis, leaf, tensor)
            self._names[symbol] = name
            if not given:
                self._limit(name, size)
        return name

    def ranges(self) -> tuple[SizeRange, ...]:
        """Limits of the named axes that have any."""
        return tuple(
            SizeRange(name, low, high)
            for name, (low, high) in self._limits.items()
            if low > 0 or high is not None
        )

    def _limit(self, name: str, size: torch.SymInt) -> None:
        """Narrow an axis to the sizes for which export's branches were taken."""
        bounds = size_bounds(size)
        # Export assumes that dynamic axes are 2 or more; that alone is not a branch of the model.
        low = 0 if bounds.lower <= _ASSUMED_LEAST else int(bounds.lower)
        high = None if bounds.upper >= _NO_LIMIT else int(bounds.upper)
        other_low, other_high = self._limits.get(name, (0, None))
        highs = [h for h in (high, other_high) if h is not None]
        self._limits[name] = (max(low, other_low), min(highs, default=None))

    def _choose(self, axis: int, leaf: str, tensor: Tensor) -> str:
        if axis == 0 and self._batch in (None, tensor.shape[0]):
            self._batch = tensor.shape[0]
            return "batch"
        if axis == 1 and tensor.dim() <= 3:
            taken = "sequence" in self._names.values()
            return f"{leaf}_sequence" if taken else "sequence"
        return f"{leaf}_dim_{axis}"


def _canonical_example(
    graph: torch.fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example with keyword arguments in the captured order."""
    positional = input_spec(graph).children()[0].num_children
    order = argument_names(graph)[positional:]
    return args, {name: kwargs[name] for name in order}


def to_evaluation_module(exported: ExportedProgram) -> ProgramModule:
    """The graph of a model exported in evaluation mode, without its dropouts."""
    module = to_module(exported, training=False)
    graph = copy_graph(module.graph)
    # fx keeps random operators, but dropout has no effect in evaluation mode
    erase_unread(n for n in graph.nodes if n.target in _DROPOUTS)
    return module.rebuild(graph, program_tensors(module))


def _is_image(leaf: InputLeaf) -> bool:
    """Whether an input is `[batch, channels, height, width]` with fixed height and width."""
    if len(leaf.shape) != 4 or leaf.name.startswith(PAST) or "float" not in str(leaf.dtype):
        return False
    return all(isinstance(size, int) and size > 1 for size in leaf.shape[2:])


def _static_notes(signature: Signature) -> list[str]:
    """Notes on leading axes that are fixed because of size 0 or 1, and on images' sizes."""
    notes = []
    for leaf in signature.inputs:
        if leaf.dtype is None:
            continue
        if _is_image(leaf):
            notes.append(
                f"{leaf.name}: axes 2 and 3 are fixed at {leaf.shape[2]} × {leaf.shape[3]}; name "
                "them in dynamic_shapes where the model takes images of any size"
            )
        for axis, size in enumerate(leaf.shape[:2]):
            if size in (0, 1):
                notes.append(
                    f"{leaf.name}: axis {axis} is fixed at {size}; an example of size 2 or more "
                    "lets it vary"
                )
    return notes
