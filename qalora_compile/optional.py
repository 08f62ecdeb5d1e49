"""Imports on first use, of optional dependencies and of a package's own names."""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qalora_compile.errors import UnsupportedError


def require(module: str, *, extra: str | None, purpose: str) -> Any:
    """Import `module`, or raise an error that says how to install it.

    Args:
        module: Dotted module name, for example `"onnxruntime"`.
        extra: The extra of `qalora-compile` that depends on it; None: no extra does, and the
            package to install has the name of the module.
        purpose: What it is needed for, to complete "… is needed to".

    Raises:
        UnsupportedError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnsupportedError(
            f"{module} is needed to {purpose}, and it cannot be imported ({error})",
            hint=f"pip install 'qalora-compile[{extra}]'" if extra else f"pip install {module}",
        ) from error


def lazy_attribute(package: str, name: str, homes: Mapping[str, str]) -> Any:
    """An attribute of a package, imported on first use; for the package's `__getattr__`.

    Args:
        package: Name of the package.
        name: The attribute asked for.
        homes: Public name → module below the package that defines it.

    Raises:
        AttributeError: there is no such name; the nearest one is suggested.
    """
    if name not in homes:
        near = difflib.get_close_matches(name, homes, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}")
    return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)


@contextmanager
def quiet_logger(name: str) -> Iterator[None]:
    """Silence the logger of a library in the block, except for errors."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
