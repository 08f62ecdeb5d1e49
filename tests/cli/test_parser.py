"""The parser: quick, one line of usage, every default stated, and the nearest name on a typo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import qalora_compile
from qalora_compile._version import __version__
from qalora_compile.cli.commands import COMMANDS
from qalora_compile.cli.main import main
from qalora_compile.cli.parser import Formatter, build_parser

Capture = pytest.CaptureFixture[str]
ROOT = Path(qalora_compile.__file__).parents[1]
PARSER = build_parser()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help_and_states_its_default(command: str) -> None:
    formatter = Formatter(prog="x")
    for action in PARSER.commands[command]._actions:
        assert action.help, action.dest
        if action.option_strings and action.nargs != 0 and not action.required:
            assert "default" in formatter._get_help_string(action), action.option_strings


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns(
    command: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["finetun"], "there is no command finetun; did you mean finetune?"),
        (["zzz"], "there is no command zzz"),
        (["finetune", "--dta", "x"], "there is no option --dta; did you mean --data?"),
        (["export", "f", "--out", "e", "--pre-set=fast"], "no option --pre-set; did you mean"),
        (["fold"], "the following arguments are required: RUN, --out"),
        (["export", "f", "--out", "e", "--preset", "quick"], "invalid choice: 'quick'"),
        ([], "the following arguments are required: COMMAND"),
        (["fold", "\x1b[31mrun", "x", "--out", "y"], r"unrecognized arguments: x"),
    ],
)
def test_a_typo_is_answered_in_three_lines(words: list[str], wanted: str, capsys: Capture) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert wanted in lines[0]
    assert [line.split(":")[0] for line in lines] == ["error", "usage", "help"]
    assert "\x1b" not in said


def test_usage_names_what_a_command_requires() -> None:
    usage = PARSER.commands["finetune"].short_usage()
    assert usage == "qalora-compile finetune [MODEL] --data FILE ... --out RUN [options]"


def test_abbreviated_options_are_taken(tmp_path: Path, capsys: Capture) -> None:
    assert main(["fold", str(tmp_path / "none"), "--ou", str(tmp_path / "new")]) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], ["finetun"], *([c, "--dta"] for c in COMMANDS)]
)
def test_nothing_heavy_is_imported_to_answer(words: list[str]) -> None:
    """Not timed: torch, transformers, onnx and numpy are what takes seconds."""
    code = (
        "import sys\nfrom qalora_compile.cli.main import main\n"
        f"main({words!r})\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert __version__ in said or "usage" in said


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_options(shell: str, capsys: Capture) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("finetune", "init-from", "preset", "quantize"):
        assert word in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_without_its_library_completion_says_what_to_install(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'qalora-compile[cli]'" in capsys.readouterr().err
