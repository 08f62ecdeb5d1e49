"""The figures of the package's structure stay within their limits; the counts can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import structure


@pytest.mark.parametrize("limit", structure.LIMITS, ids=lambda limit: limit.title)
def test_a_figure_is_within_its_limit(limit: structure.Limit) -> None:
    assert limit.count(structure.ROOT / structure.NAME) <= limit.most


def package(folder: Path, **files: str) -> Path:
    """A package of the given files, `verify__a` for verify/a.py."""
    for name, text in files.items():
        path = folder / structure.NAME / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / structure.NAME


@pytest.mark.parametrize(
    "back",
    [
        "from qalora_compile import a",
        "import qalora_compile.a",
        "def f():\n    from qalora_compile.a import x",
        "if TYPE_CHECKING:\n    from qalora_compile.a import x",
        "importlib.import_module('qalora_compile.a')",
    ],
)
def test_a_circle_is_found(tmp_path: Path, back: str) -> None:
    made = package(tmp_path, a="from qalora_compile.b import y", b=back, c="import torch")
    assert structure.circles(structure.import_graph(made)) == [
        ["qalora_compile.a", "qalora_compile.b"]
    ]


def test_a_chain_is_no_circle(tmp_path: Path) -> None:
    made = package(tmp_path, a="from qalora_compile import b, c", b="import qalora_compile.c", c="")
    assert structure.circles(structure.import_graph(made)) == []


def test_arrows_are_counted_once_between_what_a_folder_holds(tmp_path: Path) -> None:
    text = "from qalora_compile.verify.proof import x, y\nfrom qalora_compile.verify import b"
    made = package(
        tmp_path,
        verify__a=text,
        verify__b="from qalora_compile.verify.proof.y import z\nimport qalora_compile.c",
        verify__proof__x="from qalora_compile.verify.proof import y",
        verify__proof__y="",
        c="",
    )
    assert structure.arrows("verify")(made) == 3
    assert structure.arrows("passes")(made) == 0


def test_arguments_by_position_are_counted_outside_the_views(tmp_path: Path) -> None:
    made = package(tmp_path, passes__a="x = node.args[0]\ny = self.args[1:]", ir__ops__b="args[3]")
    assert structure.raw_args(made) == 2


def test_lengths_are_counted(tmp_path: Path) -> None:
    made = package(tmp_path, a="def f():\n    return 1\n", b="@g\nasync def h():\n    pass\n")
    assert sorted(structure.function_lengths(made)) == [2, 2]
    assert sum(structure.file_lengths(made)) == 5


def test_a_broken_limit_is_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = package(
        tmp_path, a="from qalora_compile import b", b="def f():\n    import qalora_compile.a"
    )
    assert structure.main(["--package", str(made), "--circles"]) == 1
    shown = capsys.readouterr().out
    assert "2: qalora_compile.a, qalora_compile.b" in shown
    assert "over the limit" in next(
        line for line in shown.splitlines() if line.startswith("import circles")
    )
