"""Numbers that the passes must reproduce, computed apart from the package's own operators."""

from __future__ import annotations

import numpy as np
from torch import Tensor

import qalora_compile as qc


def to_numpy(tensor: Tensor) -> np.ndarray:
    """As float64."""
    return tensor.detach().double().numpy()


def unpack(packed: Tensor, bits: int, k: int) -> np.ndarray:
    """Codes `[N, K]` of a little-endian bit stream, row by row."""
    rows = []
    for row in packed.reshape(packed.shape[0], -1).tolist():
        number = int.from_bytes(bytes(row), "little")
        rows.append([(number >> (position * bits)) & (2**bits - 1) for position in range(k)])
    return np.array(rows, dtype=np.float64)


def spread(values: np.ndarray, group_size: int, k: int) -> np.ndarray:
    """One value a group to one a column."""
    return np.repeat(values, group_size, axis=1)[:, :k]


def pool(x: np.ndarray, group_size: int, convention: str) -> np.ndarray:
    """Pooled x as each convention defines it; a short tail group counts as padded with zeros."""
    k = x.shape[-1]
    groups = -(-k // group_size)
    padded = np.concatenate([x, np.zeros((*x.shape[:-1], groups * group_size - k))], axis=-1)
    grouped = padded.reshape(*x.shape[:-1], groups, group_size)
    if convention == "sum":
        return grouped.sum(-1)
    if convention == "mean":
        return grouped.mean(-1)
    return grouped.mean(-1) * groups


def base_weight(program: qc.Program, path: str) -> np.ndarray:
    """W = scale · q + offset of a quantized or folded site."""
    site = next(s for s in program.plan if s.path == path)
    assert site.bits is not None and site.group_size is not None
    tensors = program.tensors()
    codes = unpack(tensors[f"{path}.qweight"], site.bits, site.k)
    scale, offset = (to_numpy(tensors[f"{path}.{part}"]) for part in ("scale", "offset"))
    return codes * spread(scale, site.group_size, site.k) + spread(offset, site.group_size, site.k)


def adapted_layer(
    program: qc.Program, path: str, x: np.ndarray, spec: qc.AdapterSpec
) -> np.ndarray:
    """y = x Wᵀ + b + scaling · (pool(x) Aᵀ) Bᵀ of one adapted layer."""
    site = next(s for s in program.plan if s.path == path)
    tensors = program.tensors()
    group = spec.group_size or site.group_size
    assert group is not None
    lora_a, lora_b = (to_numpy(tensors[f"{path}.{part}"]) for part in ("lora_A", "lora_B"))
    y = x @ base_weight(program, path).T
    if f"{path}.bias" in tensors:
        y = y + to_numpy(tensors[f"{path}.bias"])
    scaling = spec.alpha / spec.rank
    return y + scaling * pool(x, group, spec.pooling) @ lora_a.T @ lora_b.T


def distance(found: Tensor, expected: np.ndarray) -> float:
    """Largest absolute difference."""
    return float(np.abs(to_numpy(found) - expected).max())
