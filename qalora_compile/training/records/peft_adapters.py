"""Adapters alone in the files of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

PEFT's `use_qalora` adapters multiply the mean of each group by the number of groups. What another
pooling makes of that is written into alpha, layer by layer, so that the numbers that PEFT computes
with are those that were trained with; `qalora_pooling` says which convention that was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qalora_compile.config import POOLINGS, one_of
from qalora_compile.errors import PreconditionError, UnsupportedError, UserInputError
from qalora_compile.files import atomic_folder, write_json
from qalora_compile.ir.adapters.find import find_adapters
from qalora_compile.ir.affine import group_count
from qalora_compile.ir.program import Program
from qalora_compile.ir.safetensors_io import load_tensors, save_tensors
from qalora_compile.ir.stages import ADAPTED, ADAPTER_NAMES
from qalora_compile.training.records.checkpoint import load_adapters
from qalora_compile.untrusted import read_json

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SAME = 1e-6


@dataclass(frozen=True)
class _Layer:
    """An adapter as PEFT describes it."""

    rank: int
    alpha: float
    pool: int


def save_peft(
    program: Program,
    folder: Path,
    *,
    pooling: str,
    base_model: str | None = None,
    dropout: float = 0.0,
    overwrite: bool = False,
) -> None:
    """Write the adapters of a program as PEFT names them.

    Args:
        program: At stage `adapted`.
        folder: To write.
        pooling: The convention that the adapters were inserted with, for `qalora_pooling`.
        base_model: What PEFT is to load the adapters onto.
        dropout: That of training.
        overwrite: Replace an existing folder.

    Raises:
        PreconditionError: the program has no adapters.
        UnsupportedError: PEFT has no such adapters: those of stacked experts, of two group sizes,
            that are not pooled adapters alone, or parameters that train together with them.
        UserInputError: the folder exists, or there is no such pooling.
    """
    one_of("pooling", pooling, POOLINGS)
    layers = _layers(program)
    if program.trained:
        raise UnsupportedError(
            "adapter_config.json has no place for parameters that train together with the adapters",
            where=program.trained[0],
            hint="save the complete program: Program.save",
        )
    config = _config(layers) | {
        "base_model_name_or_path": base_model,
        "lora_dropout": dropout,
        "qalora_pooling": pooling,
    }
    tensors = {_tensor_name(name): tensor for name, tensor in program.named_adapter_parameters()}
    with atomic_folder(folder, overwrite=overwrite) as staging:
        write_json(staging / CONFIG_FILE, config)
        save_tensors(tensors, staging / TENSORS_FILE)


def _config(layers: Mapping[str, _Layer]) -> dict[str, Any]:
    """`adapter_config.json` of adapters; ranks and alphas of the few apart from those of most."""
    (pool, *others) = {layer.pool for layer in layers.values()}
    if others:
        raise UnsupportedError(f"adapters pool groups of {pool} and of {others[0]}, PEFT of one")
    rank, alpha = (
        Counter(getattr(layer, part) for layer in layers.values()).most_common(1)[0][0]
        for part in ("rank", "alpha")
    )
    return {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "rank_pattern": {p: layer.rank for p, layer in layers.items() if layer.rank != rank},
        "lora_alpha": alpha,
        "alpha_pattern": {p: layer.alpha for p, layer in layers.items() if layer.alpha != alpha},
        "bias": "none",
        "target_modules": sorted(layers),
        "use_qalora": True,
        "qalora_group_size": pool,
    }


def load_peft(program: Program, folder: Path) -> None:
    """Copy adapters from files of PEFT into a program that has such adapters.

    Raises:
        UserInputError: they are no pooled adapters, or those of another plan; the first difference
            is named, and the program is left as it was.
        UnsupportedError: as for `save_peft`.
    """
    where = str(folder)
    config = read_json(folder / CONFIG_FILE)
    if not isinstance(config, dict) or not config.get("use_qalora"):
        raise UserInputError(
            "the adapters are not pooled: use_qalora is not set",
            where=where,
            hint="an adapter on single inputs does not fold into zero-points",
        )
    stored = load_tensors(folder / TENSORS_FILE)
    for path, layer in _layers(program).items():
        _check_layer(path, layer, config, where)
    names = {_tensor_name(name): name for name, _ in program.named_adapter_parameters()}
    tensors: dict[str, Tensor] = {names.get(name, name): t for name, t in stored.items()}
    load_adapters(program, tensors, where=where)


def _check_layer(path: str, layer: _Layer, config: Mapping[str, Any], where: str) -> None:
    rank = config.get("rank_pattern", {}).get(path, config.get("r"))
    alpha = config.get("alpha_pattern", {}).get(path, config.get("lora_alpha"))
    if config.get("use_rslora") and rank and alpha is not None:
        alpha *= rank**0.5  # PEFT divides by √rank then
    pool = config.get("qalora_group_size")
    for what, theirs, ours in (
        ("rank", rank, layer.rank),
        ("group size", pool, layer.pool),
        ("alpha, as PEFT counts it,", alpha, layer.alpha),
    ):
        same = theirs is not None and abs(theirs - ours) <= _SAME * abs(ours)
        if not same:
            raise UserInputError(
                f"the {what} of {path} is {theirs} in the files and {ours} in the program",
                where=where,
                hint="insert adapters like those in the files",
            )


def _layers(program: Program) -> dict[str, _Layer]:
    """The adapters by path."""
    if program.stage != ADAPTED:
        raise PreconditionError(
            f"a program at stage {program.stage} has no adapters", hint="give the trained program"
        )
    found = {}
    for adapter in find_adapters(program.graph):
        if adapter.unlike_pooled:
            raise UnsupportedError(
                f"PEFT has no adapters that {adapter.unlike_pooled}",
                where=adapter.site,
                hint="save the complete program: Program.save",
            )
        site, own = program.plan[adapter.site or ""], adapter.settings
        if site.experts:
            raise UnsupportedError(
                "PEFT has no pooled adapters for stacked experts",
                where=site.name,
                hint="save the complete program: Program.save",
            )
        assert site.rank is not None
        alpha = own.scaling * site.rank * own.pool / group_count(site.k, own.pool)
        found[site.path] = _Layer(site.rank, alpha, own.pool)
    return found


def _tensor_name(name: str) -> str:
    path, _, part = name.rpartition(".")
    assert part in ADAPTER_NAMES
    return f"{_PREFIX}{path}.{part}.weight"
