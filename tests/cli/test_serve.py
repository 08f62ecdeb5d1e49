"""`serve` as a process: it says where it is, answers, and ends by a signal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qalora_compile.cli.main import main
from tests.serving.conftest import quantized, write_talker

pytest.importorskip("uvicorn", reason="the extra `serve`")
pytest.importorskip("fastapi", reason="the extra `serve`")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    return quantized(write_talker(root / "model"), root / "edge")


@contextmanager
def process(edge: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A server on a free port, its address, and what it said before."""
    words = [sys.executable, "-m", "qalora_compile", "serve", str(edge), "--port", "0"]
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*words, "--threads", "1"], env=os.environ | environment, **pipes) as run:
        assert run.stderr is not None
        said = ""
        try:
            while (found := re.search(r"http://\S+/v1", said)) is None:
                line = run.stderr.readline()
                assert line, said
                said += line
            yield run, found[0], said
        finally:
            run.kill()


def asked(address: str, key: str = "") -> Any:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    body = json.dumps({"prompt": "red is", "max_tokens": 3, "temperature": 0}).encode()
    request = urllib.request.Request(f"{address}/completions", body, headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_server_answers_until_a_signal(number: int, code: int, edge: Path) -> None:
    with process(edge, QALORA_API_KEY="sesame") as (run, address, said):
        assert "serving edge" in said
        with pytest.raises(urllib.error.HTTPError, match="401"):
            asked(address)
        assert asked(address, "sesame")["usage"]["completion_tokens"] == 3
        run.send_signal(number)
        rest = run.communicate(timeout=30)[1]
    assert run.returncode == code
    assert "Traceback" not in rest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--max-queue", "0"], "--max-queue is 0"),
        (["--host", "203.0.113.7", "--port", "0"], "cannot listen on 203.0.113.7"),
    ],
)
def test_what_cannot_be_served_is_explained(
    words: list[str], message: str, edge: Path, capsys: Capture
) -> None:
    assert main(["serve", str(edge), *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_other_folders_are_refused(tmp_path: Path, capsys: Capture) -> None:
    assert main(["serve", str(tmp_path)]) == 2
    assert "the folder holds no tokenizer" in capsys.readouterr().err
