"""`chat` with lines from a pipe and in a terminal, and a signal during an answer."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qalora_compile.cli.main import main
from qalora_compile.cli.ui import console
from tests.serving.conftest import add_template, quantized, write_talker

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    folder = write_talker(root / "model")
    add_template(folder)
    return quantized(folder, root / "edge")


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


@pytest.mark.slow
def test_lines_of_a_pipe_are_answered(
    edge: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    words = ["chat", str(edge), "--max-new-tokens", "4", "--threads", "1"]
    type_lines(monkeypatch, "red is a", "", "two is a", "/reset", "red is a", "/exit", "one")
    assert main(words) == 0
    shown = capsys.readouterr()
    answers = shown.out.splitlines()
    assert len(answers) == 3 and answers[0] == answers[2]
    figures = [line for line in shown.err.splitlines() if line.startswith("[")]
    assert len(figures) == 3
    assert ", 0 of them before" in figures[0]
    assert ", 0 of them before" not in figures[1]
    assert "4 new" in figures[0] and "tokens/s" in figures[0]
    assert "begins anew" in shown.err


def test_a_conversation_that_is_too_long_goes_on_after_reset(
    edge: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    type_lines(monkeypatch, "red " * 70, "/reset", "red")
    assert main(["chat", str(edge), "--max-new-tokens", "2"]) == 0
    shown = capsys.readouterr()
    assert "more than the 64 tokens" in shown.err and "/reset forgets" in shown.err
    assert len(shown.out.splitlines()) == 1


def test_what_cannot_be_opened_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    type_lines(monkeypatch, "red")
    assert main(["chat", str(tmp_path)]) == 2
    assert "the folder holds no tokenizer" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(
    edge: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    printed: list[str] = []
    write = console.print

    def interrupted(*values: object, **options: object) -> None:
        if options.get("end") == "" and not printed:
            os.kill(os.getpid(), signal.SIGINT)
        printed.append(str(values))
        write(*values, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(console, "print", interrupted)
    type_lines(monkeypatch, "red is a", "two is a")
    assert main(["chat", str(edge), "--max-new-tokens", "4"]) == 0
    figures = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert "1 new; stopped" in figures[0]
    assert "stopped" not in figures[1] and ", 0 of them before" not in figures[1]


@pytest.mark.slow
def test_a_terminal_shows_a_prompt_and_ends_at_the_end_of_the_input(edge: Path) -> None:
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "qalora_compile", "chat", str(edge), "--max-new-tokens", "3"]
    with subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        deadline = time.monotonic() + 60
        for awaited, typed in ((b"> ", b"red is a\n"), (b"new", b"/exit\n")):
            while awaited not in seen and time.monotonic() < deadline:
                seen += os.read(ours, 4096)
            os.write(ours, typed)
            seen = seen if awaited == b"> " else b""
        assert process.wait(timeout=60) == 0
    os.close(ours)
