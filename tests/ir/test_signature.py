"""Names, dynamic sizes and checks of a program's inputs and outputs."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qalora_compile as qc
from qalora_compile.errors import UserInputError
from qalora_compile.ir.signature import InputLeaf, Signature, dtype_name

SIGNATURE = Signature(
    (
        InputLeaf("ids", "int64", ("batch", "sequence")),
        InputLeaf("x", "float32", ("batch", 3, 8)),
        InputLeaf("flag", None, (), True),
    ),
    ("logits",),
)


def leaves() -> list[object]:
    """Inputs that fit."""
    return [torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 3, 8), True]


def test_check_accepts_what_fits_at_any_dynamic_size() -> None:
    SIGNATURE.check(leaves())
    SIGNATURE.check([torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 3, 8), True])


BAD: dict[str, tuple[int, object, str]] = {
    "dtype": (0, torch.zeros(2, 5, dtype=torch.int32), "input ids is int32, but was int64"),
    "rank": (0, torch.zeros(2, dtype=torch.int64), r"input ids has shape \[2\]"),
    "fixed size": (1, torch.zeros(2, 4, 8), r"input x has shape \[2, 4, 8\].*\['batch', 3, 8\]"),
    "no tensor": (1, [1.0], "input x is list, not a tensor"),
    "constant": (2, False, "input flag is False, but was True"),
}


@pytest.mark.parametrize("kind", BAD)
def test_check_names_the_input(kind: str) -> None:
    position, value, message = BAD[kind]
    values = leaves()
    values[position] = value
    with pytest.raises(UserInputError, match=message):
        SIGNATURE.check(values)


def test_json_round_trip() -> None:
    assert Signature.from_json(json.loads(json.dumps(SIGNATURE.to_json()))) == SIGNATURE


def test_dtype_name() -> None:
    assert dtype_name(torch.bfloat16) == "bfloat16"


class Nested(nn.Module):
    """Containers in and out."""

    def forward(self, pair: tuple[Tensor, Tensor], table: dict[str, Tensor]) -> dict[str, object]:
        """Mix everything, so that every input counts."""
        return {"sum": pair[0] + pair[1], "rest": [table["b"] * 2, table["a"] * 3]}


def test_names_of_nested_inputs_and_outputs() -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    program = qc.capture_model(Nested(), ((a, b), {"a": a, "b": b}))
    assert [leaf.name for leaf in program.signature.inputs] == [
        "pair.0",
        "pair.1",
        "table.a",
        "table.b",
    ]
    assert program.signature.outputs == ("sum", "rest.0", "rest.1")
    assert all(leaf.shape[0] == "batch" for leaf in program.signature.inputs)


@pytest.mark.parametrize(
    ("count", "names"), [(1, ("output",)), (3, ("output_0", "output_1", "output_2"))]
)
def test_names_of_plain_outputs(count: int, names: tuple[str, ...]) -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> object:
            found = tuple(x + i for i in range(count))
            return found if count > 1 else found[0]

    assert qc.capture_model(Plain(), (torch.randn(2, 3),)).signature.outputs == names


@dataclass
class Answer:
    """An output class of a user's model."""

    logits: Tensor
    hidden: Tensor


pytree.register_dataclass(Answer, serialized_type_name="tests.Answer")


def test_names_of_dataclass_outputs() -> None:
    class Answering(nn.Module):
        def forward(self, x: Tensor) -> Answer:
            return Answer(logits=x * 2, hidden=x - 1)

    program = qc.capture_model(Answering(), (torch.randn(2, 3),))
    assert program.signature.outputs == ("logits", "hidden")
    found = program(torch.ones(4, 3))
    assert isinstance(found, Answer)
    assert found.logits.tolist() == [[2.0] * 3] * 4


def test_output_names_are_unique() -> None:
    class Colliding(nn.Module):
        def forward(self, x: Tensor) -> object:
            return {"output_1": x, "pair": {"output_1": x + 1}}, x + 2

    names = qc.capture_model(Colliding(), (torch.randn(2, 3),)).signature.outputs
    assert names == ("0.output_1", "0.pair.output_1", "output_2")


def test_dynamic_axes_have_readable_names() -> None:
    class Three(nn.Module):
        def forward(self, ids: Tensor, hidden: Tensor, flat: Tensor) -> Tensor:
            return ids.sum() + hidden.sum() + flat.sum()

    args = (torch.zeros(2, 5, dtype=torch.int64), torch.randn(2, 5, 8), torch.randn(2, 8))
    shapes = {leaf.name: leaf.shape for leaf in qc.capture_model(Three(), args).signature.inputs}
    assert shapes == {
        "ids": ("batch", "sequence"),
        "hidden": ("batch", "hidden_sequence", 8),  # nothing ties it to the length of ids
        "flat": ("batch", "flat_sequence"),  # nothing fixes it: the sum takes any length
    }
