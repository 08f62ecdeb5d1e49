"""Try the newest torch, transformers, onnx and onnxruntime, and print which private names broke.

A virtual environment under `build/newest` gets the newest releases in the package index, and takes
everything else from the environment that runs this script. In it, each name that
`ir/torch_internals.py` imports is imported individually. Then the tests of the two modules of
private names run, and a few that capture, quantize and export small models. Exit status 1 if
something broke.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "newest"
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime")
TORCH_SEAM = ROOT / "qalora_compile" / "ir" / "torch_internals.py"
SEAM_TESTS = ("tests/ir/test_torch_internals.py", "tests/capture/test_transformers_internals.py")
ROAD_TESTS = (
    "tests/ir/test_module.py",
    "tests/capture/test_causal_lm.py",
    "tests/capture/test_rope.py",
    "tests/exporters/test_exported.py",
)
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet")


def main() -> int:
    """Compare versions, install the newer ones, and report what they break."""
    newest = newest_versions()
    newer = {n: v for n, v in newest.items() if v != installed(n)}
    shown = ", ".join(f"{name} {version}" for name, version in newest.items())
    if not newer:
        print(f"The newest releases are installed already: {shown}.")
        return 0
    old = ", ".join(f"{name} {installed(name)}" for name in newer)
    print(f"Trying {shown} (installed: {old}).", flush=True)
    try:
        python = make_environment(newer)
        print(f"In use: {versions_in_use(python)}.", flush=True)
        broken = [*probe(python), *run_tests(python)]
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
    print("\n".join(f"BROKEN {line}" for line in broken) or "Nothing broke.")
    return 1 if broken else 0


def newest_versions() -> dict[str, str]:
    """The newest release of each package that pip would install here."""
    only = ("install", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-")
    found = subprocess.run([*PIP, *only, *PACKAGES], check=True, capture_output=True, text=True)
    rows = [row["metadata"] for row in json.loads(found.stdout)["install"]]
    return {row["name"]: row["version"].partition("+")[0] for row in rows}


def installed(package: str) -> str:
    """The version in this environment, without the build suffix (`+cpu`)."""
    return importlib.metadata.version(package).partition("+")[0]


def make_environment(versions: dict[str, str]) -> Path:
    """Create a virtual environment with these versions; returns its Python."""
    venv.create(FOLDER, clear=True, symlinks=True)
    python = FOLDER / "bin" / "python"
    own = sysconfig.get_path("purelib", vars={"base": str(FOLDER)})
    rest = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (Path(own) / "rest.pth").write_text(rest, "utf-8")
    wanted = [f"{name}=={version}" for name, version in versions.items()]
    # pip warns that the package requires older releases: that is the point of this script.
    command = [*PIP, "--python", str(python), "install", "--no-compile", *wanted]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return python


def versions_in_use(python: Path) -> str:
    """The versions that the environment imports: the newest releases hide the older ones."""
    each = f"(f'{{name}} {{load(name).__version__}}' for name in {PACKAGES})"
    code = f"from importlib import import_module as load; print(*{each}, sep=', ')"
    command = [str(python), "-W", "ignore", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def probe(python: Path) -> list[str]:
    """The names that `ir/torch_internals.py` imports and the newer torch lacks."""
    command = [str(python), __file__, "--probe"]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return found.stdout.splitlines()


def missing_names(source: str) -> Iterator[str]:
    """Yield each name that a source file imports from torch and this environment lacks."""
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("torch"):
            continue
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            try:
                if not hasattr(importlib.import_module(str(node.module)), alias.name):
                    importlib.import_module(name)
            except ImportError as error:
                yield f"{name}: {error}"


def run_tests(python: Path) -> list[str]:
    """Run the tests; returns the failed ones, with the first line of the error."""
    results = FOLDER / "results.xml"
    options = ["-q", "--tb=no", "-W", "ignore", "-m", "not slow", "-p", "no:cacheprovider"]
    command = [str(python), "-m", "pytest", *options, f"--junitxml={results}"]
    done = subprocess.run([*command, *SEAM_TESTS, *ROAD_TESTS], cwd=ROOT, check=False)
    if not results.is_file():
        return [f"pytest: it ended with exit status {done.returncode} and without results"]
    return [*failures(results.read_text("utf-8"))]


def failures(results: str) -> Iterator[str]:
    """Yield the failed tests in a report of pytest: by private name, or by test name."""
    for test in ElementTree.fromstring(results).iter("testcase"):
        for problem in [*test.iter("failure"), *test.iter("error")]:
            name = str(test.get("name"))
            if name.startswith("test_private_name["):
                name = name.partition("[")[2].removesuffix("]")
            why = str(problem.get("message")).partition("\n")[0]
            yield f"{name} ({test.get('classname')}): {why}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--probe"]:
        for line in missing_names(TORCH_SEAM.read_text("utf-8")):
            print(line)
    else:
        sys.exit(main())
