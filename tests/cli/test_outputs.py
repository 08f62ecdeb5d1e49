"""Commands and the outputs of others: nothing of these is lost, and two never write one folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qalora_compile as qc
from qalora_compile.cli.main import main
from qalora_compile.cli.signals import Stop, Terminated, stopping
from qalora_compile.errors import UserInputError
from qalora_compile.files.locks import held
from qalora_compile.training.records.checkpoint import list_checkpoints
from tests.e2e.ended import contents

Capture = pytest.CaptureFixture[str]
COMMANDS = ("finetune", "fold", "export", "export gguf", "quantize")


@pytest.fixture(scope="module")
def ready(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its folded folder, beside the model and the data."""
    root = tmp_path_factory.mktemp("ready")
    shutil.copytree(model_folder, root / "model")
    shutil.copy2(data_file, root / "data.jsonl")
    line = lines(root, root / "run")["finetune"]
    assert main(line) == 0
    assert main(["fold", str(root / "run"), "--out", str(root / "folded")]) == 0
    return root


def lines(root: Path, out: Path) -> dict[str, list[str]]:
    """A line of each command, which writes `out`."""
    model, data, end = str(root / "model"), str(root / "data.jsonl"), ["--out", str(out)]
    export = ["export", str(root / "folded")]
    return {
        "finetune": ["finetune", model, "--data", data, "--steps", "1", "--rank", "2", *end],
        "fold": ["fold", str(root / "run"), *end],
        "export": [*export, *end],
        "export gguf": [*export, "--target", "gguf", *end],
        "quantize": ["quantize", model, *end],
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_overwrite_leaves_what_is_not_ours(
    ready: Path, tmp_path: Path, command: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ready, tmp_path / "all")
    root = tmp_path / "all"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it", "utf-8")
    before = contents(tmp_path)
    first = {"fold": "run", "export": "folded", "export gguf": "folded"}.get(command, "model")
    refusals = [
        (mine, "was not written by this tool"),
        (mine / "thesis.txt", "is not a folder"),
        (root, "holds the input"),
        (tmp_path, "holds the input"),
        (root / first, "is the input"),
    ]
    for out, says in refusals:
        assert main([*lines(root, out)[command], "--overwrite"]) == 2
        assert says in "".join(capsys.readouterr().err)
    monkeypatch.chdir(ready)
    assert main([*lines(root, ready)[command], "--overwrite"]) == 2
    assert "holds the working directory" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_writer_is_told_at_once(
    ready: Path, tmp_path: Path, command: str, capsys: Capture
) -> None:
    out = tmp_path / "out"
    with held(out):
        started = time.monotonic()
        assert main(lines(ready, out)[command]) == 2
        assert time.monotonic() - started < 5
    assert "another process is writing" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_second_resume_is_told(ready: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(ready / "run", tmp_path / "run")
    before = contents(tmp_path)
    line = [*lines(ready, tmp_path / "run")["finetune"], "--resume"]
    with held(tmp_path / "run"):
        assert main(line) == 2
    assert "another process is writing" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert main(line) == 0


def test_the_api_refuses_alike(ready: Path, tmp_path: Path) -> None:
    program = qc.Program.load(ready / "folded")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").touch()
    spec = qc.ExportSpec(target="safetensors", overwrite=True)
    refused = pytest.raises(UserInputError, match="was not written by this tool")
    with refused:
        program.save(tmp_path / "mine", overwrite=True)
    with refused:
        qc.export_model(program, tmp_path / "mine", spec)
    with pytest.raises(UserInputError, match="is the input"):
        shutil.copytree(ready / "folded", tmp_path / "input")
        qc.export_model(program, tmp_path / "input", spec, model=tmp_path / "input")
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(UserInputError, match="is not a file"):
        qc.export_model(program, tmp_path / "m.onnx", qc.ExportSpec(overwrite=True))


def test_a_page_or_certificate_does_not_take_the_place_of_something_else(
    ready: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "notes.html"
    path.write_text("mine", "utf-8")
    folders = [str(ready / "run"), str(ready / "folded")]
    for option in ("--html", "--certificate"):
        assert main(["verify", *folders, "--prove", option, str(path)]) == 2
        assert "was not written by this tool" in capsys.readouterr().err
    assert path.read_text("utf-8") == "mine"
    for name in ("a.html", "a.json"):
        option = "--html" if name.endswith("html") else "--certificate"
        for _ in range(2):  # its own output of before
            assert main(["verify", *folders, "--prove", option, str(tmp_path / name)]) == 0


def test_a_signal_that_comes_twice_at_once_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a launcher passes on what the terminal has sent to all processes."""
    now = [10.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = Stop()
    stop.handle(signal.SIGINT, None)
    stop.handle(signal.SIGTERM, None)
    assert (stop.number, stop.exit_code) == (signal.SIGINT, 130)
    now[0] += 2
    with pytest.raises(Terminated):
        stop.handle(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGINT, None)
    with stopping(Stop()) as other:
        signal.raise_signal(signal.SIGTERM)
    assert (other.number, other.exit_code) == (signal.SIGTERM, 143)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_and_leaves_nothing(
    ready: Path,
    tmp_path: Path,
    number: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr(
        "qalora_compile.api.fold.copy_parts", lambda *_: signal.raise_signal(number)
    )
    # what starts the tests may ignore it, as shells do for what runs behind them
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    old = signal.getsignal(signal.SIGTERM)
    assert main(lines(ready, tmp_path / "out")["fold"]) == code
    assert signal.getsignal(signal.SIGTERM) is old
    assert os.listdir(tmp_path) == []
    assert ("terminated" if code == 143 else "interrupted") in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [False, True])
def test_sigterm_saves_a_checkpoint(ready: Path, tmp_path: Path, launcher: bool) -> None:
    out = tmp_path / "run"
    words = ["-m", "qalora_compile", *lines(ready, out)["finetune"]]
    words[words.index("--steps") + 1] = "3000"
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, *(several if launcher else []), *words, "--save-every", "5"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    end = time.monotonic() + 120
    while not list_checkpoints(out / "checkpoints"):
        assert process.poll() is None, "it ended before its first checkpoint"
        assert time.monotonic() < end
        time.sleep(0.02)
    process.terminate()
    process.wait(timeout=60)
    if not launcher:
        assert process.returncode == 143
    assert '"status": "interrupted"' in (out / "run.json").read_text("utf-8")
    assert [name for name in os.listdir(tmp_path) if name != "run"] == []
