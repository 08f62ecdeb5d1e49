"""What every attack must not do, checked once: `attack` runs a reader in a child and watches it.

The child is forked, so that nothing has to be imported again. It reports what it opened, imported
and ran (audit events of Python), how much its memory grew, and what the reader gave or raised.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qalora_compile.errors import InternalError, QaloraError

SECONDS = 20
FREE_MEMORY = 64 << 20
SECRET = "the secret that no model may read"
_PACKAGE = Path(__file__).resolve().parents[2]
_READ = ("/usr/", "/lib", "/etc/ld", "/proc/", "/sys/", "/dev/", "/root/.pyenv", "/etc/localtime")


@dataclass
class Outcome:
    """What became of an attack."""

    error: str = ""
    kind: str = ""
    value: Any = None
    memory: int = 0
    opened: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)


def attack(reader: Callable[[], Any], folder: Path) -> Outcome:
    """Run a reader on a hostile folder, and see that it does no harm.

    No file outside the folder is opened but those of Python and its libraries, no code is run, the
    memory grows by at most twice the folder's size (or 64 MiB), and it ends within 20 seconds.

    Returns:
        The error of this package that it raised, or what it gave, as JSON.
    """
    return attack_by_all({"it": reader}, folder)["it"]


def attack_by_all(readers: Mapping[str, Callable[[], Any]], folder: Path) -> dict[str, Outcome]:
    """`attack` by each reader, in turn, in one child; 20 seconds for all of them."""
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and not f.is_symlink())
    said = _in_child(lambda answer: _watch(readers, answer))
    outcomes = {name: Outcome(**outcome) for name, outcome in json.loads(said).items()}
    assert list(outcomes) == list(readers)
    for name, outcome in outcomes.items():
        assert outcome.kind != "library", f"{name}: {outcome.error}"
        _check_opened(outcome.opened, folder)
        assert not outcome.ran, f"{name} ran {outcome.ran}"
        allowed = max(2 * size, FREE_MEMORY)
        grown = f"{name}: memory grew by {outcome.memory} bytes, of {allowed}"
        assert outcome.memory <= allowed, grown
    return outcomes


def _in_child(work: Callable[[int], None]) -> bytes:
    """What a forked child writes to the descriptor that it is given, until it ends."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        work(writing)
    os.close(writing)
    said, limit = b"", time.monotonic() + SECONDS
    while (left := limit - time.monotonic()) > 0:
        if select.select([reading], [], [], left)[0]:
            part = os.read(reading, 1 << 16)
            said += part
            if not part:
                break
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(status), f"ended by signal {os.WTERMSIG(status)} ({SECONDS} s?)"
    return said


def refused(reader: Callable[[], Any], folder: Path, *words: str) -> Outcome:
    """Run a reader that has to refuse a folder, in words that say why."""
    return refused_by_all({"it": reader}, folder, *words)["it"]


def refused_by_all(
    readers: Mapping[str, Callable[[], Any]], folder: Path, *words: str
) -> dict[str, Outcome]:
    """`refused` by each reader."""
    outcomes = attack_by_all(readers, folder)
    for name, outcome in outcomes.items():
        assert outcome.kind == "typed", f"{name}: it was read: {outcome.value}"
        for word in words:
            assert word in outcome.error, f"{name}: {word!r} is not in: {outcome.error}"
        assert SECRET not in outcome.error
    return outcomes


def given(readers: Mapping[str, Callable[[Path], Any]], path: Path) -> dict[str, Callable[[], Any]]:
    """Readers of one path."""
    return {name: partial(reader, path) for name, reader in readers.items()}


def cli(*words: object) -> Callable[[], Any]:
    """A command, as a reader."""

    def run() -> Any:
        import io
        from contextlib import redirect_stderr, redirect_stdout

        from qalora_compile.cli import ui
        from qalora_compile.cli.main import main

        text = io.StringIO()
        ui.err_console.file = ui.console.file = text
        with redirect_stdout(text), redirect_stderr(text):
            code = main([str(word) for word in words])
        if code == 2:
            raise QaloraError(text.getvalue())
        return [code, text.getvalue()]

    return run


def plant_secret(folder: Path) -> Path:
    """A file outside a folder, which nothing in it may reach."""
    path = folder.parent / "secret.txt"
    path.write_text(SECRET * 100)
    return path


def _check_opened(opened: list[str], folder: Path) -> None:
    home = folder.resolve()
    free = (*_READ, str(_PACKAGE), sys.prefix, sys.base_prefix, str(home))
    for text in opened:
        path = os.path.realpath(text)
        library = path.endswith((".py", ".pyc", ".so", ".pth", ".zip")) and "secret" not in path
        assert path.startswith(free) or library, f"opened {path}"


def _watch(readers: Mapping[str, Callable[[], Any]], answer: int) -> None:
    """In the child."""
    outcomes = {name: Outcome() for name in readers}
    outcome = Outcome()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], (str, bytes)):
            outcome.opened.append(os.fsdecode(args[0]))
        elif event in _RUNS:
            outcome.ran.append(f"{event} {args!r:.200}")
        elif event == "ctypes.dlopen" and not _is_ours(args[0]):
            outcome.ran.append(f"dlopen {args[0]}")
        elif event == "import" and str(args[0]).startswith("canary"):
            outcome.ran.append(f"import {args[0]}")

    sys.addaudithook(hook)
    for name, reader in readers.items():
        _reset_peak()
        outcome, before = outcomes[name], _resident()
        _run(reader, outcome)
        outcome.memory = max(0, _peak() - before) * 1024
    try:
        with os.fdopen(answer, "wb") as file:
            file.write(json.dumps({name: vars(each) for name, each in outcomes.items()}).encode())
    finally:
        os._exit(0)


def _run(reader: Callable[[], Any], outcome: Outcome) -> None:
    try:
        value = reader()
        outcome.kind, outcome.value = "value", value if _plain(value) else str(value)[:1000]
    except InternalError:
        outcome.kind, outcome.error = "library", traceback.format_exc()
    except QaloraError as error:
        outcome.kind, outcome.error = "typed", str(error)
    except BaseException:
        outcome.kind, outcome.error = "library", traceback.format_exc()[-4000:]


_RUNS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
)
"""Events that no reader of data has a reason for."""


def _is_ours(library: object) -> bool:
    """Whether a library is this package's or one of Python's."""
    place = os.path.realpath(str(library))
    return library is None or place.startswith((str(_PACKAGE), sys.prefix, sys.base_prefix))


def _plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return 0


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _reset_peak() -> None:
    """Forget the parent's peak (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
