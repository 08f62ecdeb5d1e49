"""`diff_folders`, `apply_diff`: what a fine-tuning changed in an edge folder, and back bit for bit.

A fine-tuning leaves codes and scales as they are, so two edge folders of one base differ in
zero-points, heads and records. A PATCH holds what the tuned folder has and the base has not:
`patch.json` names, for every tuned file, the bytes of the base and the new bytes that it is made
of, and `new.bin` has the latter.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qalora_compile.errors import UserInputError
from qalora_compile.files import atomic_folder, reserve
from qalora_compile.files.copying import copy_range
from qalora_compile.progress import track
from qalora_compile.sealed import digest_of_file, read_sealed, write_sealed
from qalora_compile.untrusted import check_fields, check_folder, member, quoted
from qalora_compile.untrusted.artifacts import encoder_decoder_files, model_file
from qalora_compile.untrusted.onnx_file import check_onnx
from qalora_compile.untrusted.onnx_tensors import external_file
from qalora_compile.untrusted.paths import check_name

PATCH_FILE, DATA_FILE = "patch.json", "new.bin"
FORMAT, VERSION = "qalora-patch", 1
_LEAST_BYTES = 256
"""Equal tensors below this size are stored again: naming their place takes as much."""
Place = tuple[str, int, int]
"""File in a folder, offset and length."""


@dataclass(frozen=True)
class Part:
    """Successive bytes of a tuned file.

    Attributes:
        file: The file of the base that has them; None: the patch's own data.
        offset, length: Where they are in that file, and how many.
    """

    file: str | None
    offset: int
    length: int


@dataclass(frozen=True)
class TunedFile:
    """A file of the tuned folder.

    Attributes:
        sha256: Its digest.
        parts: What it is made of.
    """

    sha256: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class DiffSpec:
    """Two edge folders, and the patch to write.

    Attributes:
        base, tuned: The folders.
        out: The folder of the patch.
        overwrite: Replace an existing patch.
    """

    base: Path
    tuned: Path
    out: Path
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class ApplySpec:
    """A patch, and the folder that it was made from.

    Attributes:
        base: The edge folder of the base.
        patch: The folder of the patch.
        out: The tuned edge folder to write.
        overwrite: Replace an existing folder.
    """

    base: Path
    patch: Path
    out: Path
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class PatchResult:
    """What was compared or written.

    Attributes:
        tuned, patch: Bytes of the tuned folder and of the patch.
        tensors: Tensors that differ from the base's, as `file:name`.
    """

    tuned: int
    patch: int
    tensors: tuple[str, ...]


def diff_folders(spec: DiffSpec) -> PatchResult:
    """Write what the tuned folder has and the base has not.

    Raises:
        UserInputError: a folder holds no exported model or leads out of itself, or the output
            exists.
        OutputError: the patch cannot be written.
    """
    stored, wanted = _tensors(spec.base), _tensors(spec.tuned)
    with (
        reserve(spec.out, overwrite=spec.overwrite, inputs=[spec.base, spec.tuned]),
        atomic_folder(spec.out, overwrite=spec.overwrite) as folder,
    ):
        with (folder / DATA_FILE).open("wb") as data, _Comparison(spec, stored, data) as comparison:
            files = {
                name: TunedFile(
                    digest_of_file(spec.tuned / name),
                    tuple(comparison.parts(name, _of_file(wanted, name))),
                )
                for name in track(_files(spec.tuned), "compare")
            }
        used = sorted({p.file for f in files.values() for p in f.parts if p.file is not None})
        record = {
            "format": FORMAT,
            "version": VERSION,
            "base": {name: digest_of_file(spec.base / name) for name in used},
            "files": {name: asdict(file) for name, file in files.items()},
            "data": digest_of_file(folder / DATA_FILE),
            "tensors": comparison.changed,
        }
        write_sealed(folder / PATCH_FILE, record)
        size = _size(folder)
    return PatchResult(tuned=_size(spec.tuned), patch=size, tensors=tuple(comparison.changed))


def apply_diff(spec: ApplySpec) -> PatchResult:
    """Write the tuned folder from the base and a patch.

    Raises:
        UserInputError: the patch is damaged or of another kind, the base is another one, a name
            leads out of the folder, or the output exists.
        OutputError: the folder cannot be written.
    """
    check_folder(spec.patch)
    record, files = read_patch(spec.patch / PATCH_FILE)
    check_origin(spec.base, spec.patch, record)
    with (
        reserve(spec.out, overwrite=spec.overwrite, inputs=[spec.base, spec.patch]),
        atomic_folder(spec.out, overwrite=spec.overwrite) as folder,
    ):
        for name, file in track(list(files.items()), "write"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("wb") as made:
                for part in file.parts:
                    _copy(spec, part, made)
            _check_digest(folder / name, file.sha256, "the patch is damaged: make it again")
        size = _size(folder)
    return PatchResult(tuned=size, patch=_size(spec.patch), tensors=tuple(record["tensors"]))


class _Comparison:
    """Compares the files of two folders, and collects what is new.

    Args:
        spec: The folders.
        stored: The base's tensors.
        data: The file of new bytes.

    Attributes:
        changed: Tensors that differ, with offset and length in the file of new bytes.
    """

    def __init__(self, spec: DiffSpec, stored: dict[str, Place], data: BinaryIO) -> None:
        self._spec, self._stored, self._data = spec, stored, data
        self._open, self._stack = dict[Path, memoryview](), ExitStack()
        self.changed: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> _Comparison:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def parts(self, name: str, tensors: dict[str, Place]) -> Iterator[Part]:
        """What a file of the tuned folder is made of."""
        own = self._bytes(self._spec.tuned / name)
        same = self._spec.base / name
        if same.is_file() and own == self._bytes(same):
            if len(own):
                yield Part(name, 0, len(own))
            return
        done = 0
        for tensor, (_, offset, length) in sorted(tensors.items(), key=lambda item: item[1][1]):
            found = self._equal(tensor, own[offset : offset + length])
            if found is None:
                self.changed[tensor] = (self._data.tell() + offset - done, length)
            elif length >= _LEAST_BYTES:
                yield from self._new(own[done:offset])
                yield Part(*found)
                done = offset + length
        yield from self._new(own[done:])

    def _equal(self, tensor: str, own: memoryview) -> Place | None:
        """Where the base has the same tensor."""
        file, offset, length = self._stored.get(tensor, ("", 0, 0))
        same = file and self._bytes(self._spec.base / file)[offset : offset + length] == own
        return (file, offset, length) if same else None

    def _new(self, values: memoryview) -> Iterator[Part]:
        if len(values):
            offset = self._data.tell()
            self._data.write(values)
            yield Part(None, offset, len(values))

    def _bytes(self, path: Path) -> memoryview:
        if path not in self._open:
            with path.open("rb") as file:
                empty = path.stat().st_size == 0
                view = memoryview(
                    b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                )
            self._open[path] = self._stack.enter_context(view)
        return self._open[path]


def _tensors(folder: Path) -> dict[str, Place]:
    """Where the tensors of an edge folder's models are, by file and name.

    Raises:
        UserInputError: it holds no model, or a file is refused by `check_onnx`.
    """
    check_folder(folder)
    halves = encoder_decoder_files(folder)
    models = (model_file(folder),) if halves is None else halves
    if not models[0].is_file():
        raise UserInputError(
            "the folder holds no exported ONNX model",
            where=str(folder),
            hint="give folders that export or quantize wrote",
        )
    found: dict[str, Place] = {}
    for model in models:
        for name, row in check_onnx(model).tensors.items():
            file, place = model, row.inside
            if row.external is not None:
                file, *rest = external_file(row, model)
                place = (rest[0], rest[1])
            if place is not None:
                found[f"{model.name}:{name}"] = (file.relative_to(folder).as_posix(), *place)
    return found


def _of_file(tensors: dict[str, Place], name: str) -> dict[str, Place]:
    return {tensor: place for tensor, place in tensors.items() if place[0] == name}


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder) for path in paths)
    return sorted(n.as_posix() for n in names if not any(p.startswith(".") for p in n.parts))


def _size(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in _files(folder))


def read_patch(path: Path) -> tuple[dict[str, Any], dict[str, TunedFile]]:
    """The record of a patch.

    Raises:
        UserInputError: it is damaged, of another kind or version, or names files outside.
    """
    record = read_sealed(path)
    if (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        raise UserInputError(
            f"{path.name} is of another kind or version: {quoted(record.get('format'))}",
            where=str(path),
            hint="give a folder that qalora-compile diff wrote",
        )
    try:
        files = {}
        for name, row in record["files"].items():
            check_name(name, path.parent)
            parts = tuple(Part(**check_fields(Part, part, "a part")) for part in row["parts"])
            if any(part.offset < 0 or part.length < 0 for part in parts):
                raise ValueError("a part has a negative size")
            files[name] = TunedFile(str(row["sha256"]), parts)
        if not all(isinstance(record[k], t) for k, t in _FIELDS.items()):
            raise ValueError("a field is of another type")
        for key, (offset, length) in record["tensors"].items():
            check_fields(Part, {"file": None, "offset": offset, "length": length}, quoted(key))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserInputError(f"{path.name} is malformed: {error}", where=str(path)) from error
    return record, files


def check_origin(base: Path, patch: Path, record: Mapping[str, Any]) -> None:
    """Compare the files of a patch and its base with the digests in the record.

    Raises:
        UserInputError: one differs.
    """
    _check_digest(member(patch, DATA_FILE), record["data"], "get the patch again")
    for name, digest in record["base"].items():
        _check_digest(member(base, name), digest, "give the folder that diff had as BASE")


_FIELDS = {"base": dict, "data": str, "tensors": dict}


def _check_digest(path: Path, digest: object, hint: str) -> None:
    if digest_of_file(path) != digest:
        raise UserInputError(
            f"{path.name} is not the file that the patch names: its SHA-256 differs",
            where=str(path),
            hint=hint,
        )


def _copy(spec: ApplySpec, part: Part, made: BinaryIO) -> None:
    """Copy the bytes of a part.

    Raises:
        UserInputError: its file is shorter.
    """
    path = spec.patch / DATA_FILE if part.file is None else member(spec.base, part.file)
    with path.open("rb") as source:
        if copy_range(source, made, part.offset, part.length) != part.length:
            raise UserInputError(f"{path.name} ends before a part of it", where=str(path))
