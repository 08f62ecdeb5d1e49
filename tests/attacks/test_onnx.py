"""Hostile ONNX files: places outside the folder, sizes, nesting, functions, packed weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qalora_compile as qc
from qalora_compile.runtime.session import open_session
from qalora_compile.untrusted.onnx_file import MAX_DEPTH, check_onnx
from qalora_compile.verify.proof.graphs.read_onnx import read_onnx_graph
from qalora_compile.verify.runners.onnx_session import OnnxSession
from tests.attacks.onnx_files import X, Y, external, model, weight, write
from tests.attacks.support import attack, attack_by_all, cli, given, refused, refused_by_all
from tests.fuzz.seeds import folded_program

READERS: dict[str, Callable[[Path], Any]] = {
    "session": lambda path: open_session(path).get_outputs()[0].name,
    "verify": lambda path: OnnxSession(path).outputs({}),
    "proof": lambda path: len(read_onnx_graph(path).nodes),
    "inspect": lambda path: cli("inspect", path)(),
}


def read(reader: str, path: Path) -> Callable[[], Any]:
    return lambda: READERS[reader](path)


def every(path: Path) -> dict[str, Callable[[], Any]]:
    return given(READERS, path)


def test_a_valid_file_is_read(folder: Path) -> None:
    (folder / "w.bin").write_bytes(np.ones((4, 4), np.float32).tobytes())
    path = write(model([external("w.bin", offset="0", length="64")]), folder)
    for reader, outcome in attack_by_all(every(path), folder).items():
        assert reader == "verify" or outcome.kind == "value", outcome.error


PLACES = {
    "CVE-2022-25882: a location that begins with ..": "../secret.txt",
    "CVE-2024-27318: .. behind another folder": "sub/../../secret.txt",
    "CVE-2026-27489: junk before ..": "junk/./../../secret.txt",
    "GHSA-q56x-g2fj-4rj6: a drive of Windows": "C:\\secret.txt",
    "CVE-2022-25882: .. with backslashes": "..\\secret.txt",
    "an absolute path": "/etc/hostname",
    "a device": "/dev/zero",
    "a NUL in a name": "w.bin\0.txt",
    "no name": "",
    "the folder itself": ".",
}


@pytest.mark.parametrize("kind", PLACES)
def test_external_data_outside_the_folder_are_not_read(kind: str, folder: Path) -> None:
    """The location of a tensor leads out of the model's folder, spelled in one way or another."""
    (folder / "sub").mkdir()
    path = write(model([external(PLACES[kind])]), folder)
    refused_by_all(every(path), folder)


def test_cve_2026_34447_a_symbolic_link_out_of_the_folder(folder: Path) -> None:
    """The location is a link in the folder, and the link leads out of it."""
    (folder / "w.bin").symlink_to("../secret.txt")
    refused_by_all(every(write(model([external("w.bin")]), folder)), folder, "link")


def test_cve_2026_27489_a_link_in_the_middle_of_a_path(folder: Path) -> None:
    """The last part of the location is a file; a folder before it is a link."""
    (folder / "sub").symlink_to("..", target_is_directory=True)
    refused_by_all(every(write(model([external("sub/secret.txt")]), folder)), folder, "link")


def test_cve_2026_34446_a_hard_link_to_a_file_outside(folder: Path) -> None:
    """A second name of a file outside looks like a file of the folder."""
    os.link(folder.parent / "secret.txt", folder / "w.bin")
    refused_by_all(every(write(model([external("w.bin")]), folder)), folder, "hard link")


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    """Opening a pipe without a writer never returns."""
    os.mkfifo(folder / "w.bin")
    refused_by_all(every(write(model([external("w.bin")]), folder)), folder, "not a regular file")


SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "CVE-2024-27319: an offset behind the end of the file": ({"offset": "4096"}, 64),
    "CVE-2024-27319: a length over the end": ({"length": "65"}, 64),
    "CVE-2026-34445: a length that is negative": ({"length": "-1"}, 64),
    "CVE-2026-34445: a length of terabytes": ({"length": str(2**42)}, 64),
    "CVE-2026-34445: keys that no place has": ({"__class__": "x"}, 64),
    "an offset that overflows 64 bits": ({"offset": str(2**64 - 32)}, 64),
    "an offset that is no number": ({"offset": "0x10"}, 64),
    "an offset in digits of another script": ({"offset": "١"}, 64),
    "a shape larger than the file": ({"shape": (2**31, 2**31)}, 64),
    "a file that is empty": ({}, 0),
    "a negative axis": ({"shape": (-4, -4)}, 64),
}


@pytest.mark.parametrize("kind", SIZES)
def test_external_data_of_other_sizes_are_refused(kind: str, folder: Path) -> None:
    """What is said of a tensor's place does not fit the file there."""
    options, size = SIZES[kind]
    (folder / "w.bin").write_bytes(b"\0" * size)
    refused_by_all(every(write(model([external("w.bin", **options)]), folder)), folder)


def lying(shape: tuple[int, ...], raw: bytes, kind: int = 1) -> TensorProto:
    return TensorProto(name="w", data_type=kind, dims=shape, raw_data=raw)


STORED = {
    "ONNX Runtime 27721: a negative axis of a weight": lying((-4, 4), b"\0" * 64),
    "ONNX Runtime 27721: a weight smaller than its shape": lying((4, 4), b"\0" * 8),
    "a shape whose product overflows": lying((2**32, 2**32), b"\0" * 64),
    "a shape of exabytes without data": TensorProto(name="w", data_type=1, dims=[2**60]),
    "an unknown type": lying((4, 4), b"\0" * 64, kind=99),
    "a text with bytes": lying((4,), b"\0" * 64, kind=8),
    "more axes than any reader takes": lying((1,) * 40 + (16,), b"\0" * 64),
}


@pytest.mark.parametrize("kind", STORED)
def test_weights_that_contradict_their_shape_are_refused(kind: str, folder: Path) -> None:
    """Kernels copy and pack weights by their shape alone."""
    refused_by_all(every(write(model([STORED[kind]]), folder)), folder)


def packed(**changes: int) -> onnx.ModelProto:
    """A MatMulNBits of K = N = 32; its attributes may say more."""
    sizes = {"K": 32, "N": 32, "bits": 4, "block_size": 32} | changes
    node = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", **sizes)
    tensors = [
        numpy_helper.from_array(np.zeros((32, 1, 16), np.uint8), "b"),
        numpy_helper.from_array(np.ones(32, np.float32), "s"),
    ]
    return model(tensors, [node], domains=("com.microsoft",))


@pytest.mark.parametrize("reader", ["session", "verify", "inspect"])
@pytest.mark.parametrize(
    "changes",
    [{"K": 4096}, {"N": 2**20}, {"K": 2**31 - 1, "N": 2**31 - 1}, {"bits": 8}, {"block_size": 16},
     {"N": -1}, {"K": 0}, {"bits": 64}],
    ids=str,
)  # fmt: skip
def test_onnx_runtime_29445_attributes_overstate_packed_weights(
    changes: dict[str, int], reader: str, folder: Path
) -> None:
    """MatMulNBits is packed when a file is loaded, up to 1.27 by the sizes in its attributes."""
    refused(read(reader, write(packed(**changes), folder)), folder, "MatMulNBits")


@pytest.mark.parametrize("reader", ["session", "verify", "inspect"])
def test_our_own_operator_with_attributes_that_overstate_its_weights(
    reader: str, folder: Path
) -> None:
    """214 bytes that declare K = 2³¹ − 1: nothing is allocated."""
    sizes = {"K": 2**31 - 1, "N": 2**31 - 1, "bits": 4, "group_size": 32}
    node = helper.make_node(
        "GroupQuantLinear", ["x", "b", "s", "z"], ["y"], domain="qalora", **sizes
    )
    tensors = [
        numpy_helper.from_array(np.zeros((1, 1, 16), np.uint8), "b"),
        numpy_helper.from_array(np.ones((1, 1), np.float32), "s"),
        numpy_helper.from_array(np.ones((1, 1), np.float32), "z"),
    ]
    made = model(tensors, [node], domains=("qalora",))
    refused(read(reader, write(made, folder)), folder, "GroupQuantLinear")


def test_bodies_nested_without_end_are_refused(folder: Path) -> None:
    """Readers recurse into bodies; CVE-2024-5187's kind of trust in a file's own structure."""
    made = model(
        [numpy_helper.from_array(np.array(True), "c")], [helper.make_node("Identity", ["x"], ["y"])]
    )
    for _ in range(MAX_DEPTH + 2):  # one branch alone grows, or the file would double each time
        body = helper.make_graph(list(made.graph.node), "b", [], [Y])
        other = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "e", [], [Y])
        node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=other)
        del made.graph.node[:]
        made.graph.node.append(node)
    refused_by_all(every(write(made, folder)), folder, "nested more than")


def function(name: str, *calls: str) -> Any:
    nodes = [helper.make_node(call, ["a"], [f"b{i}"], domain="f") for i, call in enumerate(calls)]
    nodes.append(helper.make_node("Identity", ["b0" if calls else "a"], ["y"]))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
    return helper.make_function("f", name, ["a"], ["y"], nodes, opsets)


FUNCTIONS = {
    "a function that calls itself": [function("A", "A")],
    "two functions that call each other": [function("A", "B"), function("B", "A")],
    "functions that double at each of 40 levels": [
        *(function(f"F{i}" if i else "A", f"F{i + 1}", f"F{i + 1}") for i in range(40)),
        function("F40"),
    ],
    "a function twice": [function("A"), function("A")],
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_that_expand_without_end_are_refused(kind: str, folder: Path) -> None:
    """Runtimes inline functions when a file is loaded."""
    nodes = [helper.make_node("A", ["x"], ["y"], domain="f")]
    made = model([], nodes, functions=FUNCTIONS[kind], domains=("f",))
    refused_by_all(every(write(made, folder)), folder, "function")


def test_constants_that_ask_for_exabytes_are_refused(folder: Path) -> None:
    """ConstantOfShape is folded when a file is loaded: sixteen bytes ask for any amount."""
    shape = numpy_helper.from_array(np.array([2**40, 2**10], np.int64), "s")
    nodes = [helper.make_node("ConstantOfShape", ["s"], ["y"])]
    refused_by_all(every(write(model([shape], nodes), folder)), folder, "ConstantOfShape")


BYTES = {
    "CVE-2024-7776: an archive named as a model": b"PK\x03\x04" + b"\0" * 60,
    "a model in ONNX Runtime's own format": b"\x18\0\0\0ORTM" + b"\0" * 64,
    "a length over the end of the file": b"\x3a\xff\xff\xff\xff\x0f" + b"\0" * 8,
    "a number without end": b"\x08" + b"\xff" * 40,
    "no bytes": b"",
    "two graphs": b"\x3a\x00\x3a\x00",
}


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_that_are_no_model_are_refused(kind: str, folder: Path) -> None:
    """Not a protobuf message, or one that readers of protobuf disagree about."""
    path = folder / "model.onnx"
    path.write_bytes(BYTES[kind])
    refused_by_all(every(path), folder)


def test_metadata_twice_are_refused(folder: Path) -> None:
    """Readers disagree on which of two entries with one key counts."""
    made = model()
    made.metadata_props.add(key=made.metadata_props[0].key, value="{}")
    refused_by_all(every(write(made, folder)), folder, "twice")


def test_a_library_beside_the_model_is_not_loaded(folder: Path) -> None:
    """An operator that no runtime has does not make one look for a library in the folder."""
    for name in ("custom.so", "libqalora.so", "canary.py"):
        (folder / name).write_bytes(b"\x7fELF" + b"\0" * 60)
    nodes = [helper.make_node("Canary", ["x"], ["y"], domain="custom")]
    (folder / "genai_config.json").write_text('{"model": {"custom_ops_library": "custom.so"}}')
    attack_by_all(every(write(model([], nodes, domains=("custom",)), folder)), folder)


def test_what_is_found_is_said(folder: Path) -> None:
    (folder / "w.bin").write_bytes(np.ones((4, 4), np.float32).tobytes())
    found = check_onnx(write(model([external("w.bin")]), folder))
    assert found.files == {folder / "w.bin"}
    assert found.nodes == 1
    assert found.tensors["w"].shape == (4, 4)
    assert weight().dims == [4, 4] and X.name == "x"


def shapeless(kind: str, tensors: list[TensorProto], **attributes: Any) -> onnx.ModelProto:
    """A node whose shapes ONNX infers when a file is loaded."""
    node = helper.make_node(kind, ["x", *(t.name for t in tensors)], ["y"], **attributes)
    return model(tensors, [node])


INFERRED = {
    "ONNX Runtime 28731: a kernel with more axes than what it reads": shapeless(
        "Conv", [weight("w", (4, 4, 3, 3, 3))], dilations=[1, 1]
    ),
    "ONNX 8275: a split into more parts than there are": shapeless("Split", [], num_outputs=2**20),
    "ONNX Runtime 27699: a classifier of fewer vectors than it says": model(
        [],
        [
            helper.make_node(
                "SVMClassifier",
                ["x"],
                ["l", "y"],
                domain="ai.onnx.ml",
                classlabels_ints=[0, 1],
                vectors_per_class=[2**30, 2**30],
                coefficients=[1.0],
                support_vectors=[1.0],
                rho=[0.0],
            )
        ],
        domains=("ai.onnx.ml",),
    ),
}


@pytest.mark.parametrize("reader", ["session", "proof", "inspect"])
@pytest.mark.parametrize("kind", INFERRED)
def test_shapes_that_do_not_fit_end_in_no_crash(kind: str, reader: str, folder: Path) -> None:
    """Inference of shapes read past the ends of lists that attributes were to fill."""
    attack(read(reader, write(INFERRED[kind], folder)), folder)


def test_cve_2025_51480_an_export_does_not_write_through_a_link(folder: Path) -> None:
    """Saving external data followed whatever stood at the place of the data file."""
    secret = folder.parent / "secret.txt"
    (folder / "edge").mkdir()
    (folder / "edge" / "model.onnx.data").symlink_to(secret)
    before = secret.read_bytes()
    program = folded_program()

    def export() -> str:
        qc.export_model(program, folder / "edge" / "model.onnx")
        return "written"

    attack(export, folder)
    assert secret.read_bytes() == before
