"""Patches between edge folders: exact, small, and refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import qalora_compile as qc
from qalora_compile.api.diff import (
    DATA_FILE,
    PATCH_FILE,
    ApplySpec,
    DiffSpec,
    PatchResult,
    apply_diff,
    diff_folders,
)
from qalora_compile.api.tuned_session import open_tuned
from qalora_compile.cli.main import main
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.runtime import open_session
from qalora_compile.sealed import read_sealed, write_sealed
from qalora_compile.untrusted.artifacts import MODEL_FILE
from tests.models import MLP, randomize_adapters

WIDTHS = (96, 200, 64)
GROUPS = sum(k // 32 * n for k, n in pairwise(WIDTHS))


def edges(folder: Path, *, external_data: bool = False) -> tuple[Path, Path]:
    """Edge folders of one base with two different adapters."""
    torch.manual_seed(0)
    x = torch.randn(2, WIDTHS[0])
    base = qc.insert_adapters(
        qc.quantize_groups(qc.capture_model(MLP(*WIDTHS).eval(), (x,)), qc.QuantSpec())
    )
    made = []
    for name in ("base", "tuned"):
        spec = qc.ExportSpec(external_data=external_data)
        tuned = qc.fold_adapters(randomize_adapters(base, size=0.1 if name == "base" else 0.2))
        (folder / name / "onnx").mkdir(parents=True)
        qc.export_model(tuned, folder / name / MODEL_FILE, spec)
        (folder / name / "qalora.json").write_text(json.dumps({"made": name}), "utf-8")
        (folder / name / "tokenizer.json").write_text("{}" * 500, "utf-8")
        (folder / name / "empty.txt").touch()
        made.append(folder / name)
    return made[0], made[1]


def diff(folder: Path, base: Path, tuned: Path) -> PatchResult:
    return diff_folders(DiffSpec(base=base, tuned=tuned, out=folder / "patch"))


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("external_data", [False, True])
def test_the_tuned_folder_comes_back_bit_for_bit(external_data: bool, tmp_path: Path) -> None:
    base, tuned = edges(tmp_path, external_data=external_data)
    made = diff(tmp_path, base, tuned)
    assert len(made.tensors) == 2
    assert all(name.endswith(".zero_point") for name in made.tensors)
    assert (tmp_path / "patch" / DATA_FILE).stat().st_size < 4 * GROUPS * 3 + 20_000
    again = tmp_path / "again"
    found = apply_diff(ApplySpec(base=base, patch=tmp_path / "patch", out=again))
    assert files(again) == files(tuned)
    assert (found.tensors, found.tuned) == (made.tensors, made.tuned)


def test_equal_folders_need_no_new_bytes(tmp_path: Path) -> None:
    base, _ = edges(tmp_path)
    made = diff(tmp_path, base, shutil.copytree(base, tmp_path / "same"))
    assert (made.tensors, (tmp_path / "patch" / DATA_FILE).stat().st_size) == ((), 0)
    apply_diff(ApplySpec(base=base, patch=tmp_path / "patch", out=tmp_path / "again"))
    assert files(tmp_path / "again") == files(base)


def test_another_base_is_refused(tmp_path: Path) -> None:
    base, tuned = edges(tmp_path)
    diff(tmp_path, base, tuned)
    with pytest.raises(UserInputError, match="not the file that the patch names"):
        apply_diff(ApplySpec(base=tuned, patch=tmp_path / "patch", out=tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def _data(patch: Path) -> None:
    path = patch / DATA_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")


def _unsealed(patch: Path) -> None:
    (patch / PATCH_FILE).write_text('{"format": "qalora-patch"}', "utf-8")


def _record(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def plant(patch: Path) -> None:
        record = read_sealed(patch / PATCH_FILE)
        change(record)
        write_sealed(patch / PATCH_FILE, record)

    return plant


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "new bytes": (_data, "not the file that the patch names"),
    "no seal": (_unsealed, "changed"),
    "another kind": (_record(lambda r: r.update(format="zip")), "another kind"),
    "a name outside": (
        _record(lambda r: r["files"].update({"../x": r["files"]["empty.txt"]})),
        "leads out of the folder",
    ),
    "a base outside": (_record(lambda r: r["base"].update({"/etc/hostname": "0"})), "leads out"),
    "a part outside": (
        _record(
            lambda r: r["files"]["empty.txt"].update(
                parts=[{"file": "../../x", "offset": 0, "length": 1}]
            )
        ),
        "leads out",
    ),
    "a negative length": (
        _record(
            lambda r: r["files"]["empty.txt"].update(
                parts=[{"file": None, "offset": 0, "length": -1}]
            )
        ),
        "negative size",
    ),
    "too many bytes": (
        _record(
            lambda r: r["files"]["empty.txt"].update(
                parts=[{"file": None, "offset": 0, "length": 1 << 40}]
            )
        ),
        "ends before",
    ),
    "other bytes": (
        _record(
            lambda r: r["files"]["empty.txt"].update(
                parts=[{"file": None, "offset": 0, "length": 1}]
            )
        ),
        "not the file",
    ),
    "a text for a number": (
        _record(
            lambda r: r["files"]["empty.txt"].update(
                parts=[{"file": None, "offset": "0", "length": 1}]
            )
        ),
        "malformed",
    ),
    "a tensor without a place": (_record(lambda r: r["tensors"].update(a=5)), "malformed"),
    "a tensor at a text": (_record(lambda r: r["tensors"].update(a=["0", 1])), "malformed"),
    "no files": (_record(lambda r: r.pop("files")), "malformed"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_patch_writes_nothing(kind: str, tmp_path: Path) -> None:
    base, tuned = edges(tmp_path)
    diff(tmp_path, base, tuned)
    plant, message = DAMAGE[kind]
    plant(tmp_path / "patch")
    with pytest.raises(UserInputError, match=message):
        apply_diff(ApplySpec(base=base, patch=tmp_path / "patch", out=tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def test_a_patch_runs_on_the_files_of_its_base(tmp_path: Path) -> None:
    base, tuned = edges(tmp_path, external_data=True)
    diff(tmp_path, base, tuned)
    x = torch.randn(2, WIDTHS[0]).numpy()
    for library in (False, None):
        sessions = (
            open_tuned(base, tmp_path / "patch", library=library),
            open_session(tuned, library=library),
            open_session(base, library=library),
        )
        found, wanted, other = (s.run(None, {s.get_inputs()[0].name: x})[0] for s in sessions)
        assert (found == wanted).all()
        assert abs(found - other).max() > 1e-2


def test_a_patch_of_one_file_does_not_run_without_apply(tmp_path: Path) -> None:
    base, tuned = edges(tmp_path)
    diff(tmp_path, base, tuned)
    with pytest.raises(UnsupportedError, match="--external-data"):
        open_tuned(base, tmp_path / "patch")


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(UserInputError, match="no exported ONNX model"):
        diff(tmp_path, tmp_path / "none", tmp_path / "none")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = edges(tmp_path)
    patch, again = str(tmp_path / "patch"), str(tmp_path / "again")
    assert main(["diff", str(base), str(tuned), "--out", patch]) == 0
    assert "tensors that differ" in capsys.readouterr().out
    assert main(["diff", str(base), str(tuned), "--out", patch]) == 2
    assert main(["diff", str(base), str(tuned), "--out", patch, "--overwrite"]) == 0
    assert main(["apply", str(base), patch, "--out", again]) == 0
    assert files(Path(again)) == files(tuned)
