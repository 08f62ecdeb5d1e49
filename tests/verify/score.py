"""What the two checks made of the planted faults, as a table and a line."""

from __future__ import annotations

from collections.abc import Sequence

from tests.verify.planted import Found


def is_right(found: Found) -> bool:
    """Whether both checks did what the fault says: caught and named it, or could not see it."""
    fault, unseen = found.fault, dict(found.fault.unseen)
    named = found.named.startswith(fault.numeric or fault.site.removesuffix(":"))
    proof = found.difference.startswith(fault.site) if found.proof else "proof" in unseen
    numeric = named if found.numeric else "numeric" in unseen
    expected = ("proof" not in unseen, "numeric" not in unseen)
    return proof and numeric and (found.proof, found.numeric) == expected


def score_line(found: Sequence[Found]) -> str:
    """How many faults each check caught, in one line."""
    count = len(found)
    proof, numeric = sum(f.proof for f in found), sum(f.numeric for f in found)
    right = sum(map(is_right, found))
    return (
        f"mutation score: {count} faults planted; proof {proof}/{count}, numeric "
        f"{numeric}/{count}, as expected and named rightly {right}/{count}"
    )


def table(found: Sequence[Found]) -> str:
    """One row for each fault."""
    rows = ["| fault | planted in | proof | numeric | first difference |", "|---|---|---|---|---|"]
    for one in found:
        unseen = dict(one.fault.unseen)
        marks = [
            "caught" if seen else f"not seen: {unseen.get(check, 'MISSED')}"
            for check, seen in (("proof", one.proof), ("numeric", one.numeric))
        ]
        where = one.difference.partition("\n")[0].replace("|", "∣")
        on = one.fault.on.replace("program ", "")
        rows.append(f"| {one.fault.name} | {on} | {marks[0]} | {marks[1]} | {where[:90]} |")
    return "\n".join(rows)
