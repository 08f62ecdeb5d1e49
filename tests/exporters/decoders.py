"""Decoders of checkpoints, written from the formats' documentation and from nothing of ours.

Each takes a folder and the path of a layer, and gives its weight `[N, K]` in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

Array = NDArray[Any]


def tensors(folder: Path) -> dict[str, Array]:
    """All tensors of a folder's safetensors files."""
    found: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def config(folder: Path, file: str = "config.json") -> dict[str, Any]:
    """A JSON file of the folder."""
    return json.loads((folder / file).read_text("utf-8"))


def bits_of(words: Array, bits: int, count: int) -> Array:
    """`[R, words]` of any integer type as codes `[R, count]`: bit b of a code, low bits first."""
    rows = np.ascontiguousarray(words).view(np.uint8).reshape(words.shape[0], -1)
    stream = np.unpackbits(rows, axis=1, bitorder="little")[:, : count * bits]
    return (stream.reshape(len(rows), count, bits) << np.arange(bits)).sum(-1)


def per_weight(values: Array, group: int) -> Array:
    """`[N, L]` to one value a weight."""
    return np.repeat(values.astype(np.float64), group, axis=1)


def float_weight(folder: Path, name: str) -> Array:
    """Hugging Face: the weight itself."""
    return tensors(folder)[f"{name}.weight"].astype(np.float64)


def mlx(folder: Path, name: str) -> Array:
    """MLX, mode affine: `scales · q + biases`."""
    found, settings = tensors(folder), config(folder)["quantization"]
    own = settings.get(name, settings)
    scales, biases = found[f"{name}.scales"], found[f"{name}.biases"]
    k = scales.shape[1] * own["group_size"]
    codes = bits_of(found[f"{name}.weight"], own["bits"], k)
    return per_weight(scales, own["group_size"]) * codes + per_weight(biases, own["group_size"])


def hqq(folder: Path, name: str) -> Array:
    """HQQ, axis 1: `(W_q − zero) · scale`, rows of groups packed by parts, first part highest."""
    prefix = f"{name}."
    found = {n[len(prefix) :]: t for n, t in tensors(folder).items() if n.startswith(prefix)}
    bits, group, shape = int(found["nbits"]), int(found["group_size"]), found["shape"]
    kind = bytes(found["packing"].tolist()).decode()
    parts = {"8bit_u8": 1, "4bit_u8": 2, "3bit_32": 10, "2bit_u8": 4}[kind]
    packed = found["W_q"].astype(np.int64)
    rows = [packed >> bits * (parts - 1 - part) & 2**bits - 1 for part in range(parts)]
    codes = np.concatenate(rows)[: int(np.prod(shape)) // group]
    wide = (codes - found["zero"].astype(np.float64)) * found["scale"].astype(np.float64)
    return wide.reshape(shape)


def gptq(folder: Path, name: str) -> Array:
    """GPTQ version 2: `(q − z) · scale[g_idx]`, q packed along K, z along N, z as it is."""
    found, settings = tensors(folder), config(folder, "quantize_config.json")
    assert settings["checkpoint_format"] == "gptq_v2"
    bits = settings["bits"]
    for pattern, changes in (settings["dynamic"] or {}).items():
        if pattern == f"+:^{name.replace('.', chr(92) + '.')}$":
            bits = changes["bits"]
    groups, scales = found[f"{name}.g_idx"], found[f"{name}.scales"].astype(np.float64)
    codes = bits_of(found[f"{name}.qweight"].T, bits, len(groups)).T
    zeros = bits_of(found[f"{name}.qzeros"], bits, scales.shape[1])
    return ((codes - zeros[groups]) * scales[groups]).T


def compressed(folder: Path, name: str) -> Array:
    """compressed-tensors, pack-quantized: codes and zero-points are signed, plus 2^(bits − 1)."""
    found = tensors(folder)
    part = {key: found[f"{name}.weight_{key}"] for key in ("packed", "scale", "zero_point")}
    n, k = found[f"{name}.weight_shape"]
    groups = config(folder)["quantization_config"]["config_groups"].values()
    settings = next(g["weights"] for g in groups if name in g["targets"])
    half = 2 ** (settings["num_bits"] - 1)
    codes = bits_of(part["packed"], settings["num_bits"], k).astype(np.int64) - half
    zeros = bits_of(part["zero_point"].T, settings["num_bits"], n).T.astype(np.int64) - half
    size = settings["group_size"]
    return (codes - per_weight(zeros, size)) * per_weight(part["scale"], size)


def own(folder: Path, name: str) -> Array:
    """docs/reference/formats.md: `scale · q + offset`, a row a bit stream padded to 8 codes.

    Column `order[i]` of the weight is where the codes have column i.
    """
    found = tensors(folder)
    layer = config(folder, "layers.json")["layers"][name]
    k, size = layer["k"], layer["group_size"]
    codes = bits_of(found[f"{name}.qweight"], layer["bits"], k)
    scale, offset = (per_weight(found[f"{name}.{p}"], size)[:, :k] for p in ("scale", "offset"))
    order = found[f"{name}.order"] if layer.get("ordered") else np.arange(k)
    weight = np.full(codes.shape, np.nan)
    weight[:, order] = scale * codes + offset
    return weight


DECODERS: dict[str, Callable[[Path, str], Array]] = {
    "float": float_weight,
    "mlx": mlx,
    "hqq": hqq,
    "safetensors": own,
    "gptq": gptq,
    "compressed-tensors": compressed,
}
