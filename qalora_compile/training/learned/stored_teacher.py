"""The teacher's predictions in a file, so that a training that goes on does not compute them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qalora_compile.ir.safetensors_io import load_tensors, save_tensors
from qalora_compile.sealed import check_files, digests_of, read_sealed, write_sealed
from qalora_compile.training.learned.divergence import TeacherRows

_ROWS, _RECORD = "teacher.safetensors", "teacher.json"
_FORMAT = {"format": "qalora-teacher", "version": 1}


def write_teacher(folder: Path, parts: list[TeacherRows]) -> None:
    """Write predictions; the record comes last, so without it they are not complete.

    Raises:
        OutputError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Tensor] = {}
    for at, part in enumerate(parts):
        rows |= {f"{at}.{name}": value for name, value in vars(part).items()}
    save_tensors(rows, folder / _ROWS)
    record = _FORMAT | {"parts": len(parts), "files": digests_of(folder, [_ROWS])}
    write_sealed(folder / _RECORD, record)


def read_teacher(folder: Path) -> list[TeacherRows] | None:
    """The predictions in a folder; None if there are none.

    Raises:
        UserInputError: the files are damaged.
    """
    if not (folder / _RECORD).is_file():
        return None
    record = read_sealed(folder / _RECORD)
    check_files(folder, record.get("files"))
    tensors = load_tensors(folder / _ROWS)
    return [_part(tensors, at) for at in range(int(record["parts"]))]


def _part(tensors: Mapping[str, Tensor], at: int) -> TeacherRows:
    names = ("index", "log_probs", "rest")
    return TeacherRows(*(tensors[f"{at}.{name}"] for name in names))
