"""What the three checks made of the planted faults, as a table and a line."""

from __future__ import annotations

from collections.abc import Sequence

from qalora_compile.verdict import Verdict
from tests.verify.planted import Found, is_in_a_pass


def is_right(found: Found) -> bool:
    """Whether each check caught and named a fault, or missed one that it is said not to see.

    Along the graph UNDECIDED is not enough: a planted fault is DIFFERENT.
    """
    fault, unseen = found.fault, dict(found.fault.unseen)
    caught = {
        "proof": found.proof,
        "numeric": found.numeric,
        "nodes": found.nodes == Verdict.DIFFERENT,
    }
    named = {
        "proof": found.difference.startswith(fault.site),
        "numeric": found.named.startswith(fault.numeric or fault.site.removesuffix(":")),
        "nodes": found.node.startswith(fault.node or fault.site),
    }
    clean = found.nodes == Verdict.EQUAL if "nodes" in unseen else True
    return (
        clean
        and all(caught[c] == (c not in unseen) for c in caught)
        and all(named[c] for c in caught if caught[c])
    )


def is_bisected(found: Found) -> bool:
    """Whether `bisect` named the step and the place, of a fault that is in a pass."""
    fault = found.fault
    if not is_in_a_pass(fault):
        return True
    step = "fold" if fault.on.startswith("program folded") else "lower"
    return f"{found.bisected}:".startswith(f"{step}: {fault.node or fault.site}")


def score_line(found: Sequence[Found]) -> str:
    """How many faults each check caught, in one line."""
    count = len(found)
    proof, numeric = sum(f.proof for f in found), sum(f.numeric for f in found)
    nodes = sum(f.nodes == Verdict.DIFFERENT for f in found)
    right = sum(map(is_right, found))
    passes = [f for f in found if is_in_a_pass(f.fault)]
    return (
        f"mutation score: {count} faults planted; proof {proof}/{count}, numeric "
        f"{numeric}/{count}, along the graph {nodes}/{count}, bisected "
        f"{sum(map(is_bisected, passes))}/{len(passes)}, as expected and named rightly "
        f"{right}/{count}"
    )


def table(found: Sequence[Found]) -> str:
    """One row for each fault."""
    checks = "proof | numeric | along the graph"
    rows = [f"| fault | planted in | {checks} | first difference |", "|---|---|---|---|---|---|"]
    for one in found:
        unseen = dict(one.fault.unseen)
        marks = [
            "caught" if seen else f"not seen: {unseen.get(check, 'MISSED')}"
            for check, seen in (
                ("proof", one.proof),
                ("numeric", one.numeric),
                ("nodes", one.nodes == Verdict.DIFFERENT),
            )
        ]
        where = one.difference.partition("\n")[0].replace("|", "∣")
        on = one.fault.on.replace("program ", "")
        rows.append(f"| {one.fault.name} | {on} | {' | '.join(marks)} | {where[:90]} |")
    return "\n".join(rows)
