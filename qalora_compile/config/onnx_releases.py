"""What each release of ONNX Runtime's CPU provider runs: the table behind `ExportSpec.runtime`.

`make test-runtimes` installs the releases and runs exported models in each of them: a model that
is exported for a release has to load there and compute what the program computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qalora_compile.errors import UserInputError

RUNTIME = "onnxruntime"
_REQUIREMENT = re.compile(rf"{RUNTIME}\s*(?:==|>=)\s*(\d+\.\d+)(?:\.\d+)?")


@dataclass(frozen=True, kw_only=True)
class OnnxRelease:
    """The properties of a release that decide on the form of a model.

    Attributes:
        version: Major and minor version.
        opset: The newest version of the standard operators that a model may import.
        bias: MatMulNBits takes a bias.
        blocks: DequantizeLinear takes 4-bit codes, and codes in blocks.
        eight_bits: The accuracy levels at which MatMulNBits takes codes of 8 bits.
        two_bits: MatMulNBits takes codes of 2 bits on int8 activations.
        tables: Target `onnx` may have embeddings on codes: codes that were unpacked have a Cast.
    """

    version: str
    opset: int
    bias: bool = True
    blocks: bool = True
    eight_bits: tuple[int, ...] = (0, 2, 4)
    two_bits: bool = True
    tables: bool = True


_OLD: Mapping[str, Any] = {"two_bits": False, "tables": False}
RELEASES = (
    OnnxRelease(version="1.18", opset=21, bias=False, blocks=False, eight_bits=(), **_OLD),
    OnnxRelease(version="1.19", opset=21, eight_bits=(), **_OLD),
    OnnxRelease(version="1.20", opset=21, eight_bits=(), **_OLD),
    OnnxRelease(version="1.21", opset=22, eight_bits=(), **_OLD),
    OnnxRelease(version="1.22", opset=22, eight_bits=(4,), **_OLD),
    OnnxRelease(version="1.23", opset=23, two_bits=False),
    *(OnnxRelease(version=f"1.{minor}", opset=23) for minor in range(24, 33)),
)
"""Oldest first. What a release takes, newer ones take as well, so `>=` and `==` give one form."""


def release_of(requirement: str) -> OnnxRelease:
    """The release that a requirement names: `onnxruntime==1.18`, or `>=` for it and newer ones.

    Raises:
        UserInputError: it is no such requirement, or no test runs the release.
    """
    found = _REQUIREMENT.fullmatch(requirement.strip()) if isinstance(requirement, str) else None
    known = {release.version: release for release in RELEASES}
    if found is None or found[1] not in known:
        raise UserInputError(
            f"there is no form of a model for the runtime {requirement!r}",
            hint=f"use {RUNTIME}==V or {RUNTIME}>=V, where V is one of {', '.join(known)}",
        )
    return known[found[1]]
