"""Run a folded model's GGUF file in llama.cpp, and compare its greedy tokens with ONNX Runtime's.

`--build` builds llama.cpp from the source package of llama-cpp-python, once, into an environment of
its own. It compiles on one core, niced, which takes from a quarter of an hour to an hour. On a CPU,
llama.cpp multiplies Q4_1 weights by activations that it rounds to int8, block by block, so its
logits differ from those of float32 by that rounding. ONNX Runtime is run on float32 activations
and, to show the size of such a difference, on int8 ones too. As a control, llama.cpp also runs the
weights of the same file written as F32, which it multiplies by activations in float32: what differs
then is not the runtime's arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

import qalora_compile as qc
from qalora_compile.api.run_folder import MODEL, TOKENIZER, load_run
from qalora_compile.cli.ui import console, print_summary, print_table
from qalora_compile.exporters.checkpoints.gguf.metadata import copy_metadata
from qalora_compile.ir.program import Program
from qalora_compile.runtime import LanguageModel, open_session
from qalora_compile.untrusted.tokenizer import load_tokenizer

EXAMPLES = """examples:
  python -m benchmarks.llama_cpp --build llama-venv FOLDED
  python -m benchmarks.llama_cpp --python llama-venv/bin/python --json llama.json FOLDED
  python -m benchmarks.llama_cpp --python llama-venv/bin/python --texts test.jsonl --tokens 2 FOLDED
"""
PACKAGE = "llama-cpp-python==0.3.36"
CMAKE = (
    "-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF "
    "-DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_CURL=OFF -DGGML_OPENMP=OFF"
)
SIDE = Path(__file__).with_name("llama_cpp_side.py")
TEXTS = (
    "The committee met on Tuesday to discuss the plans for a new railway line, and",
    "Shares in the oil company fell sharply after",
    "Once upon a time, in a village by the sea,",
    "The capital of France is",
    "Water boils at a lower temperature on a mountain because",
)
CONTEXT = 512


@dataclass(frozen=True)
class Row:
    """One prompt.

    Attributes:
        text: The prompt.
        equal: Tokens before the first that differs, ONNX Runtime and llama.cpp, both greedy.
        choices: Positions of ONNX Runtime's continuation at which llama.cpp prefers the same token.
        margin: At the first that differs: by how much ONNX Runtime's logits prefer theirs.
        difference: Largest difference of a logit on that continuation, to the folded program.
        scale: Largest logit there.
        int8_equal, int8_difference: The same of ONNX Runtime on int8 activations.
        float_equal, float_choices, float_margin, float_difference: The same of llama.cpp on the
            file's weights as F32.
    """

    text: str
    equal: int
    choices: int
    margin: float
    difference: float
    scale: float
    int8_equal: int
    int8_difference: float
    float_equal: int
    float_choices: int
    float_margin: float
    float_difference: float


def read_texts(file: Path | None) -> list[str]:
    """The prompts of a file of JSON lines, or a few of our own."""
    if file is None:
        return list(TEXTS)
    return [json.loads(line)["prompt"] for line in file.read_text("utf-8").splitlines()]


def build(folder: Path) -> Path:
    """An environment with llama.cpp, built from source; gives its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    environment = os.environ | {"CMAKE_ARGS": CMAKE, "CMAKE_BUILD_PARALLEL_LEVEL": "1"}
    command = [str(python), "-m", "pip", "install", "--no-binary", "llama-cpp-python", PACKAGE]
    subprocess.run(["nice", "-n", "15", *command], check=True, env=environment)
    return python


def common(first: list[int], second: list[int]) -> int:
    """How many tokens two sequences have in common from the start."""
    pairs = zip(first, second, strict=True)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(first))


def matching(equal: list[int], tokens: int) -> str:
    """How many continuations are equal to the last token."""
    return f"{sum(count == tokens for count in equal)} of {len(equal)}"


def reference(program: Program, prompt: list[int], tokens: list[int]) -> np.ndarray[Any, Any]:
    """Logits of the folded program at each of the tokens."""
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        logits = program(ids, torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
    values: np.ndarray[Any, Any] = logits.float().numpy()
    return values


def write_as_floats(source: Path, target: Path) -> None:
    """The same GGUF file with every tensor dequantized to F32."""
    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    copy_metadata(source, writer)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_llama(python: Path, job: dict[str, Any], scratch: Path, name: str) -> dict[str, Any]:
    """What llama.cpp makes of a job; its logits lie in the folder `name`."""
    (scratch / name).mkdir()
    place = scratch / name / "job.json"
    place.write_text(json.dumps(job), "utf-8")
    # Isolated: this folder has a module of the name of the library.
    subprocess.run([str(python), "-I", str(SIDE), str(place)], check=True)
    found: dict[str, Any] = json.loads(place.with_name("found.json").read_text("utf-8"))
    return found


def measure(options: argparse.Namespace, python: Path, scratch: Path) -> dict[str, Any]:
    """Export for both runtimes, generate, compare."""
    folder = Path(options.folder)
    program, _ = load_run(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    texts = read_texts(options.texts)[: options.prompts]
    prompts = [tokenizer(text).input_ids for text in texts]
    exported = qc.export_model(
        program,
        scratch / "model.gguf",
        qc.ExportSpec(target="gguf"),
        model=folder / MODEL,
        tokenizer=folder / TOKENIZER,
    )
    cached = qc.add_kv_cache(program, folder / MODEL)
    tokens = []
    for level in (0, 4):
        path = scratch / f"level-{level}.onnx"
        qc.export_model(cached, path, qc.ExportSpec(accuracy_level=level))
        model = LanguageModel(open_session(path, threads=options.threads))
        tokens.append([list(model.generate(p, max_new_tokens=options.tokens)) for p in prompts])
    exact, int8 = tokens
    write_as_floats(scratch / "model.gguf", scratch / "float.gguf")
    job = {
        "texts": texts,
        "prompts": prompts,
        "given": exact,
        "new": options.tokens,
        "threads": options.threads,
        "context": CONTEXT,
    }
    found, control = (
        run_llama(python, job | {"model": str(scratch / f"{name}.gguf")}, scratch, name)
        for name in ("model", "float")
    )
    rows, session = [], open_session(scratch / "level-4.onnx", threads=options.threads)
    for number, prompt in enumerate(prompts):
        given = exact[number]
        wanted = reference(program, prompt, given)
        rough = reference_int8(session, prompt, given)
        own, floats = (
            compared(one, number, wanted, given, scratch / name)
            for name, one in (("model", found), ("float", control))
        )
        same, apart = common(given, int8[number]), float(np.abs(rough - wanted).max())
        scale = float(np.abs(wanted).max())
        rows.append(Row(texts[number], *own, scale, same, apart, *floats))
    cut_alike = sum(a == b for a, b in zip(prompts, found["texts"], strict=True))
    return {
        "llama_cpp_python": found["version"],
        "tokens": options.tokens,
        "rows": [asdict(row) for row in rows],
        "equal to the last token": matching([row.equal for row in rows], options.tokens),
        "as F32": matching([row.float_equal for row in rows], options.tokens),
        "ONNX Runtime on int8 activations": matching(
            [row.int8_equal for row in rows], options.tokens
        ),
        "prompts cut into the same tokens": f"{cut_alike} of {len(prompts)}",
        "rounding of weights": max(row.relative_error for row in exported.stored),
        "bytes": exported.size_bytes,
    }


def compared(
    found: dict[str, Any],
    number: int,
    wanted: np.ndarray[Any, Any],
    tokens: list[int],
    folder: Path,
) -> tuple[int, int, float, float]:
    """Equal tokens, equal choices, margin and largest difference: what `Row` has of a run."""
    equal, margin = common(tokens, found["tokens"][number]), 0.0
    if equal < len(tokens):
        margin = float(wanted[equal, tokens[equal]] - wanted[equal, found["tokens"][number][equal]])
    same = sum(a == b for a, b in zip(tokens, found["choices"][number], strict=True))
    logits = np.load(folder / f"logits-{number}.npy")
    return equal, same, margin, float(np.abs(logits - wanted).max())


def reference_int8(session: Any, prompt: list[int], tokens: list[int]) -> np.ndarray[Any, Any]:
    """Logits of ONNX Runtime on int8 activations at each of the tokens."""
    shapes = {i.name: i.shape for i in session.get_inputs()}
    ids = np.array([prompt + tokens], dtype=np.int64)
    feed: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feed["position_ids"] = np.arange(ids.shape[1])[None]
    for name, shape in shapes.items():
        if name.startswith("past_key_values."):
            feed[name] = np.zeros((1, shape[1], 0, shape[3]), dtype=np.float32)
    feed = {name: value for name, value in feed.items() if name in shapes}
    (logits,) = session.run(["logits"], feed)
    values: np.ndarray[Any, Any] = logits[0, len(prompt) - 1 : -1]
    return values


def show(result: dict[str, Any]) -> None:
    """Print what was measured."""
    of = result["tokens"]
    print_table(
        f"llama.cpp and ONNX Runtime, {of} tokens a prompt",
        ("equal", "choices", "margin", "Δ logit", "F32: equal", "choices", "margin", "Δ logit",
         "ORT int8: equal", "Δ logit", "largest", "prompt"),
        [(r["equal"], r["choices"], r["margin"], r["difference"], r["float_equal"],
          r["float_choices"], r["float_margin"], r["float_difference"], r["int8_equal"],
          r["int8_difference"], r["scale"], r["text"]) for r in result["rows"]],
    )  # fmt: skip
    print_summary("llama.cpp", {k: v for k, v in result.items() if k != "rows"})


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; 0 where at each position llama.cpp's choice is ours or close to it."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDED", help="folder written by fold")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--build", type=Path, metavar="DIR", help="environment to build it in")
    place.add_argument("--python", type=Path, help="Python that has llama-cpp-python")
    parser.add_argument("--texts", type=Path, help="JSON lines with a prompt each, as trained on")
    parser.add_argument("--prompts", type=int, help="how many prompts; all if not given")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    options = parser.parse_args(arguments)
    python = build(options.build) if options.build else options.python
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options, python, Path(scratch))
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    apart = [row for row in result["rows"] if row["margin"] > 2 * row["difference"]]
    for row in apart:
        console.print(f"more than rounding explains: {row['text']}", markup=False)
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
