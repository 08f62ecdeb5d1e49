"""Entry point: parse options, dispatch, and turn errors into messages and exit codes."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from qalora_compile._version import __version__
from qalora_compile.cli import exit_codes
from qalora_compile.cli.signals import Terminated, terminable
from qalora_compile.cli.ui import complain
from qalora_compile.errors import InternalError, QaloraError, VerificationError
from qalora_compile.files import fault_of, recover
from qalora_compile.sealed import unchecked

COMMANDS = (
    *("finetune", "adapt", "fold", "export", "quantize", "verify", "bisect", "inspect"),
    *("generate", "bench", "diff", "apply"),
    "doctor",
)
"""Each command is a module of `qalora_compile.cli`."""

READERS = ("finetune", "fold", "export", "verify", "bisect", "inspect", "generate", "bench")
"""Commands that read folders written by this tool."""


def build_parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of the named commands; only their modules are imported."""
    parser = argparse.ArgumentParser(
        prog="qalora-compile",
        description="Fine-tune a model on its own INT4/3/2 weights and ship one INT4 ONNX file.",
        epilog=(
            "typical sequence:\n"
            "  qalora-compile finetune MODEL --data train.jsonl --out run\n"
            "  qalora-compile fold run --out folded\n"
            "  qalora-compile export folded --out edge\n"
            "  qalora-compile verify folded edge --max-abs 1e-3\n"
            '  qalora-compile generate edge --prompt "Hello"\n'
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in names:
        module = importlib.import_module(f"qalora_compile.cli.{name}")
        command = commands.add_parser(
            module.NAME,
            help=module.SUMMARY,
            description=module.SUMMARY,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        if name in READERS:
            command.add_argument(
                "--no-verify",
                action="store_true",
                help="read folders of this tool without comparing the SHA-256 of their files",
            )
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    # Other commands' dependencies, torch above all, may be missing.
    names = [words[0]] if words and words[0] in COMMANDS else COMMANDS
    try:
        options = build_parser(names).parse_args(words)
    except (SystemExit, QaloraError) as stop:
        return _ended(stop)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    try:
        digests = unchecked() if getattr(options, "no_verify", False) else nullcontext()
        with terminable(), digests:
            _recover_named(options)
            return int(options.run(options))
    except Terminated:
        complain("terminated")
        return exit_codes.TERMINATED
    except KeyboardInterrupt:
        complain("interrupted")
        return exit_codes.INTERRUPTED
    except VerificationError as error:
        _complain(error)
        return exit_codes.FAILED
    except QaloraError as error:
        _complain(error)
        return exit_codes.USAGE
    except Exception as error:
        _complain(_of_system(error, options))
        return exit_codes.USAGE


def _ended(stop: SystemExit | QaloraError) -> int:
    """The exit code if parsing ends early: help, a wrong option, a broken extension."""
    if isinstance(stop, SystemExit):
        return int(stop.code or 0)
    _complain(stop)
    return exit_codes.USAGE


def _recover_named(options: argparse.Namespace) -> None:
    """For every path in the options, restore what a killed process had moved aside."""
    for value in vars(options).values():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                recover(Path(text))


def _of_system(error: Exception, options: argparse.Namespace) -> QaloraError:
    """An error of the system (a full disk, a folder without permission) as a `QaloraError`.

    Raises:
        Exception: `error` itself, if it is of another kind.
    """
    found = fault_of(error, getattr(options, "out", None) or "the output")
    if found is not None:
        return found
    if not isinstance(error, OSError):
        raise error
    return QaloraError(f"{error.strerror or error}", where=error.filename)


def _complain(error: QaloraError) -> None:
    kind = "internal error" if isinstance(error, InternalError) else "error"
    complain(f"{kind}: {error}")


if __name__ == "__main__":
    sys.exit(main())
