"""Scores of pieces: joining by them is joining by the merges that they were found from."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qalora_compile.errors import UnsupportedError
from qalora_compile.exporters.checkpoints.gguf.piece_scores import piece_scores


def scores_of(*merges: tuple[str, str]) -> list[float]:
    made = {left + right for left, right in merges}
    every = sorted({*"".join(made), *made}, key=lambda text: (len(text), text))
    return piece_scores(list(merges), every, set(), "here")


def test_scores_are_ranks() -> None:
    assert scores_of(("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")) == [-4, -4, -4, 0, -1, -2]
    with pytest.raises(UnsupportedError, match="a merge of '<0x0A>'"):  # of a byte, not its name
        piece_scores([("<0x0A>", "a")], ["a", "<0x0A>", "<0x0A>a"], set(), "here")


@pytest.mark.parametrize(
    ("merges", "words"),
    [
        ([("a", "b"), ("b", "c"), ("a", "bc"), ("c", "a"), ("ab", "c")], "come between those that"),
        ([("a", "b"), ("b", "c"), ("a", "bc")], "there is no merge of 'ab' and 'c'"),
        ([("a", "b"), ("ab", "c"), ("b", "xc")], "there is a merge of 'b' and 'xc'"),
        ([("a", "b"), ("a", "b")], "occurs twice"),
        ([("▁", "▁▁"), ("▁", "▁"), ("▁▁", "▁")], r"4 spaces are cut into \[2, 2\] by the merges"),
        ([("▁", "▁"), ("▁▁", "▁▁"), ("▁", "▁▁"), ("▁▁", "▁"), ("▁", "▁▁▁"), ("▁▁▁", "▁"),
          ("▁", "a"), ("▁", "▁a"), ("▁▁", "a")], "come between those that"),
    ],
)  # fmt: skip
def test_merges_without_scores_are_refused(merges: list[tuple[str, str]], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words) as caught:
        scores_of(*merges)
    assert (caught.value.where, bool(caught.value.hint)) == ("here", True)


@given(st.data())
def test_scores_join_as_merges_do(data: st.DataObject) -> None:
    """On random vocabularies: what is accepted cuts every text as the tokenizers library does."""
    from tokenizers import Tokenizer, models

    made = data.draw(st.lists(st.text("ab▁", min_size=2, max_size=4), unique=True, max_size=9))
    texts = ["a", "b", "▁", *made]
    cuts = [(text[:cut], text[cut:]) for text in made for cut in range(1, len(text))]
    merges = [cut for cut in cuts if cut[0] in texts and cut[1] in texts]
    scores = piece_scores(merges, texts, set(), "here")
    own = Tokenizer(models.BPE({text: n for n, text in enumerate(texts)}, merges))
    text = data.draw(st.text("ab▁", max_size=12))
    assert joined(text, dict(zip(texts, scores, strict=True))) == own.encode(text).tokens


def joined(text: str, scores: dict[str, float]) -> list[str]:
    """The rule written out: join the pair whose piece has the highest score, leftmost first."""
    symbols = list(text)
    while True:
        texts = [left + right for left, right in pairwise(symbols)]
        pairs = [(piece, at) for at, piece in enumerate(texts) if piece in scores]
        if not pairs:
            return symbols
        piece, at = max(pairs, key=lambda pair: (scores[pair[0]], -pair[1]))
        symbols[at : at + 2] = [piece]
