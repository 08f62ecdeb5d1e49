"""Checkpoints: adapters, optimizer and position in safetensors and JSON, written atomically."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.files import atomic_folder, read_json, write_json
from qalora_compile.ir.program import Program
from qalora_compile.ir.storage import load_tensors, save_tensors

ADAPTERS = "adapters.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
KEPT = 2

_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and the number of steps done when it was written."""

    folder: Path
    step: int


def save_checkpoint(
    folder: Path, program: Program, optimizer: torch.optim.Optimizer, *, step: int, seed: int
) -> Checkpoint:
    """Write `folder/step-N` and remove all but the last `KEPT` checkpoints."""
    names = {id(p): name for name, p in program.named_adapter_parameters()}
    moments: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            moments[f"{names[id(parameter)]}:{key}"] = value
    target = folder / f"{_PREFIX}{step:08d}"
    with atomic_folder(target, overwrite=True) as staging:
        save_tensors(dict(program.named_adapter_parameters()), staging / ADAPTERS)
        save_tensors(moments, staging / OPTIMIZER)
        write_json(staging / STATE, {"step": step, "seed": seed})
    for old in list_checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old.folder)
    return Checkpoint(target, step)


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints in a folder, oldest first."""
    found = sorted(folder.glob(f"{_PREFIX}*")) if folder.is_dir() else []
    return [Checkpoint(f, int(f.name.removeprefix(_PREFIX))) for f in found if f.is_dir()]


def restore_checkpoint(
    checkpoint: Checkpoint, program: Program, optimizer: torch.optim.Optimizer, *, seed: int
) -> None:
    """Load adapters, optimizer state and random state in place.

    Raises:
        UserInputError: the checkpoint is of another plan or seed; the first difference is named.
    """
    state = read_json(checkpoint.folder / STATE)
    if state.get("seed") != seed:
        raise UserInputError(
            f"the checkpoint was made with seed {state.get('seed')}, not {seed}",
            where=str(checkpoint.folder),
        )
    adapters = load_tensors(checkpoint.folder / ADAPTERS)
    load_adapters(program, adapters, where=str(checkpoint.folder))
    moments = load_tensors(checkpoint.folder / OPTIMIZER)
    torch.set_rng_state(moments.pop("rng"))
    for name, parameter in program.named_adapter_parameters():
        keys = [k for k in moments if k.startswith(f"{name}:")]
        optimizer.state[parameter] = {k.rpartition(":")[2]: moments[k] for k in keys}


def load_adapters(program: Program, adapters: dict[str, Tensor], *, where: str) -> None:
    """Copy stored adapters into a program.

    Raises:
        UserInputError: names or shapes differ; the first difference is named.
    """
    own = dict(program.named_adapter_parameters())
    odd = sorted(own.keys() ^ adapters.keys())
    if odd:
        side = "missing in the file" if odd[0] in own else "unknown to the program"
        raise UserInputError(f"the adapter {odd[0]} is {side}", where=where)
    for name, parameter in own.items():
        if parameter.shape != adapters[name].shape:
            raise UserInputError(
                f"the adapter {name} is {list(adapters[name].shape)} in the file and "
                f"{list(parameter.shape)} in the program",
                where=where,
            )
        with torch.no_grad():
            parameter.copy_(adapters[name])
