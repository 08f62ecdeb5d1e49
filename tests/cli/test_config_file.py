"""`--config`: options from a YAML file, checked like those of the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from qalora_compile.cli.config_file import apply_config, read_config
from qalora_compile.cli.finetune import finetune_spec
from qalora_compile.cli.parser import build_parser
from qalora_compile.errors import UserInputError


def parsed(text: str, folder: Path, *words: str) -> argparse.Namespace:
    """The options of `finetune` with a configuration file."""
    path = folder / "run.yaml"
    path.write_text(text, "utf-8")
    line = ["--config", str(path), *words]
    parser = build_parser(["finetune"])
    command = parser.commands["finetune"]
    apply_config(command, command.by_name(), line)
    return parser.parse_args(["finetune", *line])


def test_options_come_from_the_file_and_the_command_line_goes_before(tmp_path: Path) -> None:
    text = (
        "model: ./m\ndata: [a.jsonl, b.jsonl]\nbits: 3\nlr: 5.0e-4\nrslora: true\n"
        "eval_data: [c.jsonl]\nmap: prompt=q,completion=a\nrank: auto\nrank-budget: 100\n"
    )
    options = parsed(text, tmp_path, "--out", "run", "--lr", "1e-2")
    spec = finetune_spec(options)
    assert (spec.model, spec.reading.data, spec.reading.eval_data) == (
        "./m",
        ("a.jsonl", "b.jsonl"),
        ("c.jsonl",),
    )
    assert (spec.codes.bits, spec.fit.learning_rate, spec.adapter.use_rslora) == (3, 1e-2, True)
    assert spec.reading.map == {"prompt": "q", "completion": "a"}
    assert spec.adapter.rank == "auto"


def test_a_switch_that_is_false_leaves_the_default(tmp_path: Path) -> None:
    options = parsed("model: m\ndata: [a]\nrslora: false\n", tmp_path, "--out", "run")
    assert options.rslora is False


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("bitz: 4\n", "did you mean bits?"),
        ("bits: 5\n", "bits is 5"),
        ("bits: four\n", "bits is 'four'"),
        ("data: a.jsonl\n", "data takes a list"),
        ("lr: [1, 2]\n", "lr takes one value"),
        ("lr: {a: 1}\n", "lr takes one value"),
        ("rslora: 1\n", "rslora is true or false"),
        ("- bits\n", "a mapping of options"),
        ("1: 2\n", "a mapping of options"),
        ("", "a mapping of options"),
        ("a: [\n", "not YAML"),
        ("a: !!python/object/apply:os.system [echo]\n", "not YAML"),
        ("help: true\n", "no option 'help'"),
        ("config: x\n", "no option 'config'"),
        ("map: prompt\n", "map is 'prompt'"),
    ],
)
def test_a_bad_file_is_explained(text: str, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(UserInputError) as caught:
        parsed(text, tmp_path, "--out", "run")
    assert wanted in str(caught.value)
    assert str(tmp_path / "run.yaml") in str(caught.value)


def test_a_file_that_is_missing_or_huge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="cannot be read"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "huge.yaml").write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(UserInputError, match="over 1 MiB"):
        read_config(tmp_path / "huge.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserInputError, match="not YAML"):
        read_config(tmp_path / "bytes.yaml")
