"""`--config FILE`: options of a command from a YAML file; the command line goes before it.

A file names options as the command line does, without the two dashes, and MODEL as `model`:

    model: ./SmolLM2
    data: [train.jsonl]
    bits: 3
    rslora: true

`finetune` writes such a file, `run.yaml`, into its RUN folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qalora_compile.cli.options import did_you_mean
from qalora_compile.errors import UserInputError
from qalora_compile.optional import require
from qalora_compile.untrusted.artifacts import RUN_CONFIG

_LARGEST = 1 << 20
"""Bytes of a configuration file; real ones have a few hundred."""


Actions = Mapping[str, argparse.Action]
"""The options of a command, by the names that a file gives them."""


def apply_config(parser: argparse.ArgumentParser, actions: Actions, words: Sequence[str]) -> None:
    """Make the options in the file of `--config`, or of a resumed RUN, the parser's defaults.

    Args:
        parser: The parser of the command.
        actions: Its options.
        words: The command line without the command.

    Raises:
        UserInputError: the file cannot be read, or an option in it is unknown or has no such value.
    """
    first = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    for name in ("--config", "--out"):
        first.add_argument(name)
    first.add_argument("--resume", action="store_true")
    try:
        given = first.parse_known_args(words)[0]
    except argparse.ArgumentError:
        return  # the complete parser says what is wrong
    if given.config:
        _apply(parser, actions, Path(given.config))
    elif given.resume and given.out and (Path(given.out) / RUN_CONFIG).is_file():
        _apply(parser, actions, Path(given.out) / RUN_CONFIG)


def read_config(path: Path) -> dict[str, Any]:
    """The options in a file.

    Raises:
        UserInputError: the file cannot be read, or is no mapping of names to values.
        UnsupportedError: PyYAML is not installed.
    """
    yaml = require("yaml", extra="hf", purpose="read a configuration file")
    try:
        if path.stat().st_size > _LARGEST:
            raise UserInputError("the configuration file is over 1 MiB", where=str(path))
        found = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise UserInputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserInputError(f"not YAML: {error}", where=str(path)) from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise UserInputError(
            "a configuration is a mapping of options to values",
            where=str(path),
            hint="write lines such as `bits: 4`",
        )
    return found


def _apply(parser: argparse.ArgumentParser, actions: Actions, path: Path) -> None:
    for name, value in read_config(path).items():
        action = actions.get(name.replace("_", "-"))
        if action is None:
            raise UserInputError(
                f"{parser.prog} has no option {name!r}",
                where=str(path),
                hint=did_you_mean(name, actions) or f"{parser.prog} --help lists them",
            )
        if value is None:
            continue
        parser.set_defaults(**{action.dest: _converted(action, name, value, path)})
        action.required = False
        if not action.option_strings:
            action.nargs = "?"


def _converted(action: argparse.Action, name: str, value: Any, path: Path) -> Any:
    """The value as the option's type, as if it had been given on the command line."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserInputError(f"{name} is true or false, not {value!r}", where=str(path))
        return action.const if value else action.default
    several = action.nargs in ("+", "*")
    if isinstance(value, dict) or isinstance(value, list) is not several:
        wanted = "a list" if several else "one value"
        raise UserInputError(f"{name} takes {wanted}, not {value!r}", where=str(path))
    found = [_one(action, name, part, path) for part in (value if several else [value])]
    return found if several else found[0]


def _one(action: argparse.Action, name: str, value: Any, path: Path) -> Any:
    kind: Any = action.type or str
    try:
        converted = kind(str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise UserInputError(f"{name} is {value!r}: {error}", where=str(path)) from error
    if action.choices is not None and converted not in action.choices:
        known = ", ".join(map(str, action.choices))
        raise UserInputError(f"{name} is {value!r}", where=str(path), hint=f"use one of {known}")
    return converted
