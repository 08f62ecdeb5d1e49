"""`completion`: print the completion script of a shell."""

from __future__ import annotations

import argparse

EXAMPLES = """examples:
  eval "$(qalora-compile completion bash)"       in ~/.bashrc
  qalora-compile completion zsh > "${fpath[1]}/_qalora-compile"
  qalora-compile completion tcsh > ~/.qalora-compile.tcsh
"""
SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def run(options: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        UnsupportedError: shtab is not installed.
    """
    from qalora_compile.cli.parser import build_parser
    from qalora_compile.cli.ui import console
    from qalora_compile.optional import require

    shtab = require("shtab", extra="cli", purpose="write completion scripts")
    console.print(shtab.complete(build_parser(), shell=options.shell), soft_wrap=True)
    return 0
