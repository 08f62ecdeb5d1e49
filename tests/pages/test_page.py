"""Pages: everything in one file, in order, escaped, the same bytes for the same calls."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qalora_compile.errors import UserInputError
from qalora_compile.pages import Mark, Page, histogram, line_chart

VOID = {"meta", "br", "wbr"}


class Reader(HTMLParser):
    """Checks that elements are closed in order; keeps ids, references and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "xlink:href", "src"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def text_of(path: Path) -> str:
    """The text of a page that is one file: well-formed, and without references to others."""
    reader = Reader()
    reader.feed(path.read_text("utf-8"))
    assert reader.open == [] and len(reader.ids) == len(set(reader.ids))
    assert all(link.startswith("#") for link in reader.links), "it refers to nothing outside"
    return " ".join(reader.text.split())


def example() -> Page:
    page = Page("Layers & <numbers>", "of one model")
    page.verdict(Mark("<EQUAL>", good=True), "on <all>")
    page.section("Loss", "It falls.", "1 < 2")
    page.chart(line_chart({"a": ([1, 2, 3], [3, 2, 1])}, x="step", y="loss"), "what is left")
    page.section("Layers")
    page.facts({"verdict": "PASS", "largest": 0.000123456})
    page.table(("layer", "error", "bits"), [("<q>", 1.23456, 4), ("k", 0.5, 3)], "all layers")
    page.chart(histogram([1.0, 2.0, float("nan")], x="shift"))
    page.side_by_side(("before", "x\n <y>"), ("after", "z"), fold="the graphs")
    page.code("raise <this>")
    page.layer_map({f"<m>.layers.{i}.{k}": i / 4 for i in (0, 1) for k in ("q", "<k>")}, "map")
    page.bars({"<bar>": 2.0, "other": 1.0})
    page.layer_tables(("layer", "bits"), [("a.0.q", 4), ("a.1.q", 4), ("<head>", 8)])
    with page.fold("<folded>", "<remark>"):
        page.text("<inside>")
    return page


def read(page: Page) -> Reader:
    reader = Reader()
    reader.feed(page.html())
    assert reader.open == []
    return reader


def test_everything_is_there_in_order_and_escaped() -> None:
    found = read(example())
    wanted = [
        "Layers & <numbers>", "of one model", "✓ <EQUAL> on <all>", "It falls.", "1 < 2",
        "what is left", "verdict PASS", "0.0001235", "all layers", "<q> 1.235 4",
        "not finite", "the graphs", "x <y>", "after z", "raise <this>",
        "<m>.layers", "block q <k> 0 0 0 1 0.25 0.25", "map", "<bar> 2",
        "q 2 layers", "other layers 1 layer", "<head>", "<folded> <remark> <inside>",
    ]  # fmt: skip
    squeezed = re.sub(r"\s", "", found.text)
    spots = [squeezed.find(re.sub(r"\s", "", text)) for text in wanted]
    assert -1 not in spots and spots == sorted(spots)


def test_it_refers_to_nothing_outside_itself_and_ids_are_its_own() -> None:
    html = example().html()
    found = read(example())
    assert len(found.ids) == len(set(found.ids))
    assert {link for link in found.links if not link.startswith("#")} == set()
    assert {link[1:] for link in found.links} <= set(found.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(found.ids)
    assert "<script" not in html and "@import" not in html


def test_light_and_dark_define_the_same_colours() -> None:
    html = example().html()
    names = re.findall(r"^ *(--[a-z0-9-]+):", html, re.MULTILINE)
    assert all(names.count(name) == 2 for name in names)
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", html)) <= set(names)


def test_the_same_calls_write_the_same_bytes(tmp_path: Path) -> None:
    first = example().write(tmp_path / "a.html")
    example().write(tmp_path / "b.html")
    assert first.read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_a_page_that_may_not_be_replaced_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_text("kept")
    with pytest.raises(UserInputError, match="already exists"):
        example().write(path, overwrite=False)
    assert path.read_text() == "kept"


def test_a_row_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserInputError, match="row 1 of the table has 1 cells for 2 columns"):
        Page("x").table(("a", "b"), [(1, 2), (3,)], "c")


def test_only_columns_of_numbers_are_aligned_right() -> None:
    page = Page("x")
    page.table(("mixed", "yes", "flag"), [("a", 1, True), (2, 2.0, False)])
    assert re.findall(r'<th class="number">(\w+)', page.html()) == ["yes"]


def test_a_longer_bar_is_a_larger_value_and_begins_at_zero() -> None:
    page = Page("x")
    page.bars({"a": 1.0, "b": 2.0, "none": 0.0, "lost": float("nan")})
    assert re.findall(r"width:([0-9.]+)%", page.html()) == ["50.0", "100.0", "0.0", "100.0"]
    assert "not a number" in page.html()


def test_a_verdict_has_a_sign_and_a_class() -> None:
    for good, sign in ((True, "✓"), (False, "✗"), (None, "?")):
        page, mark = Page("x"), Mark("THIS", good=good)
        page.table(("a",), [(mark,)])
        assert f'<strong class="{mark.tone} short">{sign} THIS</strong>' in page.html()


def test_every_layer_is_in_a_map_or_a_bar_and_its_path_is_its_tooltip() -> None:
    paths = [f"m.layers.{i}.{k}" for i in range(3) for k in ("a.q", "a.k", "b")] + ["head"]
    page = Page("x")
    page.layer_map({path: float(i) for i, path in enumerate(paths)}, top=8.0)
    html = page.html()
    for place, path in enumerate(paths[:-1]):
        assert f'title="{path}: {place}"' in html, path
    assert "head" in html and '<th colspan="2">a</th>' in html
    assert re.findall(r"var\(--heat\) ([0-9.]+)%", html)[:3] == ["0.0", "12.5", "25.0"]


def test_a_map_of_nothing_or_of_negative_numbers_is_refused() -> None:
    for values in ({}, {"a": -1.0}):
        with pytest.raises(UserInputError):
            Page("x").layer_map(values)


def test_a_long_path_may_break_between_its_parts() -> None:
    page = Page("x")
    page.table(("path",), [("model.layers.0.q_proj",)])
    assert "model.<wbr>layers.0.<wbr>q_<wbr>proj" in page.html()
