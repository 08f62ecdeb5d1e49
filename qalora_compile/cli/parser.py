"""The parser of the command line: short usage, stated defaults, and the nearest name on a typo."""

from __future__ import annotations

import argparse
import importlib
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from qalora_compile._version import __version__
from qalora_compile.cli import exit_codes
from qalora_compile.cli.commands import COMMANDS
from qalora_compile.cli.options import did_you_mean

PROGRAM = "qalora-compile"
_WIDTH = 78
_USAGE = f"{PROGRAM} COMMAND ..."

READERS = (
    *("finetune", "fold", "export", "verify", "bisect", "inspect"),
    *("generate", "chat", "serve", "eval", "bench"),
)
"""Commands that read folders written by this tool."""
_SEQUENCE = """typical sequence:
  qalora-compile finetune MODEL --data train.jsonl --out run
  qalora-compile fold run --out folded
  qalora-compile export folded --out edge
  qalora-compile verify folded edge --max-abs 1e-3
  qalora-compile generate edge --prompt "Hello"
"""


_NARGS = {"+": "{} ...", "*": "[{} ...]", "?": "[{}]"}


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with the default of every option that takes a value."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or action.nargs == 0 or action.required or "default" in text:
            return text
        value = action.default
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        return f"{text} (default: {'none' if shown in (None, '') else shown})".strip()


class Parser(argparse.ArgumentParser):
    """A parser whose usage is one line, and whose errors suggest the nearest name."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=Formatter, **settings)
        self.commands: dict[str, Parser] = {}

    def short_usage(self) -> str:
        """The command with its required arguments."""
        words = [self.prog]
        for action in self._actions:
            if action.option_strings and not action.required:
                continue
            name = str(action.metavar or action.dest.upper())
            value = _NARGS.get(str(action.nargs), "{}").format(name)
            words.append(f"{action.option_strings[0]} {value}" if action.option_strings else value)
        return " ".join([*words, "[options]"])

    def by_name(self) -> dict[str, argparse.Action]:
        """The options by the names that a configuration file gives them."""
        found = {}
        for action in self._actions:
            names = action.option_strings
            name = names[-1].lstrip("-") if names else action.dest
            if name not in ("help", "config"):
                found[name] = action
        return found

    def option_names(self) -> list[str]:
        """The names of the options, without dashes and without the arguments by position."""
        return [name for name, action in self.by_name().items() if action.option_strings]

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse; an unknown option is refused before a missing one."""
        if self._subparsers is None:
            for word in args or ():
                self._check_known(word)
        return super().parse_known_args(args, namespace)

    def _check_known(self, word: str) -> None:
        known = [name for action in self._actions for name in action.option_strings]
        name = word.partition("=")[0]
        if name.startswith("--") and name != "--" and not any(k.startswith(name) for k in known):
            self.error(f"there is no option {name}{_nearest(name, known)}")

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in three lines, and exit with code 2."""
        from qalora_compile.cli.ui import complain, remark

        complain(f"error: {message}")
        remark(f"usage: {self.usage or self.short_usage()}")
        remark(f"help:  {self.prog} --help")
        self.exit(exit_codes.USAGE)


def _nearest(name: str, known: Iterable[str]) -> str:
    question = did_you_mean(name, known)
    return f"; {question}" if question else ""


def build_parser(names: Iterable[str] = COMMANDS) -> Parser:
    """The parser of all commands; only the modules of the named ones are imported."""
    parser = Parser(
        prog=PROGRAM,
        description="Fine-tune a model on its own INT4/3/2 weights and ship one INT4 ONNX file.",
        usage=_USAGE,
        epilog=_SEQUENCE,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, title="commands", prog=PROGRAM
    )
    chosen = set(names)
    for name, summary in COMMANDS.items():
        parser.commands[name] = commands.add_parser(
            name, help=summary, description=textwrap.fill(summary, _WIDTH)
        )
        if name in chosen:
            _declare(name, parser.commands[name])
    return parser


def _declare(name: str, command: Parser) -> None:
    """Add the options of a command, and those that several commands have."""
    module = importlib.import_module(f"qalora_compile.cli.{name}")
    command.epilog = module.EXAMPLES
    module.add_arguments(command)
    command.add_argument("--config", metavar="FILE", help="read options from a YAML file")
    if name in READERS:
        command.add_argument(
            "--no-verify",
            action="store_true",
            help="read folders of this tool without comparing the SHA-256 of their files",
        )
    command.set_defaults(run=module.run)
    command.usage = command.short_usage()


def command_of(words: Sequence[str]) -> str | None:
    """The command that is called; None if the first word is an option or there is none.

    Raises:
        SystemExit: there is no such command.
    """
    if not words or words[0].startswith("-"):
        return None
    if words[0] not in COMMANDS:
        Parser(prog=PROGRAM, usage=_USAGE).error(
            f"there is no command {words[0]}{_nearest(words[0], COMMANDS)}"
        )
    return words[0]
