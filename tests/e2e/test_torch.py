"""Target `torch`: layers of SmolLM2-135M generate torch's tokens; C++ runs a package."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qalora_compile as qc
from qalora_compile.capture.load_source import load_source
from tests.e2e.layers import keep_layers
from tests.models import MLP, adapted, assert_close, randomize_adapters

pytestmark = pytest.mark.slow

EXAMPLES = str(Path(__file__).parents[2] / "examples")
PROMPT = "Water boils at a lower temperature on a mountain because"
NEW_TOKENS = 16
LAYERS = 2
"""Of 30: torch computes the target's graph slowly, and later layers hold the same nodes."""


def test_layers_of_smollm2_generate_the_tokens_of_torch(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        from assets import model_path

        source = load_source(str(model_path()))
    keep_layers(source.model, LAYERS)
    quantized = qc.quantize_groups(source.capture(), embeddings=qc.QuantSpec(bits=8))
    folded = qc.fold_adapters(randomize_adapters(qc.insert_adapters(quantized), 1e-3)).eval()
    cached = qc.add_kv_cache(folded, source.model, last_logits=None)
    path = tmp_path / "model.pt2"
    qc.export_model(cached, path, qc.ExportSpec(target="torch"))

    tokens = source.tokenizer(PROMPT).input_ids
    expected = list(tokens)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            call = torch.tensor([expected])
            found = folded(input_ids=call, attention_mask=torch.ones_like(call))
            expected.append(int(found.logits[0, -1].argmax()))
    assert len(set(expected)) > len(set(tokens)), "a degenerate continuation would show nothing"
    assert generate(path, cached, tokens) == expected


def generate(path: Path, program: qc.Program, tokens: list[int]) -> list[int]:
    """Tokens by the exported model, with its key-value cache as inputs and outputs."""
    model: Any = torch.export.load(path).module()  # the test wrote the file
    past = [
        torch.zeros([int(s.startswith("batch")) if isinstance(s, str) else s for s in leaf.shape])
        for leaf in program.signature.cache
    ]
    found, fresh = list(tokens), list(tokens)
    for _ in range(NEW_TOKENS):
        begin = len(found) - len(fresh)
        feed: dict[str, Any] = {
            "input_ids": torch.tensor([fresh]),
            "attention_mask": torch.ones(1, len(found), dtype=torch.int64),
            "position_ids": torch.arange(begin, len(found))[None],
        }
        feed |= {
            leaf.name: value for leaf, value in zip(program.signature.cache, past, strict=True)
        }
        leaves = [feed[leaf.name] for leaf in program.signature.inputs if leaf.dtype is not None]
        with torch.no_grad():
            flat = call_flat(model, program, leaves)
        named = dict(zip(program.signature.outputs, flat, strict=True))
        past = [
            named[leaf.name.replace("past_key_values.", "present.")]
            for leaf in program.signature.cache
        ]
        fresh = [int(named["logits"][0, -1].argmax())]
        found += fresh
    return found


def call_flat(model: Any, program: qc.Program, leaves: list[Any]) -> list[Any]:
    """Call a loaded module with the inputs as a list, for which it has a tree."""
    from qalora_compile.ir.signature import input_spec
    from qalora_compile.ir.torch_internals import pytree

    args, kwargs = pytree.tree_unflatten(leaves, input_spec(program.graph))
    return list(pytree.tree_leaves(model(*args, **kwargs)))


SOURCE = r"""
#include <fstream>
#include <vector>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

int main(int count, char** paths) {
  std::ifstream in(paths[2], std::ios::binary);
  std::vector<float> values(2 * 5 * 50);
  in.read(reinterpret_cast<char*>(values.data()), values.size() * sizeof(float));
  at::NoGradGuard guard;
  torch::inductor::AOTIModelPackageLoader loader(paths[1]);
  std::vector<at::Tensor> inputs = {at::from_blob(values.data(), {2, 5, 50})};
  at::Tensor y = loader.run(inputs)[0].contiguous();
  std::ofstream out(paths[3], std::ios::binary);
  out.write(reinterpret_cast<const char*>(y.data_ptr<float>()), y.nbytes());
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")
def test_a_cpp_program_runs_the_compiled_package(tmp_path: Path) -> None:
    program = qc.fold_adapters(
        adapted(MLP(50, 64, 10).eval(), (torch.randn(4, 3, 50),), qc.QuantSpec(group_size=32))
    )
    report = qc.export_model(
        program, tmp_path / "model.pt2", qc.ExportSpec(target="torch", aot=True)
    )
    assert set(report.files) == {"model.pt2", "model_aot.pt2"}
    root = Path(torch.__file__).parent
    source, binary = tmp_path / "run.cpp", tmp_path / "run"
    source.write_text(SOURCE, "utf-8")
    abi = int(torch.compiled_with_cxx11_abi())
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    links = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-Wl,--no-as-needed"]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    options = ["-std=c++20", "-O0", "-w", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
    command = ["g++", *options, *includes, str(source), "-o", str(binary), *links, *libraries]
    subprocess.run(command, check=True)
    x = torch.randn(2, 5, 50)
    x.numpy().tofile(tmp_path / "x")
    files = [str(tmp_path / name) for name in ("model_aot.pt2", "x", "y")]
    subprocess.run([str(binary), *files], check=True)
    found = torch.from_numpy(np.fromfile(tmp_path / "y", np.float32)).reshape(2, 5, 10)
    assert_close(found, program(x), relative=1e-5)
