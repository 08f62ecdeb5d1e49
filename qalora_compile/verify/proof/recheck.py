"""Deviations of a stated certificate from the result of checking it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from qalora_compile.verdict import Verdict
from qalora_compile.verify.proof.certificate import Certificate, GraphRecord, SiteProof
from qalora_compile.verify.proof.compare_weights import Coefficients
from qalora_compile.verify.proof.match_structure import PROVED
from qalora_compile.verify.proof.tokenizer_digests import changed_files, tokenizer_digests

_SLACK = 1e-9
"""Relative tolerance for sums, which another numpy may compute in another order."""
_ROUNDING = 2.0**-48
"""Tolerance for adapter products by another linear algebra library, relative to the weight."""
_RATIO = 2.0**-4
"""Tolerance for the ratio of a difference that only arithmetic explains."""
_NORMS = {"frobenius": "‖ΔW‖_F", "operator": "the bound of ‖ΔW‖", "bias_norm": "‖Δb‖"}
_OTHERS = {
    "bias_max_abs": "the largest difference of a bias",
    "coarse": "the largest storage rounding relative to a scale",
    "weight_max": "the largest weight",
    "weight_frobenius": "‖W‖_F",
    "terms": "the number of roundings",
}


def recheck(stated: Certificate, now: Certificate) -> list[str]:
    """Deviations in the verdict, the set of parts, their statuses, and every bound."""
    problems = []
    if not stated.passes(allow_sampled=True):
        problems.append(f"the certificate itself states {stated.verdict}")
    if now.verdict == Verdict.DIFFERENT:
        problems.append(f"the two are different: {now.difference}")
    elif now.verdict.is_worse_than(stated.verdict):
        problems.append(f"stated as {stated.verdict}, but is {now.verdict}: {now.difference}")
    found = {part.name: part for part in now.parts}
    said = {part.name: part for part in stated.parts}
    problems += [f"{name}: in only one of the two" for name in sorted(found.keys() ^ said.keys())]
    problems += [
        f"{name}: stated as proved, and is {found[name].status}"
        for name, part in said.items()
        if part.status == PROVED and name in found and found[name].status != PROVED
    ]
    needed = [c for c in now.conditions if c not in stated.conditions]
    problems += [f"a condition that is not stated: {condition}" for condition in needed]
    sites = {site.name: site for site in now.sites}
    for site in stated.sites:
        if site.name in sites:
            problems += [f"{site.name}: {text}" for text in _of_site(site, sites[site.name])]
    return problems


def _of_site(stated: SiteProof, now: SiteProof) -> Iterator[str]:
    sizes = [(s.k, s.n, s.experts) for s in (stated, now)]
    if sizes[0] != sizes[1]:
        yield f"it has k, n and experts {sizes[1]}, stated as {sizes[0]}"
    if stated.modes.keys() != now.modes.keys():
        yield f"it is read by {list(now.modes)}, stated as {list(stated.modes)}"
    for name in [name for name in stated.modes if name in now.modes]:
        for text in _of_mode(stated.modes[name], now.modes[name]):
            yield text if name == "operators" else f"{text} (by {name})"


def _of_mode(stated: Coefficients, now: Coefficients) -> Iterator[str]:
    rounding = _ROUNDING * now.weight_frobenius
    if not _within(now.max_abs, stated.max_abs, rounding):
        yield f"the largest difference is {now.max_abs:.3g}, stated as {stated.max_abs:.3g}"
    if not _within(now.max_ratio, stated.max_ratio, _RATIO):
        yield (
            f"the largest difference is {now.max_ratio:.3g} times the storage rounding, stated "
            f"as {stated.max_ratio:.3g}"
        )
    slacks = dict.fromkeys(_NORMS, rounding) | dict.fromkeys(_OTHERS, 0.0)
    for name, shown in (_NORMS | _OTHERS).items():
        here, there = getattr(now, name), getattr(stated, name)
        if not _within(here, there, slacks[name]):
            yield f"{shown} is {here:.3g}, stated as {there:.3g}"
    if stated.float32 is not None and (
        now.float32 is None or not _within(now.float32, stated.float32, 0.0)
    ):
        found = "has no bound" if now.float32 is None else f"is within {now.float32:.3g}"
        yield f"float32 evaluation {found}, stated as {stated.float32:.3g}"


def _within(found: float, stated: float, slack: float) -> bool:
    """Whether a stated bound holds; NaN never does."""
    return found <= stated * (1 + _SLACK) + slack


def tokenizers_now(
    stated: Certificate, places: Sequence[Path]
) -> tuple[tuple[GraphRecord, GraphRecord], list[str]]:
    """The records with the tokenizers that are there now, and the files that have changed."""
    records, problems = [], []
    for record, place in zip((stated.reference, stated.candidate), places, strict=True):
        if record.tokenizer is None:
            records.append(record)
            continue
        found = tokenizer_digests(place)
        problems += [
            f"{place}: the tokenizer has changed: {name}"
            for name in changed_files(record.tokenizer, found)
        ]
        records.append(dataclasses.replace(record, tokenizer=found))
    return (records[0], records[1]), problems
