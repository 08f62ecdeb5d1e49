"""Stacked experts in OpenVINO: every form of them, against torch, at sizes never captured."""

from __future__ import annotations

import copy
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qalora_compile as qc
from qalora_compile.api.run_folder import save_description, write_run_file
from qalora_compile.cli.main import main
from qalora_compile.untrusted.artifacts import OPENVINO_FILE
from tests.clients.record import TOY, record_client
from tests.exporters.openvino.running import compiled, constants, read, run
from tests.exporters.test_experts import Grouped
from tests.models import adapted, assert_close, outputs, randomize_adapters
from tests.zoo.entries import ENTRIES
from tests.zoo.modules import BatchedExperts

SPEC = qc.ExportSpec(target="openvino")


def folded(bits: int, group: int, *, gap: bool = False) -> qc.Program:
    torch.manual_seed(0)
    spec = qc.QuantSpec(bits=bits, group_size=group)
    return qc.fold_adapters(adapted(Grouped(gap=gap), (torch.randn(8, 40),), spec))


def assert_equal(program: qc.Program, path: Path, **options: Any) -> None:
    qc.export_model(program, path, qc.ExportSpec(target="openvino", **options))
    for rows in (2, 11, 30):
        x = torch.randn(rows, 40)
        assert_close(run(path, x), program(x), relative=1e-5)


@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (2, 32), (3, 24), (8, 8)])
def test_grouped_experts(bits: int, group: int, gap: bool, tmp_path: Path) -> None:
    assert_equal(folded(bits, group, gap=gap), tmp_path / "model.xml")


def test_each_expert_is_a_product_by_codes(tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    report = qc.export_model(folded(4, 16), path, SPEC)
    assert report.quantized_layers == 4, "three experts and the head"
    stored = {name for name in constants(path) if name.startswith("experts_quantized.")}
    assert len(stored) == 9, "codes, scales and zero-points of three experts"
    kinds = [
        node.get_rt_info()["layerType"].value
        for node in compiled(path).get_runtime_model().get_ops()
    ]
    assert kinds.count("FullyConnected") == 4
    assert "Subtract" not in kinds, "no weight is dequantized before the product"


def test_experts_that_have_rows_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64)
    program = qc.fold_adapters(adapted(BatchedExperts().eval(), (x,)))
    path = tmp_path / "model.xml"
    qc.export_model(program, path, SPEC)
    assert_close(run(path, x), outputs(program(x)), relative=1e-5)


@pytest.mark.parametrize("gap", [False, True])
def test_float_experts_next_to_a_quantized_layer(gap: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = qc.capture_model(Grouped(gap=gap).eval(), (torch.randn(8, 40),))
    program = qc.quantize_groups(program, exclude=["experts"])
    assert_equal(program, tmp_path / "model.xml")


def test_adapters_that_are_not_folded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = adapted(Grouped(gap=True), (torch.randn(8, 40),), qc.QuantSpec(group_size=8))
    assert_equal(program, tmp_path / "model.xml", allow_unfolded=True)


def test_a_wrong_zero_point_of_one_expert_is_seen(tmp_path: Path) -> None:
    program, path = folded(4, 16), tmp_path / "model.xml"
    changed = folded(4, 16)
    (name,) = {f"{s.path}.offset" for s in changed.plan.to_quantize() if s.experts}
    changed.tensors()[name][2] += 0.1
    qc.export_model(changed, path, SPEC)
    calls = [(torch.randn(9, 40),)]
    report = qc.verify_equivalence(program, path, calls, qc.Tolerance(max_rel=1e-4))
    assert not report.passed
    assert report.first_divergence == "experts"


@pytest.fixture(scope="module", params=["mixtral", "qwen3-moe"])
def edge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of the zoo with its adapters, and the folder with `folded` and `edge`."""
    torch.manual_seed(0)
    entry = ENTRIES[request.param]
    plain = entry.build()
    model = copy.deepcopy(plain)
    adapted_program = qc.adapt_module_(model, *entry.inputs(2, 7, 0))
    folder = tmp_path_factory.mktemp("openvino")
    program = qc.fold_adapters(randomize_adapters(adapted_program).eval())
    program.save(folder / "folded")
    save_description(plain, folder / "folded")
    write_run_file(folder / "folded", {"model": request.param})
    words = [str(folder / "folded"), "--out", str(folder / "edge"), "--target", "openvino"]
    assert main(["export", *words]) == 0
    return model.eval(), folder


def test_the_tokens_of_a_model_with_a_cache_are_torch_s(edge: Any) -> None:
    model, folder = edge
    path, prompt = folder / "edge" / OPENVINO_FILE, [[5, 9, 23, 4, 17]]
    request = compiled(path).create_infer_request()
    names = {value.any_name for value in read(path).inputs}
    tokens, held = list(prompt[0]), 0
    for _ in range(8):
        fresh = np.array([tokens[held:]])
        held = len(tokens)
        feed = {
            "input_ids": fresh,
            "attention_mask": np.ones((1, len(tokens)), np.int64),
            "position_ids": np.arange(len(tokens))[None, -fresh.shape[1] :],
            "beam_idx": np.zeros(1, np.int32),
        }
        found = request.infer({name: feed[name] for name in names})
        tokens.append(int(next(iter(found.values()))[0, -1].argmax()))
    expected = list(prompt[0])
    with torch.no_grad():
        for _ in range(8):
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    assert tokens == expected
    assert len(set(tokens[5:])) > 1, "a degenerate continuation would show nothing"
    record_client(
        "OpenVINO",
        metadata.version("openvino"),
        "openvino",
        f"{type(model).__name__}, random weights",
        "torch's 8 tokens",
        speed=TOY,
    )


def test_verify_and_inspect_read_it(edge: Any, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(edge[1] / "folded"), str(edge[1] / "edge")]
    assert main(["verify", *paths, "--max-rel", "1e-4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "logits" in {row["name"] for row in report["outputs"]}
    assert main(["inspect", paths[1], "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    experts = [row for row in rows if row["kind"] == "experts"]
    assert len(experts) == 4
    assert {(row["bits"], row["zero-point"]) for row in experts} == {(4, "real")}
