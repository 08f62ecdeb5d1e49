"""The forms that a program trains in: the same losses and gradients, less kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qalora_compile as qc
from qalora_compile.errors import PreconditionError, UnsupportedError
from qalora_compile.ir.module import ProgramModule
from qalora_compile.ir.spec import ADAPTED_LINEAR, ADAPTERS, GROUP_SUM
from qalora_compile.training import Example, FitSpec, fit
from qalora_compile.training.data.example import IGNORED, Batch
from qalora_compile.training.evaluate import label_loss, program_forward
from qalora_compile.training.forward import chunked_loss
from qalora_compile.training.forward import training_forward as forward_module
from qalora_compile.training.forward.chunked_loss import split_head
from qalora_compile.training.forward.fuse_adapters import fuse_adapters
from qalora_compile.training.forward.layer_checkpointing import split_layers
from qalora_compile.training.forward.recompute_activations import private_to, recompute_activations
from qalora_compile.training.forward.training_forward import TrainingForward
from tests.models import MLP, UsedTwice, gpt2, llama, randomize_adapters, token_ids, worst

IDS = token_ids(3, 12)


class Dropping(nn.Module):
    """Layers with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Apply them."""
        for block in self.blocks:
            x = x + functional.dropout(torch.relu(block(x)), 0.3, self.training)
        return x


def batch_of(ids: Tensor) -> Batch:
    """A batch in which some positions carry no loss."""
    labels = ids.clone()
    labels[0, :7] = IGNORED
    return Batch(ids, torch.ones_like(ids), labels)


def adapted(model: nn.Module, *args: Tensor, **quant: Any) -> qc.Program:
    program = qc.capture_model(model.eval(), args)
    program = qc.quantize_groups(program, qc.QuantSpec(group_size=16), **quant)
    return randomize_adapters(qc.insert_adapters(program, qc.AdapterSpec(rank=4)))


def language_model(dtype: torch.dtype = torch.float32, **quant: Any) -> qc.Program:
    torch.manual_seed(1)
    return adapted(llama().to(dtype), IDS, **quant)


def fused(program: qc.Program) -> ProgramModule:
    return program.module.rebuild(fuse_adapters(program), program.tensors())


def complete_loss(program: qc.Program, batch: Batch) -> Tensor:
    """By the program itself, and all its logits."""
    rows, targets = label_loss(
        program_forward(program)(batch.input_ids, batch.attention_mask), batch
    )
    return functional.cross_entropy(rows, targets)


def grads(program: qc.Program, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, program.adapter_parameters()))


HEADS: dict[str, Any] = {
    "float head": {},
    "adapted head": {"targets": ["lm_head", "q_proj", "down_proj"]},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_the_program(head: str, checkpointing: bool) -> None:
    program = language_model(torch.float64, **HEADS[head])  # in which rounding hides nothing
    batch = batch_of(IDS)
    forward = TrainingForward(program, gradient_checkpointing=checkpointing)
    mine, theirs = forward.loss(batch), complete_loss(program, batch)
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-10)
    for ours, other in zip(grads(program, mine), grads(program, theirs), strict=True):
        assert ours.dtype == other.dtype
        assert worst(ours, other) <= 1e-10 * float(other.abs().max() + 1e-3)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    program = language_model(torch.float64, targets=["lm_head", "up_proj"])
    batch = batch_of(IDS)
    forward = TrainingForward(program)
    whole = grads(program, forward.loss(batch))
    monkeypatch.setattr(chunked_loss, "_CHUNK_ELEMENTS", 500)  # three rows of 128
    for ours, other in zip(grads(program, forward.loss(batch)), whole, strict=True):
        assert worst(ours, other) <= 1e-10 * float(other.abs().max() + 1e-3)
    with torch.no_grad():
        assert forward.loss(batch).item() == pytest.approx(complete_loss(program, batch).item())


def test_a_gradient_is_scaled_by_what_comes_after_the_loss() -> None:
    program, batch = language_model(), batch_of(IDS)
    forward = TrainingForward(program)
    once = grads(program, forward.loss(batch))
    for ours, other in zip(grads(program, forward.loss(batch) * 3), once, strict=True):
        assert torch.allclose(ours, other * 3, rtol=1e-4, atol=1e-6)


def test_logits_that_are_not_a_product_of_rows_are_computed_at_once() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(32, 16), nn.Linear(16, 32)

        def forward(self, ids: Tensor) -> Tensor:
            return torch.cumsum(self.fc(self.table(ids)), 1)

    torch.manual_seed(0)
    ids = torch.randint(0, 32, (2, 6))
    program = adapted(Odd(), ids)
    forward = TrainingForward(program)
    assert split_head(program.module)[1].module is None
    assert forward.loss(batch_of(ids)).item() == pytest.approx(
        complete_loss(program, batch_of(ids)).item()
    )


def test_every_adapter_is_fused_and_outputs_are_those_of_the_program() -> None:
    for model, x in ((UsedTwice(32), torch.randn(4, 32)), (gpt2(), IDS)):
        program = adapted(model, x)
        wanted = sum(node.target in ADAPTERS for node in program.graph.nodes)
        fused = [node.target for node in fuse_adapters(program).nodes]
        assert fused.count(ADAPTED_LINEAR) == wanted
        assert GROUP_SUM not in fused
        mine, theirs = TrainingForward(program)(x), program(x)
        assert worst(mine, theirs) <= 1e-5


def test_half_precision_keeps_the_adapter_apart() -> None:
    program = adapted(MLP(32, 16).bfloat16(), torch.randn(2, 32).bfloat16())
    assert all(node.target is not ADAPTED_LINEAR for node in fuse_adapters(program).nodes)


def test_layers_are_found_where_few_values_cross(tmp_path: Path) -> None:
    program = language_model()
    program.save(tmp_path / "program")
    for one in (program, qc.Program.load(tmp_path / "program")):
        segments = split_layers(one.graph)
        names = [segment.layer for segment in segments]
        assert names == [None, "model.layers.0", "model.layers.1", None]
        own = set(segments[2].nodes)
        leaving = [n for n in own if any(user not in own for user in n.users)]
        assert len(leaving) == 1, "the residual stream alone"


def kept_bytes(forward: Any, batch: Batch) -> int:
    """What a backward pass needs, before it runs, the stored weights apart."""
    stored = {t.data_ptr() for t in forward.program.tensors().values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in stored:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward.loss(batch)
    return sum(kept.values())


def test_checkpointing_keeps_less() -> None:
    program, batch = language_model(), batch_of(IDS)
    plain = kept_bytes(TrainingForward(program), batch)
    less = kept_bytes(TrainingForward(program, gradient_checkpointing=True), batch)
    assert less < plain / 3


def test_what_lies_between_layers_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    program, batch = language_model(), batch_of(IDS)
    less = kept_bytes(TrainingForward(program), batch)
    found = [name for name, _ in recompute_activations(fused(program)).named_children()]
    parts = [name for name in found if name.startswith("between")]
    assert len(parts) == 4, "attention and the gated network, in both layers"
    monkeypatch.setattr(forward_module, "recompute_activations", lambda module: module)
    assert less < 0.75 * kept_bytes(TrainingForward(program), batch)


def test_what_goes_elsewhere_or_has_effects_is_not_run_again() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            seen = torch.tanh(self.a(x))
            changed = torch.sin(seen).mul_(2)
            return self.b(changed), seen

    program = adapted(Odd(), torch.randn(3, 16))
    graph = fused(program).graph
    layer = [node for node in graph.nodes if node.target is ADAPTED_LINEAR][1]
    order = {node: place for place, node in enumerate(graph.nodes)}
    assert not {"tanh", "mul_"} & {str(node.name) for node in private_to(layer, order)}
    x = torch.randn(3, 16)
    assert worst(TrainingForward(program)(x), program(x)) <= 1e-5


def test_fit_with_checkpointing_learns_the_same() -> None:
    rows = [tuple(range(start, start + 9)) for start in range(10, 16)]
    examples = [Example(row, row) for row in rows]
    losses = []
    for checkpointing in (False, True):
        spec = FitSpec(
            steps=3,
            batch_size=3,
            learning_rate=1e-2,
            seed=3,
            gradient_checkpointing=checkpointing,
        )
        losses.append(fit(language_model(), examples, spec).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_dropout_falls_alike_in_the_second_run() -> None:
    torch.manual_seed(2)
    x = torch.randn(8, 16)
    program = adapted(Dropping(), x).train()
    found = []
    for checkpointing in (False, True):
        forward = TrainingForward(program, gradient_checkpointing=checkpointing)
        torch.manual_seed(5)
        y = forward(x)
        found.append([y.detach(), *grads(program, y.square().sum())])
    for plain, again in zip(*found, strict=True):
        assert worst(plain, again) <= 1e-5 * float(plain.abs().max())
    forward = TrainingForward(program, gradient_checkpointing=True)
    assert worst(forward(x), forward(x)) > 0, "training"
    program.eval()
    assert worst(forward(x), forward(x)) == 0
    assert worst(forward(x), program(x)) <= 1e-5


def test_what_cannot_be_checkpointed_or_trained_is_refused() -> None:
    program = adapted(UsedTwice(32), torch.randn(2, 32))
    forward = TrainingForward(program, gradient_checkpointing=True)
    with pytest.raises(UnsupportedError, match="no layers"):
        forward(torch.randn(2, 32))
    with pytest.raises(PreconditionError, match="stage adapted"):
        TrainingForward(qc.fold_adapters(program))
