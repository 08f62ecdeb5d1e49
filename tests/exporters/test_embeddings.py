"""Exported embeddings and heads on codes: exact in every target, a tie stored once."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

import qalora_compile as qc
from qalora_compile.exporters.onnx.genai_config import CONFIG_FILE, genai_config
from qalora_compile.ir.program import Program
from qalora_compile.passes.framework.pipeline import Pipeline
from qalora_compile.runtime import LanguageModel, kernel_level, library_path, open_session
from tests.models import TiedHead, assert_close, llama, randomize_adapters, token_ids
from tests.passes.test_quantize_embeddings import VOCABULARY, Untied, captured, ids_of

TARGETS = ("ort", "ort-stock", "onnx")
TIGHT = qc.Tolerance(max_rel=1e-5)


@functools.cache
def folded(bits: int, group: int = 32) -> qc.Program:
    """A small model with a table and a head, adapters folded."""
    torch.manual_seed(0)
    spec = qc.QuantSpec(bits=bits, group_size=group)
    program = qc.quantize_groups(captured(Untied()), embeddings=spec)
    return qc.fold_adapters(randomize_adapters(qc.insert_adapters(program)))


def run(path: Path, ids: Tensor, *, library: bool = False) -> Tensor:
    session = open_session(path, library=library, threads=1, exact=True)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 48)])
def test_equal_in_every_runtime(bits: int, group: int, target: str, tmp_path: Path) -> None:
    program, ids, path = folded(bits, group), ids_of(3, 7), tmp_path / "model.onnx"
    qc.export_model(program, path, qc.ExportSpec(target=target))
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    results = [run(path, ids)]
    if target == "ort" and kernel_level():
        results.append(run(path, ids, library=True))
    if target != "ort-stock":  # MatMulNBits has no meaning there
        feed = {model.graph.input[0].name: ids.numpy()}
        results.append(torch.from_numpy(ReferenceEvaluator(model).run(None, feed)[0]))
    for result in results:
        assert_close(result, program(ids), relative=1e-5)
    domains = {node.domain for node in model.graph.node}
    assert domains <= {"onnx": {""}, "ort": {"", "qalora"}}.get(target, {"", "com.microsoft"})
    report = qc.verify_equivalence(program, path, [(ids,)], TIGHT)
    assert report.passed
    assert [row.name for row in report.sites] == ["mid", "head"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_tie_is_stored_once(bits: int, target: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    program = captured(TiedHead(VOCABULARY, 64))
    program = qc.quantize_groups(program, embeddings=qc.QuantSpec(bits=bits))
    qc.export_model(program, path, qc.ExportSpec(target=target))
    graph = onnx.load(path).graph
    names = [t.name for t in graph.initializer]
    assert "lm_head.weight" not in names
    codes = [name for name in names if name.startswith("lm_head") and name.endswith("qweight")]
    assert len(codes) == bits // 4  # planes
    stored = sum(
        int(np.prod(t.dims)) * (4 if t.data_type == onnx.TensorProto.UINT4 else 8) // 8
        for t in graph.initializer
        if t.name in codes
    )
    assert stored == VOCABULARY * 64 * bits // 8
    for name in codes:
        assert sum(name in node.input for node in graph.node) == 2, "one lookup and one product"
    assert not any(
        tuple(t.dims) in {(VOCABULARY, 64), (64, VOCABULARY)}
        for t in graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT
    )


def test_int8_activations_take_8_bits_as_they_are(tmp_path: Path) -> None:
    for target in ("ort", "ort-stock"):
        path = tmp_path / f"{target}.onnx"
        spec = qc.ExportSpec(target=target, accuracy_level=4)
        program = folded(8)
        qc.export_model(program, path, spec)
        assert not any("low" in t.name for t in onnx.load(path).graph.initializer)
        assert_close(run(path, ids_of(2, 5)), program(ids_of(2, 5)), relative=5e-2)


def test_stock_head_runs_on_4_bit_kernels(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    qc.export_model(folded(8), path, qc.ExportSpec(target="ort-stock"))
    kinds = [n for n in onnx.load(path).graph.node if n.op_type == "MatMulNBits"]
    bits = {a.i for node in kinds for a in node.attribute if a.name == "bits"}
    assert (len(kinds), bits) == (3, {4})


@pytest.mark.parametrize("target", TARGETS)
def test_written_by_rows_it_is_the_same_file(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = folded(8)
    program.save(tmp_path / "folded")
    monkeypatch.setattr("qalora_compile.ir.lazy_tensor._PART_ELEMENTS", 1000)
    stored = []
    for deferred in (False, True):
        path = tmp_path / f"{deferred}.onnx"
        source = Program.load(tmp_path / "folded", lazy=deferred)
        qc.export_model(source, path, qc.ExportSpec(target=target))
        stored.append({t.name: t.raw_data for t in onnx.load(path).graph.initializer})
    assert stored[0] == stored[1]


@pytest.mark.slow
def test_with_a_key_value_cache(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = llama()
    ids = token_ids(2, 9)
    program = qc.quantize_groups(qc.capture_model(model, (ids,)), embeddings=qc.QuantSpec(bits=8))
    program = qc.fold_adapters(randomize_adapters(qc.insert_adapters(program))).eval()
    cached = qc.add_kv_cache(program, model)
    assert [s.frozen_integer_zero for s in cached.plan] == [
        s.frozen_integer_zero for s in program.plan
    ]
    for target in TARGETS:
        path = tmp_path / f"{target}.onnx"
        qc.export_model(cached, path, qc.ExportSpec(target=target))
        library = library_path() if target == "ort" and kernel_level() else None
        report = qc.verify_equivalence(program, path, [{"input_ids": ids}], TIGHT, library=library)
        assert report.passed, report
    prompt = [5, 17, 40, 3]
    deployed = LanguageModel(open_session(tmp_path / "ort.onnx", threads=1))
    for token in deployed.generate(prompt, max_new_tokens=8):
        with torch.no_grad():
            assert int(program(torch.tensor([prompt])).logits[0, -1].argmax()) == token
        prompt.append(token)
    genai = pytest.importorskip("onnxruntime_genai")
    folder = tmp_path / "genai"
    folder.mkdir()
    (folder / "model.onnx").write_bytes((tmp_path / "ort.onnx").read_bytes())
    config = genai_config(cached.signature, model.config.to_dict(), {})
    (folder / CONFIG_FILE).write_text(json.dumps(config), "utf-8")
    loaded = genai.Model(str(folder))
    options = genai.GeneratorParams(loaded)
    options.set_search_options(max_length=len(prompt), do_sample=False)
    generator = genai.Generator(loaded, options)
    generator.append_tokens(np.array([prompt[:4]], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(t) for t in generator.get_sequence(0)]
    assert found == prompt[: len(found)]
    assert len(found) == len(prompt) or found[-1] == 0  # 0 ends the sequence


@pytest.mark.slow
def test_half_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = qc.quantize_groups(
        captured(Untied().to(torch.bfloat16)), embeddings=qc.QuantSpec(bits=8)
    )
    for target in TARGETS:
        path = tmp_path / f"{target}.onnx"
        qc.export_model(program, path, qc.ExportSpec(target=target))
        assert_close(run(path, ids_of(2, 5)), program(ids_of(2, 5)).float(), relative=3e-2)


def test_a_planted_fault_in_the_table_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    program, ids = folded(4), ids_of(2, 6)
    qc.export_model(program, path)
    model = onnx.load(path)
    table = next(t for t in model.graph.initializer if t.name == "embed.qweight")
    values = np.roll(onnx.numpy_helper.to_array(table), 1, axis=0)
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
    onnx.save(model, tmp_path / "broken.onnx")
    assert not qc.verify_equivalence(program, tmp_path / "broken.onnx", [(ids,)], TIGHT).passed


def test_a_pipeline_in_text() -> None:
    pipeline = Pipeline.parse(
        "annotate-linears{keep-heads=true},quantize-groups,quantize-embeddings{bits=4}"
    )
    plan = pipeline(captured(Untied())).program.plan
    assert {site.bits for site in plan} == {4}
