"""Import of optional dependencies, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from typing import Any

from qalora_compile.errors import UnsupportedError


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import `module`, or say which extra of this package brings it.

    Args:
        module: Dotted module name, for example `"onnxruntime"`.
        extra: The extra of `qalora-compile` that depends on it.
        purpose: What it is needed for, as the end of "… is needed to".

    Raises:
        UnsupportedError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnsupportedError(
            f"{module} is needed to {purpose}, and it cannot be imported ({error})",
            hint=f"pip install 'qalora-compile[{extra}]'",
        ) from error
