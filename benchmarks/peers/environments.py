"""The runtimes that are compared and are no dependency of this package: fetched once, pinned.

llama.cpp comes prebuilt in the platform package of `node-llama-cpp`, of which only the shared
libraries are used: the one for a CPU is chosen by llama.cpp when it runs. OpenVINO gets a virtual
environment of its own.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

LLAMA = "3.22.1"
"""Release of node-llama-cpp; its llama.cpp is v0.5.0."""
OPENVINO = "2026.4.1"
_PLATFORMS = {
    ("linux", "x86_64"): "linux-x64",
    ("linux", "aarch64"): "linux-arm64",
}


class UnavailableError(Exception):
    """A runtime, or a file for it, cannot be had on this machine; the message says why."""


def own_python(_: Path) -> Path:
    """The Python that runs this benchmark."""
    return Path(sys.executable)


def genai_python(cache: Path) -> Path:
    """The same, if it has ONNX Runtime GenAI.

    Raises:
        UnavailableError: it has not.
    """
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise UnavailableError("onnxruntime-genai is not installed")
    return own_python(cache)


def llama_folder(cache: Path) -> Path:
    """Folder of llama.cpp's shared libraries.

    Raises:
        UnavailableError: there are none for this platform, or npm fails.
    """
    name = _PLATFORMS.get((sys.platform, platform.machine()))
    if name is None:
        raise UnavailableError(f"no llama.cpp for {sys.platform}, {platform.machine()}")
    place = cache / f"node-llama-cpp-{LLAMA}"
    package = f"@node-llama-cpp/{name}"
    folder = place / "node_modules" / package / "bins" / name
    if not folder.is_dir():
        npm = shutil.which("npm")
        if npm is None:
            raise UnavailableError("npm is not installed, which fetches llama.cpp")
        place.mkdir(parents=True, exist_ok=True)
        options = ["--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(place)]
        _run([npm, "install", *options, f"{package}@{LLAMA}"])
    return folder


def openvino_python(cache: Path) -> Path:
    """The Python of OpenVINO's environment.

    Raises:
        UnavailableError: pip fails.
    """
    place = cache / f"openvino-{OPENVINO}"
    python, done = place / "bin" / "python", place / "complete"
    if not done.is_file():
        venv.create(place, with_pip=True, clear=True)
        packages = [f"openvino=={OPENVINO}", f"openvino-genai=={OPENVINO}.0"]
        _run([str(python), "-m", "pip", "install", "--quiet", *packages])
        done.touch()
    return python


def _run(command: Sequence[str]) -> None:
    """Run a command.

    Raises:
        UnavailableError: it fails; with the end of what it printed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-300:]
        raise UnavailableError(f"{' '.join(command[:3])} failed: {said}")
