"""OpenVINO's product by a weight of 4 bits: real-valued zero-points against its own integer ones.

Models of a few square layers, one row of activations, float32 activations. The forms take turns in
one process, and what is printed is the median, with quartiles, of the ratio within a round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import processor
from benchmarks.ratios import ratios, spread
from qalora_compile.exporters.openvino.library import openvino

REAL, HALF, INTEGER, FLOAT = "real", "real in float16", "integer", "float"
FORMS = (INTEGER, REAL, HALF, FLOAT)
EXAMPLES = """examples:
  python -m benchmarks.openvino_layers --width 4096 --rounds 15
  python -m benchmarks.openvino_layers --decode edge_openvino edge_ort --rounds 24
"""


def weight(form: str, width: int, group: int, generator: np.random.Generator) -> Any:
    """A weight `[width, width]` on codes, or in float."""
    op, library = openvino("opset13"), openvino()
    if form == FLOAT:
        return op.constant(generator.normal(size=(width, width)).astype(np.float32))
    groups = width // group
    codes = library.Tensor(library.Type.u4, library.Shape([width, groups, group]))
    codes.data.reshape(-1).view(np.uint8)[:] = generator.integers(0, 256, width * width // 2)
    zero = generator.uniform(0, 15, (width, groups, 1))
    scale = generator.uniform(0.5, 1.5, (width, groups, 1)) / width
    if form == INTEGER:
        whole = library.Tensor(library.Type.u4, library.Shape([width, groups, 1]))
        packed = generator.integers(0, 256, width * groups // 2)
        whole.data.reshape(-1).view(np.uint8)[:] = packed
        offset = op.convert(op.constant(whole), "f32")
    else:
        kind = np.float16 if form == HALF else np.float32
        offset, scale = op.constant(zero.astype(kind)), scale.astype(kind)
        offset = op.convert(offset, "f32") if form == HALF else offset
    step = op.constant(scale if form == HALF else scale.astype(np.float32))
    step = op.convert(step, "f32") if form == HALF else step
    level = op.subtract(op.convert(op.constant(codes), "f32"), offset)
    return op.reshape(op.multiply(level, step), np.array([width, width]), False)


def compiled(form: str, width: int, group: int, layers: int, threads: int) -> Any:
    """A model of some layers, ready to run."""
    op, library = openvino("opset13"), openvino()
    generator = np.random.default_rng(0)
    x = value = op.parameter([1, width], library.Type.f32, name="x")
    for _ in range(layers):
        value = op.matmul(value, weight(form, width, group, generator), False, True)
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "INFERENCE_NUM_THREADS": threads,
    }
    model = library.Model([value], [x], form)
    return library.Core().compile_model(model, "CPU", settings).create_infer_request()


def alternate(
    forms: dict[str, Callable[[], object]], rounds: int, inner: int
) -> dict[str, list[float]]:
    """Milliseconds of a call of each form, in each round; the order turns from round to round."""
    times = {name: list[float]() for name in forms}
    for index in range(rounds + 1):
        names = list(forms)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            begin = time.perf_counter()
            for _ in range(inner):
                forms[name]()
            if index:  # the first round warms up
                times[name].append((time.perf_counter() - begin) * 1e3 / inner)
    return times


def decoders(openvino_folder: Path, ort_folder: Path, threads: int) -> dict[str, Any]:
    """Calls that decode a token after 32, of two edge folders of one model."""
    from qalora_compile.runtime import LanguageModel, kernel_level, open_session

    library = openvino()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    path = str(openvino_folder / "openvino_model.xml")
    request = library.Core().compile_model(path, "CPU", settings).create_infer_request()
    prompt = np.arange(5, 37)[None]
    with_library = kernel_level() is not None
    session = open_session(ort_folder / "model.onnx", library=with_library, threads=threads)
    model = LanguageModel(session)
    _, cache = model.step(prompt, np.ones((1, 32), np.int64), model.empty_cache())
    token, mask = np.array([[7]]), np.ones((1, 33), np.int64)

    def step(ids: Any, begin: int) -> None:
        stop = begin + ids.shape[1]
        request.infer(
            {
                "input_ids": ids,
                "attention_mask": np.ones((1, stop), np.int64),
                "position_ids": np.arange(begin, stop)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )

    length = [32]
    step(prompt, 0)

    def by_state() -> None:
        step(token, length[0])
        length[0] += 1

    name = "ort with the library" if with_library else "ort"
    return {name: lambda: model.step(token, mask, cache), "openvino": by_state}


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
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of OpenVINO")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="of alternation")
    parser.add_argument(
        "--decode", nargs=2, metavar="DIR", help="edge folders of targets openvino and ort"
    )
    options = parser.parse_args(arguments)
    if options.decode:
        first, second = map(Path, options.decode)
        forms = decoders(first, second, options.threads)
    else:
        sizes = (options.width, options.group_size, options.layers, options.threads)
        x = np.random.default_rng(1).normal(size=(1, options.width)).astype(np.float32)
        requests = {form: compiled(form, *sizes) for form in FORMS}
        forms = {name: lambda r=request: r.infer([x]) for name, request in requests.items()}
    times = alternate(forms, options.rounds, inner=1 if options.decode else 8)
    base = next(iter(times))
    count = 1 if options.decode else options.layers
    print(f"{processor()}, {options.threads} threads, {options.rounds} rounds; by {base!r}")
    for name, values in times.items():
        each = spread([value / count for value in values])
        print(f"{name:22} {each} ms   ratio {ratios(values, times[base])}")


if __name__ == "__main__":
    main()
