"""The two kinds of thing that can be verified, run alike: programs and exported ONNX models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from qalora_compile.errors import UserInputError
from qalora_compile.ir.meta import ONNX_METADATA_KEY, QDQ_ACCURACY_KEY, site_of
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Signature
from qalora_compile.optional import require
from qalora_compile.verify.cached import CachedSteps, without_cache


@dataclass
class Run:
    """Values of one run: the flat outputs, and the outputs of sites by name, in graph order."""

    outputs: dict[str, Tensor]
    sites: dict[str, Tensor] = field(default_factory=dict)


class Runner(Protocol):
    """Something that computes outputs from flat inputs."""

    label: str
    signature: Signature

    def run(self, leaves: Sequence[Any]) -> Run:
        """Run on checked flat inputs, in signature order."""


class ProgramRunner:
    """Runs a program in evaluation mode and records the output of every site."""

    def __init__(self, program: Program, label: str | None = None) -> None:
        self.program = program
        self.label = label or f"program ({program.stage})"
        self.signature = program.signature

    def run(self, leaves: Sequence[Any]) -> Run:
        """Run node by node, without gradients; the program's mode is restored."""
        recorder = _Recorder(self.program.module)
        with self.program.evaluating():
            recorder.run(*leaves)
        outputs = zip(self.signature.outputs, recorder.flat_outputs, strict=True)
        return Run({n: v for n, v in outputs if isinstance(v, Tensor)}, recorder.sites)


class _Recorder(fx.Interpreter):
    """Keeps the value of every node that a site's mark names, and the flat outputs."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.sites: dict[str, Tensor] = {}
        self.flat_outputs: list[Any] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        site = site_of(n)
        if site is not None and isinstance(value, Tensor):
            self.sites[site] = value
        if n.op == "output":
            self.flat_outputs = list(value) if isinstance(value, (list, tuple)) else [value]
        return value


class OnnxRunner:
    """Runs an exported model in ONNX Runtime on the CPU, exactly as a user's session would.

    Language models with a key-value cache run on whole sequences, see `verify.cached`. The outputs
    come from the file as it is; site values come from a second session in which they
    are additional outputs. Standard models compute in float32 (`QDQ_ACCURACY_KEY`).

    Args:
        path: The `.onnx` file.
        library: A library of custom operators that the sessions get.
    """

    def __init__(self, path: Path, library: Path | None = None) -> None:
        self.label = f"{path} with {library.name}" if library else str(path)
        self._path, self._library = path, library
        self._runtime = require("onnxruntime", extra="onnx", purpose="run an ONNX model")
        try:
            self._session = self._runtime.InferenceSession(
                str(path), self._options(), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises bare exception types of its own
            raise UserInputError(
                f"ONNX Runtime cannot load {path.name}: {str(error).splitlines()[0]}",
                where=str(path),
            ) from error
        text = self._session.get_modelmeta().custom_metadata_map.get(ONNX_METADATA_KEY)
        if text is None:
            raise UserInputError(
                f"{path.name} was not exported by this package: it has no signature to compare by",
                where=str(path),
            )
        metadata: Mapping[str, Any] = json.loads(text)
        self.signature = Signature.from_json(metadata["signature"])
        self._cached: CachedSteps | None = None
        if self.signature.cache:
            self._cached = CachedSteps(self._session, self.signature)
        self._site_values: dict[str, str] = dict(metadata["site_values"])
        self._site_session: Any = None

    def meet(self, other: Runner) -> None:
        """Take the inputs that `other` takes, if this model has a key-value cache beside them."""
        if self._cached is not None:
            names = [leaf.name for leaf in other.signature.inputs]
            self.signature = without_cache(self._cached.signature, names)

    def run(self, leaves: Sequence[Any]) -> Run:
        """Run both sessions."""
        feed = {
            leaf.name: value.detach().numpy()
            for leaf, value in zip(self.signature.inputs, leaves, strict=True)
            if leaf.dtype is not None
        }
        if self._cached is not None:
            outputs = {"logits": self._cached.logits(feed)}
            feed = self._cached.whole(feed)
        else:
            taken = {i.name for i in self._session.get_inputs()}
            feed = {name: value for name, value in feed.items() if name in taken}
            names = [o.name for o in self._session.get_outputs()]
            outputs = dict(zip(names, map(_tensor, self._session.run(None, feed)), strict=True))
        if self._site_session is None:
            self._site_session = self._open_site_session()
        inner = list(self._site_values.values())
        values = dict(zip(inner, map(_tensor, self._site_session.run(inner, feed)), strict=True))
        return Run(outputs, {site: values[name] for site, name in self._site_values.items()})

    def _options(self) -> Any:
        options = self._runtime.SessionOptions()
        options.add_session_config_entry(QDQ_ACCURACY_KEY, "0")
        if self._library is not None:
            options.register_custom_ops_library(str(self._library))
        return options

    def _open_site_session(self) -> Any:
        onnx = require("onnx", extra="onnx", purpose="look inside an ONNX model")
        model = onnx.load(str(self._path), load_external_data=False)
        present = {output.name for output in model.graph.output}
        for name in dict.fromkeys(self._site_values.values()):
            if name not in present:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
        options = self._options()
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._path.parent)
        )
        return self._runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def _tensor(value: Any) -> Tensor:
    return torch.from_numpy(value)


def open_runner(thing: Program | str | Path, library: Path | None = None) -> Runner:
    """A runner for a program, or for the path of an exported model or of a saved program.

    Args:
        thing: What to run.
        library: A library of custom operators for an exported model.

    Raises:
        UserInputError: the path is missing or is of no known kind.
    """
    if isinstance(thing, Program):
        return ProgramRunner(thing)
    path = Path(thing)
    if path.is_dir():
        if (path / "model.onnx").exists():
            return OnnxRunner(path / "model.onnx", library)
        return ProgramRunner(Program.load(path), str(path))
    if path.suffix == ".onnx" and path.exists():
        return OnnxRunner(path, library)
    raise UserInputError(
        f"{path} is neither a program folder nor an ONNX model",
        where=str(path),
        hint="give a folder written by Program.save, finetune, fold or export, or a .onnx file",
    )
