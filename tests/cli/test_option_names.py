"""The command line speaks of its options, not of the fields of Python's specifications."""

from __future__ import annotations

from pathlib import Path

import pytest

from qalora_compile.cli.main import main
from qalora_compile.cli.option_names import in_options
from qalora_compile.cli.parser import build_parser
from qalora_compile.errors import QaloraError, UserInputError

Capture = pytest.CaptureFixture[str]
OPTIONS = build_parser(["finetune"]).commands["finetune"].option_names()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--bits", "auto"], "--budget is not given with --bits auto"),
        (["--rank", "auto"], "--rank-budget, with --rank auto, is not given"),
        (["--patience", "3"], "set --eval-every to a number of steps"),
        (["--lr", "-1"], "--lr is -1.0"),
        (["--warmup", "7"], "--warmup is 7.0"),
        (["--rslora", "--dropout", "2"], "--dropout is 2.0"),
        (
            ["--adapter", "scale", "--init", "svd"],
            "it is for --adapter lora with --zero-point real",
        ),
        (["--group-size", "auto"], "--group-size is auto with bits 4"),
        (["--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_a_field_is_called_by_its_option(
    given: list[str], wanted: str, model_folder: Path, data_file: Path, capsys: Capture
) -> None:
    words = ["finetune", str(model_folder), "--data", str(data_file), "--out", "run", *given]
    assert main(words) == 2
    assert wanted in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "error",
    [
        UserInputError("group_size is 7", where="adapter_config.json"),
        UserInputError("the steps of step 3 hold nothing", hint="qc.insert_adapters(rank=2)"),
        UserInputError("there is no model 'bits'"),
        UserInputError(
            "at step 5 the loss is nan", hint="lower the rank; group_size of embeddings"
        ),
        QaloraError("evaluate_every is 3"),
    ],
)
def test_other_messages_stay(error: QaloraError) -> None:
    assert str(in_options(error, OPTIONS)) == str(error)
