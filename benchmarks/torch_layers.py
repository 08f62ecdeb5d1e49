"""Torch's product by a 4-bit weight with real-valued zeros, next to the operator library's.

A model of a few square layers, one row of activations, is exported to targets `torch` and `ort`,
and to float. The forms take turns in one process; what is printed is the median, with quartiles,
of the ratio within a round. `--decode` compares a step of decoding of two edge folders instead,
and `--package` adds AOTInductor's compiled form. Both load `.pt2` files with torch's own loader,
which runs pickles: give files that you wrote.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import qalora_compile as qc
from benchmarks.machine import processor
from benchmarks.openvino_layers import alternate
from benchmarks.ratios import ratios, spread
from qalora_compile.ir.torch_internals import load_package
from qalora_compile.runtime import LanguageModel, kernel_level, open_session
from qalora_compile.untrusted.artifacts import TORCH_FILE
from qalora_compile.untrusted.pt2_file import compiled_file

EXAMPLES = """examples:
  python -m benchmarks.torch_layers --width 4096 --layers 2 --rounds 15
  python -m benchmarks.torch_layers --decode edge_torch edge_ort --rounds 24
"""
Calls = dict[str, Callable[[], object]]
_PROMPT = 32


def of_layers(width: int, group: int, layers: int, threads: int, *, package: bool) -> Calls:
    """Calls of a model of some layers in each form."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).eval()
    x = torch.randn(1, width)
    captured = qc.capture_model(model, (torch.randn(2, width),))
    program = qc.quantize_groups(captured, qc.QuantSpec(group_size=group))
    with tempfile.TemporaryDirectory() as folder:
        file, graph = Path(folder) / TORCH_FILE, Path(folder) / "model.onnx"
        qc.export_model(program, file, qc.ExportSpec(target="torch", aot=package))
        qc.export_model(program, graph, qc.ExportSpec(target="ort"))
        session = open_session(graph, library=kernel_level() is not None, threads=threads)
        loaded = torch.export.load(file).module()
        compiled: Calls = {}
        if package:
            runner = load_package(str(compiled_file(file)))
            compiled["torch, AOTInductor"] = lambda: runner(x)
    feed = {session.get_inputs()[0].name: x.numpy()}
    return {
        "ort": lambda: session.run(None, feed),
        "torch": lambda: loaded(x),
        **compiled,
        "torch, float": lambda: model(x),
    }


def of_decoders(torch_folder: Path, ort_folder: Path, threads: int) -> Calls:
    """Calls that decode a token after 32, of two edge folders of one model."""
    session = open_session(ort_folder, library=kernel_level() is not None, threads=threads)
    model = LanguageModel(session)
    prompt, token = np.arange(5, 5 + _PROMPT)[None], np.array([[7]])
    _, cache = model.step(prompt, np.ones((1, _PROMPT), np.int64), model.empty_cache())
    mask = np.ones((1, _PROMPT + 1), np.int64)
    past = [torch.from_numpy(np.array(value)) for value in cache.values()]
    ids, place = torch.from_numpy(token), torch.tensor([[_PROMPT]])
    calls: Calls = {"ort": lambda: model.step(token, mask, cache)}
    file = torch_folder / TORCH_FILE
    runners: dict[str, Any] = {"torch": torch.export.load(file).module()}
    if compiled_file(file).is_file():
        runners["torch, AOTInductor"] = load_package(str(compiled_file(file)))
    for name, runner in runners.items():
        calls[name] = partial(runner, ids, torch.from_numpy(mask), place, *past)
    return calls


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--width", type=int, default=4096, metavar="K", help="of the layers")
    parser.add_argument("--group-size", type=int, default=32, metavar="G", help="of the codes")
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="of each model")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="of alternation")
    parser.add_argument("--package", action="store_true", help="the compiled form of layers too")
    parser.add_argument(
        "--decode", nargs=2, metavar="DIR", help="edge folders of targets torch and ort"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        if options.decode:
            first, second = map(Path, options.decode)
            forms = of_decoders(first, second, options.threads)
        else:
            sizes = (options.width, options.group_size, options.layers, options.threads)
            forms = of_layers(*sizes, package=options.package)
        times = alternate(forms, options.rounds, inner=1 if options.decode else 8)
    count = 1 if options.decode else options.layers
    print(f"{processor()}, {options.threads} threads, {options.rounds} rounds; by 'ort'")
    for name, values in times.items():
        each = spread([value / count for value in values])
        print(f"{name:22} {each} ms   ratio {ratios(values, times['ort'])}")


if __name__ == "__main__":
    main()
