"""Reading and writing safetensors files: complete, the headers only, or single tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.files import scratch_file
from qalora_compile.ir.finite import check_sound
from qalora_compile.ir.lazy_tensor import make_lazy
from qalora_compile.ir.torch_internals import FakeTensorMode
from qalora_compile.untrusted.element_types import PROGRAM_TYPES
from qalora_compile.untrusted.safetensors_header import check_types, read_header

_SMALL_ELEMENTS = 4096
_DTYPES = {kind.safetensors: getattr(torch, kind.name) for kind in PROGRAM_TYPES}
"""Names of dtypes in safetensors → torch dtypes."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file under a temporary name, then rename it.

    Raises:
        OutputError: the file cannot be written.
    """
    with scratch_file(path) as scratch:
        # Views that overlap without being equal must be copied: safetensors refuses shared memory.
        save_file({n: t.detach().contiguous().clone() for n, t in tensors.items()}, scratch)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserInputError: it is missing, truncated or not a safetensors file.
        UnsupportedError: a tensor is of a type that this package cannot use.
    """
    check_types(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserInputError(
            f"{path.name} is truncated or not a safetensors file: {error}", where=str(path)
        ) from error


def lazy_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; large ones are deferred and read on demand.

    Raises:
        UserInputError: the file is missing, truncated or not a safetensors file.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return {
        name: read_tensor(path, name)
        if like.numel() <= _SMALL_ELEMENTS
        else make_lazy(partial(read_tensor, path, name), like, mode, partial(read_rows, path, name))
        for name, like in read_headers(path).items()
    }


def read_headers(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the meta device: shapes and dtypes, no values.

    Raises:
        UserInputError: the file is missing or broken, or holds a type that this package cannot use.
    """
    found = {}
    with open_tensors(path) as file:
        parts = {name: file.get_slice(name) for name in sorted(file.keys())}
        for name, part in parts.items():
            if part.get_dtype() not in _DTYPES:
                raise UserInputError(
                    f"{name} is of type {part.get_dtype()}",
                    where=str(path),
                    hint=f"known: {', '.join(_DTYPES)}",
                )
            dtype = _DTYPES[part.get_dtype()]
            found[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    return found


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file, in memory of its own.

    Raises:
        UserInputError: the file is missing or broken, or has no such tensor, or the tensor holds
            NaN or infinite values.
    """
    return _read(path, name, lambda file: file.get_tensor(name))


def read_rows(path: Path, name: str, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of one tensor of a safetensors file, in memory of their own.

    Raises:
        UserInputError: the file is missing or broken, or has no such tensor.
    """
    return _read(path, name, lambda file: file.get_slice(name)[start:stop])


def _read(path: Path, name: str, read: Callable[[Any], Tensor]) -> Tensor:
    with open_tensors(path) as file:
        try:
            values = read(file)
        except SafetensorError as error:
            raise UserInputError(
                f"{path.name}: cannot read {name}: {error}", where=str(path)
            ) from error
        check_sound(name, values, path)
        return values.clone()  # the file's memory is given back when it is closed


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, open.

    Raises:
        UserInputError: it is missing, truncated or not a safetensors file.
    """
    read_header(path)
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserInputError(
            f"{path.name} is truncated or not a safetensors file: {error}",
            where=str(path),
            hint="it may be truncated: fetch or write it again",
        ) from error
    with opened as file:
        yield file
