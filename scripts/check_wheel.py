"""Build the wheel, check its contents, and import all its modules without any extra.

The wheel is installed in a new environment with the dependencies in its metadata and nothing else
(torch first, so that pip does not take a CUDA build). This shows dependencies that pyproject.toml
lacks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "qalora_compile"
TORCH = "torch==2.13.0"
LIBRARY = "libqalora_ort.dylib" if sys.platform == "darwin" else "libqalora_ort.so"
INSTALL = str(ROOT / "scripts" / "install.sh")
LOAD_LIBRARY = """
from qalora_compile.runtime import kernel_level
print("the operator library loads; kernels:", kernel_level())
"""
IMPORT_ALL = """
import importlib, importlib.metadata, importlib.util, pkgutil, sys
import qalora_compile
optional = "onnx onnxruntime onnxscript onnx_ir transformers gguf peft accelerate".split()
optional += ["grandalf", "matplotlib"]  # jinja2 comes with torch
installed = [name for name in optional if importlib.util.find_spec(name)]
assert not installed, f"the environment holds extras: {installed}"
assert qalora_compile.__version__ == importlib.metadata.version("qalora-compile")
names = [m.name for m in pkgutil.walk_packages(qalora_compile.__path__, "qalora_compile.")]
for name in names:
    if name != "qalora_compile.testing.plugin":  # pytest imports it
        importlib.import_module(name)
for name in qalora_compile.__all__:
    getattr(qalora_compile, name)
assert len(names) + 1 == int(sys.argv[1]), f"{len(names) + 1} modules, {sys.argv[1]} files"
print(len(names) + 1, "modules import without extras")
"""


def run(*command: str, cwd: Path = ROOT) -> None:
    """Run a command, and stop the script if it fails."""
    done = subprocess.run(command, check=False, cwd=cwd)
    if done.returncode:
        raise SystemExit(f"failed with {done.returncode}: {' '.join(command[:6])}")


def source_files() -> set[str]:
    """The files that the wheel has to hold, under their names in it."""
    folder = ROOT / PACKAGE
    files = [*folder.rglob("*.py"), folder / "py.typed", *(folder / "pages").glob("page.*")]
    return {file.relative_to(ROOT).as_posix() for file in files}


def contents_problem(names: list[str]) -> str | None:
    """A problem in the list of a wheel's files, or None."""
    top = {name.split("/")[0] for name in names}
    strange = {name for name in top if not name.endswith(".dist-info")} - {PACKAGE}
    if strange:
        return f"the wheel would install other top-level names: {sorted(strange)}"
    held, wanted = {name for name in names if name.startswith(f"{PACKAGE}/")}, source_files()
    if missing := wanted - held:
        return f"the wheel misses {sorted(missing)}"
    if stale := {name for name in held - wanted if name.endswith(".py")}:
        return f"the wheel holds files that the source does not: {sorted(stale)}"
    return None


def build_wheel(folder: Path, environment: dict[str, str]) -> tuple[Path, str]:
    """Build the wheel into `folder`; returns its path and the output of the build."""
    for pattern in ("bdist.*", "lib*", "temp.*"):  # setuptools would ship its old files
        for stale in (ROOT / "build").glob(pattern):
            shutil.rmtree(stale)
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder))
    done = subprocess.run(
        [sys.executable, *build],
        check=False,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nthe wheel does not build")
    (wheel,) = folder.glob("*.whl")
    return wheel, done.stdout


def check_without_compiler(folder: Path) -> None:
    """Check that without a compiler the wheel is built without the library, with a notice."""
    wheel, log = build_wheel(folder, {"CXX": "no-such-compiler"})
    names = zipfile.ZipFile(wheel).namelist()
    if any(Path(name).name == LIBRARY for name in names) or "was NOT built" not in log:
        raise SystemExit(f"{log}\nwithout a compiler there has to be a notice and no library")
    print(f"{wheel.name}: without a compiler no library, and a notice", flush=True)


def main() -> None:
    """Build the wheel, check its files, install it in a new environment, import and run it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("plain", "full"):
            (folder / name).mkdir()
        check_without_compiler(folder / "plain")
        wheel, log = build_wheel(folder / "full", {})
        names = zipfile.ZipFile(wheel).namelist()
        if problem := contents_problem(names):
            raise SystemExit(problem)
        library = any(Path(name).name == LIBRARY for name in names)
        if shutil.which("c++") and not library:
            raise SystemExit(f"{log}\nthere is a C++ compiler, and no library in the wheel")
        print(f"{wheel.name}: {len(names)} files, top-level name {PACKAGE}", flush=True)
        venv.create(folder / "venv")
        binaries = folder / "venv" / "bin"
        python = str(binaries / "python")
        run(INSTALL, "--pip", python, TORCH)
        run(INSTALL, python, str(wheel))
        run(sys.executable, "-m", "pip", "--python", python, "check")
        modules = sum(name.endswith(".py") for name in names)
        run(python, "-I", "-c", IMPORT_ALL, str(modules), cwd=folder)
        run(str(binaries / "qalora-compile"), "--version", cwd=folder)
        if library:
            run(python, "-I", "-c", LOAD_LIBRARY, cwd=folder)


if __name__ == "__main__":
    main()
