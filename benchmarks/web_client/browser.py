"""A browser without a window that runs one plan; its page sends the result to our server."""

from __future__ import annotations

import functools
import json
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECONDS = 900
"""How long a plan may take."""
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--disable-extensions",
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
)


class _Handler(SimpleHTTPRequestHandler):
    """Serves a folder to an isolated page, which may have threads, and takes its result."""

    def __init__(self, *arguments: Any, results: queue.Queue[Any], **named: Any) -> None:
        self._results = results
        super().__init__(*arguments, **named)

    def log_message(self, format: str, *args: Any) -> None:
        """Print no line for each request."""

    def end_headers(self) -> None:
        """Isolate the page."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def do_POST(self) -> None:
        """The page's result."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        self._results.put(json.loads(body))


def in_browser(plan: Mapping[str, Any], folder: Path, packages: Path) -> dict[str, Any]:
    """Run a plan in Chromium.

    Args:
        plan: As `measure.js` takes it, with the build of onnxruntime-web.
        folder: The models of the plan; the page is put next to them.
        packages: Folder with `node_modules`.
    """
    browser = shutil.which("chromium")
    if browser is None:
        raise SystemExit("there is no chromium on this machine")
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    for name in ("page.html", "measure.js"):
        shutil.copyfile(HERE / name, folder / name)
    link = folder / "node_modules"
    if not link.is_symlink():
        link.symlink_to(packages / "node_modules")
    results = queue.Queue[Any]()
    handler = functools.partial(_Handler, directory=str(folder), results=results)
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/page.html"
        command = [browser, *_FLAGS, f"--user-data-dir={profile}", address]
        quiet = subprocess.DEVNULL
        with subprocess.Popen(command, stdout=quiet, stderr=quiet) as process:
            try:
                found: dict[str, Any] = results.get(timeout=SECONDS)
            except queue.Empty:
                raise SystemExit(f"the page did not answer in {SECONDS} s") from None
            finally:
                process.terminate()
        server.shutdown()
    if "failed" in found:
        raise SystemExit(f"the page failed: {found['failed']}")
    return found
