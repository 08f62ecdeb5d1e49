"""The root symlinks `passes` and `exporters`: kept by git, used by no import, not shipped."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages
from setuptools.config.pyprojecttoml import read_configuration

ROOT = Path(__file__).parents[2]
DOORS = ("passes", "exporters")


def git_files(*patterns: str, stage: bool = False) -> list[str]:
    """What git's index lists; also in a checkout that another user owns."""
    command = ["git", "-c", "safe.directory=*", "ls-files", *(["--stage"] if stage else [])]
    done = subprocess.run(
        [*command, "--", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def imports_of_doors(source: str) -> list[str]:
    """Import statements that go through a front door."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        found += [name for name in names if name.split(".")[0] in DOORS]
    return found


@pytest.mark.parametrize("name", DOORS)
def test_git_keeps_the_symlink(name: str) -> None:
    (listed,) = git_files(name, stage=True)
    assert listed.startswith("120000 "), "mode 120000 is a symlink"


@pytest.mark.parametrize("name", DOORS)
def test_the_symlink_resolves_into_the_package(name: str) -> None:
    assert (ROOT / name).is_symlink()
    assert (ROOT / name).readlink() == Path("qalora_compile", name)
    assert (ROOT / name / "__init__.py").samefile(ROOT / "qalora_compile" / name / "__init__.py")


def test_nothing_imports_through_a_front_door() -> None:
    files = git_files("*.py")
    assert "qalora_compile/__init__.py" in files
    for file in files:
        if (ROOT / file).exists():  # not one that is being removed
            assert imports_of_doors((ROOT / file).read_text("utf-8")) == [], file


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("import passes", 1),
        ("import os, exporters.onnx as e", 1),
        ("def f():\n    from passes.base import Pass", 1),
        ("from qalora_compile.passes import Pass\n'''\nfrom passes import x\n'''", 0),
    ],
)
def test_an_import_through_a_door_is_caught(source: str, faults: int) -> None:
    assert len(imports_of_doors(source)) == faults


def test_ruff_bans_the_doors() -> None:
    source = "import passes\nfrom exporters.onnx import write_onnx\n"
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--no-cache"]
    command += ["--output-format", "concise", "--stdin-filename", "qalora_compile/probe.py", "-"]
    done = subprocess.run(
        command, cwd=ROOT, input=source, capture_output=True, text=True, check=False
    )
    assert done.stdout.count("TID251") == 2, done.stdout + done.stderr


def test_the_build_finds_one_package() -> None:
    settings = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]
    include = settings["packages"]["find"]["include"]
    found = {name.split(".")[0] for name in find_packages(str(ROOT), include=include)}
    assert found == {"qalora_compile"}
    # The guard is needed: without it the finder follows the links.
    assert set(DOORS) <= {name.split(".")[0] for name in find_packages(str(ROOT))}
