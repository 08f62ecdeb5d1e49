"""`diff`: write what a fine-tuning changed in an edge folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from qalora_compile.brief import megabytes
from qalora_compile.cli.options import command_line, spec_of
from qalora_compile.cli.ui import print_summary, steps

EXAMPLES = """examples:
  qalora-compile diff edge edge_tuned --out patch
  qalora-compile apply edge patch --out edge_again
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("base", metavar="BASE", help="edge folder that devices have")
    parser.add_argument("tuned", metavar="TUNED", help="edge folder of the same base, fine-tuned")
    parser.add_argument("--out", required=True, metavar="PATCH", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing PATCH")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from qalora_compile.api.diff import DiffSpec, diff_folders

    paths = {name: Path(getattr(options, name)) for name in ("base", "tuned", "out")}
    spec = spec_of(DiffSpec, options, **paths)
    with steps():
        result = diff_folders(spec)
    print_summary(
        "diff",
        {
            "tensors that differ": len(result.tensors),
            "tuned folder": megabytes(result.tuned),
            "patch": megabytes(result.patch),
            "written": str(spec.out),
            "next": command_line("apply", spec.base, spec.out, "--out", "EDGE"),
        },
    )
    return 0
