"""The check of the module-level back-end: it has to be the adapted program in every respect."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import qalora_compile as qc
from tests.models import assert_close, outputs, scale_of, worst

if TYPE_CHECKING:
    from tests.zoo.checks import Study


def check_modules(study: Study, captured: tuple[int, int], size: tuple[int, int]) -> float:
    """`adapt_module_` gives the program's tensors, outputs and gradients to the model itself."""
    from tests.zoo.checks import ADAPTER, QUANT

    model = copy.deepcopy(study.model)
    args, kwargs = study.inputs(*captured)
    program = qc.adapt_module_(model, args, kwargs, quant=QUANT, adapter=ADAPTER)
    assert str(program) == str(study.adapted), "the two back-ends follow two plans"
    _interchange(study.adapted.tensors(), model)
    largest = 0.0
    for arguments in (study.inputs(*captured), study.inputs(*size)):
        with torch.no_grad():
            expected = study.adapted(*arguments[0], **arguments[1])
            found = model(*arguments[0], **arguments[1])
        assert_close(found, expected, relative=1e-5)
        largest = max(largest, worst(found, expected) / scale_of(expected))
    _same_gradients(program, model, args, kwargs)
    assert_close(
        qc.fold_adapters(program)(*args, **kwargs), study.folded(*args, **kwargs), relative=1e-5
    )
    return largest


def _interchange(tensors: dict[str, Tensor], model: nn.Module) -> None:
    """Load a program's state into the model; buffers that no state dict holds are left out."""
    state = model.state_dict()
    unsaved = {n for n, _ in model.named_buffers(remove_duplicate=False) if n not in state}
    wanted = {n: t for n, t in tensors.items() if n not in unsaved and "lifted_tensor" not in n}
    found = model.load_state_dict(wanted, strict=False)
    assert not found.unexpected_keys, f"the model has no {found.unexpected_keys}"
    ours = ("qweight", "scale", "offset", "lora_A", "lora_B")
    pointers = {model.state_dict()[n].data_ptr() for n in wanted}
    missing = [n for n in found.missing_keys if n.rpartition(".")[2] in ours]
    assert all(state[n].data_ptr() in pointers for n in missing), f"the program has no {missing}"


def _same_gradients(program: qc.Program, model: nn.Module, args: Any, kwargs: Any) -> None:
    """In training mode, with one seed for dropout: equal outputs, and equal gradients."""
    gradients: list[dict[str, Tensor]] = []
    results: list[Any] = []
    before = copy.deepcopy(model.state_dict())
    for run, train in ((program, program.train), (model, model.train)):
        train()
        model.load_state_dict(before)  # batch statistics moved, and are shared
        model.zero_grad()
        torch.manual_seed(4)
        results.append(run(*args, **kwargs))
        floats = [t for t in _raw(results[-1]) if t.requires_grad]
        _projection(floats).backward()
        named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append({n: g.clone() for n, g in named.items()})
    model.load_state_dict(before)
    model.eval()
    program.eval()
    assert_close(outputs(results[1]), outputs(results[0]), relative=3e-5)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in trainable} == {"lora_A", "lora_B"}
    assert gradients[0].keys() == gradients[1].keys() == trainable
    for name, gradient in gradients[0].items():
        assert_close([gradients[1][name]], [gradient], relative=1e-3)


def _projection(values: list[Tensor]) -> Tensor:
    """A scalar that depends on every element: mean squares would not, behind a layer norm."""
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(value.shape, generator=generator) for value in values]
    return torch.stack([(w * v.float()).mean() for w, v in zip(weights, values, strict=True)]).sum()


def _raw(value: Any) -> list[Tensor]:
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
