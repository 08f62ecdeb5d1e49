"""Patterns: what fits, what does not, and what a mismatch says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from qalora_compile.passes.framework.match import (
    Match,
    Mismatch,
    Pattern,
    add,
    anchor,
    anything,
    const,
    either,
    match,
    mul,
    node,
    number,
    op,
)
from qalora_compile.passes.framework.no_ops import changes_nothing, readers, through

ATEN = torch.ops.aten
COS, SIN, NEG = ATEN.cos.default, ATEN.sin.default, ATEN.neg.default
MEAN, CAT = ATEN.mean.dim, ATEN.cat.default


class Built:
    """A graph of two inputs, to which calls are added."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.x, self.y = (self.graph.placeholder(name) for name in "xy")

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call."""
        return self.graph.call_function(target, args, kwargs)


@pytest.fixture
def built() -> Built:
    return Built()


def found(at: fx.Node, *patterns: Pattern) -> Match:
    result = match(at, *patterns)
    assert isinstance(result, Match), result
    return result


def missed(at: fx.Node, *patterns: Pattern) -> Mismatch:
    result = match(at, *patterns)
    assert isinstance(result, Mismatch), result.captured
    return result


def test_operands_are_captured_by_name(built: Built) -> None:
    total = built.call(ATEN.add.Tensor, built.call(COS, built.x), 0.5)
    result = found(total, op(ATEN.add.Tensor, other=number("eps"), self=op(COS, self=node("x"))))
    assert (result["x"], result["eps"], result.node) == (built.x, 0.5, total)


@pytest.mark.parametrize("given", ["by position", "by name", "left out"])
def test_an_operand_is_read_wherever_it_stands(built: Built, given: str) -> None:
    args, kwargs = {
        "by position": (([-1], True), {}),
        "by name": ((), {"dim": [-1], "keepdim": True}),
        "left out": (([-1],), {}),
    }[given]
    mean = built.call(MEAN, built.x, *args, **kwargs)
    found(mean, op(MEAN, self=node("x"), dim=[-1], keepdim=given != "left out"))


def test_operands_that_a_pattern_does_not_name_keep_their_defaults(built: Built) -> None:
    total = built.call(ATEN.add.Tensor, built.x, built.y, alpha=2)
    miss = missed(total, add(node("a"), node("b")))
    assert (miss.node, miss.reason) == (total, "alpha is 2, not 1")
    found(total, op(ATEN.add.Tensor, self=node("a"), other=node("b"), alpha=anything("alpha")))


@pytest.mark.parametrize("order", [False, True])
def test_sums_and_products_match_in_either_order(built: Built, order: bool) -> None:
    parts = [built.call(COS, built.x), built.y]
    product = built.call(ATEN.mul.Tensor, *(parts[::-1] if order else parts))
    result = found(product, mul(node("other"), op(COS, self=node("x"))))
    assert (result["x"], result["other"]) == (built.x, built.y)


def test_one_name_is_one_value(built: Built) -> None:
    pattern = mul(node("x"), op(COS, self=node("x")))
    cos = built.call(COS, built.x)
    found(built.call(ATEN.mul.Tensor, cos, built.x), pattern)
    miss = missed(built.call(ATEN.mul.Tensor, cos, built.y), pattern)
    assert str(miss) == "%x: another value stands where x is expected"


def test_an_alternative_is_taken_back_where_what_follows_asks_for_it(built: Built) -> None:
    first, second = built.call(COS, built.x), built.y
    same = either(op(COS, self=node("a")), node("a"))
    joined = built.call(CAT, [first, second, first], 1)
    pattern = op(CAT, tensors=(same, node("b"), node("a")), dim=1)
    assert found(joined, pattern)["a"] is first


@pytest.mark.parametrize("final", [False, True])
def test_an_alternative_that_fits_by_itself_may_be_final(built: Built, final: bool) -> None:
    parts = op(COS, self=node("a")), node("a")
    joined = built.call(CAT, [built.call(COS, built.x), built.x], 1)
    pattern = op(CAT, tensors=(either(*parts, final=final), node("b")), dim=1)
    result = match(joined, pattern.where(lambda m: m["a"] is not m["b"], "a is b"))
    assert isinstance(result, Mismatch) == final


def test_a_failed_alternative_is_no_reason_where_another_fits(built: Built) -> None:
    pattern = op(SIN, self=either(op(COS, self=op(NEG, self=node("x"))), node("x"))).where(
        lambda m: m["x"] is built.y, "x is not y"
    )
    miss = missed(built.call(SIN, built.call(COS, built.x)), pattern)
    assert miss.reason == "x is not y"


def test_the_failure_that_got_furthest_is_the_reason(built: Built) -> None:
    pattern = either(
        op(SIN, self=op(COS, self=op(NEG, self=node("x")))), op(SIN, self=op(NEG, self=node("x")))
    )
    miss = missed(built.call(SIN, built.call(COS, built.x)), pattern)
    assert str(miss) == "%x: an input stands where aten.neg is expected"


def test_constants_say_what_was_found(built: Built) -> None:
    mean = built.call(MEAN, built.x, [1])
    last = const([-1], [3], otherwise="the mean is not over the last axis")
    assert missed(mean, op(MEAN, self=node("x"), dim=const([-1], [3]))).reason == (
        "dim is [1], not [-1] or [3]"
    )
    assert missed(mean, op(MEAN, self=node("x"), dim=last)).reason == (
        "the mean is not over the last axis (dim is [1])"
    )
    computed = built.call(ATEN.pow.Tensor_Scalar, built.x, built.y)
    miss = missed(computed, op(ATEN.pow.Tensor_Scalar, self=node("x"), exponent=2))
    assert (miss.node, miss.reason) == (built.y, "exponent is computed, not 2")


def test_reasons_of_the_author_take_the_place_of_the_general_ones(built: Built) -> None:
    cos = built.call(COS, built.x)
    assert (
        missed(cos, op(SIN, self=node("x"))).reason == "aten.cos stands where aten.sin is expected"
    )
    assert missed(cos, op(SIN, self=node("x")).otherwise("it is no sine")).reason == "it is no sine"
    total = built.call(ATEN.add.Tensor, cos, built.y)
    pattern = op(ATEN.add.Tensor, self=node("x"), other=number("eps"))
    assert missed(total, pattern).reason == "an input stands where eps is expected"


def test_lists_have_a_length(built: Built) -> None:
    joined = built.call(CAT, [built.x, built.y, built.x], 1)
    miss = missed(joined, op(CAT, tensors=(node("a"), node("b")), dim=1))
    assert miss.reason == "tensors are not 2"


ENCLOSED = mul(node("weight"), mul(node("x"), anchor(op(COS, self=node("x")))))


def test_what_encloses_the_anchor_is_found_from_its_readers(built: Built) -> None:
    cos = built.call(COS, built.x)
    built.call(NEG, cos)
    product = built.call(ATEN.mul.Tensor, cos, built.x)
    ends = [built.call(ATEN.mul.Tensor, built.y, built.call(ATEN.alias.default, product))]
    ends.append(built.call(ATEN.mul.Tensor, product, product))
    assert found(cos, ENCLOSED).node is ends[0]
    assert found(cos, ENCLOSED)["weight"] is built.y
    built.graph.erase_node(ends[0])
    assert found(cos, ENCLOSED).node is ends[1]


def test_an_anchor_that_nothing_fitting_reads_says_who_reads_it(built: Built) -> None:
    cos = built.call(COS, built.x)
    built.graph.output(built.call(NEG, cos))
    assert str(missed(cos, ENCLOSED)) == "%cos_default: no aten.mul.Tensor reads it, only aten.neg"


def test_a_mismatch_is_near_from_the_recognizable_operator_on(built: Built) -> None:
    pattern = op(SIN, self=op(COS, self=op(NEG, self=node("x"))).recognizable())
    assert not missed(built.call(SIN, built.x), pattern).near
    assert missed(built.call(SIN, built.call(COS, built.x)), pattern).near


def test_a_guard_without_a_reason_is_not_reported(built: Built) -> None:
    cos = built.call(COS, built.x)
    guarded = op(COS, self=node("x")).where(lambda m: False)
    assert missed(cos, guarded, op(SIN, self=node("x"))).reason.startswith("aten.cos stands")


def test_of_several_patterns_the_first_that_fits_is_taken(built: Built) -> None:
    cos = built.call(COS, built.x)
    result = found(cos, op(SIN, self=node("a")), op(COS, self=node("b")), op(COS, self=node("c")))
    assert list(result.captured) == ["b"]


def test_nodes_that_change_nothing_are_looked_through(built: Built) -> None:
    half = torch.empty(2, 4, dtype=torch.float16)
    built.x.meta["val"] = half
    same, other = (built.call(ATEN.to.dtype, built.x, d) for d in (torch.float16, torch.float32))
    same.meta["val"], other.meta["val"] = half, half.float()
    everything = built.call(ATEN.slice.Tensor, same, 1, 0, 2**63 - 1)
    part = built.call(ATEN.slice.Tensor, same, 1, 0, 3)
    every_second = built.call(ATEN.slice.Tensor, same, 1, 0, 2**63 - 1, 2)
    assert through(everything) is through(same) is built.x
    assert [changes_nothing(n) for n in (other, part, every_second)] == [False] * 3
    assert readers(built.x) == [part, every_second, other]
    cos = built.call(COS, everything)
    assert found(cos, op(COS, self=node("x")))["x"] is built.x
    assert cos in readers(built.x)
