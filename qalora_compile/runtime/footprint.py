"""The memory use of one exported language model, measured in a separate process.

python -m qalora_compile.runtime.footprint edge/model.onnx 128 [--library]
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from qalora_compile.errors import QaloraError
from qalora_compile.runtime.language_model import LanguageModel
from qalora_compile.runtime.session import open_session

_NEW_TOKENS = 8
_LIBRARY = "--library"


def footprint(path: Path, *, prompt: int, library: bool) -> int:
    """Peak resident bytes that a session on `path` adds, with `prompt` tokens and 8 new ones.

    Raises:
        QaloraError: the measuring process failed.
    """
    words = [str(path), str(prompt), *([_LIBRARY] if library else [])]
    command = [sys.executable, "-m", __name__, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise QaloraError(f"measuring {path.name} failed", where=done.stderr.strip()[-300:])
    return int(done.stdout.split()[-1])


def main(arguments: list[str]) -> None:
    """Print the bytes."""
    before = resident_memory()
    model = LanguageModel(open_session(arguments[0], library=_LIBRARY in arguments))
    for _ in model.generate([1] * int(arguments[1]), max_new_tokens=_NEW_TOKENS):
        pass
    print(peak_memory() - before)


def peak_memory() -> int:
    """Peak resident bytes so far; 0 if the system does not report them."""
    try:  # not getrusage, which on Linux includes the memory before exec
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def resident_memory() -> int:
    """Bytes that are resident now; 0 if the system does not report them."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    import resource

    return pages * resource.getpagesize()


def time_tokens(model: LanguageModel, prompt: int, count: int) -> tuple[float, float]:
    """Seconds for a prompt of that length and per each of `count` further tokens (0 if none)."""
    import numpy as np

    ids = np.ones((1, prompt), np.int64)
    begin = time.perf_counter()
    _, cache = model.step(ids, np.ones_like(ids), model.empty_cache())
    between = time.perf_counter()
    for total in range(prompt + 1, prompt + count + 1):
        _, cache = model.step(ids[:, :1], np.ones((1, total), np.int64), cache)
    return between - begin, (time.perf_counter() - between) / max(count, 1)


if __name__ == "__main__":
    main(sys.argv[1:])
