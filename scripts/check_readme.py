"""Run what the README shows, and the examples.

Fenced blocks behind a line `<!-- ci: run -->` are run in order in one scratch folder: `bash` blocks
by bash with this environment first in PATH, `python` blocks in one Python process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"<!-- ci: run -->\s*```(bash|python)\n(.*?)```", re.DOTALL)
NOT_HERE = {"demo.py", "assets.py"}
"""Examples that CI runs in a step of their own, or that are no programs."""


def main() -> None:
    """Run the blocks, then the examples."""
    blocks = BLOCK.findall((ROOT / "README.md").read_text("utf-8"))
    if not blocks:
        raise SystemExit("README.md has no block marked to run")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    python = "\n".join(code for kind, code in blocks if kind == "python")
    shell = [code for kind, code in blocks if kind == "bash"]
    with tempfile.TemporaryDirectory() as scratch:
        if python:
            print("--- README: python", flush=True)
            subprocess.run([sys.executable, "-c", python], check=True, cwd=scratch, env=environment)
        for code in shell:
            print(f"--- README: {code.splitlines()[0]}", flush=True)
            command = ["bash", "-euo", "pipefail", "-c", code]
            subprocess.run(command, check=True, cwd=scratch, env=environment)
        for example in sorted((ROOT / "examples").glob("*.py")):
            if example.name not in NOT_HERE:
                print(f"--- {example.name}", flush=True)
                subprocess.run([sys.executable, str(example)], check=True, cwd=scratch)


if __name__ == "__main__":
    main()
