"""`doctor`: versions, CPU features, and the kernels that quantized layers run on."""

from __future__ import annotations

import argparse

from qalora_compile.cli.ui import print_json, print_summary

EXAMPLES = """examples:
  qalora-compile doctor
  qalora-compile doctor --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from qalora_compile.runtime.doctor import describe_machine

    facts = describe_machine()
    if options.json:
        print_json(facts)
    else:
        print_summary("doctor", facts)
    return 0
