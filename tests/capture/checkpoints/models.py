"""A small llama as other libraries store it, quantized."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.models import llama

Quantize = Callable[[nn.Linear], dict[str, Tensor]]
"""The tensors of a layer, by their names inside it."""


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of the blocks, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            yield name, module


def write_folder(folder: Path, quantize: Quantize, config: dict[str, Any]) -> dict[str, Tensor]:
    """Write `config.json` and safetensors; the state before quantization is returned."""
    model: Any = llama()
    state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    stored = dict(state)
    for name, module in linears(model):
        del stored[f"{name}.weight"]
        stored |= {f"{name}.{part}": t for part, t in quantize(module).items()}
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in stored.items()}, folder / "model.safetensors")
    known = model.config.to_dict() | {"architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps({**known, **config}))
    return state


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the stored tensors."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the linear layers of the blocks."""
    return {name: module.weight.detach() for name, module in linears(model)}


def example(model: Any) -> Tensor:
    """Two rows of tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, model.config.vocab_size, (2, 9), generator=generator)
