"""Commands on a tiny model that are ended hard (SIGKILL, a limit on file sizes); prints JSON rows.

A program of its own, `python -m tests.e2e.ended ROOT COUNT SEED END …`, where END is "kills" or
"limits" and a command. It imports all there is and traces the model once, and forks a child for
each run, which is safe while torch computes with one thread. What is ended is a command that loads,
computes and writes.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from qalora_compile.cli.main import main as run_command
from qalora_compile.files import recover
from tests import forked
from tests.capture.checkpoints.gguf_files import write_llama
from tests.captures import Memo
from tests.cli.tiny import write_data, write_model
from tests.shortcuts import shortcuts

STEPS = 4
_TIMES = re.compile(rb'"(seconds|tokens_per_second)": [0-9.e+-]+')
"""Facts of a run that no other run shares."""
_ROW = "row: "
"""Before each row, among what a first run prints."""
_PAGE = "report.html"
_SHARE = 1.02
"""Of a command's own time, the part in which it is killed."""


@dataclass(frozen=True)
class Command:
    """A command, with what it reads.

    Attributes:
        words: Without `--out`.
        other: Options that give another output.
    """

    words: tuple[str, ...]
    other: tuple[str, ...]

    def line(self, out: Path, *more: str) -> list[str]:
        return [*self.words, "--out", str(out), *more]


def commands(root: Path) -> dict[str, Command]:
    """The commands of a prepared folder."""
    model, data = str(root / "model"), str(root / "train.jsonl")
    small = ("--rank", "2", "--batch-size", "2", "--steps", str(STEPS), "--save-every", "1")
    export = ("export", str(root / "folded"))
    rest = {
        "finetune": Command(("finetune", model, "--data", data, *small), ("--lr", "0.5")),
        "fold": Command(("fold", str(root / "run")), ()),
        "export": Command(export, ("--accuracy-level", "4")),
        "quantize": Command(("quantize", model), ("--bits", "3")),
    }
    targets = ("onnx", "mlx", "float", "safetensors", "hqq")
    rest |= {f"export {t}": Command((*export, "--target", t), ()) for t in targets}
    gguf = ("export", str(root / "from_gguf"), "--target", "gguf")
    return rest | {"export gguf": Command(gguf, ())}


def prepare(root: Path, names: list[str]) -> None:
    """A model, data, a RUN and a FOLDED folder."""
    write_model(root / "model", layers=1)
    data = str(write_data(root / "train.jsonl"))
    found = commands(root)
    lines = [found["finetune"].line(root / "run"), found["fold"].line(root / "folded")]
    if "export gguf" in names:
        base = str(write_llama(root / "base.gguf"))
        begin = ["finetune", base, "--data", data, "--steps", "1", "--rank", "2"]
        lines += [
            [*begin, "--out", str(root / "run_gguf")],
            ["fold", str(root / "run_gguf"), "--out", str(root / "from_gguf")],
        ]
    for line in lines:
        code, text = run_in_child(line)
        assert code == 0, text


def run_in_child(
    line: list[str], *, kill_after: float | None = None, before: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """Run a command in a child; gives its exit code, less than 0 for a signal, and what it said."""
    child = forked.command(line, before)
    if kill_after is not None:
        time.sleep(kill_after)
        child.send(signal.SIGKILL)
    ended, output, errors = child.wait()
    return ended, errors + output


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file, hidden ones too, without the times that a run took."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            found[str(file.relative_to(folder))] = "folder"
            continue
        data = b"" if file.name == _PAGE else _TIMES.sub(b"", file.read_bytes())
        found[str(file.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def kills(root: Path, name: str, count: int, seed: int) -> dict[str, Any]:
    """Kill a command at random moments until enough kills have landed; each is resumed."""
    command, rng = commands(root)[name], random.Random(seed)
    place = root / f"kills {name}"
    started = time.monotonic()
    old = _written(command.line(place / "old", *command.other))
    between = time.monotonic()
    expected = _written(command.line(place / "new"))
    duration = min(between - started, time.monotonic() - between)  # a busy machine takes longer
    landed = tried = again = 0
    wrong: list[str] = []
    while landed < count and tried < 4 * count:
        tried += 1
        out = place / "out"
        overwriting = tried % 2 == 0
        if overwriting:
            shutil.copytree(place / "old", out)
        more = ["--overwrite"] if overwriting else []
        code, _ = run_in_child(
            command.line(out, *more), kill_after=rng.uniform(0, _SHARE * duration)
        )
        landed += code == -signal.SIGKILL
        recover(out)
        if name != "finetune":
            possible: list[Any] = [expected, old if overwriting else None]
            if (contents(out) if out.exists() else None) not in possible:
                wrong.append(f"{tried}: neither the old output nor the new one is there")
        again += _go_on(command, name, out, place, overwriting, wrong, tried, expected)
        shutil.rmtree(out, ignore_errors=True)
    return {"command": name, "landed": landed, "tried": tried, "resumed": again, "wrong": wrong}


def _go_on(
    command: Command,
    name: str,
    out: Path,
    place: Path,
    overwriting: bool,
    wrong: list[str],
    tried: int,
    expected: dict[str, str],
) -> bool:
    """Resume or run the command again, and compare; whether there was something to go on with."""
    more = ["--overwrite"] if out.exists() else []
    begun = name == "finetune" and out.exists() and contents(out) != contents(place / "old")
    code, text = run_in_child(command.line(out, *(["--resume"] if begun else more)))
    if code != 0:
        wrong.append(f"{tried}: exit code {code}: {text[-400:]}")
    elif contents(out) != expected:
        found = contents(out)
        names = [n for n in {**found, **expected} if found.get(n) != expected.get(n)]
        wrong.append(f"{tried}: other bytes in {names[:5]} (overwriting: {overwriting})")
    rest = sorted(set(os.listdir(place)) - {"old", "new", "out"})
    if rest:
        wrong.append(f"{tried}: left over: {rest}")
    return begun or "weights were kept" in text


def limits(root: Path, name: str, count: int, seed: int) -> dict[str, Any]:
    """Run a command under limits of the size of a file, all of them too small."""
    command, rng = commands(root)[name], random.Random(seed)
    place = root / f"limits {name}"
    old = _written(command.line(place / "old", *command.other))
    expected = _written(command.line(place / "new"))
    files = [f for f in (place / "new").rglob("*") if f.is_file() and f.name != _PAGE]
    sizes = [file.stat().st_size for file in files]  # a page is of another size in each run
    wrong: list[str] = []
    points = sorted(_points(sizes, count, rng))
    for number, limit in enumerate(points):
        out = place / "out"
        overwriting = number % 2 == 0
        if overwriting:
            shutil.copytree(place / "old", out)
        line = command.line(out, *(["--overwrite"] if overwriting else []))
        code, text = run_in_child(line, before=lambda limit=limit: _limit(limit))  # type: ignore[misc]
        if code != 2 or "error: cannot write" not in text or "File too large" not in text:
            wrong.append(f"limit {limit}: exit code {code}: {text[-600:]}")
        if name != "finetune":
            there = contents(out) if out.exists() else None
            if there != (old if overwriting else None):
                wrong.append(f"limit {limit}: the old output is not as it was")
        rest = [n for n in os.listdir(place) if n not in ("old", "new", "out")]
        if not all(n.startswith(".out.qalora.") and n.endswith(".part") for n in rest):
            wrong.append(f"limit {limit}: left over: {rest}")
        if name == "finetune" or number % 10 == 0:
            _go_on(command, name, out, place, overwriting, wrong, limit, expected)
        shutil.rmtree(out, ignore_errors=True)
    return {"command": name, "limits": len(points), "most": max(points), "wrong": wrong}


def _points(sizes: list[int], count: int, rng: random.Random) -> Iterator[int]:
    """Sizes below the largest file's: none at all, one byte too few of each file, any others."""
    top = max(sizes)
    edges = [0, 1, top - 1, *(size - 1 for size in sizes if size > 1)]
    yield from (edges if len(edges) <= count else rng.sample(edges, count))
    for _ in range(count - len(edges)):
        yield int(top ** rng.uniform(0, 1)) - 1 if rng.random() < 0.5 else rng.randrange(top)


def _limit(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _written(line: list[str]) -> dict[str, str]:
    """The contents of what a command writes that nobody ends."""
    code, text = run_in_child(line)
    assert code == 0, text
    return contents(Path(line[line.index("--out") + 1]))


def main(root: Path, count: int, seed: int, ends: list[str]) -> None:
    """Prepare, and print a row for each command and kind of end."""
    assert os.environ.get("OMP_NUM_THREADS") == "1", "a fork loses the threads of its parent"
    torch.set_num_threads(1)
    with shortcuts(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "export", Memo(torch.export.export))
        _print_rows(root, count, seed, [tuple(end.split(" ", 1)) for end in ends])


def _print_rows(root: Path, count: int, seed: int, ends: list[tuple[str, ...]]) -> None:
    """Warm up, and end each command."""
    names = list(dict.fromkeys(name for _, name in ends))
    prepare(root, names)
    for name in names:  # what a first run imports, the others need not
        run_command(commands(root)[name].line(root / "warm" / name))
    gc.collect()
    gc.freeze()  # children's collectors need not look through all that was imported, and copy it
    work = {"kills": kills, "limits": limits}
    for what, name in ends:
        started = time.monotonic()
        row = work[what](root, name, count, seed)
        row["seconds"] = round(time.monotonic() - started)
        print(f"\n{_ROW}{json.dumps(row)}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
