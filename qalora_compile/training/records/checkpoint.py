"""Checkpoints: adapters, optimizer and position in safetensors and JSON, written atomically."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora_compile.config.choices import CHECKPOINTS_KEPT
from qalora_compile.errors import UserInputError
from qalora_compile.files import atomic_folder, recover
from qalora_compile.ir.program import Program
from qalora_compile.ir.safetensors_io import load_tensors, save_tensors
from qalora_compile.sealed import check_files, digests_of, read_sealed, write_sealed
from qalora_compile.training.fit import Best, FitState
from qalora_compile.training.records.run_identity import Identity
from qalora_compile.untrusted import quoted

ADAPTERS = "adapters.safetensors"
OPTIMIZER = "optimizer.safetensors"
BEST = "best.safetensors"
REFERENCE = "reference.safetensors"
RANKS = "ranks.safetensors"
STATE = "state.json"

_PREFIX = "step-"
_FORMAT, _VERSION = "qalora-checkpoint", 3
"""Version 3 has digests; checkpoints of version 2, which have none, can still be read."""
_VERSIONS = (2, _VERSION)
_FIELDS = {"step": int, "stale": int, "moments": list, "identity": dict}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, and the number of steps done when it was written."""

    folder: Path
    step: int


def save_checkpoint(
    folder: Path,
    program: Program,
    state: FitState,
    identity: Identity,
    *,
    keep: int = CHECKPOINTS_KEPT,
) -> Checkpoint:
    """Write `folder/step-N`, completely or not at all, then remove all but the last `keep`.

    Since older checkpoints are removed, save only weights with a finite loss: in `fit`'s `on_good`.

    The step determines the schedule, the position in the data and all random numbers (see
    `FitState`), so a resumed training gives bit-identical weights.

    Raises:
        OutputError: it cannot be written; older checkpoints stay as they were.
    """
    names = {id(p): name for name, p in program.named_adapter_parameters()}
    moments: dict[str, Tensor] = {
        f"{names[id(parameter)]}:{key}": value
        for parameter, values in state.optimizer.state.items()
        for key, value in values.items()
    }
    best = state.best
    target = folder / f"{_PREFIX}{state.step:08d}"
    with atomic_folder(target, overwrite=True) as staging:
        save_tensors(dict(program.named_adapter_parameters()), staging / ADAPTERS)
        save_tensors(moments, staging / OPTIMIZER)
        if best is not None:
            save_tensors(best.adapters, staging / BEST)
        if state.reference is not None:
            save_tensors(state.reference, staging / REFERENCE)
        if state.ranks is not None:
            save_tensors(state.ranks.state, staging / RANKS)
        value = {
            "format": _FORMAT,
            "version": _VERSION,
            "step": state.step,
            "stale": state.stale,
            "moments": sorted(moments),
            "best": None if best is None else {"loss": best.loss, "step": best.step},
            "identity": identity.to_json(),
        }
        written = (path.name for path in staging.glob("*.safetensors"))
        write_sealed(staging / STATE, value | {"files": digests_of(staging, written)})
    for old in list_checkpoints(folder)[:-keep]:
        going = old.folder.with_name(f".{old.folder.name}.going")
        old.folder.rename(going)  # so that a partly removed folder never looks like a checkpoint
        shutil.rmtree(going)
    return Checkpoint(target, state.step)


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints in a folder, oldest first."""
    named = [(f, re.fullmatch(rf"{_PREFIX}(\d+)", f.name)) for f in folder.glob(f"{_PREFIX}*")]
    found = [Checkpoint(f, int(name[1])) for f, name in named if name and f.is_dir()]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def remove_unfinished(folder: Path) -> None:
    """Remove the remains of a checkpoint whose writer was killed."""
    for rest in list(folder.glob(f".{_PREFIX}*")):
        name = re.match(rf"\.({_PREFIX}\d+)\.", rest.name)
        if name is not None:
            recover(folder / name[1])
        if rest.is_dir():
            shutil.rmtree(rest)
        else:
            rest.unlink(missing_ok=True)


def restore_checkpoint(
    checkpoint: Checkpoint, program: Program, state: FitState, identity: Identity
) -> None:
    """Load adapters, optimizer state and position in place.

    Raises:
        UserInputError: the checkpoint has another plan, model, data or options (the first
            difference is named), or it is broken. Nothing is changed in this case.
    """
    where = str(checkpoint.folder)
    value = _read_state(checkpoint.folder)
    identity.check(value["identity"], where=where)
    adapters = load_tensors(checkpoint.folder / ADAPTERS)
    moments = load_tensors(checkpoint.folder / OPTIMIZER)
    _check_moments(program, moments, value["moments"], where)
    best = None
    if value["best"] is not None:
        best = Best(adapters=load_tensors(checkpoint.folder / BEST), **value["best"])
        _check_adapters(program, best.adapters, where)
    reference = None
    if state.reference is not None:
        reference = load_tensors(checkpoint.folder / REFERENCE)
        _check_adapters(program, reference, where)
    if state.ranks is not None:
        ranks = load_tensors(checkpoint.folder / RANKS)
        _check_tensors("state of the ranks", state.ranks.state, ranks, where)
        state.ranks.state = ranks
    load_adapters(program, adapters, where=where)
    for name, parameter in program.named_adapter_parameters():
        keys = [k for k in moments if k.startswith(f"{name}:")]
        own = {k.rpartition(":")[2]: moments[k] for k in keys}
        state.optimizer.state[parameter] = {
            key: tensor.to(parameter.device) if tensor.dim() else tensor
            for key, tensor in own.items()
        }
    state.step, state.stale, state.best = value["step"], value["stale"], best
    state.reference = reference


def _read_state(folder: Path) -> dict[str, Any]:
    """Read the state of a checkpoint, and check its fields and their types."""
    where = str(folder)
    value = read_sealed(folder / STATE, since=_VERSION)
    if value.get("format") != _FORMAT:
        raise UserInputError("this is not a checkpoint of this package", where=where)
    if value.get("version") not in _VERSIONS:
        raise UserInputError(
            f"the checkpoint has version {quoted(value.get('version'))}, and this package reads "
            f"{_VERSIONS[0]} and {_VERSION}",
            where=where,
            hint="use the qalora-compile that wrote it",
        )
    odd = [name for name, kind in _FIELDS.items() if not isinstance(value.get(name), kind)]
    best = value.get("best", {})
    if best is not None and (not isinstance(best, dict) or best.keys() != {"loss", "step"}):
        odd.append("best")
    if odd:
        raise UserInputError(
            f"the checkpoint is broken: {odd[0]} in {STATE} is missing or malformed",
            where=where,
            hint="remove it to continue from the one before",
        )
    if value["version"] == _VERSION:
        check_files(folder, value.get("files"))
    return value


def _check_moments(
    program: Program, moments: Mapping[str, Tensor], stored: list[str], where: str
) -> None:
    """Check that all stored moments are there and fit the adapters.

    A missing moment would begin at zero, and training would give other weights.
    """
    own = dict(program.named_adapter_parameters())
    for name in sorted({*stored, *moments}):
        moment, parameter = moments.get(name), own.get(name.rpartition(":")[0])
        if moment is None:
            problem = "is missing"
        elif name not in stored or parameter is None:
            problem = "belongs to no adapter"
        elif moment.dim() and moment.shape != parameter.shape:
            problem = f"is {list(moment.shape)}, and its adapter is {list(parameter.shape)}"
        else:
            continue
        raise UserInputError(
            f"the checkpoint is broken: the state {name} of the optimizer {problem}",
            where=where,
            hint="remove it to continue from the one before",
        )


def load_adapters(program: Program, adapters: dict[str, Tensor], *, where: str) -> None:
    """Copy stored adapters into a program.

    Raises:
        UserInputError: names or shapes differ; the first difference is named.
    """
    _check_adapters(program, adapters, where)
    with torch.no_grad():
        for name, parameter in program.named_adapter_parameters():
            parameter.copy_(adapters[name])


def _check_adapters(program: Program, adapters: dict[str, Tensor], where: str) -> None:
    _check_tensors("adapter", dict(program.named_adapter_parameters()), adapters, where)


def _check_tensors(
    what: str, own: Mapping[str, Tensor], stored: Mapping[str, Tensor], where: str
) -> None:
    odd = sorted(own.keys() ^ stored.keys())
    if odd:
        problem = "missing in the file" if odd[0] in own else "unknown to the program"
        raise UserInputError(f"the {what} {odd[0]} is {problem}", where=where)
    for name, tensor in own.items():
        if tensor.shape != stored[name].shape:
            raise UserInputError(
                f"the {what} {name} is {list(stored[name].shape)} in the file and "
                f"{list(tensor.shape)} in the program",
                where=where,
            )
