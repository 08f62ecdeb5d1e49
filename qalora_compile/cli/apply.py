"""`apply`: write a tuned edge folder again, from its base and a patch."""

from __future__ import annotations

import argparse
from pathlib import Path

from qalora_compile.brief import megabytes
from qalora_compile.cli.options import command_line, spec_of
from qalora_compile.cli.ui import print_summary, steps

EXAMPLES = """examples:
  qalora-compile apply edge patch --out edge_tuned
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("base", metavar="BASE", help="edge folder that diff had as BASE")
    parser.add_argument("patch", metavar="PATCH", help="folder that diff wrote")
    parser.add_argument("--out", required=True, metavar="EDGE", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing EDGE")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from qalora_compile.api.diff import ApplySpec, apply_diff

    paths = {name: Path(getattr(options, name)) for name in ("base", "patch", "out")}
    spec = spec_of(ApplySpec, options, **paths)
    with steps():
        result = apply_diff(spec)
    print_summary(
        "apply",
        {
            "tensors from the patch": len(result.tensors),
            "patch": megabytes(result.patch),
            "edge folder": megabytes(result.tuned),
            "written": str(spec.out),
            "next": command_line("inspect", spec.out),
        },
    )
    return 0
