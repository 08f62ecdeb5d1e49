"""The part of the build that pyproject.toml cannot say: the ONNX Runtime custom-operator library.

It is compiled from `qalora_compile/runtime/native` where a C++17 compiler is present (`CXX`, else
c++, g++ or clang++), and skipped with a notice where not. The environment variable
`QALORA_BUILD_LIBRARY` makes it `required`, so that a failure ends the build, or `off`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = Path("qalora_compile/runtime/native")
OBJECTS = Path("build/objects")
"""Compiled files of builds in this source tree, by what they were made from."""
SWITCH = "QALORA_BUILD_LIBRARY"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti")
X86 = platform.machine().lower() in ("x86_64", "amd64")
ARM64 = platform.machine().lower() in ("aarch64", "arm64")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
# One file a level, as in native/CMakeLists.txt; the other machine's files compile to nothing.
LEVEL_FLAGS = {
    "avx2.cc": AVX2 if X86 else (),
    "avxvnni.cc": (*AVX2, "-mavxvnni") if X86 else (),
    "avx512.cc": AVX512 if X86 else (),
    "amx.cc": (*AVX512, "-mamx-int8") if X86 else (),
    "neon.cc": ("-march=armv8.2-a+dotprod",) if ARM64 and sys.platform != "darwin" else (),
    "i8mm.cc": ("-march=armv8.2-a+dotprod+i8mm",) if ARM64 else (),
}
# Levels whose instructions are younger than some compilers that are in use.
YOUNG = ("amx.cc", "avxvnni.cc", "i8mm.cc")


def find_compiler() -> list[str] | None:
    """The command that compiles C++, or None."""
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    return next(
        ([path] for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None
    )


def level_flags(compiler: list[str], name: str) -> tuple[str, ...]:
    """The flags of one file; none where the compiler is older than the instructions.

    The file then compiles to a level that is not there.
    """
    flags = LEVEL_FLAGS.get(name, ())
    if name not in YOUNG or not flags:
        return flags
    probe = [*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    known = subprocess.run(probe, check=False, capture_output=True).returncode == 0
    return flags if known else ()


def version() -> str:
    """The package's version, read without importing it."""
    text = (ROOT / "qalora_compile/_version.py").read_text("utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit("qalora_compile/_version.py has no __version__")
    return found.group(1)


def made_from(compiler: list[str], options: list[str], files: list[str]) -> str:
    """A digest of a compiler, its version and options, and the contents of files."""
    named = subprocess.run([*compiler, "--version"], check=True, capture_output=True).stdout
    digest = hashlib.sha256("\0".join([*compiler, *options]).encode() + named)
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:16]


class BuildLibrary(build_ext):
    """Compile the library with the plain compiler; it is no Python extension."""

    def get_ext_filename(self, fullname: str) -> str:
        """Its name does not depend on the Python version.

        It lies in a folder that is no package, so that nothing takes it for a module.
        """
        suffix = ".dylib" if sys.platform == "darwin" else ".so"
        return str(Path(*fullname.split("."))) + suffix

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """No module initialisation function."""
        return []

    def build_extension(self, ext: Extension) -> None:
        """Compile and link, or say clearly why not."""
        compiler = find_compiler()
        try:
            if compiler is None:
                raise FileNotFoundError("no C++ compiler was found (c++, g++, clang++, or CXX)")
            self._compile(compiler, ext)
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get(SWITCH) == "required":
                raise SystemExit(f"the custom-operator library was not built: {error}") from error
            print(
                f"\nNOTICE: the ONNX Runtime custom-operator library was NOT built: {error}\n"
                "Everything else of qalora-compile works without it; models of target ort then run "
                "on stock kernels.\nInstall a C++17 compiler and install the package again to get "
                "it.\n",
                file=sys.stderr,
                flush=True,
            )

    def copy_extensions_to_source(self) -> None:
        """For an editable install: put it into the source tree, if it was built."""
        (ROOT / NATIVE.parent / "lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()

    def _compile(self, compiler: list[str], ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        for folder in (OBJECTS, target.parent):
            folder.mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> str:
            name = Path(source).name
            define = f'-DQALORA_VERSION="{version()}"'
            options = [*FLAGS, define, *level_flags(compiler, name), "-c", source]
            out = OBJECTS / f"{name}.{made_from(compiler, options, [source, *ext.depends])}.o"
            if not out.is_file():
                for old in OBJECTS.glob(f"{name}.*.o"):
                    old.unlink(missing_ok=True)
                scratch = out.with_suffix(".part")
                subprocess.run([*compiler, *options, "-o", str(scratch)], check=True)
                scratch.replace(out)
            return str(out)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        linking = ["-dynamiclib"] if sys.platform == "darwin" else ["-shared", "-Wl,--no-undefined"]
        scratch = target.with_name(f".{target.name}")  # a session may have the old one mapped
        subprocess.run([*compiler, *linking, *objects, "-o", str(scratch)], check=True)
        scratch.replace(target)


class Wheel(bdist_wheel):
    """One wheel for every Python: the library does not link against it."""

    def get_tag(self) -> tuple[str, str, str]:
        """Platform-specific only where the library is in it."""
        _, _, system = super().get_tag()
        return ("py3", "none", system)


def extensions() -> list[Extension]:
    """The library; none on Windows, whose compiler takes other options, or where switched off."""
    if os.environ.get(SWITCH) == "off" or sys.platform == "win32":
        return []
    sources = sorted(str(path) for path in NATIVE.glob("*.cc"))
    headers = sorted(str(path) for path in NATIVE.glob("*.h"))
    name = "qalora_compile.runtime.lib.libqalora_ort"
    return [Extension(name, sources, depends=headers, optional=True)]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
