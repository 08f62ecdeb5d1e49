"""`chat`: talk with an exported language model."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qalora_compile.cli.exit_codes import TERMINATED
from qalora_compile.cli.options import spec_of
from qalora_compile.cli.signals import Stop, stopping
from qalora_compile.cli.ui import complain, console, err_console, steps
from qalora_compile.errors import UserInputError

if TYPE_CHECKING:
    from qalora_compile.serving.conversation import Answer, Conversation

EXAMPLES = """examples:
  qalora-compile chat edge
  qalora-compile chat edge --system "Answer in one sentence."
  qalora-compile chat edge --raw            models without a chat template
  qalora-compile chat edge < questions.txt  one message a line

/reset forgets the conversation, /exit (or the end of the input) leaves.
Ctrl-C stops an answer, which stays in the history as far as it came.
"""
RESET, EXIT = "/reset", "/exit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", metavar="EDGE", help="folder written by export or quantize")
    parser.add_argument(
        "--system", metavar="TEXT", help="instructions at the beginning (default: none)"
    )
    parser.add_argument(
        "--raw", action="store_true", help="continue the plain text, without a chat template"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="tokens of an answer (default: what the context has left)",
    )
    own = "default: as generation_config.json has it"
    parser.add_argument("--temperature", type=float, metavar="F", help=f"0 is greedy ({own}, or 0)")
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help=f"sample from the likeliest tokens of this probability ({own}, or 1)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="N",
        help=f"sample from this many of the likeliest tokens ({own}, or no limit)",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of the samples (default: another one each time)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of ONNX Runtime (default: its own choice)"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from qalora_compile.api.chat import ChatSpec, open_chat

    with steps():
        conversation = open_chat(spec_of(ChatSpec, options, folder=Path(options.folder)))
    if sys.stdin.isatty():
        err_console.print(
            f"{RESET} forgets the conversation, {EXIT} leaves, Ctrl-C stops an answer"
        )
    for text in _messages():
        if text == EXIT:
            break
        if text == RESET:
            conversation.reset()
            err_console.print("the conversation begins anew")
        elif text and _answered(conversation, text) == signal.SIGTERM:
            return TERMINATED
    return 0


def _messages() -> Iterator[str]:
    """The lines of the input, without a prompt if it is no terminal."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    with suppress(EOFError):
        while True:
            yield input("> ").strip()


def _answered(conversation: Conversation, text: str) -> int | None:
    """Print an answer; returns the number of the signal that stopped it, or None."""
    stop = Stop()
    try:
        answer = conversation.ask(text)
    except UserInputError as error:  # the history is too long, which /reset remedies
        complain(f"error: {error}\n  do:    {RESET} forgets the conversation")
        return None
    with stopping(stop), closing(answer.pieces) as pieces:
        for piece in pieces:
            console.print(piece, end="", soft_wrap=True)
            if stop():
                break
    console.print()
    err_console.print(_figures(answer, stopped=stop()), style="dim")
    return stop.number


def _figures(answer: Answer, *, stopped: bool) -> str:
    rate = "" if answer.rate is None else f", {answer.rate:.1f} tokens/s"
    return (
        f"[{answer.prompt} tokens read, {answer.reused} of them before; first after "
        f"{answer.first:.2f} s; {answer.tokens} new{rate}{'; stopped' if stopped else ''}]"
    )
