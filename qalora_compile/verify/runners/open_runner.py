"""One runner interface for what can be verified: programs and exported models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qalora_compile.errors import QaloraError, UserInputError
from qalora_compile.ir.interpret import WatchingInterpreter
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.program import Program
from qalora_compile.untrusted import quoted
from qalora_compile.untrusted.artifacts import (
    ORT_SUFFIX,
    ArtifactKind,
    find_artifact,
    unknown_artifact,
)
from qalora_compile.verify.runners.coreml_session import CoremlSession
from qalora_compile.verify.runners.encoder_decoder import EncoderDecoderRunner
from qalora_compile.verify.runners.kv_cache import (
    MASK,
    CachedSteps,
    Session,
    counts_padding,
    without_cache,
)
from qalora_compile.verify.runners.onnx_session import OnnxSession
from qalora_compile.verify.runners.openvino_session import OpenvinoSession
from qalora_compile.verify.runners.run import Run, Runner
from qalora_compile.verify.runners.torch_session import TorchSession

_EXPORTED = (
    ArtifactKind.ONNX,
    ArtifactKind.OPENVINO,
    ArtifactKind.TORCH,
    ArtifactKind.COREML,
)


class ProgramRunner:
    """Runs a program in evaluation mode and records the output of every site."""

    def __init__(self, program: Program, label: str | None = None) -> None:
        self.program = program
        self.label = label or f"program ({program.stage})"
        self.signature = program.signature

    def run(self, leaves: Sequence[Any]) -> Run:
        """Run node by node, without gradients; the program's mode is restored."""
        sites = {n.name: site for n in self.program.graph.nodes if (site := site_of(n)) is not None}
        end = self.program.graph.output_node().name
        recorder = WatchingInterpreter(self.program.module, [*sites, end])
        with self.program.evaluating():
            try:
                recorder.run_leaves(leaves)
            except QaloraError:
                raise
            except Exception as error:  # the parts of a stored program may not fit together
                raise UserInputError(
                    f"the program fails when it runs: {type(error).__name__}: "
                    f"{quoted(str(error), 200)}",
                    where=self.label,
                ) from error
        values = {n: v for n, v in recorder.values.items() if isinstance(v, Tensor)}
        flat = recorder.values[end]
        flat = flat if isinstance(flat, (list, tuple)) else [flat]
        outputs = zip(self.signature.outputs, flat, strict=True)
        return Run(
            {n: v for n, v in outputs if isinstance(v, Tensor)},
            {site: values[name] for name, site in sites.items() if name in values},
        )


class ExportedRunner:
    """Runs an exported model, see `OnnxSession` and the other sessions.

    Language models with a key-value cache run on complete sequences, see `verify.runners.kv_cache`.

    Args:
        path: The `.onnx`, `.ort`, `.xml` or `.pt2` file, or the `.mlpackage` folder.
        library: For ONNX: a library of custom operators for the sessions.

    Raises:
        UserInputError: see the sessions; or it is one half of an encoder-decoder model.
    """

    def __init__(self, path: Path, library: Path | None = None) -> None:
        is_onnx = path.suffix in (".onnx", ORT_SUFFIX)
        self.label = f"{path} with {library.name}" if library and is_onnx else str(path)
        others: dict[str, Callable[[Path], Session]]
        others = {".pt2": TorchSession, ".mlpackage": CoremlSession}
        other = others.get(path.suffix, OpenvinoSession)
        self._graph: Session = OnnxSession(path, library) if is_onnx else other(path)
        self.signature = self._graph.signature
        if self.signature.cross_cache:
            raise UserInputError(
                f"{path.name} is the decoder of an encoder-decoder model",
                where=str(path),
                hint="give the folder, which holds its encoder too",
            )
        self._cached: CachedSteps | None = None
        if self.signature.cache:
            self._cached = CachedSteps(self._graph)

    @property
    def in_steps(self) -> bool:
        """Whether sequences run in steps with a cache."""
        return self._cached is not None

    def meet(self, other: Runner) -> None:
        """Adopt the inputs of `other` if this model has the same and a key-value cache."""
        if self._cached is not None:
            names = [leaf.name for leaf in other.signature.inputs]
            self.signature = without_cache(self._cached.signature, names)
            if isinstance(other, ProgramRunner) and MASK in names:
                self._cached.counts_padding = counts_padding(other.program, other)

    def run(self, leaves: Sequence[Any]) -> Run:
        """Run both sessions."""
        feed = {
            leaf.name: value.detach().numpy()
            for leaf, value in zip(self.signature.inputs, leaves, strict=True)
            if leaf.dtype is not None
        }
        if self._cached is None:
            return Run(self._graph.outputs(feed), self._graph.sites(feed))
        outputs, full = {"logits": self._cached.logits(feed)}, self._cached.full_feed(feed)
        sites = self._graph.sites(full)
        if self._cached.last_only:  # a head on codes is compared as the logits
            length = full["input_ids"].shape[1]
            sites = {n: v for n, v in sites.items() if v.shape[1:2] in ((), (length,))}
        return Run(outputs, sites)


def open_runner(thing: Program | str | Path, library: Path | None = None) -> Runner:
    """A runner for a program, or for the path of an exported model or of a saved program.

    Args:
        thing: What to run.
        library: A library of custom operators for an exported model.

    Raises:
        UserInputError: the path is missing or of an unknown kind.
    """
    if isinstance(thing, Program):
        return ProgramRunner(thing)
    found = find_artifact(thing)
    if found is not None and found.kind is ArtifactKind.ENCODER_DECODER:
        return EncoderDecoderRunner(found.path, library)
    if found is not None and found.kind in _EXPORTED:
        return ExportedRunner(found.path, library)
    if found is not None and found.kind is ArtifactKind.PROGRAM:
        return ProgramRunner(Program.load(found.path), str(found.path))
    raise unknown_artifact(thing)
