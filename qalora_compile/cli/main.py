"""Entry point: parse options, dispatch, and turn errors into messages and exit codes."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from qalora_compile.cli import exit_codes
from qalora_compile.cli.config_file import apply_config
from qalora_compile.cli.option_names import in_options
from qalora_compile.cli.parser import build_parser, command_of
from qalora_compile.cli.signals import Terminated, terminable
from qalora_compile.cli.ui import complain
from qalora_compile.errors import InternalError, QaloraError, VerificationError
from qalora_compile.files import fault_of, recover
from qalora_compile.sealed import unchecked


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        options = _parsed(words)
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
        name = str(options.command)
        _complain(in_options(error, build_parser([name]).commands[name].option_names()))
        return exit_codes.USAGE
    except Exception as error:
        _complain(_of_system(error, options))
        return exit_codes.USAGE


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    """The options; only the module of the command that is called is imported."""
    name = command_of(words)
    parser = build_parser([] if name is None else [name])
    if name is not None:
        command = parser.commands[name]
        apply_config(command, command.by_name(), words[1:])
    return parser.parse_args(words)


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
