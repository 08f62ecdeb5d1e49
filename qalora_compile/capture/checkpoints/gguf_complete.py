"""Checks that transformers builds from a GGUF file the model that the file holds.

transformers initializes a parameter at random if the file has no tensor for it, and ignores a
tensor for which the model has no parameter: rotary frequencies, a bias, a layer beyond the number
that the file states. Each of these silently changes the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from qalora_compile.capture.transformers_internals import gguf_names
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.optional import require
from qalora_compile.untrusted.gguf_header import Header
from qalora_compile.untrusted.gguf_reader import open_gguf

_LAYER = re.compile(r"blk\.(\d+)\..*")
_FREQUENCIES, _FACTORS = "rope_freqs.weight", "rope_factors"


def check_complete(header: Header, model: Any, missing: Iterable[str], path: Path) -> None:
    """Check that every parameter was in the file, and that no relevant tensor was ignored.

    Args:
        header: Header of the file.
        model: The model built by transformers.
        missing: Names of the parameters for which transformers found no tensor.
        path: The file.

    Raises:
        UserInputError: a parameter was missing, or the file has layers that the model lacks.
        UnsupportedError: the file has a bias or rotary frequencies that the model lacks.
    """
    absent = sorted(map(str, missing))
    if absent:
        raise UserInputError(
            f"the file has no tensor for {absent[0]} ({len(absent)} in all)",
            where=str(path),
            hint="the file is incomplete: fetch or convert it again",
        )
    layers = int(model.config.num_hidden_layers)
    for name in sorted(header.tensors.keys() - gguf_names(model)):
        layer = _LAYER.fullmatch(name)
        if layer is not None and int(layer[1]) >= layers:
            raise UserInputError(
                f"the file has {name}, a layer that the model does not have",
                where=str(path),
                hint=f"its metadata states {layers} layers: convert it again",
            )
        if name.endswith(".bias") or name.startswith(_FACTORS) or _rescales(name, path):
            raise UnsupportedError(
                f"the file has {name}, for which transformers has no parameter in a "
                f"{type(model).__name__}: the model would differ",
                where=str(path),
                hint="give the Hugging Face folder that the file was converted from",
            )


def _rescales(name: str, path: Path) -> bool:
    """Whether a tensor holds the divisors of rotary frequencies."""
    if name != _FREQUENCIES:
        return False
    gguf = require("gguf", extra="hf", purpose="read GGUF files")
    tensor = next(t for t in open_gguf(path).tensors if t.name == name)
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return not bool((np.asarray(values) == 1).all())
