"""Read `.pt2` files of `torch.export.save` without torch's own reader, which runs pickles.

The file is a zip archive of raw tensors and JSON. This reader takes the JSON and the places of the
tensors. It refuses archives with compressed or pickled parts, as this package writes neither.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.untrusted import check_regular, parse_json

METADATA_FILE = "qalora.json"
"""Name under which `torch.export.save` stores the metadata of this package, below `extra/`."""
_MODEL, _WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
_CONSTANTS = "data/constants/model_constants_config.json"
_MAX_JSON, _MAX_ENTRIES = 1 << 28, 1 << 17
_HINT = "export the model again: the file is damaged, or not of this package"


@dataclass(frozen=True)
class Pt2Tensor:
    """A stored tensor, as the archive describes it: the entry with its bytes, and torch's meta."""

    entry: str
    size: int
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Pt2File:
    """The content of a file.

    Attributes:
        path: The file.
        metadata: The text that this package stored, see `OnnxMetadata`.
        graph: The graph in torch's schema: inputs, nodes and outputs.
        specs: Roles of inputs and outputs.
        tensors: Stored tensors by name.
    """

    path: Path
    metadata: str
    graph: Mapping[str, Any]
    specs: Mapping[str, Any]
    tensors: Mapping[str, Pt2Tensor]

    def bytes_of(self, tensor: Pt2Tensor) -> bytes:
        """The bytes of a tensor.

        Raises:
            UserInputError: they are damaged.
        """
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(tensor.entry)
        except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
            raise UserInputError(
                f"{tensor.entry} of {self.path.name} is damaged: {error}",
                where=str(self.path),
                hint=_HINT,
            ) from error


def compiled_file(model: Path) -> Path:
    """Where AOTInductor's package of an exported model is."""
    return model.with_name(f"{model.stem}_aot{model.suffix}")


def read_pt2(path: Path) -> Pt2File:
    """The content of a file that this package exported; no tensor is read.

    Raises:
        UserInputError: it is missing, is no such archive, has pickled or compressed parts, or was
            not exported by this package.
    """
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(path, archive)
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserInputError(
            f"{path.name} is not a .pt2 file of this package: {type(error).__name__} {error}",
            where=str(path),
            hint=_HINT,
        ) from error


def _read(path: Path, archive: zipfile.ZipFile) -> Pt2File:
    infos = archive.infolist()
    if not infos or len(infos) > _MAX_ENTRIES:
        raise UserInputError(f"{path.name} has {len(infos)} entries", where=str(path), hint=_HINT)
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise UserInputError(f"{path.name} is compressed", where=str(path), hint=_HINT)
    if sum(info.file_size for info in infos) > path.stat().st_size:
        raise UserInputError(
            f"entries of {path.name} are larger than the file", where=str(path), hint=_HINT
        )
    root = infos[0].filename.partition("/")[0]
    names = {info.filename: info for info in infos}

    def text(name: str) -> str:
        info = names.get(f"{root}/{name}")
        if info is None or info.file_size > _MAX_JSON:
            raise UserInputError(
                f"{path.name} has no readable {name}: it was not exported by this package",
                where=str(path),
                hint=_HINT,
            )
        return archive.read(info).decode()

    def parsed(name: str) -> Any:
        return parse_json(text(name), path, what=f"{name} of {path.name}")

    metadata = text(f"extra/{METADATA_FILE}")
    module = parsed(_MODEL)["graph_module"]
    tensors = {}
    for file in (_WEIGHTS, _CONSTANTS):
        folder = file.rpartition("/")[0]
        for name, row in parsed(file)["config"].items():
            entry = f"{root}/{folder}/{row['path_name']}"
            if row["use_pickle"] is not False or entry not in names:
                raise UserInputError(
                    f"the tensor {name} of {path.name} is pickled or missing",
                    where=str(path),
                    hint="pickles run code, so that none is read",
                )
            tensors[name] = Pt2Tensor(entry, names[entry].file_size, row["tensor_meta"])
    return Pt2File(path, metadata, module["graph"], module["signature"], tensors)
