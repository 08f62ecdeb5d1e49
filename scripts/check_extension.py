"""Install the example extension into a temporary folder, and run its tests there.

The package is built without an index and without its dependencies, which this environment has. It
is found by its entry points only, like any installed extension.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "extension"
PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index")
LISTED = """
from qalora_compile.passes import available_passes
from qalora_compile.registry import QUANTIZERS, TARGETS
assert "remove-unit-scale" in available_passes()
assert "two-sigma" in QUANTIZERS.names() and "npz" in TARGETS.names()
import sys
assert not any(name.startswith("qalora_example") for name in sys.modules), "listing imports nothing"
print("the entry points are listed, and nothing of the extension is imported")
"""


def main() -> None:
    """Install, list, test."""
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "installed"
        shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__"))
        path = os.pathsep.join([str(target), str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path}
        tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"))
        for arguments in (
            (*PIP, "--no-deps", "--no-build-isolation", "--target", str(target), str(source)),
            ("-c", LISTED),
            (*tests, "--rootdir", str(source), str(source / "test_example.py")),
        ):
            command = [sys.executable, *arguments]
            done = subprocess.run(command, check=False, cwd=scratch, env=environment)
            if done.returncode:
                raise SystemExit(f"failed with {done.returncode}: {' '.join(command[:6])}")


if __name__ == "__main__":
    main()
