"""Write docs/reference/commands.md: every command with every option and its default.

The argument parsers are the source. A test compares the page with them.

    python -m scripts.write_commands
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qalora_compile.cli.parser import Parser, build_parser
from qalora_compile.files import write_text

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reference" / "commands.md"
INTRODUCTION = """# Commands

This page lists every command with every option and its default. `python -m scripts.write_commands`
writes it from the argument parsers; do not edit it by hand. `qalora-compile COMMAND --help` prints
the same options.

Exit codes are 0 (done), 1 (a check failed), 2 (wrong usage, invalid input, or an output that cannot
be written), 3 (a proof with parts that were only tried on samples), 130 (Ctrl-C) and 143 (SIGTERM).
"""
USUAL = {"positional arguments": "Arguments", "options": "Options"}
"""The groups that argparse names itself."""


def parsers() -> dict[str, Parser]:
    """The parser of each command."""
    return build_parser().commands


def cell(text: str) -> str:
    """Text as it has to stand in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;") or "–"


def sentence(text: str) -> str:
    """Text that begins with a capital letter."""
    return text[:1].upper() + text[1:]


def values(action: argparse.Action) -> str:
    """What an option takes: its choices, or the word that stands for its value."""
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        return ", ".join(str(choice) for choice in action.choices)
    word = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    word = word if isinstance(word, str) else " ".join(word)
    return {"+": f"{word} …", "*": f"[{word} …]", "?": f"[{word}]"}.get(str(action.nargs), word)


def default(action: argparse.Action, stated: str) -> str:
    """What holds where the option is left out: `stated` is what its help says at the end."""
    if action.required and action.nargs != "?":
        return "required"
    if action.nargs == 0:
        return "off"
    if stated:
        return f"`{stated}`" if stated == _text(action.default) else cell(stated)
    return "as described" if "default" in (action.help or "") else "–"


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def row(command: argparse.ArgumentParser, action: argparse.Action) -> str:
    """One option or argument as a row of a table."""
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    taken = values(action)
    first = f"{names} `{taken}`" if names and taken else names or f"`{taken}`"
    said = command._get_formatter()._expand_help(action) if action.help else ""
    said, _, stated = said.partition("(default: ")
    stated = stated.rstrip().removesuffix(")")
    return f"| {first.replace('|', chr(92) + '|')} | {cell(said)} | {default(action, stated)} |"


def section(name: str, command: Parser) -> str:
    """A command: its summary, its options by group, its examples."""
    lines = [f"\n## {name}\n", f"{sentence(cell(command.description or ''))}.\n"]
    for group in command._action_groups:
        actions = [a for a in group._group_actions if not isinstance(a, argparse._HelpAction)]
        if actions:
            title = group.title or ""
            lines.append(f"| {USUAL.get(title, sentence(title))} | | default |\n|---|---|---|")
            lines += [row(command, action) for action in actions]
            lines.append("")
    if command.epilog:
        lines.append(f"```text\n{command.epilog.rstrip()}\n```")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page as Markdown."""
    return INTRODUCTION + "".join(section(*found) for found in parsers().items())


def main() -> None:
    """Write the page."""
    write_text(PAGE, page())
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
