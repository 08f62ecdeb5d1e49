"""Equivalent rewrites of exported models, by node and by tools that optimize or convert ONNX files.

`simplified` needs onnxslim and onnxsim in an environment of their own (`make simplifiers`); without
it there are none of these.
"""

from __future__ import annotations

import copy
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import onnxscript.optimizer
import onnxscript.rewriter
from onnx import version_converter

from qalora_compile.runtime.library import kernel_level, library_path
from tests.verify.mutations import Mutant

SIMPLIFIERS = Path("build/simplifiers/bin/python")
_LEVELS = ("BASIC", "EXTENDED", "ALL")
_OPSETS = (24, 25, 26)
_ORDERS = 3


def ordered(model: Any) -> Iterator[Mutant]:
    """Nodes in other orders in which each comes after those that it reads."""
    for seed in range(_ORDERS):
        chance = random.Random(seed)
        made = copy.deepcopy(model)
        waiting = list(made.graph.node)
        missing = {name for node in waiting for name in node.output}
        kept: list[Any] = []
        while waiting:
            ready = [n for n in waiting if not missing.intersection(n.input)]
            node = chance.choice(ready)
            waiting.remove(node)
            missing -= set(node.output)
            kept.append(copy.deepcopy(node))
        del made.graph.node[:]
        made.graph.node.extend(kept)
        yield f"nodes in order {seed}", made


def reassociated(model: Any) -> Iterator[Mutant]:
    """(a + b) + c as a + (b + c), and products alike, where only one node reads the inner one."""
    given = {o.name for o in model.graph.output}
    made_by = {name: node for node in model.graph.node for name in node.output}
    read = [name for node in model.graph.node for name in node.input]
    for place, node in enumerate(model.graph.node):
        inner = made_by.get(node.input[0]) if node.op_type in ("Add", "Mul") else None
        if inner is None or inner.op_type != node.op_type or inner.output[0] in given:
            continue
        if read.count(inner.output[0]) != 1:
            continue
        made = copy.deepcopy(model)
        outer = made.graph.node[place]
        one, two = inner.input
        three = outer.input[1]
        del outer.input[:]
        outer.input.extend([one, "joined"])
        made.graph.node.insert(place, onnx.helper.make_node(node.op_type, [two, three], ["joined"]))
        made.graph.node.remove(inner)
        yield f"{node.output[0]} in another grouping", made


def with_opsets(model: Any) -> Iterator[Mutant]:
    """By ONNX's version converter."""
    for version in _OPSETS:
        yield f"opset {version}", version_converter.convert_version(model, version)


def optimized(path: Path) -> Iterator[Mutant]:
    """What ONNX Runtime writes after its offline optimizations, at three levels."""
    for level in _LEVELS:
        with tempfile.TemporaryDirectory() as folder:
            chosen = onnxruntime.SessionOptions()
            chosen.log_severity_level = 3
            levels = onnxruntime.GraphOptimizationLevel
            chosen.graph_optimization_level = getattr(levels, f"ORT_ENABLE_{level}")
            chosen.optimized_model_filepath = str(Path(folder) / "model.onnx")
            if kernel_level() is not None:
                chosen.register_custom_ops_library(str(library_path()))
            onnxruntime.InferenceSession(str(path), chosen, providers=["CPUExecutionProvider"])
            yield f"ONNX Runtime's {level.lower()}", onnx.load(chosen.optimized_model_filepath)


def scripted(model: Any) -> Iterator[Mutant]:
    """By onnxscript's optimizer and its rewrite rules."""
    yield "onnxscript's optimizer", onnxscript.optimizer.optimize(copy.deepcopy(model))
    yield "onnxscript's rewriter", onnxscript.rewriter.rewrite(copy.deepcopy(model))


def simplified(path: Path) -> Iterator[Mutant]:
    """By onnxslim and onnxsim, where they are installed."""
    for tool in ("onnxslim", "onnxsim") if SIMPLIFIERS.exists() else ():
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "model.onnx"
            command: list[str | Path] = [SIMPLIFIERS, "-m", tool, path, made]
            subprocess.run(command, check=True, capture_output=True)
            yield tool, onnx.load(made)


def by_tools(path: Path) -> Iterator[Mutant]:
    """All of these of the model at a path, and some after each other."""
    model = onnx.load(path)
    single: tuple[Callable[[], Iterator[Mutant]], ...] = (
        lambda: ordered(model),
        lambda: reassociated(model),
        lambda: with_opsets(model),
        lambda: optimized(path),
        lambda: scripted(model),
        lambda: simplified(path),
    )
    for make in single:
        for name, made in make():
            yield name, made
            if name in ("ONNX Runtime's extended", "onnxslim"):
                yield from ((f"{name}, {other}", again) for other, again in ordered(made))
