"""`serve`: an exported model behind the OpenAI API."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qalora_compile.api.edge import MODEL_CONFIG_FILE, read_edge_record
from qalora_compile.api.pooling import recorded_pooling
from qalora_compile.api.text_model import edge_tokenizer, open_text_model, say_ignored
from qalora_compile.errors import UserInputError
from qalora_compile.optional import require
from qalora_compile.runtime.session import open_session
from qalora_compile.serving.app import Served, create_app
from qalora_compile.serving.embedder import Embedder
from qalora_compile.serving.guard import is_local
from qalora_compile.serving.limits import Limits
from qalora_compile.serving.text_model import TextModel
from qalora_compile.untrusted import read_object
from qalora_compile.untrusted.artifacts import model_file

_STOP_SECONDS = 5
"""How long running answers may go on after the server was asked to stop."""
_LONGEST_TEXT = 512
"""Tokens of a text for an encoder whose `config.json` does not name a limit."""


@dataclass(frozen=True, kw_only=True)
class ServeSpec:
    """A server.

    Attributes:
        folder: A folder written by `export_folder` or `quantize_folder`: a language model, or a
            sentence encoder.
        host, port: Where it listens; port 0 takes a free one.
        name: The model's name for clients; None: the folder's.
        key: The key that clients must send; None: none.
        limits: What it accepts.
        threads: Number of threads of ONNX Runtime.
    """

    folder: Path
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    key: str | None = None
    limits: Limits = field(default_factory=Limits)
    threads: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise UserInputError(f"--port is {self.port}", hint="use 0 to 65535")
        if self.key is not None and not self.key:
            raise UserInputError("the key is empty", hint="give a key, or leave it out")


def open_served(spec: ServeSpec) -> Served:
    """Open the model of a server.

    Raises:
        UserInputError: a file is missing or broken, or the folder holds no tokenizer.
        UnsupportedError: the model is neither a language model nor a sentence encoder.
    """
    return Served(
        name=spec.name or spec.folder.resolve().name,
        model=_open(spec.folder, spec.threads),
        limits=spec.limits,
        key=spec.key,
        local=is_local(spec.host),
    )


def run_server(spec: ServeSpec, started: Callable[[Served, int], None]) -> None:
    """Serve a model until a signal ends it.

    Args:
        spec: The server.
        started: Called with what is served, and with the port, once it accepts requests.

    Raises:
        UserInputError: see `open_served`; or the address cannot be used.
        UnsupportedError: see `open_served`; or FastAPI or uvicorn is not installed.
        KeyboardInterrupt: the signal was SIGINT.
    """
    uvicorn = require("uvicorn", extra="serve", purpose="serve a model")
    served = open_served(spec)
    with _listening(spec) as listening:
        config = uvicorn.Config(
            create_app(served),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        started(served, int(listening.getsockname()[1]))
        if signal.SIGINT in _run(uvicorn.Server(config), listening):
            raise KeyboardInterrupt


def _run(server: Any, listening: socket.socket) -> list[int]:
    """Run a server to its end; returns the signals that it was sent.

    uvicorn raises a signal again when it has shut down. A SIGINT reaches asyncio then, which may
    find its task done, and no exception comes of it.
    """
    found, stop = list[int](), server.handle_exit

    def handle_exit(number: int, frame: Any) -> None:
        found.append(number)
        stop(number, frame)

    server.handle_exit = handle_exit
    server.run(sockets=[listening])
    return found


def _listening(spec: ServeSpec) -> socket.socket:
    """The socket of a server.

    Raises:
        UserInputError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in spec.host else socket.AF_INET
    try:
        return socket.create_server((spec.host, spec.port), family=family)
    except OSError as error:
        raise UserInputError(
            f"cannot listen on {spec.host}, port {spec.port}: {error.strerror}",
            hint="give another --port or --host",
        ) from error


def _open(folder: Path, threads: int | None) -> TextModel | Embedder:
    record = read_edge_record(folder)
    if record.get("kv_cache") or (not record.get("pooling") and not record.get("classes")):
        model = open_text_model(folder, threads=threads)
        say_ignored(model)
        return model
    pooling = recorded_pooling(record)
    path = folder / MODEL_CONFIG_FILE
    config: dict[str, Any] = read_object(path) if path.is_file() else {}
    longest = config.get("max_position_embeddings", _LONGEST_TEXT)
    return Embedder(
        open_session(model_file(folder), threads=threads),
        edge_tokenizer(folder),
        pooling=pooling.pooling,
        normalize=pooling.normalize,
        longest=longest if isinstance(longest, int) and longest > 0 else _LONGEST_TEXT,
        where=str(folder),
    )
