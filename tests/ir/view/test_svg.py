"""Graphs to look at: DOT, SVG and Netron's ONNX show every node, with shapes, at every stage."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import onnx
import pytest
import torch

import qalora_compile as qc
from qalora_compile.cli.main import main
from qalora_compile.errors import UserInputError
from qalora_compile.ir.view import svg
from qalora_compile.ir.view.netron import structure_model
from qalora_compile.ir.view.outline import outline
from qalora_compile.ir.view.svg import to_dot, to_svg
from tests.models import MLP, adapted
from tests.verify.planted import SPECS, program

STAGES = ("quantized", "adapted", "folded", *(f"lowered:{name}" for name in SPECS))
SVG = "{http://www.w3.org/2000/svg}"


def calls(source: qc.Program) -> list[torch.fx.Node]:
    return [node for node in source.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("kind", STAGES)
def test_netrons_model_is_valid_and_has_every_node_and_shape(kind: str, tmp_path: Path) -> None:
    source = program(kind)
    onnx.save(structure_model(source), tmp_path / "graph.onnx")
    model = onnx.load(tmp_path / "graph.onnx")
    onnx.checker.check_model(model, full_check=True)
    own = [node for node in model.graph.node if node.domain]
    assert [node.output[0] for node in own] == [node.name for node in calls(source)]
    assert {node.domain for node in own} <= {"aten", "qalora", "python"}
    shown = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
             for v in model.graph.value_info}  # fmt: skip
    assert shown["layer_norm"] == ["batch", "sequence", 48]
    assert set(shown) == {node.name for node in calls(source)}
    assert not model.graph.initializer, "it has no weights"
    (result,) = model.graph.output
    assert [d.dim_param or d.dim_value for d in result.type.tensor_type.shape.dim] == [
        "batch", "sequence", 40,
    ]  # fmt: skip


def test_nodes_say_which_layer_and_which_tensors_they_are_of() -> None:
    model = structure_model(program("folded"))
    node = next(n for n in model.graph.node if n.name == "q/group_linear")
    values = {a.name: a.s.decode() for a in node.attribute}
    assert values["scale"] == "q.scale: float32[48, 2]"
    assert (values["bits"], values["group_size"]) == ("4", "32")


def test_shapes_are_those_of_a_run() -> None:
    source = program("lowered:ort-stock")
    found = {box.value.name: box.value for box in outline(source)}
    sizes = {"batch": 3, "sequence": 7}
    values = torch.fx.Interpreter(source.module, garbage_collect_values=False)
    values.run(torch.randint(0, 40, (3, 7)), enable_io_processing=False)
    for node in calls(source):
        shape = [sizes.get(str(d), d) for d in found[node.name].shape]
        assert shape == list(values.env[node].shape)


def test_a_part_has_what_it_reads_as_inputs_and_what_is_read_of_it_as_outputs() -> None:
    boxes = outline(program("adapted"), only="q")
    inputs = [box.value.name for box in boxes if box.domain == "input"]
    assert inputs == ["layer_norm", "pooled_adapter_default"]
    inside = [box for box in boxes if box.domain not in ("input", "output")]
    assert {box.path for box in inside} == {"q"}
    assert [(box.op, box.reads) for box in boxes[-1:]] == [("q", (inside[-1].value.name,))]
    with pytest.raises(UserInputError, match="at or below nowhere"):
        outline(program("adapted"), only="nowhere")


@pytest.mark.parametrize("kind", STAGES)
def test_dot_has_a_line_for_every_node_and_edge(kind: str) -> None:
    source = program(kind)
    text = to_dot(source)
    assert text == to_dot(source) and text.startswith("digraph program {") and text.endswith("}\n")
    nodes = re.findall(r'^  "([^"]+)" \[label', text, re.MULTILINE)
    assert len(nodes) == len(set(nodes)) == len(calls(source)) + 2
    edges = re.findall(r'^  "([^"]+)" -> "([^"]+)"', text, re.MULTILINE)
    assert {end for edge in edges for end in edge} == set(nodes)
    for node in calls(source):
        for read in node.all_input_nodes:
            if read.op != "get_attr":
                assert (read.name, node.name) in edges
    assert text.count('"') % 2 == 0


def rectangles(svg: str) -> list[tuple[float, float, float, float]]:
    boxes = [r for r in ET.fromstring(svg).iter(f"{SVG}rect") if r.get("rx")]
    return [tuple(float(r.attrib[k]) for k in ("x", "y", "width", "height")) for r in boxes]  # type: ignore[misc]


def test_svg_has_every_node_apart_from_all_others_inside_the_image() -> None:
    source = program("adapted")
    svg = to_svg(source)
    assert svg == to_svg(source)
    root = ET.fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    boxes = rectangles(svg)
    assert len(boxes) == len(calls(source)) + 2
    for index, (x, y, w, h) in enumerate(boxes):
        assert x >= 0 and y >= 0 and x + w <= width + 1 and y + h <= height + 1
        for u, v, p, q in boxes[:index]:
            assert x + w <= u or u + p <= x or y + h <= v or v + q <= y, "two boxes overlap"
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert "qalora.group_linear" in texts and "float32[batch, sequence, 48]" in texts


@pytest.mark.slow
def test_a_drawing_does_not_depend_on_where_in_memory_it_is_made() -> None:
    source, draw, kept = program("adapted"), random.Random(0), []
    drawn = set()
    for _ in range(100):
        kept.append([object() for _ in range(draw.randrange(3000))])
        kept = kept[::2] if len(kept) > 6 else kept
        drawn.add(to_svg(source))
    assert len(drawn) == 1


def test_what_is_read_stands_above_what_reads_it() -> None:
    svg = to_svg(program("folded"))
    for path in ET.fromstring(svg).iter(f"{SVG}path"):
        points = [tuple(map(float, p.split())) for p in path.attrib["d"][2:].split(" L ")]
        assert points[0][1] < points[-1][1]


def test_a_graph_that_nobody_could_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svg, "_MOST", 10)
    with pytest.raises(UserInputError, match="cannot be read") as caught:
        to_svg(program("folded"))
    assert "--only" in str(caught.value)
    assert to_svg(program("folded"), only="q")


def test_the_command_line_writes_every_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = adapted(MLP(16, 8), (torch.randn(2, 16),))
    source.save(tmp_path / "run")
    names = {"text": "g.txt", "dot": "g.dot", "svg": "g.svg", "netron": "g.onnx"}
    words = [w for n, file in names.items() for w in (f"--{n}", str(tmp_path / file))]
    assert main(["inspect", str(tmp_path / "run"), *words]) == 0
    assert (tmp_path / "g.txt").read_text("utf-8") == str(source)
    assert (tmp_path / "g.dot").read_text("utf-8") == to_dot(qc.Program.load(tmp_path / "run"))
    onnx.checker.check_model(onnx.load(tmp_path / "g.onnx"))
    assert len(rectangles((tmp_path / "g.svg").read_text("utf-8"))) == len(calls(source)) + 2
    assert main(["inspect", str(tmp_path / "run"), "--dot", str(tmp_path / "g.dot")]) == 2
    qc.export_model(qc.fold_adapters(source), tmp_path / "model.onnx")
    again = ["--dot", str(tmp_path / "other.dot")]
    assert main(["inspect", str(tmp_path / "model.onnx"), *again]) == 2
    assert "can be opened in Netron directly" in capsys.readouterr().err
    assert not (tmp_path / "other.dot").exists()
