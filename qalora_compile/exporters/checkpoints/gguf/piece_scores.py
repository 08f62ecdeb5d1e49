"""Scores of SentencePiece's pieces, found from the order in which a tokenizer merges them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Never

from qalora_compile.errors import UnsupportedError

SPACE = "▁"
"""The character that SentencePiece writes for a space."""
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
"""The tokens of single bytes."""
Merge = tuple[str, str]


def refuse(what: str, where: str) -> Never:
    """Raise `UnsupportedError` for something that llama.cpp's tokenizer does not compute."""
    raise UnsupportedError(
        what,
        where=where,
        hint="give the model's own .gguf file as the model to take its metadata, or leave the "
        "tokenizer out",
    )


def piece_scores(merges: list[Merge], texts: list[str], added: set[str], where: str) -> list[float]:
    """The score of every piece: minus the rank of the first merge that produces it.

    A piece that no merge produces comes last.

    Args:
        merges: Pairs of pieces, the first to be joined first.
        texts: All pieces.
        added: Added tokens, which are cut out of a text before the rest is cut into pieces.
        where: The file, for errors.

    Raises:
        UnsupportedError: joining by these scores gives other pieces than the merges do.
    """
    made: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(merges):
        made.setdefault(left + right, []).append(rank)
    _check_complete(merges, texts, added, where)
    _check_order(made, where)
    _check_runs(merges, made, where)
    return [-float(made[text][0] if text in made else len(merges)) for text in texts]


def _check_complete(merges: list[Merge], texts: list[str], added: set[str], where: str) -> None:
    """Check that the merges are exactly the pairs that make a piece: llama.cpp joins all of them.

    Raises:
        UnsupportedError: such a pair is not a merge, or a merge is not such a pair or occurs twice.
    """
    parts = set(texts) - BYTES - added  # a byte's token stands for a byte, not for its name
    wanted = {
        (text[:cut], text[cut:])
        for text in texts
        if text not in added
        for cut in range(1, len(text))
        if all(len(part) == 1 or part in parts for part in (text[:cut], text[cut:]))
    }
    possible = [merge for merge in merges if added.isdisjoint((*merge, "".join(merge)))]
    given = set(possible)
    odd = min(wanted ^ given, default=None)
    if odd is not None:
        has = "a" if odd in given else "no"
        refuse(
            f"{len(wanted ^ given)} merges are not those that the pieces imply: there is {has} "
            f"merge of {odd[0]!r} and {odd[1]!r}",
            where,
        )
    if len(given) != len(possible):
        refuse("a merge occurs twice", where)


def _check_order(made: Mapping[str, list[int]], where: str) -> None:
    """Check that all merges that produce a piece come before those that produce the next one.

    Runs of spaces may be mixed with each other if no other piece holds one: see `_check_runs`.

    Raises:
        UnsupportedError: the order depends on the parts of a piece.
    """
    order = sorted(made, key=lambda piece: made[piece][0])
    apart = not any(SPACE * 2 in piece and not _is_run(piece) for piece in order)
    latest = order[0] if order else ""
    for piece in order[1:]:
        mixed = made[piece][0] < made[latest][-1]
        if mixed and not (apart and _is_run(piece) and _is_run(latest)):
            refuse(
                f"merges that make {piece!r} come between those that make {latest!r}: no score "
                "per piece says which to join first",
                where,
            )
        latest = max(latest, piece, key=lambda text: made[text][-1])


def _is_run(piece: str) -> bool:
    """Whether a piece consists of spaces only."""
    return piece == SPACE * len(piece)


def _check_runs(merges: list[Merge], made: Mapping[str, list[int]], where: str) -> None:
    """Check that merges and scores join runs of spaces identically, up to two longest pieces.

    Raises:
        UnsupportedError: the results differ.
    """
    runs = {
        (len(pair[0]), len(pair[1])): rank
        for rank, pair in enumerate(merges)
        if _is_run("".join(pair))
    }
    firsts = {len(piece): ranks[0] for piece, ranks in made.items() if _is_run(piece)}
    for length in range(2, 2 * max(firsts, default=0) + 2):
        by_merges = _join_run(length, lambda left, right: runs.get((left, right)))
        by_scores = _join_run(length, lambda left, right: firsts.get(left + right))
        if by_merges != by_scores:
            refuse(
                f"{length} spaces are cut into {by_merges} by the merges, and by scores of pieces "
                f"into {by_scores}",
                where,
            )


def _join_run(length: int, rank: Callable[[int, int], int | None]) -> list[int]:
    """Lengths of the pieces of a run of spaces, joined by lowest rank, from the left."""
    pieces = [1] * length
    while True:
        ranks = [(rank(left, right), at) for at, (left, right) in enumerate(pairwise(pieces))]
        possible = [(found, at) for found, at in ranks if found is not None]
        if not possible:
            return pieces
        at = min(possible)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
