"""What each command does, called from Python: nothing is printed, and results are objects."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from qalora_compile import AdapterSpec, Tolerance
from qalora_compile.api.bisect import BisectSpec, bisect_pipeline
from qalora_compile.api.codes import CodesSpec
from qalora_compile.api.deploy import DeploySpec, export_folder
from qalora_compile.api.finetune import FinetuneResult, finetune
from qalora_compile.api.finetune_spec import FinetuneSpec, ReadingSpec
from qalora_compile.api.fold import FoldSpec, fold_run
from qalora_compile.api.generate import GenerateSpec, generate
from qalora_compile.api.inspect import inspect_exported
from qalora_compile.api.quantize import QuantizeSpec, quantize_folder
from qalora_compile.api.verify import VerifySpec, compare_along, compare_on_inputs, prove
from qalora_compile.errors import UserInputError
from qalora_compile.progress import listening
from qalora_compile.training import FitSpec
from qalora_compile.verdict import Verdict
from tests.cli.tiny import write_data, write_model

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "model").mkdir()
    write_model(folder / "model")
    write_data(folder / "train.jsonl")
    return folder


@pytest.fixture(scope="module")
def spec(root: Path) -> FinetuneSpec:
    """Two steps on the tiny model."""
    return FinetuneSpec(
        model=str(root / "model"),
        out=root / "run",
        reading=ReadingSpec(data=(str(root / "train.jsonl"),)),
        codes=CodesSpec(group_size=16),
        adapter=AdapterSpec(rank=4),
        fit=FitSpec(steps=2, batch_size=4),
    )


@pytest.fixture(scope="module")
def trained(spec: FinetuneSpec) -> FinetuneResult:
    """The result of a training that is watched."""
    seen: list[int] = []
    said: list[str] = []
    with listening(lambda *_: None, said.append):
        result = finetune(spec, watch=lambda report: seen.append(report.step))
    assert seen == [1, 2]
    assert said[0] == f"load {spec.model}"
    return result


@pytest.mark.slow
def test_the_way_through(trained: FinetuneResult, root: Path, capsys: Capture) -> None:
    folded, edge = root / "folded", root / "edge"
    assert (trained.fit.step, trained.fit.stopped) == (2, False)
    assert trained.facts["status"] == "finished" and trained.reports
    fold = fold_run(FoldSpec(folder=trained.folder, out=folded))
    assert (fold.report.verdict, fold.program.stage) == (Verdict.EQUAL, "folded")
    export = export_folder(DeploySpec(folder=folded, out=edge))
    assert export.parts is not None and "qalora.json" in export.written
    sides = VerifySpec(a=str(folded), b=str(edge), inputs=1)
    assert compare_on_inputs(sides, Tolerance(max_rel=1e-3)).decisive.verdict == Verdict.EQUAL
    assert prove(sides).passed
    levels = dataclasses.replace(sides, levels=("all",))
    assert compare_along(levels).verdict == Verdict.EQUAL
    rows, totals = inspect_exported(edge)
    assert sum(row["decision"] == "quantize" for row in rows) == totals["layers to quantize"]
    made = generate(GenerateSpec(folder=edge, prompt="red is a", max_new_tokens=3))
    assert made.cached and 0 < len(list(made.pieces)) <= 3
    found = bisect_pipeline(BisectSpec(path=str(folded), target="ort-stock", inputs=1))
    assert found.verdict == Verdict.EQUAL and len(found.steps) >= 2
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_model_is_quantized_without_data(root: Path, capsys: Capture) -> None:
    codes = CodesSpec(bits=3, group_size=16)
    spec = QuantizeSpec(model=str(root / "model"), out=root / "three", codes=codes)
    result = quantize_folder(spec)
    assert result.generates and {report.bits for report in result.reports} == {3}
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_run_is_gone_on_with_by_an_equal_specification(
    trained: FinetuneResult, spec: FinetuneSpec
) -> None:
    stored = json.loads((trained.folder / "run.json").read_text("utf-8"))["options"]
    assert stored == json.loads(json.dumps(spec.decisive() | {"task": "language"}))
    known = dataclasses.replace(
        spec, reading=dataclasses.replace(spec.reading, task="language"), resume=True
    )
    known.check_resumed(stored)
    known.check_resumed(stored | {"no_verify": False})  # of records before specifications
    other = dataclasses.replace(known, adapter=AdapterSpec(rank=8))
    with pytest.raises(UserInputError, match="started with --rank 4, not 8"):
        other.check_resumed(stored)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CodesSpec(embeddings_group_size=32), "without --embeddings"),
        (
            lambda: QuantizeSpec(model="m", out=Path("o"), codes=CodesSpec(method="gptq")),
            "calibration data",
        ),
        (lambda: BisectSpec(path="p", target="ort", inputs=0), "--inputs is 0"),
        (lambda: GenerateSpec(folder=Path("f"), prompt="", max_new_tokens=0), "is 0"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_the_specification(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserInputError, match=words):
        make()
