"""The same rows from every kind of file, held against what `datasets` and pyarrow read of it."""

from __future__ import annotations

import csv
import gzip
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from qalora_compile.errors import UserInputError
from qalora_compile.training.data.load_examples import find_classes, load_examples
from qalora_compile.training.data.read_rows import find_files, read_rows
from qalora_compile.training.data.row_forms import read_mapping
from tests.training.data.test_dataset import CHAT, Words, write

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")

ROWS = [{"prompt": f"a {'bb ' * i}", "completion": f' c\u2028{i},\n"d"'} for i in range(5)]
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}


def jsonl(path: Path) -> Path:
    return write(path / "a.jsonl", *ROWS)


def with_mark(path: Path) -> Path:
    file = jsonl(path)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    return file


def compressed(path: Path) -> Path:
    file = path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(with_mark(path).read_bytes()))
    return file


def json_list(path: Path) -> Path:
    file = path / "a.json"
    file.write_text(json.dumps(ROWS, indent=2), "utf-8")
    return file


def json_lines_named_json(path: Path) -> Path:
    return write(path / "a.json", *ROWS)


def table(path: Path, delimiter: str = ",", suffix: str = ".csv") -> Path:
    file = path / f"a{suffix}"
    with file.open("w", encoding="utf-8-sig", newline="") as opened:
        writer = csv.DictWriter(opened, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return file


def tabbed(path: Path) -> Path:
    return table(path, "\t", ".tsv")


def parquet(path: Path) -> Path:
    file = path / "a.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(ROWS), file)
    return file


def saved(path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(path / "saved", num_shards=2)
    return path / "saved"


def chosen(path: Path) -> Path:
    """Rows that are others than those of the table behind them."""
    rows = [ROWS[0], {"prompt": "x", "completion": "y"}, *ROWS[1:]]
    made = datasets.Dataset.from_list(rows)
    made.select([0, 2, 3, 4, 5]).save_to_disk(path / "chosen")
    return path / "chosen"


def split(path: Path) -> Path:
    made = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    made.save_to_disk(path / "split")
    return path / "split"


def folder(path: Path) -> Path:
    write(path / "b.jsonl", *ROWS[3:])
    write(path / "a.jsonl", *ROWS[:3])
    (path / "README.md").write_text("of what it is", "utf-8")
    return path


KINDS = [
    jsonl, with_mark, compressed, json_list, json_lines_named_json, table, tabbed, parquet, saved,
    chosen, split, folder,
]  # fmt: skip


@pytest.mark.parametrize("make", KINDS)
def test_the_rows_are_the_same(make: Any, tmp_path: Path) -> None:
    given = make(tmp_path)
    found = [row for file in find_files(given) for _, row in read_rows(file)]
    assert found == ROWS
    data = load_examples(given, Words(), max_length=50)
    expected = load_examples(write(tmp_path / "expected.jsonl", *ROWS), Words(), max_length=50)
    assert data.examples == expected.examples
    assert sum(file.forms["prompt and completion"] for file in data.files) == 5


def test_nulls_of_columns_are_no_fields(tmp_path: Path) -> None:
    """Arrow gives every object the fields of each."""
    rows = [{"messages": CHAT, "text": None}, {"messages": [CHAT[0], CALL], "text": None}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (file,) = find_files(tmp_path / "saved")
    (_, first), (_, second) = read_rows(file)
    assert first["messages"] == CHAT
    assert second["messages"][1] == {**CALL, "content": None}


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_json_in_columns_is_parsed(tmp_path: Path, kind: str) -> None:
    """As `datasets` stores objects whose fields differ, so that no nulls are put between them."""
    if "on_mixed_types" not in inspect.signature(datasets.Dataset.from_list).parameters:
        pytest.skip("datasets before 4.7 has no columns of JSON")
    other = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "g", "arguments": {"y": 2}}}],
    }
    rows = [
        {"messages": [CHAT[0], call], "tools": [{"name": name}]}
        for call, name in ((CALL, "f"), (other, "g"))
    ]
    made = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    if kind == "saved":
        made.save_to_disk(tmp_path / "data")
    else:
        (tmp_path / "data").mkdir()
        made.to_parquet(tmp_path / "data" / "a.parquet")
    found = [row for file in find_files(tmp_path / "data") for _, row in read_rows(file)]
    assert found == rows == list(made)


def test_a_table_holds_lists_as_json(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('input_ids,other\n"[1, 2, 3]",x\n', "utf-8")
    assert load_examples(path, None, max_length=8).examples[0].tokens == (1, 2, 3)


def test_fields_can_have_other_names(tmp_path: Path) -> None:
    rows = [{"q": "a bb", "text": "no", "a": " ccc"}]
    mapping = read_mapping("prompt=q, completion=a")
    data = load_examples(write(tmp_path / "a.jsonl", *rows), Words(), max_length=9, mapping=mapping)
    assert data.examples[0].labels == (-100, -100, 3, 99)
    with pytest.raises(UserInputError, match=r"no field 'z' for --map; it has the fields \['q'"):
        load_examples(
            tmp_path / "a.jsonl", Words(), max_length=9, mapping={"prompt": "q", "completion": "z"}
        )
    labelled = [{"review": "a", "stars": n} for n in (1, 2)]
    path = write(tmp_path / "b.jsonl", *labelled)
    assert find_classes(path, {"text": "review", "label": "stars"}) == ("1", "2")
    for wrong in ("prompt", "prompt=", "prompt=a,prompt=b", "question=a"):
        with pytest.raises(UserInputError, match="map|question"):
            read_mapping(wrong)


UNKNOWN = {
    "no form": ({"question": "?", "answer": "!"}, r"but the fields \['question', 'answer'\]"),
    "answers to choose from": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "answers to choose from are not learned",
    ),
    "two forms": (
        {"instruction": "a", "output": "b", "text": "c"},
        "instruction and text; which one is meant",
    ),
    "an output that is none": ({"instruction": "a", "output": 3}, "is missing or not a text"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_row_of_no_form_says_what_is_there_and_what_is_known(kind: str, tmp_path: Path) -> None:
    row, message = UNKNOWN[kind]
    path = write(tmp_path / "a.jsonl", {"text": "a"}, row)
    with pytest.raises(UserInputError, match=message) as caught:
        load_examples(path, Words(), max_length=8)
    assert caught.value.where == f"{path}:2"
    if kind in ("no form", "two forms"):
        assert '{"instruction", "output"}' in str(caught.value.hint)
        assert "--map" in str(caught.value.hint)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    intact = {kind.__name__: kind(tmp_path) for kind in (compressed, parquet, json_list, table)}
    for name, path in intact.items():
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] + (b"\xff" if name == "table" else b""))
        with pytest.raises(UserInputError) as caught:
            list(read_rows(path))
        assert str(path) in str(caught.value.where), name
    (tmp_path / "a.arrow").write_bytes(b"ARROW1\0\0 and nothing that belongs to it")
    with pytest.raises(UserInputError, match="cannot read"):
        list(read_rows(tmp_path / "a.arrow"))
    (tmp_path / "b.csv").write_text("text,label\na,b\nc\n", "utf-8")
    with pytest.raises(UserInputError, match="1 values, and there are 2 columns") as caught:
        list(read_rows(tmp_path / "b.csv"))
    assert str(caught.value.where).endswith("b.csv:3")
    (tmp_path / "b.csv").write_text("text,text\na,b\n", "utf-8")
    with pytest.raises(UserInputError, match="two columns have the same name"):
        list(read_rows(tmp_path / "b.csv"))


def test_folders_of_which_it_is_not_known_what_is_meant_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="holds no data file"):
        find_files(tmp_path)
    write(tmp_path / "train.jsonl", *ROWS)
    write(tmp_path / "test.jsonl", *ROWS)
    with pytest.raises(UserInputError, match=r"held-out data next to training data: test\.jsonl"):
        find_files(tmp_path)
    made = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "split")
    with pytest.raises(UserInputError, match="the splits 'train, test'"):
        find_files(tmp_path / "split")
    assert len(find_files(tmp_path / "split" / "train")) == 1
    state = tmp_path / "split" / "train" / "state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": "../../train.jsonl"}]}), "utf-8")
    with pytest.raises(UserInputError, match="leads out of the folder"):
        find_files(tmp_path / "split" / "train")
