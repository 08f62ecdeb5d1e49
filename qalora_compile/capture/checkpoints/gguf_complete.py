"""Whether the model that transformers makes of a GGUF file is the one that the file holds.

transformers draws a parameter at random where the file has no tensor for it, and passes over a
tensor for which the model has no parameter: the frequencies of rotary positions, a bias, a layer
more than the file says that it has. Each of these makes another model, without a word.
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

_LAYER = re.compile(r"blk\.(\d+)\..*")
_FREQUENCIES, _FACTORS = "rope_freqs.weight", "rope_factors"


def check_complete(header: Header, model: Any, missing: Iterable[str], path: Path) -> None:
    """See that every parameter was in the file, and that no tensor was left out that counts.

    Args:
        header: Of the file.
        model: As transformers made it.
        missing: Names of the parameters that transformers found no tensor for.
        path: The file.

    Raises:
        UserInputError: a parameter was missing, or the file has layers that the model has not.
        UnsupportedError: the file has a bias or rotary frequencies that the model has not.
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
                hint=f"it says that it has {layers} layers: convert it again",
            )
        if name.endswith(".bias") or name.startswith(_FACTORS) or _rescales(name, path):
            raise UnsupportedError(
                f"the file has {name}, and transformers has no place for it in a "
                f"{type(model).__name__}: another model would be read",
                where=str(path),
                hint="give the Hugging Face folder that the file was converted from",
            )


def _rescales(name: str, path: Path) -> bool:
    """Whether a tensor changes rotary frequencies: it holds what each is divided by."""
    if name != _FREQUENCIES:
        return False
    gguf = require("gguf", extra="hf", purpose="read GGUF files")
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return not bool((np.asarray(values) == 1).all())
