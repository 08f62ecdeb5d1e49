"""The text of a program: stable, complete, independent of torch's node names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import qalora_compile as qc
from tests.models import MLP, TiedHead, adapted


def test_golden_text(golden: Callable[[str, str], None]) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(24, 12)

        def forward(self, x: Tensor, mask: Tensor, gain: float = 1.0) -> tuple[Tensor, Tensor]:
            y = self.fc(x).to(torch.float64)
            return torch.where(mask, y, float("-inf")), y.sum([1, 2]) * 0.1

    args = (torch.randn(2, 5, 24), torch.ones(2, 5, 12, dtype=torch.bool))
    golden("printer", str(qc.capture_model(Mixed(), args, {"gain": 0.5})))


def test_text_does_not_depend_on_node_names() -> None:
    program = adapted(MLP(24, 12, 4), (torch.randn(2, 24),))
    graph = program.copy_graph()
    for index, node in enumerate(graph.nodes):
        node._rename(f"node_called_{index}")
    renamed = program.evolve(graph=graph)
    assert [n.name for n in renamed.graph.nodes] != [n.name for n in program.graph.nodes]
    assert str(renamed) == str(program)


def test_text_shows_what_differs() -> None:
    texts = set()
    for bits in (2, 3, 4, 8):
        for group in (8, 12):
            spec = qc.QuantSpec(bits=bits, group_size=group)
            program = qc.capture_model(MLP(24, 12), (torch.randn(2, 24),))
            texts.add(str(qc.quantize_groups(program, spec)))
    assert len(texts) == 8


def test_text_tells_stage_plan_and_trainable_tensors() -> None:
    ids = torch.randint(0, 48, (2, 6))
    program = qc.insert_adapters(qc.quantize_groups(qc.capture_model(TiedHead(), (ids,))))
    text = str(program)
    assert text.startswith("program adapted (2 keep, 1 quantize)\n")
    assert "input %ids: i64[batch, sequence]" in text
    assert text.count(" trainable\n") == 2
    assert "  # mid\n" in text
