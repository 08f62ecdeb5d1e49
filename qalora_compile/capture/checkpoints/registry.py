"""Readers of quantized checkpoints, by the name that `config.json` gives to the method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from qalora_compile.capture.checkpoints.awq import decode_awq
from qalora_compile.capture.checkpoints.base import Decoded, OpenFolder, Reader, Tensors
from qalora_compile.capture.checkpoints.compressed_tensors import decode_compressed
from qalora_compile.capture.checkpoints.gptq import decode_gptq
from qalora_compile.capture.checkpoints.hqq import decode_hqq
from qalora_compile.capture.checkpoints.mlx import decode_mlx
from qalora_compile.capture.checkpoints.qalora import METHOD, decode_own
from qalora_compile.registry import Registry

GPTQ, MLX = "gptq", "mlx"


def read_awq(tensors: Tensors, config: Mapping[str, Any], folder: OpenFolder) -> Decoded:
    """See `decode_awq`."""
    return decode_awq(tensors, config)


def read_compressed(tensors: Tensors, config: Mapping[str, Any], folder: OpenFolder) -> Decoded:
    """See `decode_compressed`."""
    return decode_compressed(tensors, config, modules=folder.modules)


def read_gptq(tensors: Tensors, config: Mapping[str, Any], folder: OpenFolder) -> Decoded:
    """See `decode_gptq`."""
    return decode_gptq(tensors, config, zero_points=folder.zero_points)


def read_hqq(tensors: Tensors, config: Mapping[str, Any], folder: OpenFolder) -> Decoded:
    """See `decode_hqq`."""
    return decode_hqq(tensors, config)


def read_mlx(tensors: Tensors, config: Mapping[str, Any], folder: OpenFolder) -> Decoded:
    """See `decode_mlx`."""
    return decode_mlx(tensors, config)


def read_own(tensors: Tensors, config: Mapping[str, Any], folder: OpenFolder) -> Decoded:
    """See `decode_own`."""
    return decode_own(tensors, config, folder=folder.path)


READERS = Registry(
    "reader",
    "qalora_compile.readers",
    {
        "awq": f"{__name__}:read_awq",
        "compressed-tensors": f"{__name__}:read_compressed",
        GPTQ: f"{__name__}:read_gptq",
        "hqq": f"{__name__}:read_hqq",
        MLX: f"{__name__}:read_mlx",
        METHOD: f"{__name__}:read_own",
    },
)
"""`quantization_config.quant_method` of `config.json` → reader. MLX does not write the method:
`mlx` stands for its own entry `quantization`."""


def register_reader(method: str, reader: Reader) -> None:
    """Register `reader` for folders whose `quantization_config.quant_method` is `method`.

    Raises:
        ExtensionError: the name is taken, or `reader` is not callable.
    """
    READERS.add(method, _checked(method, reader))


def get_reader(method: str) -> Reader:
    """The reader of a known method.

    Raises:
        UserInputError: there is no such reader.
        ExtensionError: its package cannot be imported, or provides something else.
    """
    return _checked(method, READERS.load(method))


def _checked(name: str, found: object) -> Reader:
    if not callable(found):
        raise READERS.unfit(name, "a function of tensors, config.json and folder")
    return cast(Reader, found)
