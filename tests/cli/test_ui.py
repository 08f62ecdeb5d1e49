"""The terminal shows texts as they are: no markup, no emoji, no control characters."""

from __future__ import annotations

import ast
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from qalora_compile.cli import ui
from qalora_compile.cli.main import main
from qalora_compile.cli.ui import PlainConsole, Steps
from qalora_compile.errors import UserInputError

Capture = pytest.CaptureFixture[str]
PACKAGE = Path(ui.__file__).parents[1]
ODD = "[/red] [v2] [bold]x[/bold] [link=a]:smile: [ \\[a]"
"""What rich would take for markup, and for a mistake in it."""
ORDERS = "\x1b[31mred\x1b]0;title\x07\x9b2J\r\b\u202etxt\x00"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed on either console."""
    stream = io.StringIO()
    for console in (ui.console, ui.err_console):
        monkeypatch.setattr(console, "_file", stream)
        monkeypatch.setattr(console, "width", 200)
    return stream


def show(text: str) -> None:
    """Every way to print a text."""
    ui.console.print(text)
    ui.console.print(f"note: {text}", end="", soft_wrap=True)
    ui.complain(text)
    ui.print_summary(text, {text: text})
    ui.print_table(text, (text, "b"), [(text, 1.0)])
    Steps().say(text)
    Steps().update(text, 1, 1, text)


def test_markup_and_emoji_are_printed_as_they_are(written: io.StringIO) -> None:
    show(ODD)
    assert written.getvalue().count(ODD) == 12


def test_control_characters_are_spelled_out(written: io.StringIO) -> None:
    show(ORDERS)
    shown = written.getvalue()
    assert not set(shown) & set(ORDERS) - set("[]0123456789abcdefghijklmnopqrstuvwxyzJ;\n")
    assert shown.count(r"\x1b[31mred\x1b]0;title\x07\x9b2J\r\x08\u202etxt\x00") == 12


def test_lines_and_tabulators_stay(written: io.StringIO) -> None:
    ui.console.print("a\n  b")
    assert written.getvalue() == "a\n  b\n"


def test_json_is_json_and_gives_no_orders(written: io.StringIO) -> None:
    value = {"note": ODD + ORDERS, "many": [ODD * 50]}
    ui.print_json(value)
    text = written.getvalue()
    assert json.loads(text) == value
    assert not set(text) & set("\x1b\x9b\x07\u202e")


@pytest.mark.parametrize("text", [ODD, ORDERS])
def test_bars_show_texts_as_they_are(text: str) -> None:
    stream = io.StringIO()
    console = PlainConsole(width=300)
    console._file, console._force_terminal = stream, True
    steps = Steps(console)
    assert steps._live
    with steps._bar:
        steps.update(text, 0, 2, text)
        steps.update(text, 2, 2, text)
    assert ui.shown(text) in stream.getvalue()
    assert "\x1b[31mred" not in stream.getvalue()


def test_all_printing_goes_through_one_module() -> None:
    """Nothing else of the package knows rich, or prints a text of its own."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        if path == Path(ui.__file__) or path.name == "footprint.py":
            continue  # a process of its own prints one number
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
                found += [path.name for name in names if str(name).split(".")[0] == "rich"]
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "Console"):
                found.append(path.name)
            if isinstance(node, ast.keyword) and node.arg in ("markup", "emoji"):
                found.append(path.name)
    assert found == []


def test_every_console_is_plain() -> None:
    tree = ast.parse(Path(ui.__file__).read_text("utf-8"))
    made = [ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)]
    assert "Console" not in made
    assert made.count("PlainConsole") == 3
    columns = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    columns = [n for n in columns if ast.unparse(n.func) == "TextColumn"]
    odd = [ast.unparse(n) for n in columns if "{" in ast.unparse(n)]
    assert len(odd) == 2
    assert all("markup=False" in text for text in odd)
    assert Console(file=io.StringIO())._markup, "which would interpret it"


def test_an_error_says_what_a_file_says(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: object) -> int:
        raise UserInputError(ODD, where=ODD, hint="\x1b[31m")

    monkeypatch.setattr("qalora_compile.cli.doctor.run", fail)
    assert main(["doctor"]) == 2
    said = capsys.readouterr().err
    assert said.count(ODD) == 2
    assert r"\x1b[31m" in said
    assert "\x1b" not in said


@pytest.mark.slow
def test_commands_with_markup_in_paths_labels_and_notes(
    encoder_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    root = tmp_path / "a[/red] [v2] :smile:"
    root.mkdir(parents=True)
    labels = ("[/good]", "[bold]bad[/bold]")
    words = ["this", "is", "good", "bad"]
    rows = [
        {"text": f"{w} {v}", "label": labels[i % 2]} for i, w in enumerate(words) for v in words
    ]
    rows.append({"text": " ".join(words * 30), "label": labels[0]})
    data = root / "[bold]data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    run, folded, edge = (f"{root}/{name}" for name in ("[run]", "[/folded]", "edge\x1b[31m"))
    line = ["finetune", str(encoder_folder), "--data", str(data), "--task", "classification"]
    line += ["--steps", "2", "--batch-size", "4", "--group-size", "4", "--seq-len", "16"]
    assert main([*line, "--out", run]) == 0
    said = "".join(capsys.readouterr())
    flat = "".join(said.replace("│", "").split())
    for text in ("[/good] 9", "[bold]bad[/bold] 8", run, str(data)):
        assert "".join(text.split()) in flat, text
    assert main(["fold", run, "--out", folded]) == 0
    assert main(["export", folded, "--out", edge]) == 0
    assert main(["inspect", edge]) == 0
    assert main(["verify", run, edge, "--max-rel", "1e-3"]) == 0
    assert main(["fold", run, "--out", folded]) == 2
    said = "".join(capsys.readouterr())
    assert "".join(folded.split()) in "".join(said.split())
    assert r"edge\x1b[31m" in "".join(said.replace("│", "").split())
    assert "\x1b" not in said


def narrow(monkeypatch: pytest.MonkeyPatch, width: int) -> io.StringIO:
    """What is printed on a terminal of that many columns."""
    stream = io.StringIO()
    for console in (ui.console, ui.err_console):
        monkeypatch.setattr(console, "_file", stream)
        monkeypatch.setattr(console, "width", width)
    return stream


@pytest.mark.parametrize("width", [60, 80, 120])
def test_numbers_are_never_cut_and_names_fold(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    written = narrow(monkeypatch, width)
    name = "model.layers.{0..29}.self_attn.q_proj.of.a.very.deep.model"
    numbers = [1.234e-17 * 7**index for index in range(8)]
    columns = ("layer", *(f"a long title {index}" for index in range(8)))
    ui.print_table("worst", columns, [(name, *numbers), ("short", *numbers)])
    ui.print_table("few", ("layer", "max abs"), [(name * 2, numbers[0])])
    text = written.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for number in numbers:
        assert text.count(f"{number:.4g}") >= 2
    first = (line.split("│")[1].strip() for line in text.splitlines() if "│" in line)
    assert name * 2 in "".join(first)


@pytest.mark.parametrize("note", ["", "loss 2.5000, held out 3.2500 (41.2% right), lr 1.00e-03"])
def test_a_bar_in_80_columns_has_step_rate_and_time_left(note: str) -> None:
    stream = io.StringIO()
    console = PlainConsole(width=80)
    console._file, console._force_terminal = stream, True
    steps = Steps(console)
    with steps._bar:
        for done in range(900):
            steps.update("train", done, 1000, note)
        steps._bar.refresh()
    lines = [line for line in re.split(r"[\r\n]", stream.getvalue()) if "899" in line]
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", lines[-1])
    assert "899/1000" in shown
    assert "/s" in shown
    assert re.search(r"eta +\d:\d\d:\d\d", shown)
    assert len(shown) <= 80
    assert not note or "loss 2.5000" in shown
