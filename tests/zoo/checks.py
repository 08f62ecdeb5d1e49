"""What has to hold for every model of the zoo, one function a check, on one shared study.

A check returns the largest error that it saw, relative to the output's scale, or None where it
measures none.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.cli.main import main
from qalora_compile.ir.affine import expand_groups
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.packing.bitstream import unpack_codes
from qalora_compile.ir.pattern import match_linear
from qalora_compile.passes.framework.base import validating
from qalora_compile.runtime import library_path
from qalora_compile.verify.numeric.decoding_calls import sequence_calls
from tests.models import assert_close, randomize_adapters, scale_of, worst
from tests.zoo import eager
from tests.zoo.entries import Entry

CAPTURED = (2, 16)
NEW_SIZES = ((3, 23), (1, 5))
EXPORT_SIZE = (4, 9)
CAUSAL = frozenset(
    ["llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "gpt-neox", "mixtral", "qwen3-moe"]
)
"""Decoder-only models whose layers cache keys and values."""
PAIRS = frozenset(["t5", "bart", "whisper"])
"""Models with an encoder and a decoder."""
QUANT = qc.QuantSpec(bits=4, group_size=32)
ADAPTER = qc.AdapterSpec(rank=4)


@dataclass
class Study:
    """One model on its way through the stages."""

    entry: Entry
    model: nn.Module
    folder: Path
    captured: qc.Program
    annotated: qc.Program
    quantized: qc.Program
    adapted: qc.Program
    folded: qc.Program

    @classmethod
    def make(cls, entry: Entry, folder: Path) -> Study:
        """Capture, quantize, adapt and fold, every program checked around every pass."""
        torch.manual_seed(0)
        model = entry.build()
        args, kwargs = entry.inputs(*CAPTURED, 0)
        captured = qc.capture_model(model, args, kwargs)
        steps = qc.Pipeline.parse("canonicalize-pointwise,annotate-linears")
        annotated = steps(captured).program
        quantized = qc.quantize_groups(annotated, QUANT)
        adapted = randomize_adapters(qc.insert_adapters(quantized, ADAPTER))
        folded = qc.fold_adapters(adapted)
        return cls(entry, model, folder, captured, annotated, quantized, adapted, folded)

    def size(self, batch: int, sequence: int) -> tuple[int, int]:
        """A size with the axes that the model fixes at their captured value."""
        fixed = self.entry.fixed or {}
        return (
            CAPTURED[0] if "batch" in fixed else batch,
            CAPTURED[1] if "sequence" in fixed else sequence,
        )

    def inputs(self, batch: int, sequence: int, seed: int = 1) -> Any:
        """Arguments and keyword arguments at a size."""
        return self.entry.inputs(*self.size(batch, sequence), seed)


def check_capture(study: Study) -> float:
    """The captured program computes what the model does, at three sizes, and in training."""
    largest = 0.0
    for size in (CAPTURED, *NEW_SIZES):
        args, kwargs = study.inputs(*size)
        with torch.no_grad():
            expected, found = study.model(*args, **kwargs), study.captured(*args, **kwargs)
        assert_close(found, expected, relative=1e-5)
        largest = max(largest, worst(found, expected) / scale_of(expected))
    _check_training_mode(study)
    for axis in study.entry.fixed or {}:
        assert study.captured.notes, f"nothing says that {axis} is fixed"
    return largest


def _check_training_mode(study: Study) -> None:
    args, kwargs = study.inputs(*CAPTURED)
    before = copy.deepcopy(study.model.state_dict())
    twin = copy.deepcopy(study.model).train()
    torch.manual_seed(3)
    expected = twin(*args, **kwargs)
    study.captured.train()
    try:
        torch.manual_seed(3)
        found = study.captured(*args, **kwargs)
    finally:
        study.captured.eval()
        study.model.load_state_dict(before)  # batch statistics moved, and are shared
    assert_close(found, expected, relative=1e-5)


def check_plan(study: Study) -> None:
    """Every parameter with two or more dimensions has a row, and every row a reason."""
    rows = study.quantized.plan
    storages = {t.data_ptr() for n, t in study.captured.tensors().items()}
    named = {s.weight for s in rows}
    for name, parameter in study.model.named_parameters(remove_duplicate=False):
        if parameter.dim() >= 2 and name not in named:
            assert parameter.data_ptr() in storages, f"{name} has no row"
    assert all(site.reason for site in rows)
    assert len({site.name for site in rows}) == len(rows)


def check_quantized(study: Study) -> float:
    """The quantized program is the eager model with dequantized weights in it."""
    twin = copy.deepcopy(study.model)
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    maps = {site_of(n): match_linear(n) for n in study.annotated.graph.nodes}
    stored = study.quantized.tensors()
    changed = 0.0
    for site in study.quantized.plan.weights_to_quantize():
        linear = maps[site.name]
        assert linear is not None and site.bits is not None and site.group_size is not None
        codes = stored[f"{site.path}.qweight"]
        parts = codes if site.experts else codes[None]
        values = torch.stack([unpack_codes(part, site.bits, site.k) for part in parts])
        scale, offset = (
            expand_groups(stored[f"{site.path}.{part}"], site.group_size, site.k)
            for part in ("scale", "offset")
        )
        weight = values.reshape(scale.shape) * scale + offset
        place = linear.matrix(parameters[site.weight].detach())
        changed = max(changed, float((place - weight).abs().max()))
        place.copy_(weight)
    assert changed > 0, "quantization changed no weight"
    largest = 0.0
    for size in (CAPTURED, study.size(*NEW_SIZES[0])):
        args, kwargs = study.inputs(*size)
        with torch.no_grad():
            expected, found = twin(*args, **kwargs), study.quantized(*args, **kwargs)
        assert_close(found, expected, relative=1e-5)
        largest = max(largest, worst(found, expected) / scale_of(expected))
    return largest


def check_training(study: Study) -> None:
    """Adapters alone get gradients, all of them do, and nothing else changes in ten steps."""
    program = randomize_adapters(qc.insert_adapters(study.quantized, ADAPTER))
    args, kwargs = study.inputs(*CAPTURED)
    frozen = {n: t.clone() for n, t in program.tensors().items() if not t.requires_grad}
    optimizer = torch.optim.AdamW(program.adapter_parameters(), lr=1e-3)
    losses: list[float] = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = _distance(_floats(program(*args, **kwargs)))
        loss.backward()
        if not losses:
            for name, tensor in program.tensors().items():
                got = tensor.grad is not None and bool(tensor.grad.any())
                assert got == tensor.requires_grad, f"{name}: gradient {got}"
        optimizer.step()
        losses.append(float(loss.detach()))
    after = program.tensors()
    for name, tensor in frozen.items():
        assert torch.equal(tensor, after[name]), f"{name} changed"
    assert losses[-1] < losses[0]


def _distance(found: list[Tensor]) -> Tensor:
    """Mean square distance of outputs to fixed random targets."""
    generator = torch.Generator().manual_seed(5)
    parts = [(t.float() - torch.randn(t.shape, generator=generator)).square().mean() for t in found]
    return torch.stack(parts).sum()


def _floats(value: Any) -> list[Tensor]:
    from torch.utils import _pytree as pytree

    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return [t for t in leaves if t.is_floating_point()]


def check_fold(study: Study) -> float:
    """The folded program is the adapted one, at two new sizes."""
    largest = 0.0
    for size in NEW_SIZES:
        args, kwargs = study.inputs(*size)
        with torch.no_grad():
            before = study.quantized(*args, **kwargs)
            expected, found = study.adapted(*args, **kwargs), study.folded(*args, **kwargs)
        assert worst(before, expected) > 0.01 * scale_of(expected), "the adapters do nothing"
        assert_close(found, expected, relative=1e-4)
        largest = max(largest, worst(found, expected) / scale_of(expected))
    return largest


def check_tensor(study: Study) -> None:
    """The program comes back from its folder."""
    folder = study.folder / "stored"
    study.folded.save(folder)
    args, kwargs = study.inputs(*EXPORT_SIZE)
    with torch.no_grad():
        again = qc.Program.load(folder)(*args, **kwargs)
        assert worst(again, study.folded(*args, **kwargs)) == 0.0


def check_inspect(study: Study) -> None:
    """`inspect` prints the whole plan, and `inspect --json` gives its rows."""
    folder = study.folder / "inspected"
    study.folded.save(folder)
    plan = study.folded.plan
    assert len(_output("inspect", str(folder), "--layers").splitlines()) > len(plan)
    rows = json.loads(_output("inspect", str(folder), "--json"))["layers"]
    assert [(r["path"], r["decision"], r["reason"]) for r in rows] == [
        (s.name, s.decision, s.reason) for s in plan
    ]


def _output(*words: str) -> str:
    """What a command prints."""
    with redirect_stdout(io.StringIO()) as printed:
        assert main(list(words)) == 0
    return printed.getvalue()


def check_onnx(study: Study) -> float:
    """The exported files compute what the folded program does, with and without the library."""
    return max(
        _exported(study, "ort-stock", None),
        _exported(study, "ort", None),
        _exported(study, "ort", library_path()),
    )


def _exported(study: Study, target: str, library: Path | None) -> float:
    """The largest difference of one export, as a part of the output's scale."""
    path = study.folder / f"{target}.onnx"
    rows = study.folded.plan.to_quantize()
    if not path.exists():
        report = qc.export_model(study.folded, path, qc.ExportSpec(target=target))
        assert report.quantized_layers == sum(site.experts or 1 for site in rows)
    args, kwargs = study.inputs(*EXPORT_SIZE)
    names = [leaf.name for leaf in study.folded.signature.inputs]
    call = dict(zip(names, study.folded.leaves(args, kwargs), strict=True))
    result = qc.verify_equivalence(
        study.folded, path, [kwargs or args], qc.Tolerance(max_rel=1e-4), library=library
    )
    assert call and result.passed, str(result)
    assert len(result.sites) == len(rows)
    return max(c.max_abs / c.scale for c in result.outputs)


def check_kv_cache(study: Study) -> float | None:
    """Models captured again with their cache, in the steps in which devices run them.

    Encoder-decoder models become two files: the encoder, and the decoder with its cache.
    """
    if study.entry.name in CAUSAL:
        path = study.folder / "cached.onnx"
        qc.export_model(qc.add_kv_cache(study.folded, study.model), path)
    elif study.entry.name in PAIRS:
        path = study.folder / "pair"
        parts = qc.split_encoder_decoder(study.folded, study.model)
        for file, part in zip(("encoder_model.onnx", "decoder_model.onnx"), parts, strict=True):
            qc.export_model(part, path / file)
    else:
        return None
    args, kwargs = study.inputs(*EXPORT_SIZE)
    calls = [kwargs or args, *sequence_calls(study.folded)]
    tolerance = qc.Tolerance(max_rel=1e-4)
    worst = 0.0
    for library in (None, library_path()):
        result = qc.verify_equivalence(study.folded, path, calls, tolerance, library=library)
        assert result.passed, str(result)
        worst = max(worst, *(c.max_abs / c.scale for c in result.outputs))
    return worst


def check_modules(study: Study) -> float:
    """The module-level back-end is the adapted program: names, outputs, gradients, fold."""
    return eager.check_modules(study, CAPTURED, NEW_SIZES[0])


CHECKS: dict[str, Callable[[Study], float | None]] = {
    "capture": check_capture,
    "plan": check_plan,
    "quantized": check_quantized,
    "training": check_training,
    "modules": check_modules,
    "fold": check_fold,
    "stored": check_tensor,
    "inspect": check_inspect,
    "onnx": check_onnx,
    "kv_cache": check_kv_cache,
}


def run_checks(entry: Entry, folder: Path) -> tuple[Study, dict[str, float | None]]:
    """All checks on one model, every program validated; what each check measured."""
    with validating():
        study = Study.make(entry, folder)
        return study, {name: check(study) for name, check in CHECKS.items()}
