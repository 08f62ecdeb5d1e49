"""Files of target `torch` are run without torch's loader, and hostile ones are refused."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qalora_compile as qc
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.verify.compare import Tolerance
from qalora_compile.verify.runners.torch_session import TorchSession
from tests.models import MLP, adapted, assert_close, bert, token_ids

SPEC = qc.ExportSpec(target="torch")
MODEL, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[qc.Program, Path]:
    program = qc.fold_adapters(
        adapted(MLP(50, 64, 10).eval(), (torch.randn(4, 3, 50),), qc.QuantSpec(group_size=32))
    )
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    qc.export_model(program, path, SPEC)
    return program, path


def test_outputs_and_sites_are_those_of_the_program(exported: tuple[qc.Program, Path]) -> None:
    program, path = exported
    report = qc.verify_equivalence(
        program, path, [(torch.randn(2, 5, 50),), (torch.randn(1, 1, 50),)], Tolerance(max_rel=1e-5)
    )
    assert report.passed
    assert [site.name for site in report.sites] == [site.name for site in program.plan]


@pytest.mark.slow
def test_an_encoder_is_run_with_all_its_operators(tmp_path: Path) -> None:
    program = qc.fold_adapters(adapted(bert(), (token_ids(2, 16),)))
    qc.export_model(program, tmp_path / "model.pt2", SPEC)
    calls = [(token_ids(3, 11),)]
    report = qc.verify_equivalence(program, tmp_path / "model.pt2", calls, Tolerance(max_rel=1e-5))
    assert report.passed


def test_a_wrong_weight_is_found(exported: tuple[qc.Program, Path], tmp_path: Path) -> None:
    program, path = exported

    def other_scale(names: dict[str, bytes]) -> None:
        config = json.loads(names[WEIGHTS])["config"]["layers.0.scale_and_zero"]
        entry = f"data/weights/{config['path_name']}"
        names[entry] = bytes(len(names[entry]))

    wrong = changed(path, tmp_path, other_scale)
    report = qc.verify_equivalence(
        program, wrong, [(torch.randn(2, 5, 50),)], Tolerance(max_rel=1e-3)
    )
    assert not report.passed


def test_a_damaged_weight_is_named(exported: tuple[qc.Program, Path], tmp_path: Path) -> None:
    program, path = exported

    def with_nan(names: dict[str, bytes]) -> None:
        config = json.loads(names[WEIGHTS])["config"]["layers.1.bias"]
        entry = f"data/weights/{config['path_name']}"
        names[entry] = b"\xff" * len(names[entry])

    wrong = changed(path, tmp_path, with_nan)
    report = qc.verify_equivalence(
        program, wrong, [(torch.randn(2, 5, 50),)], Tolerance(max_rel=1e-3)
    )
    assert not report.passed
    assert "layers.1.bias holds NaN" in str(report.first_divergence)


def changed(path: Path, folder: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of the archive with some entries changed."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        names = {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}
    change(names)
    made = folder / "changed.pt2"
    with zipfile.ZipFile(made, "w") as archive:
        for name, data in names.items():
            archive.writestr(f"{root}/{name}", data)
    return made


def with_json(name: str, change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def run(names: dict[str, bytes]) -> None:
        value = json.loads(names[name])
        change(value)
        names[name] = json.dumps(value).encode()

    return run


def node_target(target: str) -> Callable[[Any], None]:
    def run(value: Any) -> None:
        value["graph_module"]["graph"]["nodes"][-1]["target"] = target

    return run


def first_weight(key: str, found: Any) -> Callable[[Any], None]:
    def run(value: Any) -> None:
        row = next(iter(value["config"].values()))
        (row if key in row else row["tensor_meta"])[key] = found

    return run


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_json(MODEL, node_target("torch.ops.aten.from_file.default")), "no functional"),
        (with_json(MODEL, node_target("torch.ops.aten.add_.Tensor")), "no functional"),
        (with_json(MODEL, node_target("os.system")), "no functional"),
        (with_json(MODEL, node_target("torch.ops.aten.save.default")), "no functional"),
        (with_json(MODEL, node_target("torch.ops.prims.add.default")), "no functional"),
        (with_json(WEIGHTS, first_weight("use_pickle", found=True)), "pickled or missing"),
        (with_json(WEIGHTS, first_weight("path_name", "../../extra/qalora.json")), "missing"),
        (with_json(WEIGHTS, first_weight("sizes", [{"as_int": 1 << 38}])), "beyond|malformed"),
        (with_json(WEIGHTS, first_weight("strides", [{"as_int": -1}])), "malformed"),
        (with_json(WEIGHTS, first_weight("dtype", 99)), "malformed"),
        (with_json(MODEL, lambda value: value.pop("graph_module")), "no .pt2|not a .pt2"),
        (lambda names: names.pop("extra/qalora.json"), "not exported by this package"),
        (lambda names: names.update({MODEL: b"["}), "model.json"),
    ],
)
def test_hostile_files_are_refused(
    change: Callable[[dict[str, bytes]], None],
    words: str,
    exported: tuple[qc.Program, Path],
    tmp_path: Path,
) -> None:
    made = changed(exported[1], tmp_path, change)
    with pytest.raises(UserInputError, match=words):
        TorchSession(made)


def test_other_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"PK\x03\x04 and nothing")
    with pytest.raises(UserInputError, match="not a .pt2 file of this package"):
        TorchSession(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/models/model.json", "{}" * 100)
    with pytest.raises(UserInputError, match="is compressed"):
        TorchSession(path)
    with pytest.raises(UserInputError, match="missing|no file"):
        TorchSession(tmp_path / "none.pt2")


def test_entries_that_share_their_bytes_are_refused(
    exported: tuple[qc.Program, Path], tmp_path: Path
) -> None:
    made = tmp_path / "model.pt2"
    with zipfile.ZipFile(exported[1]) as archive, zipfile.ZipFile(made, "w") as copy:
        for name in archive.namelist():
            copy.writestr(name, archive.read(name))
        first = copy.infolist()[0]
        again = zipfile.ZipInfo(f"{first.filename}_again")  # an entry of the directory alone
        again.header_offset, again.file_size, again.compress_size = 0, 1 << 20, 1 << 20
        again.CRC = first.CRC
        copy.filelist.append(again)
    with pytest.raises(UserInputError, match="larger than the file"):
        TorchSession(made)


def test_a_proof_says_that_there_is_none(exported: tuple[qc.Program, Path]) -> None:
    program, path = exported
    with pytest.raises(UnsupportedError, match="has no form in a proof"):
        qc.prove_equivalence(program, path)


def test_the_values_of_the_session_are_tensors(exported: tuple[qc.Program, Path]) -> None:
    program, path = exported
    x = torch.randn(2, 4, 50)
    session = TorchSession(path)
    (found,) = session.outputs({"x": x.numpy()}).values()
    assert_close(found, program(x), relative=1e-5)
    assert session.width(next(iter(session.signature.outputs))) is None
