"""A server of a test in a thread of its own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qalora_compile.api.serve import ServeSpec, open_served
from qalora_compile.serving.app import create_app
from qalora_compile.serving.limits import Limits


@contextmanager
def serving(folder: Path, *, limits: dict[str, int] | None = None, **more: Any) -> Iterator[str]:
    """The address of a server on a free port, for the block."""
    import uvicorn

    spec = ServeSpec(folder=folder, threads=1, limits=Limits(**limits or {}), **more)
    config = uvicorn.Config(
        create_app(open_served(spec)), port=0, log_level="error", timeout_graceful_shutdown=5
    )
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.started
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listening.close()
    assert not thread.is_alive()
