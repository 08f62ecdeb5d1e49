"""`Registry`: extensions by name, built in, registered, or from installed packages.

Nothing is imported before it is looked up, and installed packages are only searched when a name is
not built in, or when names are listed.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import ClassVar

from qalora_compile.errors import ExtensionError, UserInputError

_NAME = re.compile(r"[a-z][a-z0-9_-]*")


class Registry:
    """The extensions of one kind.

    Args:
        kind: The word for an extension in messages.
        group: The entry-point group by which installed packages bring more.
        builtin: Name → `module:attribute` of the extensions in this package.
    """

    _all: ClassVar[list[Registry]] = []

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        self.kind, self.group, self.builtin = kind, group, tuple(builtin)
        self._homes = builtin
        self._added: dict[str, object] = {}
        self._points: dict[str, metadata.EntryPoint] | None = None
        Registry._all.append(self)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        return name in self.builtin or name in self._added or name in self._installed()

    def names(self) -> tuple[str, ...]:
        """Built-in names, then registered ones, then those of installed packages.

        Raises:
            ExtensionError: two installed packages bring the same name, or one brings a built-in's.
        """
        return (*self.builtin, *self._added, *self._installed())

    def load(self, name: str) -> object:
        """The extension with a name.

        Raises:
            UserInputError: the name is unknown.
            ExtensionError: the package that brings it cannot be imported.
        """
        if name in self.builtin:
            module, _, attribute = self._homes[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        if name in self._added:
            return self._added[name]
        if name not in self._installed():
            raise self._unknown(name)
        point = self._installed()[name]
        try:
            return point.load()
        except Exception as error:  # raised by the package's own code
            raise ExtensionError(
                f"the {self.kind} {name!r} of {_distribution(point)} cannot be imported: "
                f"{type(error).__name__}: {error}",
                where=f"{point.value}, entry point of {self.group}",
                hint=f"reinstall, upgrade or remove {_distribution(point)}",
            ) from error

    def add(self, name: str, extension: object) -> None:
        """Register an extension; registering the same one again does nothing.

        Raises:
            ExtensionError: the name is taken or not valid.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ExtensionError(
                f"{name!r} is not a name for a {self.kind}",
                hint="use small letters, digits, dashes and underscores, a letter first",
            )
        if self._added.get(name) is extension:
            return
        if name in self:
            raise ExtensionError(
                f"there is a {self.kind} {name!r} already",
                where=f"it is of {self.origin(name)}",
                hint="choose another name",
            )
        self._added[name] = extension

    def origin(self, name: str) -> str:
        """The provider of the extension with a name."""
        if name in self.builtin:
            return "qalora-compile"
        if name in self._added:
            found = self._added[name]
            return str(getattr(found, "__module__", type(found).__module__))
        installed = self._installed()
        return _distribution(installed[name]) if name in installed else "none that is registered"

    def unfit(self, name: str, wanted: str) -> ExtensionError:
        """The error for an extension of the wrong type."""
        return ExtensionError(
            f"the {self.kind} {name!r} is not {wanted}",
            where=f"it is of {self.origin(name)}",
            hint="docs/reference/extending.md says what is wanted",
        )

    def _unknown(self, name: str) -> UserInputError:
        near = difflib.get_close_matches(name, self.names(), n=1)
        return UserInputError(
            f"there is no {self.kind} {name!r}",
            hint=(f"did you mean {near[0]}? " if near else "")
            + f"known: {', '.join(self.names())}; one of another package is known once that "
            f"package is installed (entry points of {self.group}) or has called "
            f"extend.register_{self.kind}",
        )

    def _installed(self) -> Mapping[str, metadata.EntryPoint]:
        if self._points is None:
            points: dict[str, metadata.EntryPoint] = {}
            for point in metadata.entry_points(group=self.group):
                known = point.name in self.builtin
                if known or point.name in points:
                    other = "qalora-compile" if known else _distribution(points[point.name])
                    raise ExtensionError(
                        f"{_distribution(point)} and {other} both have a {self.kind} "
                        f"{point.name!r}",
                        where=f"entry points of {self.group}",
                        hint=f"remove {_distribution(point)}"
                        + ("" if known else ", or the other one"),
                    )
                points[point.name] = point
            self._points = points
        return self._points


def _distribution(point: metadata.EntryPoint) -> str:
    return "an unnamed package" if point.dist is None else f"{point.dist.name} {point.dist.version}"


@contextmanager
def scoped() -> Iterator[None]:
    """Undo registrations after the block, in which installed packages are searched again.

    For tests. Blocks nest; earlier registrations are visible inside.
    """
    before = [(registry, dict(registry._added), registry._points) for registry in Registry._all]
    for registry, _, _ in before:
        registry._points = None
    try:
        yield
    finally:
        for registry, added, points in before:
            registry._added, registry._points = added, points


_QUANTIZERS, _CHECKPOINTS = "qalora_compile.quantizers", "qalora_compile.exporters.checkpoints"
QUANTIZERS = Registry(
    "quantizer",
    "qalora_compile.quantizers",
    {
        "minmax": f"{_QUANTIZERS}.registry:MINMAX",
        "mse": f"{_QUANTIZERS}.registry:MSE",
        "hqq": f"{_QUANTIZERS}.registry:HQQ",
        "gptq": f"{_QUANTIZERS}.registry:GPTQ",
        "learned": "qalora_compile.training.learned.method:LEARNED",
    },
)
"""The values of `QuantSpec.method`, by falling error: usually of a layer's output; provably, up
to `hqq`, in the squared error of the weights, and for `hqq` on calibration data in the output too.
Specifications need the names, so the table is in the core."""
ONNX_TARGETS = {
    "ort": "qalora_compile.exporters.onnx.targets:ORT",
    "ort-stock": "qalora_compile.exporters.onnx.targets:ORT_STOCK",
    "onnx": "qalora_compile.exporters.onnx.targets:ONNX",
}
GRAPH_TARGETS = {
    **ONNX_TARGETS,
    "openvino": "qalora_compile.exporters.openvino.targets:OPENVINO",
    "torch": "qalora_compile.exporters.pt2.targets:TORCH",
    "coreml": "qalora_compile.exporters.coreml.targets:COREML",
}
"""The targets for which passes lower the program."""
CHECKPOINT_TARGETS = {
    "gguf": f"{_CHECKPOINTS}.registry:GGUF",
    "mlx": f"{_CHECKPOINTS}.registry:MLX",
    "float": f"{_CHECKPOINTS}.registry:FLOAT",
    "hqq": f"{_CHECKPOINTS}.registry:HQQ",
    "safetensors": f"{_CHECKPOINTS}.registry:SAFETENSORS",
    "gptq": f"{_CHECKPOINTS}.registry:GPTQ",
    "compressed-tensors": f"{_CHECKPOINTS}.registry:COMPRESSED_TENSORS",
}
TARGETS = Registry("target", "qalora_compile.targets", {**GRAPH_TARGETS, **CHECKPOINT_TARGETS})
"""The values of `ExportSpec.target`."""
