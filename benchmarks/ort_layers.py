"""Time single layers in ONNX Runtime: `qalora::GroupQuantLinear` against stock MatMulNBits.

Every row is a chain of equal layers, long enough that its weights do not fit into the last-level
cache, on one thread. Where the cache is so large that all variants' chains would not fit into
memory, the chain is shorter, and the output says that its weights stay in the cache. The variants
of a row are alternated in one process. A number is the ratio of a variant's time to that of stock
MatMulNBits (4 bits, uint8 zero-points, no adapter) of the same accuracy level in the same round:
the median over the rounds, and the quartiles. Weights have a real-valued zero-point, as a folded
QA-LoRA layer has it, which the stock kernel rounds. The merged forms on stock kernels come from
this package's own exporter: MatMulNBits and a correction.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of the bandwidth measurement

import numpy as np
import onnx
import onnxruntime
import torch

import qalora_compile as qc
from benchmarks.machine import MEGABYTE, available_memory, cache_size, processor
from benchmarks.ratios import ratios
from qalora_compile.ir.packing.kernel_layouts import pack_groups
from qalora_compile.runtime import kernel_level, register

EXAMPLES = """examples:
  python -m benchmarks.ort_layers                 all rows, a few minutes
  python -m benchmarks.ort_layers --rows 1 --json layers.json
"""
COPIES = 3  # of a variant's weights: the model, its serialized form, the session
SIDE = 4096
WIDE = 11008
REACH_MERGED = {"fp32": 1.23, "digits": 1.05}  # design: on stock kernels, g = 32, M = 1
REACH = {  # design: ratio to stock 4 bits of the same accuracy level, M = 1, K = N = 4096
    ("int8", 4, 32): 0.85,
    ("int8", 4, 64): 1.0,
    ("int8", 4, 128): 1.0,
    ("fp32", 4, 32): 0.65,
    ("fp32", 4, 64): 0.65,
    ("fp32", 4, 128): 0.65,
    ("int8", 3, 32): 0.75,
    ("int8", 2, 32): 0.55,
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compute a layer.

    Attributes:
        stock: MatMulNBits rather than GroupQuantLinear.
        correction: How the stock form corrects its rounded zero-points, `ExportSpec.correction`; ""
            leaves them rounded.
        compute: `"fp32"` or `"int8"` (accuracy level 0 or 4 of the stock kernel).
        bits: Width of a code.
        half: Scale and zero-point in float16.
        level: Dispatch level forced by QALORA_KERNEL; "" takes the CPU's own.
    """

    stock: bool = False
    correction: str = ""
    compute: str = "int8"
    bits: int = 4
    half: bool = True
    level: str = ""

    def __str__(self) -> str:
        if self.correction:
            return f"merged on stock kernels, {self.compute}, correction {self.correction}"
        if self.stock:
            return f"stock MatMulNBits, {self.compute}"
        types = "fp16" if self.half else "fp32"
        level = f", {self.level}" if self.level else ""
        return f"GroupQuantLinear, {self.compute}, {self.bits} bits, {types} s/z{level}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A chain of layers `[m, k] → [m, n]`, back to k where they differ, and what to time on it."""

    m: int
    k: int
    n: int
    group_size: int
    variants: tuple[Variant, ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured of one variant on one row; times per pass over the chain."""

    m: int
    k: int
    n: int
    group_size: int
    variant: str
    milliseconds: float
    gigabytes_per_second: float
    ratio: float
    low: float
    high: float
    reach: float | None
    cached: bool


def layer_constants(
    variant: Variant, *, k: int, n: int, group_size: int, seed: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Random codes, scale and zero-point of one layer, packed for the variant's operator."""
    generator = np.random.default_rng(seed)
    groups = -(-k // group_size)
    middle = (2**variant.bits - 1) / 2
    codes = generator.integers(0, 2**variant.bits, (n, k), dtype=np.uint8)
    packed = pack_groups(torch.from_numpy(codes), bits=variant.bits, group_size=group_size).numpy()
    scale = generator.uniform(0.75, 1.25, (n, groups)) / (middle * k**0.5)
    zero = middle + 0.6 * generator.standard_normal((n, groups))
    if variant.stock:
        integer = np.clip(np.rint(zero), 0, 15).astype(np.uint8)
        integer = np.pad(integer, ((0, 0), (0, groups % 2)))
        points = integer[:, 0::2] | (integer[:, 1::2] << 4)
        return {"q": packed, "s": scale.astype(np.float32), "z": points.astype(np.uint8)}
    dtype = np.float16 if variant.half else np.float32
    return {"q": packed, "s": scale.astype(dtype), "z": zero.astype(dtype)}


def build_model(row: Row, variant: Variant, layers: int) -> tuple[bytes, int]:
    """A serialized model of the chain, and the bytes of its weights."""
    make = onnx.helper
    nodes, constants = [], []
    value = "x"
    size = 0
    for layer in range(layers):
        k, n = (row.k, row.n) if layer % 2 == 0 else (row.n, row.k)
        arrays = layer_constants(variant, k=k, n=n, group_size=row.group_size, seed=layer)
        names = [f"{name}{layer}" for name in arrays]
        for name, array in zip(names, arrays.values(), strict=True):
            constants.append(onnx.numpy_helper.from_array(array, name))
            size += array.nbytes
        attributes: dict[str, Any] = {"K": k, "N": n, "bits": variant.bits}
        if variant.stock:
            level = 4 if variant.compute == "int8" else 0
            attributes |= {"block_size": row.group_size, "accuracy_level": level}
            kind, domain = "MatMulNBits", "com.microsoft"
        else:
            attributes |= {"group_size": row.group_size, "compute": variant.compute}
            kind, domain = "GroupQuantLinear", "qalora"
        output = f"y{layer}"
        nodes.append(make.make_node(kind, [value, *names], [output], domain=domain, **attributes))
        value = output
    last = row.k if layers % 2 == 0 else row.n
    info = make.make_tensor_value_info
    graph = make.make_graph(
        nodes,
        "layers",
        [info("x", onnx.TensorProto.FLOAT, [row.m, row.k])],
        [info(value, onnx.TensorProto.FLOAT, [row.m, last])],
        constants,
    )
    opsets = [make.make_opsetid(d, v) for d, v in (("", 20), ("com.microsoft", 1), ("qalora", 1))]
    model = make.make_model(graph, opset_imports=opsets, ir_version=10)
    return model.SerializeToString(), size


def export_merged(row: Row, layers: int, folder: Path) -> dict[Variant, tuple[Path, int]]:
    """The same chain, adapted, folded and exported for stock kernels: files and bytes of each."""
    variants = [variant for variant in row.variants if variant.correction]
    if not variants:
        return {}
    sides = [(row.k, row.n) if i % 2 == 0 else (row.n, row.k) for i in range(layers)]
    chain = torch.nn.Sequential(*(torch.nn.Linear(k, n, bias=False) for k, n in sides))
    program = qc.capture_model(chain, (torch.ones(row.m, row.k),), {})
    program = qc.quantize_groups(program, qc.QuantSpec(bits=4, group_size=row.group_size))
    program = qc.insert_adapters(program, qc.AdapterSpec(rank=4))
    with torch.no_grad():
        for parameter in program.adapter_parameters():
            parameter.normal_(0, 0.01)
    folded = qc.fold_adapters(program)
    files = {}
    for variant in variants:
        path = folder / f"{variant.compute}-{variant.correction}.onnx"
        level = 4 if variant.compute == "int8" else 0
        spec = qc.ExportSpec(
            target="ort-stock", accuracy_level=level, correction=variant.correction
        )
        files[variant] = (path, qc.export_model(folded, path, spec).size_bytes)
    return files


def open_chain(model: bytes | Path, variant: Variant) -> Any:
    """A session on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if not variant.stock:
        register(options)
    before = os.environ.get("QALORA_KERNEL")
    os.environ["QALORA_KERNEL"] = variant.level
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    finally:
        os.environ["QALORA_KERNEL"] = before or ""


def open_chains(row: Row, layers: int) -> dict[Variant, tuple[Any, int]]:
    """Each variant's session, and the bytes of its weights."""
    with tempfile.TemporaryDirectory() as scratch:
        models: dict[Variant, tuple[bytes | Path, int]] = {}
        models |= export_merged(row, layers, Path(scratch))
        for variant in row.variants:
            if variant not in models:
                models[variant] = build_model(row, variant, layers)
        return {v: (open_chain(models[v][0], v), models[v][1]) for v in row.variants}


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def bandwidth() -> float:
    """Bytes per second that one thread reads from memory: the best of several passes."""
    values = np.ones(64 * MEGABYTE, np.float32)  # 256 MB
    return values.nbytes / min(seconds(lambda: values @ values) for _ in range(7))


def chain_length(row: Row, cache_bytes: int, memory_bytes: int) -> int:
    """Layers whose codes alone exceed twice the cache, at the narrowest width timed.

    All variants' chains are in memory at once, so it limits their number; two is the least.
    """
    if row.m > 1:
        return 2  # work per weight byte grows with M: the cache no longer decides
    bits = min(variant.bits for variant in row.variants)
    layers = -(-2 * cache_bytes // (row.k * row.n * bits // 8))
    most = memory_bytes // layer_bytes(row)
    return max(2, min(layers + layers % 2, most - most % 2))


def layer_bytes(row: Row) -> int:
    """Bytes that one layer takes in all variants, while their models are made and loaded.

    Codes and parameters are held by the model, its serialized form and the session. The exporter
    of merged forms starts from the weights in float32, and keeps their codes as well.
    """
    weights = row.k * row.n
    each = sum(weights * v.bits // 8 + 8 * weights // row.group_size for v in row.variants)
    merged = any(variant.correction for variant in row.variants)
    return COPIES * each + (12 * weights if merged else 0)


def reach(row: Row, variant: Variant) -> float | None:
    """The design's target, where it states one."""
    if row.m > 1 or variant.level or (variant.stock and not variant.correction):
        return None
    if variant.correction:
        return REACH_MERGED[variant.correction] if row.group_size == 32 else None
    wanted = (variant.compute, variant.bits, row.group_size)
    return REACH.get(wanted) if variant.half else None


def time_row(
    row: Row, *, rounds: int, cache_bytes: int, memory_bytes: int | None = None
) -> list[Result]:
    """Alternate the variants of a row; stock ones come first, ratios refer to them."""
    memory = available_memory() // 2 if memory_bytes is None else memory_bytes
    layers = chain_length(row, cache_bytes, memory)
    sessions = open_chains(row, layers)
    x = np.random.default_rng(0).standard_normal((row.m, row.k)).astype(np.float32)
    times: dict[Variant, list[float]] = {variant: [] for variant in row.variants}
    for number in range(rounds + 1):
        for variant, (session, _) in sessions.items():
            took = seconds(partial(session.run, None, {session.get_inputs()[0].name: x}))
            if number:  # the first round touches the weights for the first time
                times[variant].append(took)
    results = []
    for variant, measured in times.items():
        stock = times[Variant(stock=True, compute=variant.compute)]
        ratio, typical = ratios(measured, stock), statistics.median(measured)
        results.append(
            Result(
                m=row.m,
                k=row.k,
                n=row.n,
                group_size=row.group_size,
                variant=str(variant),
                milliseconds=1e3 * typical,
                gigabytes_per_second=sessions[variant][1] / typical / 1e9,
                ratio=ratio.median,
                low=ratio.low,
                high=ratio.high,
                reach=reach(row, variant),
                cached=sessions[variant][1] <= cache_bytes,
            )
        )
    return results


def rows(sizes: Sequence[int], levels: Sequence[str]) -> list[Row]:
    """What is timed: M = 1 in full, other M at the two group sizes that are common."""
    stock = (Variant(stock=True), Variant(stock=True, compute="fp32"))
    merged = tuple(
        Variant(stock=True, correction=correction, compute=compute)
        for compute in ("int8", "fp32")
        for correction in REACH_MERGED
    )
    one: tuple[Variant, ...] = (*stock, *merged, Variant(half=True), Variant(half=False))
    one += tuple(Variant(bits=bits) for bits in (3, 2, 8))
    one += tuple(Variant(compute="fp32", bits=bits) for bits in (4, 3, 2))
    one += tuple(Variant(compute=c, level=level) for level in levels for c in ("int8", "fp32"))
    few: tuple[Variant, ...] = (*stock, *merged, Variant(), Variant(compute="fp32"))
    few += tuple(Variant(compute=c, level=level) for level in levels for c in ("int8", "fp32"))
    made = []
    for m in sizes:
        if m == 1:
            made += [
                Row(m=1, k=SIDE, n=n, group_size=g, variants=one)
                for n in (SIDE, WIDE)
                for g in (32, 64, 128)
            ]
        else:
            made += [Row(m=m, k=SIDE, n=SIDE, group_size=g, variants=few) for g in (32, 128)]
    return made


def print_results(results: Sequence[Result]) -> None:
    """One table row per variant."""
    first = results[0]
    print(f"\nM = {first.m}, K = {first.k}, N = {first.n}, g = {first.group_size}", flush=True)
    print(f"  {'':54} {'ms':>9} {'GB/s':>6} {'ratio':>6} {'quartiles':>12}  reach")
    for result in results:
        reach = ""
        if result.reach is not None:
            reach = f"{result.reach:.2f} {'yes' if result.ratio <= result.reach else 'NO'}"
        print(
            f"  {result.variant:54} {result.milliseconds:9.3f} {result.gigabytes_per_second:6.1f} "
            f"{result.ratio:6.3f} {result.low:6.3f}-{result.high:.3f}  {reach}",
            flush=True,
        )
    cached = [result.variant for result in results if result.cached]
    if cached:
        which = "all weights" if len(cached) == len(results) else f"weights of {', '.join(cached)}"
        print(f"  {which} fit into the last-level cache: not memory is measured", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128, 512], help="rows of x")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--levels", nargs="*", default=["avx2"], help="more levels to force")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--sides", type=int, nargs="+", default=[SIDE, WIDE], help="values of N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    stream = bandwidth()
    machine = {
        "cpu": processor(),
        "cache_bytes": cache_size(),
        "kernel_level": kernel_level(),
        "onnxruntime": onnxruntime.__version__,
        "stream_gigabytes_per_second": stream / 1e9,
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    measured: list[Result] = []
    for row in rows(options.rows, options.levels):
        if row.group_size in options.group_sizes and row.n in options.sides:
            count = options.rounds if row.m == 1 else max(3, options.rounds // 3)
            results = time_row(row, rounds=count, cache_bytes=machine["cache_bytes"])
            print_results(results)
            measured += results
    if options.json:
        content = {"machine": machine, "results": [vars(result) for result in measured]}
        options.json.write_text(json.dumps(content, indent=1), "utf-8")


if __name__ == "__main__":
    main()
