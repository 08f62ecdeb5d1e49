"""Programs in children of a process that has imported the libraries, but nothing of the package.

Their import takes longer than most programs that the documentation shows.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable

LIBRARIES = (
    "torch.onnx",
    "onnxruntime",
    "onnxscript",
    "transformers",
    "transformers.modeling_utils",
)


def import_libraries() -> None:
    """Import what children then have."""
    for library in LIBRARIES:
        importlib.import_module(library)


def fork(work: Callable[[], None], environment: dict[str, str], folder: str) -> int:
    """Do some work in a child."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(folder)
            os.environ.update(environment)
            work()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else bool(end.code)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
