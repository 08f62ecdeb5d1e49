"""The HQQ folder against what vLLM's loader `hqq_marlin` reads, which was taken from its source.

vLLM needs a GPU, and is not run here.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import qalora_compile as qc
from tests.exporters.checkpoint_cases import affine_of, causal_lm, folded
from tests.models import assert_close

READ = {"W_q", "zero", "scale"}
PASSED_OVER = {
    *("axis", "channel_wise", "compute_dtype", "encoded_state_dict", "group_size", "nbits"),
    *("offload_meta", "optimize", "packing", "quant_scale", "quant_zero", "round_zero", "shape"),
    *("stores_quant_config", "unpack_view_dtype", "view_as_float"),
}
BITS, GROUP = 4, 64
"""The only ones that vLLM takes."""


def test_every_tensor_and_key_is_one_that_vllm_reads(tmp_path: Path) -> None:
    model = causal_lm(intermediate_size=128, num_key_value_heads=4)
    program = folded(model, BITS, GROUP)
    qc.export_model(program, tmp_path / "hf", qc.ExportSpec(target="hqq"), model=model)
    config: dict[str, Any] = json.loads((tmp_path / "hf/config.json").read_text("utf-8"))
    stated = config["quantization_config"]
    assert stated["quant_method"] == "hqq"
    weights = stated["quant_config"]["weight_quant_params"]
    assert (weights["nbits"], weights["group_size"]) == (BITS, GROUP)
    assert stated["skip_modules"] == ["lm_head"]

    layers: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for file in (tmp_path / "hf").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            path, _, leaf = name.rpartition(".")
            layers[path][leaf] = tensor
    sites = list(program.plan.weights_to_quantize())
    assert len(sites) == 14
    for site in sites:
        found = layers[site.path]
        assert READ <= found.keys() <= READ | PASSED_OVER | {"bias"}
        packed, groups = found["W_q"], site.k // GROUP
        codes = torch.cat([packed >> 4, packed & 15]).reshape(-1, site.k)
        zero, scale = (found[name].reshape(-1, groups) for name in ("zero", "scale"))
        wide = [t.double().repeat_interleave(GROUP, dim=1) for t in (zero, scale)]
        wanted = affine_of(program, site)
        assert torch.equal(codes, wanted.codes)
        assert_close(
            (codes.double() - wide[0]) * wide[1], wanted.dequantize().double(), relative=1e-6
        )
