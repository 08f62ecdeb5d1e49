"""What is read of each format, measured: rows of the table of docs/reference/checkpoints.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf.quants import dequantize
from torch import Tensor

from qalora_compile.capture.load_source import load_source
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.passes.recipes.reuse_codes import reuse_codes
from tests.capture.checkpoints.gguf_files import write_llama
from tests.capture.checkpoints.models import Quantize, weights_of, write_folder
from tests.capture.checkpoints.test_folders import config_of, hqq_layer, mlx_layer
from tests.capture.checkpoints.test_gptq import AWQ, awq_layer, gptq_config, gptq_layer

_FLOAT32 = 1e-6
"""Up to this part of a layer's largest weight, a change is rounding of float32, and none."""
_Layer = Callable[[list[Tensor]], Quantize]
Written = Iterator[tuple[str, Path, list[Tensor] | None]]
"""Forms of a format: name, file or folder, the weights by its library, layer by layer."""


def _folders(folder: Path, forms: Mapping[str, tuple[_Layer, dict[str, Any]]]) -> Written:
    for name, (layer, config) in forms.items():
        weights: list[Tensor] = []
        write_folder(folder / name.replace(" ", "-"), layer(weights), config)
        yield name, folder / name.replace(" ", "-"), weights


def _gguf(folder: Path) -> Written:
    for form in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        yield form, write_llama(folder / f"{form}.gguf", form), None


def _mlx(folder: Path) -> Written:
    widths = (2, 3, 4, 5, 6, 8)
    forms = {f"{b} bits": (partial(mlx_layer, b), config_of("mlx", b)) for b in widths}
    return _folders(folder / "mlx", forms)


def _hqq(folder: Path) -> Written:
    widths = (2, 3, 4, 8)
    forms = {f"{b} bits": (partial(hqq_layer, b), config_of("hqq", b)) for b in widths}
    return _folders(folder / "hqq", forms)


def _gptq(folder: Path) -> Written:
    forms = {f"{b} bits": (partial(gptq_layer, bits=b), gptq_config(b)) for b in (2, 3, 4, 8)}
    forms |= {
        "version 2": (partial(gptq_layer, version=2), gptq_config(tag="gptq_v2")),
        "act-order": (partial(gptq_layer, act_order=True), gptq_config()),
        "float zeros": (partial(gptq_layer, floating="float"), gptq_config()),
    }
    return _folders(folder / "gptq", forms)


def _awq(folder: Path) -> Written:
    return _folders(folder / "awq", {"4 bits": (awq_layer, AWQ)})


FORMATS: dict[str, tuple[Callable[[Path], Written], str]] = {
    "gguf": (_gguf, "gguf"),
    "mlx": (_mlx, "mlx"),
    "hqq": (_hqq, "hqq"),
    "gptq": (_gptq, "packing written bit by bit"),
    "awq": (_awq, "packing written bit by bit"),
}


def read_cells(name: str, folder: Path, number: Callable[[float], str]) -> dict[str, str]:
    """What was read of a format: its forms, layers whose codes are kept, the largest change."""
    (folder / name).mkdir(exist_ok=True)
    forms, kept, total, largest = [], 0, 0, 0.0
    for form, path, wanted in FORMATS[name][0](folder):
        source = load_source(str(path))
        annotated = AnnotateLinears(exclude=("lm_head",))(source.capture()).program
        kept += len(reuse_codes(annotated, source.stored()[0]).weights)
        total += len(annotated.plan.to_quantize())
        forms.append(form)
        found = list(weights_of(source.model).values())
        for mine, theirs in zip(found, wanted or by_gguf(path), strict=True):
            change = (mine - theirs).abs().max() / theirs.abs().max()
            largest = max(largest, float(change))
    return {
        "forms": ", ".join(forms),
        "layers whose codes are kept": f"{kept} of {total}",
        "largest change of a weight": number(largest if largest > _FLOAT32 else 0.0),
    }


def by_gguf(path: Path) -> list[Tensor]:
    """The weights of the blocks by gguf, the rows of q and k as transformers has them."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    found = []
    for layer in range(2):
        for part in parts:
            stored = tensors[f"blk.{layer}.{part}.weight"]
            values = dequantize(stored.data, stored.tensor_type)
            heads = {"attn_q": 4, "attn_k": 2}.get(part)
            if heads is not None:  # neighbours back to halves of a head
                halves = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2)
                values = halves.reshape(values.shape)
            found.append(torch.from_numpy(values.copy()))
    return found
