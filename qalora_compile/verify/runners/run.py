"""The result of a run, and the interface of runners of programs and exported models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from qalora_compile.ir.signature import Signature


@dataclass
class Run:
    """Values of one run: the flat outputs, and the outputs of sites by name in graph order."""

    outputs: dict[str, Tensor]
    sites: dict[str, Tensor] = field(default_factory=dict)


class Runner(Protocol):
    """Computes outputs from flat inputs."""

    label: str
    signature: Signature

    def run(self, leaves: Sequence[Any]) -> Run:
        """Run on checked flat inputs, in signature order."""
