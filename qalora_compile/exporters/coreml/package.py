"""The files of an `.mlpackage`, which are the same each time they are written."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from qalora_compile.errors import UnsupportedError
from qalora_compile.files import write_json
from qalora_compile.files.marks import PACKAGE_MANIFEST, PRODUCER
from qalora_compile.ir.coreml_package import MODEL_PART, WEIGHTS_PART, main_block
from qalora_compile.ir.meta import ONNX_METADATA_KEY

_AUTHOR, _VERSION = "com.apple.CoreML", "1.0.0"
_DATA = Path("Data")
_DATE = "com.github.apple.coremltools.conversion_date"


def describe(spec: Any, metadata: str) -> None:
    """Put this package's metadata into a specification, and take the date out."""
    entries = spec.description.metadata
    entries.userDefined.pop(_DATE, None)
    entries.userDefined[ONNX_METADATA_KEY] = metadata


def number_values(spec: Any, kept: Collection[str]) -> dict[str, str]:
    """Name values by their operator and place, as torch's names depend on earlier traces.

    Args:
        spec: The specification, which is changed.
        kept: Names that stay, in addition to those of inputs and outputs.

    Returns:
        Old name → new name of what was renamed.
    """
    main = main_block(spec)
    features = (*spec.description.input, *spec.description.output)
    stay = {*kept, *main.outputs, *(one.name for one in features)}
    names: dict[str, str] = {}
    for kind, value in ((op.type, value) for op in _all_operators(main) for value in op.outputs):
        if value.name not in stay:
            name = f"{kind}_{len(names)}"
            while name in stay:
                name += "_"
            names[value.name] = name
    for op in _all_operators(main):
        bound = (one for given in op.inputs.values() for one in given.arguments)
        for value in (*op.outputs, *(one for one in bound if one.WhichOneof("binding") == "name")):
            value.name = names.get(value.name, value.name)
        if "name" in op.attributes:
            own = op.attributes["name"].immediateValue.tensor.strings.values
            own[:] = [names.get(one, one) for one in own]
        for inner in op.blocks:
            inner.outputs[:] = [names.get(one, one) for one in inner.outputs]
    return names


def _all_operators(block: Any) -> Iterator[Any]:
    """The operators of a block, and of those inside it."""
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from _all_operators(inner)


def write_package(made: Path, spec: Any, folder: Path) -> None:
    """Write a package from what coremltools wrote.

    Args:
        made: The package of coremltools, whose weights are moved.
        spec: The specification of the model.
        folder: The empty folder to fill.

    Raises:
        UnsupportedError: the specification is larger than protobuf can write.
    """
    model, weights = folder / _DATA / MODEL_PART, folder / _DATA / WEIGHTS_PART
    model.parent.mkdir(parents=True)
    try:
        model.write_bytes(spec.SerializeToString(deterministic=True))
    except ValueError as error:
        raise UnsupportedError(
            f"the graph has no form in target coreml: {error}", hint="target ort may hold it"
        ) from error
    parts = {MODEL_PART: "CoreML Model Specification"}
    if (made / _DATA / WEIGHTS_PART).is_dir():
        shutil.move(made / _DATA / WEIGHTS_PART, weights)
        parts[WEIGHTS_PART] = "CoreML Model Weights"
    entries = {
        _identifier(part): {
            "author": _AUTHOR,
            "description": f"{text}, written by {PRODUCER}",
            "name": Path(part).name,
            "path": part,
        }
        for part, text in parts.items()
    }
    manifest = {
        "fileFormatVersion": _VERSION,
        "itemInfoEntries": entries,
        "rootModelIdentifier": _identifier(MODEL_PART),
    }
    write_json(folder / PACKAGE_MANIFEST, manifest)


def _identifier(part: str) -> str:
    """The identifier of a part, which has to be unique inside a package only."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PRODUCER}/{part}"))
