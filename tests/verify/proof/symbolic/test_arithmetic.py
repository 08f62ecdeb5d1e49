"""Linear integer arithmetic: what it says holds does so for all numbers in range."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from qalora_compile.verify.proof.symbolic.arithmetic import holds, quotient, remainder
from qalora_compile.verify.proof.symbolic.polynomial import (
    Poly,
    as_poly,
    of_atom,
    size,
    variable,
)
from tests.verify.proof.symbolic.numbers import Numbers

N = size("n")
I = variable("i", N)  # noqa: E741
J = variable("j", as_poly(4))
FACTORS = st.lists(st.integers(-3, 3), min_size=4, max_size=4)


def linear(factors: list[int]) -> Poly:
    """A term of n, i, j and a number."""
    return N * factors[0] + of_atom(I) * factors[1] + of_atom(J) * factors[2] + factors[3]


def everywhere() -> list[Numbers]:
    """All values of n up to 5, and of indices in range."""
    return [
        Numbers({}, dict(zip((*N.atoms, I, J), row, strict=True)))
        for row in itertools.product(range(6), range(5), range(4))
        if row[1] < row[0]
    ]


@given(FACTORS, FACTORS)
@settings(max_examples=150, deadline=None)
def test_what_holds_does_so_everywhere(factors: list[int], fact: list[int]) -> None:
    value, given_fact = linear(factors), linear(fact)
    if holds(value, (given_fact,)):
        where = [n for n in everywhere() if n.poly(given_fact) >= 0]
        assert all(numbers.poly(value) >= 0 for numbers in where)


@given(FACTORS, st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_quotients_and_remainders_are_those_of_integers(factors: list[int], divisor: int) -> None:
    value, by = linear(factors), as_poly(divisor)
    for numbers in everywhere()[::7]:
        assert numbers.poly(quotient(value, by)) == numbers.poly(value) // divisor
        assert numbers.poly(remainder(value, by)) == numbers.poly(value) % divisor


def test_ranges_are_known() -> None:
    i, j = of_atom(I), of_atom(J)
    assert holds(N - 1 - i) and holds(i) and not holds(i - 1)
    assert holds(N * 4 - 1 - i * 4 - j), "i · 4 + j is an index of n · 4"
    assert quotient(i * 4 + j, as_poly(4)) is i
    assert remainder(i * 4 + j, as_poly(4)) is j
    m = variable("m", size("k"))
    both = of_atom(m) * N + i
    assert (quotient(both, N), remainder(both, N)) == (of_atom(m), i)
    assert not holds(N - 2, (N - 1,)) and holds(N * 2 - 3, (N - 2,))


def test_the_largest_size_of_an_axis_is_known() -> None:
    limited = size("m", least=1, most=5)
    assert holds(as_poly(5) - limited) and holds(limited - 1)
    assert not holds(as_poly(4) - limited) and not holds(as_poly(5) - size("m", least=1))
    assert limited is not size("m", least=1), "a fact of one is none of the other"


def test_indices_of_flattened_axes_have_known_quotients() -> None:
    k = size("k")
    flat = of_atom(variable("c", N * k))
    row = quotient(flat, N)
    assert holds(row) and holds(k - 1 - row)
    assert not holds(row - 1) and not holds(k - 2 - row)
    assert not holds(quotient(flat - 1, N)), "a dividend below 0 has a quotient below 0"


def test_quotients_by_unknown_sizes_come_to_an_end() -> None:
    index = of_atom(variable("c", N * size("k")))
    rest = remainder(index, N)
    assert holds(rest) and holds(N - 1 - rest)
    assert holds(quotient(index, N) * N + rest - index)
    assert not holds(rest - 1)
