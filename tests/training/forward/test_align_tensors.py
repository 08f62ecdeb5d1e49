"""Tensors of a file that is mapped into memory are copied to where torch puts its own."""

from __future__ import annotations

from pathlib import Path

import torch

import qalora_compile as qc
from qalora_compile.training.forward.align_tensors import align_tensors
from tests.models import adapted, llama, token_ids


def test_floating_tensors_are_aligned_and_keep_values_and_sharing(tmp_path: Path) -> None:
    adapted(llama(), (token_ids(2, 9),)).save(tmp_path / "program")
    program = qc.Program.load(tmp_path / "program")
    before = {name: tensor.clone() for name, tensor in program.tensors().items()}
    parameters = program.adapter_parameters()
    odd = [t for t in program.tensors().values() if t.is_floating_point() and t.data_ptr() % 64]
    assert odd, "the file of this program shows nothing"
    align_tensors(program)
    after = program.tensors()
    assert not [n for n, t in after.items() if t.is_floating_point() and t.data_ptr() % 64]
    assert all(torch.equal(after[name], value) for name, value in before.items())
    now = program.adapter_parameters()
    assert all(old is new for old, new in zip(parameters, now, strict=True))


def test_tensors_that_share_their_data_still_do() -> None:
    program = adapted(llama(), (token_ids(2, 9),))
    block = torch.zeros(65)
    names = [n for n, t in program.tensors().items() if t.dim() == 1 and t.is_floating_point()][:2]
    for name in names:
        program.tensors()[name].data = block[1:]
    align_tensors(program)
    first, second = (program.tensors()[name] for name in names)
    assert first.data_ptr() == second.data_ptr() != block[1:].data_ptr()
    assert first.data_ptr() % 64 == 0
