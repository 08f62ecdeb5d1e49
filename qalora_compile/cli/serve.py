"""`serve`: an exported model behind the OpenAI API."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from qalora_compile.cli.options import spec_of
from qalora_compile.cli.ui import err_console
from qalora_compile.serving.limits import Limits

if TYPE_CHECKING:
    from qalora_compile.serving.app import Served

EXAMPLES = """examples:
  qalora-compile serve edge
  qalora-compile serve edge --port 9000 --name my-model
  QALORA_API_KEY=… qalora-compile serve edge --host 0.0.0.0

routes: /v1/chat/completions, /v1/completions, /v1/models, /health, and
/v1/embeddings for sentence encoders. Only programs of this machine reach the
server unless --host names another address.
"""
KEY_VARIABLE = "QALORA_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", metavar="EDGE", help="folder written by export or quantize")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where it listens")
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="its port; 0 takes a free one"
    )
    parser.add_argument("--name", help="the model's name for clients (default: the folder's name)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"key that clients must send; better in the variable {KEY_VARIABLE}, which other "
        "users of the machine cannot read (default: none)",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of ONNX Runtime (default: its own choice)"
    )
    group = parser.add_argument_group("limits")
    for name, what in (
        ("max_tokens", "new tokens of an answer"),
        ("max_body", "bytes of a request"),
        ("max_queue", "texts in work and waiting; more are refused with status 429"),
        ("max_rows", "texts generated at once"),
        ("max_inputs", "texts in one request"),
        ("body_seconds", "seconds for a request to arrive"),
    ):
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=getattr(Limits, name),
            metavar="N",
            help=what,
        )


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from qalora_compile.api.serve import ServeSpec, run_server
    from qalora_compile.serving.guard import is_local
    from qalora_compile.serving.text_model import TextModel

    key = options.api_key or os.environ.get(KEY_VARIABLE) or None
    spec = spec_of(
        ServeSpec, options, folder=Path(options.folder), key=key, limits=spec_of(Limits, options)
    )

    def started(served: Served, port: int) -> None:
        err_console.print(
            f"serving {served.name} at http://{_address(spec.host)}:{port}/v1", soft_wrap=True
        )
        if isinstance(served.model, TextModel) and not served.model.has_template:
            err_console.print(
                "note: the model has no chat template, so only /v1/completions answers"
            )
        if key is None and not is_local(spec.host):
            err_console.print(
                f"note: everybody who reaches {spec.host} may use it; --api-key asks a key"
            )

    run_server(spec, started)
    return 0


def _address(host: str) -> str:
    return f"[{host}]" if ":" in host else host
