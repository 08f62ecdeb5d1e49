"""`torch.export` with as many dynamic axes as the model allows, and errors in the user's terms."""

from __future__ import annotations

import inspect
import io
import linecache
import logging
import os
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from qalora_compile.capture.rope import traceable_rope
from qalora_compile.errors import CaptureError, UserInputError
from qalora_compile.ir.torch_internals import pytree

_SPECIALIZED = re.compile(r"marked L\['(\w+)'\]((?:\[[^\]]*\]|\.\w+(?!\w*\())*)\.size\(\)\[(\d+)\]")
_NOT_THE_MODEL = (
    str(Path(__file__).parent),
    str(Path(torch.__file__).parent),
    str(Path(inspect.__file__).parent / "contextlib.py"),
    str(Path(inspect.__file__).parent / "functools.py"),
)
_HINTS = (
    (
        ("cache_utils",),
        "the model returns a key-value cache: pass use_cache=False among the keyword inputs",
    ),
    (
        ("GuardOnDataDependentSymNode", "data-dependent", "DataDependent"),
        "the model's control flow depends on tensor values: use torch.where or "
        "torch.cond, or remove that part from the captured module",
    ),
    (
        ("_local_scalar_dense", ".item()", "tolist"),
        "a tensor becomes a Python number here: keep it a tensor, or pass the number as an input",
    ),
    (
        ("Constraints violated", "ConstraintViolation"),
        "an axis of dynamic_shapes cannot vary in this model: leave it out of dynamic_shapes, or "
        "pass dynamic_shapes=None to let capture find out",
    ),
    (
        ("Unsupported input type", "pytree"),
        "pass tensors, numbers, booleans, strings or containers of them; register other types "
        "with torch.export.register_dataclass or torch.utils._pytree.register_pytree_node",
    ),
)
_HINT = (
    "use tensor operators that torch.export can trace on this line, or capture only a part "
    "of the model"
)


def export_model_graph(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    notes: list[str],
) -> ExportedProgram:
    """Export with the given dynamic shapes, or with as many dynamic axes as the model allows.

    By default, batch and sequence are first requested as dynamic. An axis that the model
    specializes is left for torch to fix, with a note. If that fails too, all shapes are fixed.

    Raises:
        CaptureError: `torch.export` refused the model; the error names the line of the model.
        UserInputError: the example inputs do not fit the model.
    """
    if dynamic_shapes is not None:
        return _export(model, args, kwargs, dynamic_shapes)
    shapes = _default_shapes(model, args, kwargs)
    try:
        return _export(model, args, kwargs, shapes)
    except CaptureError as error:
        first = error
    constants = _specialized(str(first.__cause__))
    try:
        exported = _export(model, args, kwargs, _relax(shapes))
    except CaptureError:
        exported = _export(model, args, kwargs, None)  # no axis can vary, or the model fails at all
        notes.append(f"all shapes are fixed: capture with dynamic ones failed ({first.what})")
        return exported
    notes += [
        f"{name}: axis {axis} is fixed: the model's code makes its size a constant"
        for name, axis in constants
    ]
    return exported


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> ExportedProgram:
    try:
        with warnings.catch_warnings(), traceable_rope(model), _without_dumps():
            # RNNs also hold their parameters in a list; tracing replaces both, which is harmless
            warnings.filterwarnings("ignore", "The tensor attributes .* were assigned")
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise _capture_error(model, error) from error


@contextmanager
def _without_dumps() -> Iterator[None]:
    """Keep torch from printing graphs and tracebacks before the error that this module raises.

    Whoever sets TORCH_LOGS wants to see them.
    """
    if "TORCH_LOGS" in os.environ:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _specialized(message: str) -> list[tuple[str, int]]:
    """Input and axis of each specialized size, from torch.export's message."""
    found = ((name + path, int(axis)) for name, path, axis in _SPECIALIZED.findall(message))
    return sorted(dict.fromkeys(found))


def _relax(shapes: Any) -> Any:
    """The same axes, for torch to keep dynamic or to fix."""
    return pytree.tree_map(lambda d: Dim.AUTO if d is Dim.DYNAMIC else d, shapes)


def _default_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dynamic axes to request: batch for all tensors, also the second axis of sequences."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise UserInputError(
            f"the example inputs do not fit the model: {error}", where=type(model).__name__
        ) from error
    return {name: pytree.tree_map(_leaf_shapes, value) for name, value in bound.arguments.items()}


def _leaf_shapes(leaf: Any) -> Any:
    """Axes of one input that should vary; torch treats sizes 0 and 1 as constants."""
    if not isinstance(leaf, Tensor):
        return None
    axes = {0: Dim.DYNAMIC} if leaf.dim() else {}
    if leaf.dim() > 1 and (not leaf.is_floating_point() or leaf.dim() == 3):
        axes[1] = Dim.DYNAMIC
    elif leaf.dim() == 2:
        axes[1] = Dim.AUTO  # the length of a waveform varies, the number of features does not
    return {axis: dim for axis, dim in axes.items() if leaf.shape[axis] > 1} or None


def check_example(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the model on its example, in evaluation mode, so that its own errors come first.

    A model without values (on the device `meta`) is not run.

    Raises:
        UserInputError: it does not run; the error names the line of the model.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(*args, **kwargs)
    except Exception as error:
        raise UserInputError(
            f"the model does not run on the example: {type(error).__name__}: {_first_line(error)}",
            where=_line_of(model, error),
            hint="give capture_model the inputs that the model takes",
        ) from error
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]


def _line_of(model: nn.Module, error: Exception) -> str:
    """The last line of the user's own code in a traceback; the model's class if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((*_NOT_THE_MODEL, "<"))]
    if not own:
        return type(model).__name__
    last = own[-1]
    code = linecache.getline(last.filename, last.lineno or 0).strip()
    return f"{last.filename}:{last.lineno}: {code}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


def _capture_error(model: nn.Module, error: Exception) -> CaptureError:
    """The error with the line of the user's model at which export stopped, and a hint."""
    text = f"{type(error).__name__} {error}"
    hint = next((h for keys, h in _HINTS if any(key in text for key in keys)), _HINT)
    return CaptureError(
        f"torch.export cannot capture {type(model).__name__}: "
        f"{type(error).__name__}: {_first_line(error)}",
        where=_line_of(model, error),
        hint=hint,
    )
