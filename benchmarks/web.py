"""Forms of a quantized layer in WebAssembly, WebGPU and Node.js, next to float in the same run.

Each runtime loads the forms of one layer, or of a language model, and runs them in turns. What is
printed is the median, with quartiles, of the ratio to float within a round. `make clients` installs
the runtimes; a browser is run without a window, and its page sends the result back.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import qalora_compile as qc
from benchmarks.machine import MEGABYTE, processor
from benchmarks.peers.sources import source_folder
from benchmarks.ratios import ratios
from benchmarks.web_client.browser import in_browser
from qalora_compile.api.quantize import QuantizeSpec, quantize_folder
from qalora_compile.capture.lazy_folder import capture_checkpoint
from qalora_compile.optional import require
from qalora_compile.untrusted import read_json
from qalora_compile.untrusted.artifacts import model_file

ROOT = Path(__file__).parents[1]
PACKAGES = ROOT / "examples" / "web"
FLOAT = "float"
UNFUSED = {"extra": {"session": {"disable_quant_qdq": "1"}}}
"""Session options with which ONNX Runtime dequantizes the weights of target `onnx` at load."""
EXAMPLES = """examples:
  python -m benchmarks.web --width 2048 2048
  python -m benchmarks.web --model smollm2 --only web ort --runtimes chromium-wasm
"""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a model is written.

    Attributes:
        export: Fields of `ExportSpec`, but for those of the preset.
        preset: As `--preset`.
        bits, group: Of the codes.
        settings: Options of the session.
        real: MatMulNBits gets real-valued zero-points; for layers only.
    """

    export: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    bits: int = 4
    group: int = 32
    settings: Mapping[str, Any] = field(default_factory=dict)
    real: bool = False


STOCK = {"target": "ort-stock"}
FORMS = {
    "web": Form(preset="web"),
    "ort": Form(),
    "ort, level 4": Form(export={"accuracy_level": 4}),
    "ort-stock": Form(export=STOCK),
    "ort-stock, level 4": Form(export=STOCK | {"accuracy_level": 4}),
    "onnx": Form(export={"target": "onnx"}),
    "onnx, unfused": Form(export={"target": "onnx"}, settings=UNFUSED),
}
LAYER_FORMS = FORMS | {
    "web, float16": Form(preset="web", export={"parameter_dtype": "float16"}),
    "ort-stock, digits": Form(export=STOCK | {"correction": "digits"}),
    "real zero-points": Form(export=STOCK, real=True),
    "ort-stock, groups of 64": Form(export=STOCK, group=64),
    "ort-stock, groups of 128": Form(export=STOCK, group=128),
    "web, 8 bits": Form(preset="web", bits=8),
    "ort-stock, 8 bits": Form(export=STOCK, bits=8),
    "ort-stock, 8 bits, level 4": Form(export=STOCK | {"accuracy_level": 4}, bits=8),
}


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where a plan is run.

    Attributes:
        provider: Execution provider.
        build: File of onnxruntime-web for a browser; None is Node.js.
        threads: Of the runtime.
    """

    provider: str
    build: str | None = None
    threads: int = 1


_WASM, _WEBGPU = "ort.wasm.bundle.min.mjs", "ort.webgpu.bundle.min.mjs"
RUNTIMES = {
    "node-native": Runtime(provider="cpu"),
    "node-wasm": Runtime(provider="wasm"),
    "chromium-wasm": Runtime(provider="wasm", build=_WASM),
    "chromium-wasm-2": Runtime(provider="wasm", build=_WASM, threads=2),
    "chromium-wasm-of-webgpu": Runtime(provider="wasm", build=_WEBGPU),
    "chromium-webgpu": Runtime(provider="webgpu", build=_WEBGPU),
}
"""The last but one is the build that transformers.js loads; the last runs on SwiftShader where
there is no GPU."""


def write_layer(form: Form | None, width: tuple[int, int], path: Path) -> None:
    """A layer of `[K, N]` random weights; None is in float."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(*width, bias=False)
    program = qc.capture_model(layer.eval(), (torch.zeros(4, width[0]),))
    if form is None:
        qc.export_model(program, path, qc.ExportSpec(allow_unfolded=True))
        return
    codes = qc.QuantSpec(bits=form.bits, group_size=form.group)
    program = qc.quantize_groups(program, codes)
    spec = qc.ExportSpec.from_preset(
        form.preset, **({"parameter_dtype": "float32"} | dict(form.export))
    )
    qc.export_model(program, path, spec)
    if form.real:
        _take_real_zero_points(path, program)


def _take_real_zero_points(path: Path, program: qc.Program) -> None:
    """Give MatMulNBits the zero-points as they are, and take out the correction."""
    onnx = require("onnx", extra="onnx", purpose="write a layer")
    model, tensors = onnx.load(path), program.tensors()
    product = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    site = next(iter(program.plan))
    zero = -tensors[f"{site.path}.offset"] / tensors[f"{site.path}.scale"]
    product.input[3] = "zero_point_real"
    product.output[0] = model.graph.output[0].name
    made = onnx.numpy_helper.from_array(zero.reshape(-1).numpy(), "zero_point_real")
    used = [*product.input[1:3]]
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    for held, rest in ((model.graph.node, [product]), (model.graph.initializer, [*kept, made])):
        del held[:]
        held.extend(rest)
    onnx.save(model, path)


def write_decoder(form: Form | None, source: Path, path: Path) -> None:
    """A language model with its cache; None is in float."""
    if form is None:
        program = capture_checkpoint(source, last_logits=None)
        spec = qc.ExportSpec(allow_unfolded=True, fusion="standard", opset=23)
        qc.export_model(program, path, spec)
        return
    target = qc.ExportSpec.from_preset(form.preset, **form.export)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        out = Path(scratch) / "edge"
        quantize_folder(QuantizeSpec(model=str(source), out=out, target=target, preset=form.preset))
        shutil.move(model_file(out), path)


def in_node(plan: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run a plan in Node.js."""
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    script = ROOT / "benchmarks" / "web_client" / "node.mjs"
    command = ["node", str(script), str(folder / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"node failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(runtime: Runtime, plan: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run a plan in a runtime: name of a form → its figures."""
    stated = dict(plan) | {"provider": runtime.provider, "threads": runtime.threads}
    stated |= {"packages": str(PACKAGES), "runtime": runtime.build}
    if runtime.build is None:
        return in_node(stated, folder)
    return in_browser(stated, folder, PACKAGES)


def lines(found: Mapping[str, Any], tokens: int | None) -> list[str]:
    """Rows of the table: form, size, load, memory, and each task with its ratio to float."""
    made = []
    for name, row in found.items():
        if "refused" in row:
            made.append(f"  {name:27} {row['refused'][:120]}")
            continue
        cells = [f"{row['bytes'] / 1e6:7.1f} MB", f"load {row['load']:6.2f} s"]
        if row.get("heap"):
            cells.append(f"heap {row['heap'] / MEGABYTE:5.0f} MiB")
        for task, times in row["times"].items():
            middle = statistics.median(times)
            shown = f"{1000 * tokens / middle:6.2f} /s" if task == "decode" and tokens else ""
            base = found.get(FLOAT, {}).get("times", {}).get(task)
            ratio = f" × {ratios(times, base)}" if base else ""
            cells.append(f"{task} {shown or f'{middle:8.2f} ms'}{ratio}")
        cells.append(_agreement(row, found.get(FLOAT)))
        made.append(f"  {name:27} " + "   ".join(cells))
    return made


def _agreement(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> str:
    """What the decoder wrote, next to float."""
    if base is None or "values" not in base or "decode" not in row["values"]:
        return ""
    return "float's tokens" if row["values"] == base["values"] else "other tokens than float's"


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--width", type=int, nargs=2, default=(576, 1536), metavar=("K", "N"))
    made.add_argument("--model", metavar="M", help="smollm2, random-1b, or a Hugging Face folder")
    made.add_argument("--only", nargs="+", metavar="FORM", help=f"of {', '.join(LAYER_FORMS)}")
    made.add_argument("--runtimes", nargs="+", choices=tuple(RUNTIMES), default=list(RUNTIMES))
    made.add_argument("--rounds", type=int, default=7, metavar="N", help="of alternation")
    made.add_argument("--prompt", type=int, default=64, metavar="N", help="tokens of the prompt")
    made.add_argument("--tokens", type=int, default=8, metavar="N", help="decoded in a round")
    made.add_argument("--cache", type=Path, default=ROOT / "build" / "web", metavar="DIR")
    made.add_argument("--no-float", action="store_true", help="leave out float, for its memory")
    return made


def layer_plans(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One plan with all forms of a layer."""
    chosen = {FLOAT: None} | {n: LAYER_FORMS[n] for n in options.only or LAYER_FORMS}
    models: list[dict[str, Any]] = []
    for name, form in chosen.items():
        file = f"{len(models)}.onnx"
        write_layer(form, tuple(options.width), folder / file)
        models.append({"name": name, "file": file, "settings": dict(form.settings if form else {})})
    calls = {"1 rows": 20, f"{options.prompt} rows": 2}
    sizes = {"width": options.width[0], "rows": [1, options.prompt], "calls": calls}
    return [{"kind": "layer", "models": models, "rounds": options.rounds} | sizes]


def decoder_plans(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A plan for each form of a decoder, with float: more do not fit in memory."""
    source = source_folder(options.model, options.cache)
    config = read_json(source / "config.json")
    heads = config["num_attention_heads"]
    sizes = {
        "heads": config["num_key_value_heads"],
        "width": config.get("head_dim") or config["hidden_size"] // heads,
        "prompt": [(17 * i) % 4000 + 100 for i in range(options.prompt)],
        "tokens": options.tokens,
    }

    def stated(name: str, form: Form | None) -> dict[str, Any]:
        file = f"{name.replace(', ', '-').replace(' ', '-')}.onnx"
        if not (folder / file).is_file():
            write_decoder(form, source, folder / file)
        return {"name": name, "file": file, "settings": dict(form.settings if form else {})}

    common = {"kind": "decoder", "rounds": options.rounds} | sizes
    base = [] if options.no_float else [stated(FLOAT, None)]
    return [
        common | {"models": [stated(name, FORMS[name]), *base]} for name in options.only or FORMS
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = parser().parse_args(arguments)
    kind = f"{options.model}" if options.model else "×".join(map(str, options.width))
    print(f"{processor()}, {kind}, {options.rounds} rounds; × is the time next to float's")
    folder = options.cache / (f"{Path(options.model).name}-models" if options.model else "layer")
    folder.mkdir(parents=True, exist_ok=True)
    if not options.model:
        shutil.rmtree(folder)
        folder.mkdir()
    plans = (decoder_plans if options.model else layer_plans)(options, folder)
    for name in options.runtimes:
        print(f"{name}:", flush=True)
        for plan in plans:
            rows = lines(run(RUNTIMES[name], plan, folder), plan.get("tokens"))
            print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
