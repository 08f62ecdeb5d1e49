"""The custom-operator library: its location, and its registration with sessions.

The library is a shared object that is built from `native/` when the package is installed. It adds
the operator `qalora::GroupQuantLinear` to any ONNX Runtime from 1.18 on. Everything else in the
package works without it.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

from qalora_compile.errors import UnsupportedError

_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
LIBRARY_NAME = f"libqalora_ort{_SUFFIX}"


def library_path() -> Path:
    """The custom-operator library of this installation.

    Raises:
        UnsupportedError: it was not built.
    """
    path = Path(__file__).parent / "lib" / LIBRARY_NAME
    if not path.is_file():
        raise UnsupportedError(
            "the custom-operator library was not built when the package was installed",
            where=str(path),
            hint="install a C++17 compiler (g++ or clang++), then the package again; models of "
            "target ort also run without the library, on stock kernels",
        )
    return path


def register(session_options: Any) -> None:
    """Register the library's operators with session options.

    Args:
        session_options: An `onnxruntime.SessionOptions`.

    Raises:
        UnsupportedError: the library was not built, or ONNX Runtime refuses it.
    """
    path = library_path()
    try:
        session_options.register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise UnsupportedError(
            f"ONNX Runtime refuses the custom-operator library: {error}",
            where=str(path),
            hint="use ONNX Runtime 1.18 or newer",
        ) from error


def kernel_level() -> str | None:
    """The kernels that are used on this CPU.

    One of `"scalar"`, `"avx2"`, `"avxvnni"`, `"avx512"`, `"amx"`, `"neon"` and `"i8mm"`.

    None if the library was not built. The environment variable `QALORA_KERNEL`, which is read when
    a session is created, selects another one of `kernel_levels`.
    """
    levels = kernel_levels()
    return levels[-1] if levels else None


def kernel_levels() -> tuple[str, ...]:
    """All levels of kernels that this CPU supports, slowest first; empty without the library."""
    text = _text("QaloraKernelLevels")
    return tuple(text.split(",")) if text else ()


def kernel_note() -> str | None:
    """Why a level of kernels that this CPU has is not used; None if none is missing.

    The level `amx` is tried before it is offered: Linux has to give the process the tiles of the
    CPU, and a fixed product on them has to be right.
    """
    return _text("QaloraKernelNote") or None


def library_version() -> str | None:
    """The version of the package that the library was built from; None without the library."""
    return _text("QaloraVersion")


def _text(function: str) -> str | None:
    """Call an exported function that returns a constant text; None without the library."""
    try:
        path = library_path()
    except UnsupportedError:
        return None
    call = getattr(ctypes.CDLL(str(path)), function)
    call.restype = ctypes.c_char_p
    call.argtypes = []
    text: bytes = call()
    return text.decode("ascii")
