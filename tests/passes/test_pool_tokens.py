"""pool-tokens: the vectors that torch makes by the formulas of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qalora_compile as qc
from qalora_compile.errors import UserInputError
from qalora_compile.passes import get_pass
from qalora_compile.passes.pool_tokens import PoolTokens
from tests.models import MLP


class Encoder(nn.Module):
    """States of tokens, each its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(16, 32), nn.Linear(32, 32)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """The mask is for who pools."""
        hidden = torch.tanh(self.fc(self.embed(input_ids)))
        return {"last_hidden_state": hidden * attention_mask.ne(5)[..., None], "other": hidden}


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [0, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])


def captured() -> qc.Program:
    torch.manual_seed(0)
    call = {"input_ids": IDS, "attention_mask": MASK}
    return qc.capture_model(Encoder().eval(), (), call)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_vector_is_that_of_the_formula(pooling: str, normalize: bool) -> None:
    program = captured()
    result = PoolTokens(pooling=pooling, normalize=normalize)(program)
    assert result.program.signature.outputs == (*program.signature.outputs, "sentence_embedding")
    before, after = program(IDS, MASK), result.program(IDS, MASK)
    hidden, mask = before["last_hidden_state"], MASK[..., None].float()
    wanted = hidden[:, 0]
    if pooling == "mean":
        wanted = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    if normalize:
        wanted = functional.normalize(wanted, p=2, dim=1)
    assert torch.allclose(after["sentence_embedding"], wanted, atol=1e-6)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_pooled_program_is_stored_and_quantized(tmp_path: object) -> None:
    program = PoolTokens(pooling="mean", normalize=True)(captured()).program
    quantized = qc.quantize_groups(program, qc.QuantSpec(bits=8, group_size=16))
    quantized.save(f"{tmp_path}/program")
    again = qc.Program.load(f"{tmp_path}/program")
    one, other = quantized(IDS, MASK), again(IDS, MASK)
    assert torch.equal(one["sentence_embedding"], other["sentence_embedding"])
    assert again.history[-3:][0].startswith("pool-tokens{pooling=mean,normalize=true}") or any(
        entry.startswith("pool-tokens{") for entry in again.history
    )


def test_other_programs_are_left_alone_with_a_reason() -> None:
    step = get_pass("pool-tokens")
    plain = qc.capture_model(MLP(16, 8).eval(), (torch.randn(2, 16),))
    (skip,) = step(plain).skips
    assert "the outputs are output, and not last_hidden_state" in skip.why
    once = step(captured()).program
    assert "already" in step(once).skips[0].why
    with pytest.raises(UserInputError, match="pooling is 'max'"):
        PoolTokens(pooling="max")


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden("pool-tokens", str(PoolTokens(pooling="mean", normalize=True)(captured()).program))
