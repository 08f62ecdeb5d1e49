"""The proof's names of operands are those of the operators' own definitions."""

from __future__ import annotations

import operator

import pytest
import torch

from qalora_compile.exporters.onnx.operators import group_quant_linear_op, matmul_nbits_op
from qalora_compile.ir.ops.views import VIEWS
from qalora_compile.ir.torch_internals import schema_of
from qalora_compile.verify.proof.graphs.graph import Node
from qalora_compile.verify.proof.graphs.operand_names import OPERANDS

onnx = pytest.importorskip("onnx")


def defined(op: str) -> list[str]:
    """The names of an operator's inputs where it is defined."""
    namespace, name, *overload = op.split(".")
    if op == "_operator.getitem":
        return ["a", "b"] if callable(operator.getitem) else []
    if overload and namespace in ("aten", "qalora"):
        found = getattr(getattr(getattr(torch.ops, namespace), name), overload[0])
        return [argument.name for argument in schema_of(found).arguments]
    if op == "qalora.GroupQuantLinear":
        return [each.name for each in group_quant_linear_op().op_schema.inputs]
    if op == "com.microsoft.MatMulNBits":
        return [each.name for each in matmul_nbits_op().op_schema.inputs]
    return [each.name for each in onnx.defs.get_schema(name, 24).inputs]


@pytest.mark.parametrize("op", OPERANDS)
def test_names_are_those_of_the_definition(op: str) -> None:
    assert list(OPERANDS[op]) == defined(op)[: len(OPERANDS[op])]


def test_operators_of_this_package_are_named_to_the_last_operand() -> None:
    own = {str(target): view for target, view in VIEWS.items() if str(target) in OPERANDS}
    assert len(own) >= 8
    assert all(len(OPERANDS[op]) == len(defined(op)) for op in own)


def test_an_operand_is_read_by_its_name_however_it_was_given() -> None:
    node = Node("y", "aten.linear.default", (1, 2), {"bias": 3}, "y = linear(…)")
    assert [node["input"], node["weight"], node["bias"]] == [1, 2, 3]
    assert node.get("bias") == 3
    assert Node("y", "aten.linear.default", (1, 2), {}, "").get("bias", 0) == 0
    with pytest.raises(KeyError, match="bias"):
        Node("y", "aten.linear.default", (1, 2), {}, "")["bias"]
