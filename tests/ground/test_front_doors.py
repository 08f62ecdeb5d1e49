"""The root symlinks `passes` and `exporters`: kept by git, used by no import."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["passes", "exporters"])
def test_git_keeps_the_symlink(name: str) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--stage", name], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert listed.startswith("120000 "), "mode 120000 is a symlink"
    assert (ROOT / name).resolve() == ROOT / "qalora_compile" / name


def test_nothing_imports_through_a_front_door() -> None:
    files = [f for f in ROOT.rglob("*.py") if ".venv" not in f.parts]
    for file in files:
        for line in file.read_text("utf-8").splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]) and len(words) > 1:
                assert words[1].split(".")[0] not in ("passes", "exporters"), f"{file}: {line}"
