"""Rows of heads: what they were made from, or new nodes of the same values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from qalora_compile.passes.fusions.head_layout import heads_of_rows, rows_of_heads

FORMS: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {
    "unflatten": (True, lambda x: x.unflatten(2, (2, -1)).transpose(1, 2)),
    "view": (True, lambda x: x.view(2, 3, -1, 4).transpose(1, 2)),
    "view of known heads": (False, lambda x: x.view(2, 3, 2, 4).transpose(2, 1)),
    "not rows": (False, lambda x: x.unflatten(2, (2, -1)).movedim(2, 1)),
}


@pytest.mark.parametrize(("found", "form"), FORMS.values(), ids=FORMS)
def test_rows_of_heads(found: bool, form: Callable[[Tensor], Tensor]) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(2, 3, 8)
    graph = make_fx(form, pre_dispatch=True)(x).graph
    (source,) = (node for node in graph.nodes if node.op == "placeholder")
    source.meta["val"] = x
    (result,) = graph.output_node().args
    assert isinstance(result, fx.Node)
    with graph.inserting_before(graph.output_node()):
        rows = rows_of_heads(result)
        again = heads_of_rows(rows, 2)
    graph.output_node().args = ((rows, again),)
    assert (rows is source) == found
    assert all(map(torch.equal, fx.GraphModule({}, graph)(x), (x, form(x))))
