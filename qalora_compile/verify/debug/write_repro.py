"""A culprit as a folder: the two smallest programs that still differ, inputs, and a script."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qalora_compile.files import atomic_folder, write_json
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import argument_names, split_call
from qalora_compile.ir.subgraph import Cut, cut_subgraph, reads
from qalora_compile.verdict import Verdict
from qalora_compile.verify.debug.bisect import Culprit
from qalora_compile.verify.numeric.compare_nodes import compare_nodes
from qalora_compile.verify.numeric.run_float64 import run_nodes
from qalora_compile.verify.proof.graphs.graph import Ref
from qalora_compile.verify.proof.match_structure import match_values
from qalora_compile.verify.proof.open_graph import open_graph

_INPUTS, _RECORD = "inputs.safetensors", "reproduction.json"
_OUTPUT = "value"
_SCRIPT = '''"""Two programs that differ, and their inputs.

Run it with `python repro.py`: it exits with 1 and says where the two programs diverge. With --again
it runs the pass on `before` once more; if the pass has been fixed, it exits with 0.
"""

import sys
from pathlib import Path

from safetensors.torch import load_file

import qalora_compile as qc
from qalora_compile.verify import compare_nodes

HERE = Path(__file__).parent
TITLE = {title!r}
PASS = {step!r}

before = qc.Program.load(HERE / "before")
if "--again" in sys.argv[1:]:
    after = qc.Pipeline.parse(PASS)(before).program
else:
    after = qc.Program.load(HERE / "after")
inputs = load_file(HERE / "{inputs}")
report = compare_nodes(before, after, {{"recorded": inputs}})
print(TITLE)
print(report)
sys.exit(0 if report.passed else 1)
'''
_README = """{title}

{what}

before/             the input program of the pass, {size}
after/              its output program
{inputs}  the inputs of both{source}
repro.py            compares them: python repro.py
                    (--again runs the pass on before/ once more)

pass: {step}
"""


def write_repro(culprit: Culprit, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a folder that reproduces a culprit: two programs, inputs, `repro.py` and a README.

    The programs are cut down to the part between the values that still agree and the first that
    does not. If that part alone does not differ, the complete programs are written.

    Args:
        culprit: Found by `bisect`.
        folder: The folder to write.
        overwrite: Replace an existing one.

    Raises:
        UserInputError: the folder exists and `overwrite` is false.
    """
    folder = Path(folder)
    parts = None if culprit.cumulative else _smallest(culprit)
    before, after, inputs, size = parts or _complete(culprit)
    row = culprit.row
    title = f"{culprit.step} changes what is computed"
    title += f" at {row.name}" if row is not None else ""
    filled = {
        "title": title,
        "what": str(culprit),
        "step": culprit.step,
        "inputs": _INPUTS,
        "size": size,
        "source": "" if row is None else f" (from the input {row.input})",
    }
    with atomic_folder(folder, overwrite=overwrite) as scratch:
        before.save(scratch / "before")
        after.save(scratch / "after")
        save_file({n: v.contiguous().clone() for n, v in inputs.items()}, scratch / _INPUTS)
        (scratch / "repro.py").write_text(_SCRIPT.format(**filled), "utf-8")
        (scratch / "README.txt").write_text(_README.format(**filled), "utf-8")
        write_json(scratch / _RECORD, {"format": "qalora-reproduction", "version": 1})
    return folder


_Parts = tuple[Program, Program, dict[str, Tensor], str]


def _smallest(culprit: Culprit) -> _Parts | None:
    """The part between agreeing and differing values; None if that part does not differ."""
    row = culprit.row
    if row is None:
        return None
    a, b = culprit.before, culprit.after
    matches = match_values(open_graph(a), open_graph(b))
    known = {m.name: m.values for m in matches}
    if row.name not in known or not all(isinstance(v, Ref) for v in known[row.name]):
        return None  # an output that one program lacks, or that is a stored tensor
    rows = [row for mode in culprit.report.modes for row in mode.rows]
    passed = {row.name for row in rows if row.verdict == Verdict.EQUAL}
    targets = known[row.name]
    agreeing = {
        first.name: second.name
        for first, second in (known[name] for name in passed)
        if isinstance(first, Ref) and isinstance(second, Ref)
    }
    agreeing |= dict(zip(_placeholders(a), _placeholders(b), strict=True))
    back = {second: first for first, second in agreeing.items()}
    read = [
        *reads(a, targets[0].name, agreeing),
        *(back[name] for name in reads(b, targets[1].name, back)),
    ]
    args = a.leaves(*split_call(culprit.inputs[row.input]))
    wanted = list(dict.fromkeys(read))
    values = dict(zip(_placeholders(a), args, strict=True)) | run_nodes(a, args, frozenset(wanted))
    cuts = [(name, values[name]) for name in wanted if isinstance(values[name], Tensor)]
    first, second = (
        cut_subgraph(
            program,
            targets[index].name,
            [Cut(f"x{i}", (n, agreeing[n])[index], v) for i, (n, v) in enumerate(cuts)],
            _OUTPUT,
        )
        for index, program in enumerate((a, b))
    )
    inputs = {f"x{i}": value for i, (_, value) in enumerate(cuts)}
    if compare_nodes(first, second, {"recorded": inputs}).passed:
        return None
    return first, second, inputs, f"cut down to {_calls(first)} of {_calls(a)} operators"


def _complete(culprit: Culprit) -> _Parts:
    name = next(iter(culprit.inputs)) if culprit.row is None else culprit.row.input
    call: Mapping[str, Any]
    args, kwargs = split_call(culprit.inputs[name])
    call = dict(zip(argument_names(culprit.before.graph), args, strict=False)) | dict(kwargs)
    inputs = {n: v for n, v in call.items() if isinstance(v, Tensor)}
    return culprit.before, culprit.after, inputs, f"complete ({_calls(culprit.before)} operators)"


def _placeholders(program: Program) -> list[str]:
    return [node.name for node in program.graph.nodes if node.op == "placeholder"]


def _calls(program: Program) -> int:
    return sum(node.op == "call_function" for node in program.graph.nodes)
