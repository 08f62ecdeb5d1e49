"""The identity of a training, to which its checkpoints belong: options, plan, weights and data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora_compile.config.fit import ADDED, FitSpec
from qalora_compile.errors import UserInputError
from qalora_compile.ir.adapters.find import find_adapters
from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import Site

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Identity:
    """All that decides to which weights a training leads.

    Attributes:
        plan: For each trained weight, by path: shape, bits, groups, rank, and what its adapter
            multiplies, pools and drops.
        weights: Digest of each tensor that is not trained, by name.
        options: The fields of the `FitSpec`.
        data: Digest of the training data (`file_digest`), and of what else the caller decides by.
    """

    plan: Mapping[str, str]
    weights: Mapping[str, str]
    options: Mapping[str, Any]
    data: str = ""

    @classmethod
    def of(cls, program: Program, spec: FitSpec, *, data: str = "") -> Identity:
        """The identity of a training of `program`; reads all of its tensors once."""
        adapters = {a.path: a.description for a in reversed(find_adapters(program.graph))}
        sites = program.plan.weights_to_adapt()
        plan = {site.path: f"{_row(site)}, {adapters.get(site.path)}" for site in sites}
        trained = dict(program.named_adapter_parameters())
        frozen = {n: tensor for n, tensor in program.tensors().items() if n not in trained}
        digests = {name: tensor_digest(tensor) for name, tensor in frozen.items()}
        return cls(plan, digests, spec.to_json(), data)

    def to_json(self) -> dict[str, Any]:
        """The parts as JSON types."""
        return {
            "plan": dict(self.plan),
            "weights": dict(self.weights),
            "options": dict(self.options),
            "data": self.data,
        }

    def check(self, stored: Mapping[str, Any], *, where: str) -> None:
        """Compare with the identity that a checkpoint was stored with.

        Raises:
            UserInputError: they differ; the first difference is named.
        """
        own = self.to_json()
        for part, what in (("plan", "layer"), ("options", "option")):
            then, now = dict(stored.get(part) or {}), own[part]
            if part == "options":
                then = ADDED | then
            for name in [*now, *(n for n in then if n not in now)]:
                a, b = then.get(name, "absent"), now.get(name, "absent")
                if a != b and not (name == "steps" and self._goes_on_from(a)):
                    raise _differs(f"{what} {name} was {a}, and is {b} now", where)
        then, now = stored.get("weights") or {}, self.weights
        for name in [*now, *(n for n in then if n not in now)]:
            if name not in then or name not in now:
                when = "then" if name in now else "now"
                raise _differs(f"there is no tensor {name} {when}", where)
            if then[name] != now[name]:
                raise _differs(f"the numbers of the tensor {name} are not those of then", where)
        if stored.get("data") != self.data:
            raise _differs("the training data are not those of then", where)

    def _goes_on_from(self, steps: object) -> bool:
        return FitSpec.from_json(self.options).lengthens(steps)


def _differs(what: str, where: str) -> UserInputError:
    return UserInputError(
        f"the checkpoint is of another training: {what}",
        where=where,
        hint="go on with what it was started with, or start a new run",
    )


def _row(site: Site) -> str:
    return f"{site.shape}, {site.bits} bits in groups of {site.group_size}, rank {site.rank}"


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of type, shape and values."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def file_digest(paths: Sequence[str | Path]) -> str:
    """SHA-256 of the contents of files, in order.

    Raises:
        UserInputError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with Path(path).open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        except OSError as error:
            raise UserInputError(
                f"cannot read the data file: {error.strerror}", where=str(path)
            ) from error
        digest.update(b"\0end of file\0")
    return digest.hexdigest()
