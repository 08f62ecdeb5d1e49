"""How far storage rounding may move the logits of a Llama-like model: a bound through all layers.

A certificate bounds what each layer's stored weights differ by. This carries the differences
through norms, attention, gates and residuals: ‖ΔW x‖ ≤ ‖ΔW‖ ‖x‖, ‖W Δx‖ ≤ ‖W‖_F ‖Δx‖; a norm at a
root mean square of at least ρ multiplies by at most max |w| / ρ, and its output has at most
√D max |w|; softmax moves by at most the largest change of a score, in the 1-norm, and never by more
than 2; |silu'| ≤ 1.1. The stated box: ρ at every norm (`--rms`). No bound is larger than twice that
of the value itself.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import qalora_compile as qc
from qalora_compile.verify import Certificate
from qalora_compile.verify.proof.graphs.read_fx import read_program_graph

EXAMPLES = """examples:
  python -m benchmarks.logit_bound folded edge/model.onnx
  python -m benchmarks.logit_bound folded edge/model.onnx --rms 0.5 --heads 9
"""
_SILU = 1.1
"""At least the largest slope of silu."""


@dataclass(frozen=True)
class Value:
    """A vector: its norm, and that of its change."""

    size: float
    change: float

    def capped(self) -> Value:
        """A change is at most the difference of two vectors of this size."""
        return Value(self.size, min(self.change, 2 * self.size))

    def __add__(self, other: Value) -> Value:
        return Value(self.size + other.size, self.change + other.change)


class Bound:
    """Carries sizes and changes through a model.

    Args:
        certificate: Of the program and its export.
        norms: The largest |w| of each norm, by name.
        rms: The least root mean square at a norm.
        heads: Number of attention heads.
    """

    def __init__(
        self, certificate: Certificate, norms: dict[str, float], rms: float, heads: int
    ) -> None:
        self._sites = {site.name: site for site in certificate.sites}
        self._norms, self._rms, self._heads = norms, rms, heads

    def linear(self, name: str, x: Value) -> Value:
        """A layer."""
        _, found = self._sites[name].worst or ("", None)
        assert found is not None, name
        norm = found.weight_frobenius + found.operator  # of either model's weight
        change = norm * x.change + found.operator * x.size + found.bias_norm
        return Value(norm * x.size, change).capped()

    def norm(self, name: str, x: Value, width: int) -> Value:
        """An RMS norm."""
        largest = self._norms[name]
        return Value(math.sqrt(width) * largest, largest / self._rms * x.change).capped()

    def attention(self, q: Value, k: Value, v: Value, width: int) -> Value:
        """Every head takes a mean of values, whose weights move with the scores."""
        scale = 1 / math.sqrt(width / self._heads)
        score = scale * (q.change * k.size + k.change * q.size + q.change * k.change)
        moved = min(2.0, score)
        root = math.sqrt(self._heads)
        return Value(root * v.size, root * (v.change + moved * v.size)).capped()

    def gated(self, gate: Value, up: Value) -> Value:
        """silu(gate) · up."""
        moved = _SILU * gate.change * (up.size + up.change) + gate.size * up.change
        return Value(gate.size * up.size, moved).capped()

    def layer(self, x: Value, place: int, width: int) -> Value:
        """One layer of a Llama."""
        at = f"model.layers.{place}"
        n = self.norm(f"{at}.input_layernorm.weight", x, width)
        q, k, v = (self.linear(f"{at}.self_attn.{name}_proj", n) for name in "qkv")
        x = x + self.linear(f"{at}.self_attn.o_proj", self.attention(q, k, v, width))
        n = self.norm(f"{at}.post_attention_layernorm.weight", x, width)
        gate, up = (self.linear(f"{at}.mlp.{name}_proj", n) for name in ("gate", "up"))
        return x + self.linear(f"{at}.mlp.down_proj", self.gated(gate, up))


def bounds(folded: Path, export: Path, rms: float, heads: int) -> tuple[list[float], Value, float]:
    """The change after each layer, the last normed state, and the longest row of the head."""
    certificate = qc.prove_equivalence(folded, export, samples=0)
    tensors = read_program_graph(folded).tensors
    norms = {n: float(np.abs(t.wide()).max()) for n, t in tensors.items() if "norm" in n}
    bound = Bound(certificate, norms, rms, heads)
    names = [site.name for site in certificate.sites if site.name.endswith("q_proj")]
    width = next(site.k for site in certificate.sites if site.name == names[0])
    x, found = Value(0.0, 0.0), list[float]()  # both look up the same row, which norms only scale
    for place in range(len(names)):
        x = bound.layer(x, place, width)
        found.append(x.change)
    last = bound.norm("model.norm.weight", x, width)
    table = next((t for n, t in tensors.items() if n in ("lm_head.weight", _TABLE)), None)
    rows = 0.0 if table is None else float(np.linalg.norm(table.wide(), axis=1).max())
    return found, last, rows


_TABLE = "model.embed_tokens.weight"


def main(argv: Sequence[str] | None = None) -> int:
    """Run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.logit_bound",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folded", type=Path, help="the folded program")
    parser.add_argument("export", type=Path, help="its export")
    parser.add_argument("--rms", type=float, default=0.1, help="least root mean square at a norm")
    parser.add_argument("--heads", type=int, default=4, help="number of attention heads")
    options = parser.parse_args(argv)
    found, last, rows = bounds(options.folded, options.export, options.rms, options.heads)
    for place, change in enumerate(found):
        print(f"after layer {place}: the state moves by at most {change:.3g}")
    print(f"the normed state: size ≤ {last.size:.4g}, change ≤ {last.change:.4g}")
    if rows:
        print(f"a logit: size ≤ {rows * last.size:.4g}, change ≤ {rows * last.change:.4g}")
    if last.change >= 2 * last.size:
        print("the bound is of no use: any two states are as near as that")
    return 0


if __name__ == "__main__":
    sys.exit(main())
