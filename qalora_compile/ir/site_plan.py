"""The site plan: a row for each use of a weight as a linear map, and for every kept weight."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qalora_compile.brief import Brief
from qalora_compile.errors import UserInputError
from qalora_compile.untrusted import check_fields

QUANTIZE = "quantize"
KEEP = "keep"
UNUSED = "unused"
"""Kind of a row for a weight that the captured forward pass does not read."""
EMBEDDING = "embedding"
"""Kind of a row for a table whose rows are looked up."""
EXCLUDED = "excluded"
"""Reason of rows that the user excluded."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One use of a parameter with two or more dimensions.

    Attributes:
        name: Unique: the module path, with `@2`, `@3` … for further uses of the same weight.
        path: Module path that holds the weight's tensors, for example `model.layers.0.mlp.up_proj`;
            rows that multiply by the same elements share it.
        weight: Name of the parameter in the captured graph.
        storage: Number of the weight's storage; rows with one number share memory (ties, reuse).
        kind: `linear`, `addmm`, `matmul`, `pointwise` (a 1×1 convolution), `experts`; for kept
            weights also the operator that reads them, and `unused`.
        k: K, length of the reduction axis, or of a row of a quantized table; else 0.
        n: N, number of outputs, or of the rows of a quantized table; else 0.
        experts: E where one weight holds a matrix for each of E experts, else None.
        dtype: Of the weight before quantization, and of the site's output.
        transposed: The weight is stored `[K, N]` (GPT-2's Conv1D), not `[N, K]`.
        decision: `quantize` or `keep`.
        reason: Why.
        bits, group_size: Set once quantized.
        chosen_bits, chosen_group: Set by assign-bits, until the weight is quantized.
        rank: Set while the site has an adapter.
        frozen_integer_zero: The zero-points −offset / scale are integers from 0 to 2^bits − 1 and
            stay so: the site gets no adapter.
        integer_zero_point: The zero-points are integers as well, and stay integers under an adapter
            of a kind that keeps them so.
        why_bits, why_rank: Reasons for bits and rank, where a budget was distributed over sites.
    """

    name: str
    path: str
    weight: str
    storage: int
    kind: str
    k: int
    n: int
    dtype: str
    transposed: bool = False
    decision: str
    reason: str
    bits: int | None = None
    group_size: int | None = None
    rank: int | None = None
    experts: int | None = None
    frozen_integer_zero: bool = False
    integer_zero_point: bool = False
    chosen_bits: int | None = None
    chosen_group: int | None = None
    why_bits: str = ""
    why_rank: str = ""

    @property
    def has_integer_zero_point(self) -> bool:
        """Whether its zero-points are integers."""
        return self.frozen_integer_zero or self.integer_zero_point

    @property
    def shape(self) -> str:
        """`K×N`, with `E×` before it for experts; empty if the use is not a linear map."""
        if not self.n:
            return ""
        return f"{self.experts}×{self.k}×{self.n}" if self.experts else f"{self.k}×{self.n}"


@dataclass(frozen=True, repr=False)
class SitePlan(Brief):
    """The rows in graph order."""

    sites: tuple[Site, ...] = ()

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise UserInputError(f"the plan has no site {name!r}")

    def to_quantize(self) -> tuple[Site, ...]:
        """The rows decided `quantize`."""
        return tuple(s for s in self.sites if s.decision == QUANTIZE)

    def weights_to_quantize(self) -> tuple[Site, ...]:
        """The first row of each distinct weight, or part of a weight, decided `quantize`."""
        return _first_of_each(self.to_quantize())

    def to_adapt(self) -> tuple[Site, ...]:
        """The rows decided `quantize` that get an adapter: all but `frozen_integer_zero`."""
        return tuple(s for s in self.to_quantize() if not s.frozen_integer_zero)

    def weights_to_adapt(self) -> tuple[Site, ...]:
        """The first row of each distinct weight that gets an adapter."""
        return _first_of_each(self.to_adapt())

    def update(self, changes: Mapping[str, Mapping[str, Any]]) -> SitePlan:
        """A plan in which the fields `changes[name]` of each named row are replaced."""
        return SitePlan(
            tuple(dataclasses.replace(s, **changes.get(s.name, {})) for s in self.sites)
        )

    def explain(self, field: str, reasons: Mapping[str, str]) -> SitePlan:
        """A plan in which `why_bits` or `why_rank` of the rows of a path is `reasons[path]`."""
        named = {s.name: {field: reasons[s.path]} for s in self.sites if s.path in reasons}
        return self.update(named)

    def brief(self) -> dict[str, object]:
        """Counts of the decisions, of the bits, and of the adapters."""
        widths = Counter(s.bits or s.chosen_bits for s in self.to_quantize())
        bits = ", ".join(f"{widths[b]} at {b} bits" for b in sorted(filter(None, widths)))
        adapted = sum(site.rank is not None for site in self.sites)
        return {
            "layers": ", ".join(f"{count} to {what}" for what, count in self.counts().items()),
            "widths": bits,
            "adapters": adapted or "",
        }

    def counts(self) -> Counter[str]:
        """The number of rows of each decision."""
        return Counter(s.decision for s in self.sites)

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as JSON types."""
        return [dataclasses.asdict(s) for s in self.sites]

    @classmethod
    def from_json(cls, rows: Iterable[Mapping[str, Any]]) -> SitePlan:
        """Undo `to_json`.

        Raises:
            UserInputError: a row has a missing or unknown field, or one of another type.
        """
        try:
            fields = [check_fields(Site, row, "a row of the site plan") for row in rows]
        except (TypeError, ValueError) as error:
            raise UserInputError(f"the site plan is malformed: {error}") from error
        return cls(tuple(Site(**row) for row in fields))


def _first_of_each(sites: Iterable[Site]) -> tuple[Site, ...]:
    """The first row of each path."""
    first: dict[str, Site] = {}
    for site in sites:
        first.setdefault(site.path, site)
    return tuple(first.values())
