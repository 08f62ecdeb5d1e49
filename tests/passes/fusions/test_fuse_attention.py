"""fuse-attention: with heads shared or not; what stays has a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import qalora_compile as qc
from qalora_compile.ir.spec import ATTENTION
from qalora_compile.passes.fusions.fuse_attention import FuseAttention
from tests.models import worst
from tests.passes.fusions.models import Attending, targets


@pytest.mark.parametrize("shared", [1, 2])
def test_attention_without_a_past_is_found(shared: int) -> None:
    x, mask = torch.randn(2, 5, 16).double(), torch.ones(5, 5).tril().bool()[None, None]
    program = qc.capture_model(Attending(shared).double().eval(), (x, mask))
    result = FuseAttention()(program)
    assert targets(result.program).count(ATTENTION) == 1
    assert torch.ops.aten.transpose.int not in targets(result.program) or shared > 1
    assert not result.skips
    assert worst(result.program(x, mask), program(x, mask)) < 1e-14


OPTIONS = {
    "it is causal from the first key on (is_causal is True)": {"is_causal": True},
    "it drops values (dropout_p is 0.5)": {"dropout_p": 0.5},
}


@pytest.mark.parametrize(("reason", "options"), OPTIONS.items())
def test_attention_with_other_options_is_left_with_a_reason(
    reason: str, options: dict[str, Any]
) -> None:
    x, mask = torch.randn(2, 5, 16), torch.ones(5, 5).bool()
    result = FuseAttention()(qc.capture_model(Attending(**options).eval(), (x, mask)))
    assert not result.modified
    (skip,) = result.skips
    assert (skip.path, skip.at, skip.why) == (*["scaled_dot_product_attention"] * 2, reason)


class Given(nn.Module):
    """Attention over keys that are an input."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend."""
        return functional.scaled_dot_product_attention(q, k.exp() if q.ndim == 3 else k, v)


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        (4, "its keys are an input, which every call would lay out in rows and back"),
        (3, "the number of heads is not known"),
    ],
)
def test_keys_of_an_input_and_unknown_heads_are_left_with_a_reason(axes: int, reason: str) -> None:
    q, k, v = (torch.randn([2, 3, 5, 4][-axes:]) for _ in range(3))
    (skip,) = FuseAttention()(qc.capture_model(Given().eval(), (q, k, v))).skips
    assert skip.why == reason


class Cached(nn.Module):
    """Attention over a past, with a few of its parts changed."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.parts = parts

    def forward(
        self, x: Tensor, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend to the past and to x."""
        q = x.unflatten(-1, (-1, 4)).transpose(1, 2)
        k = v = q[:, ::2]
        if self.parts["past"] == "computed":
            past_key = past_key.exp()
        keys = torch.cat([past_key, k], -2)
        values = v if self.parts["past"] == "keys" else torch.cat([past_value, v], 2)
        if self.parts["past"] == "keys":
            keys = k
        early = keys.cos() if self.parts["reader"] == "early" else keys
        b, h, t, d = keys.shape
        if self.parts["repeat"] == "each":
            all_k, all_v = (
                y[:, :, None].expand(b, h, 2, t, d).reshape(b, 2 * h, t, d) for y in (keys, values)
            )
        else:
            all_k, all_v = (
                y[:, None].expand(b, 2, h, t, d).reshape(b, 2 * h, t, d) for y in (keys, values)
            )
        y = functional.scaled_dot_product_attention(q, all_k, all_v, scale=self.parts["scale"])
        rows = y.transpose(1, 2)
        if self.parts["reader"] == "heads":
            return rows.reshape(*x.shape), y.cos(), values
        return rows.contiguous().reshape(*x.shape), early + 1, values


@pytest.mark.slow
@given(
    parts=st.fixed_dictionaries(
        {
            "past": st.sampled_from(["input", "computed", "keys"]),
            "reader": st.sampled_from(["", "early", "heads"]),
            "repeat": st.sampled_from(["each", "all"]),
            "scale": st.sampled_from([None, 0.3]),
        }
    )
)
@settings(max_examples=10)
def test_changed_attention_fuses_to_the_same_numbers(parts: dict[str, Any]) -> None:
    x = torch.randn(2, 5, 16).double()
    past = [torch.randn(2, 2, 3, 4).double() for _ in range(2)]
    program = qc.capture_model(Cached(**parts).double().eval(), (x, *past))
    result = FuseAttention()(program)
    (change,) = result.changes
    with_past = (
        parts["past"] == "input" and parts["reader"] != "early" and parts["repeat"] == "each"
    )
    assert change.why == f"{'with' if with_past else 'without'} a past"
    assert worst(result.program(x, *past), program(x, *past)) < 1e-13
