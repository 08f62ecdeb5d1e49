"""Build the wheel, check what is in it, and import every module of it without any extra."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE = ("torch==2.13.0", "numpy", "rich", "safetensors")
IMPORT_ALL = """
import importlib, pkgutil, sys
import qalora_compile
names = [m.name for m in pkgutil.walk_packages(qalora_compile.__path__, "qalora_compile.")]
names = [n for n in names if not n.endswith("__main__")]
for name in names:
    importlib.import_module(name)
assert "transformers" not in sys.modules and "onnx" not in sys.modules
print(len(names), "modules import without extras")
"""


def run(*command: str) -> None:
    """Run a command, and stop the script where it fails."""
    subprocess.run(command, check=True, cwd=ROOT)


def check_contents(wheel: Path) -> None:
    """The wheel holds one package, its type marker, and nothing else."""
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    extra = {name for name in top if not name.endswith(".dist-info")} - {"qalora_compile"}
    if extra or "qalora_compile/py.typed" not in names:
        raise SystemExit(f"the wheel holds {sorted(top)}, or misses py.typed")
    print(f"{wheel.name}: {len(names)} files, top-level name qalora_compile")


def main() -> None:
    """Build, look inside, install apart, import."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", scratch)
        (wheel,) = folder.glob("*.whl")
        check_contents(wheel)
        venv.create(folder / "venv", with_pip=True)
        python = str(folder / "venv" / "bin" / "python")
        quiet = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        run(python, *quiet, *CORE)
        run(python, *quiet, "--no-deps", str(wheel))
        subprocess.run([python, "-c", IMPORT_ALL], check=True, cwd=scratch)


if __name__ == "__main__":
    main()
