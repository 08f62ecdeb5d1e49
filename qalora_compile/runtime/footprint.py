"""Memory of one exported language model, measured in a process of its own.

python -m qalora_compile.runtime.footprint edge/model.onnx 128 [--library]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from qalora_compile.errors import QaloraError
from qalora_compile.runtime.language_model import LanguageModel
from qalora_compile.runtime.memory import peak_memory, resident_memory
from qalora_compile.runtime.session import open_session

_NEW_TOKENS = 8
_LIBRARY = "--library"


def footprint(path: Path, *, prompt: int, library: bool) -> int:
    """Peak resident bytes that a session on `path` adds, with so long a prompt and 8 new tokens.

    Raises:
        QaloraError: the process failed.
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


if __name__ == "__main__":
    main(sys.argv[1:])
