"""Faults of passes: planted in adapted, folded and lowered programs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

import qalora_compile as qc
from qalora_compile.ir.ops.affine_linear import STEP
from tests.verify.planted import WIDTH, Fault, find, program, with_graph, with_tensors

_ATEN = torch.ops.aten
Change = Callable[[Tensor], Tensor]


def _tensors(**changes: Change) -> Callable[[qc.Program], qc.Program]:
    """Changes of tensors; `q__offset` stands for `q.offset`."""
    named = {name.replace("__", "."): change for name, change in changes.items()}
    return lambda source: with_tensors(source, named)


def _graph(change: Callable[[fx.Graph], None]) -> Callable[[qc.Program], qc.Program]:
    return lambda source: with_graph(source, change)


def _update(site: str) -> Tensor:
    """What folding adds to an offset: scaling · f · B A, f = 1/32 (mean pooling)."""
    tensors = program("adapted").tensors()
    a, b = (tensors[f"{site}.lora_{part}"].detach() for part in "AB")
    return 2.0 / 32 * (b @ a)


def _folded_with(site: str, factor: float) -> Callable[[qc.Program], qc.Program]:
    """Another factor than the right one for the update of one site."""
    return _tensors(**{f"{site}__offset": lambda t: t + (factor - 1) * _update(site)})


def _swapped(*names: tuple[str, str]) -> Callable[[qc.Program], qc.Program]:
    """Pairs of tensors exchanged."""

    def plant(source: qc.Program) -> qc.Program:
        tensors = source.tensors()
        changes: dict[str, Change] = {}
        for first, second in names:
            changes[first] = partial(_replace, tensors[second].detach().clone())
            changes[second] = partial(_replace, tensors[first].detach().clone())
        return with_tensors(source, changes)

    return plant


def _replace(new: Tensor, old: Tensor) -> Tensor:
    return new


def _rounded(offset: Tensor) -> Tensor:
    scale = program("folded").tensors()["q.scale"]
    return -scale * (-offset / scale).round()


def _at(row: int, column: int, change: Callable[[Tensor], Tensor]) -> Change:
    """A change of one element."""

    def apply(tensor: Tensor) -> Tensor:
        tensor[row, column] = change(tensor[row, column])
        return tensor

    return apply


def _transposed_codes(packed: Tensor) -> Tensor:
    """The codes of a square weight `[48, 48]`, two to a byte, transposed."""
    codes = (
        torch.stack([packed & 15, packed >> 4], -1).reshape(WIDTH, WIDTH).t().reshape(WIDTH, -1, 2)
    )
    return codes[..., 0] | codes[..., 1] << 4


def _nibbles(packed: Tensor) -> Tensor:
    return (packed & 15) << 4 | packed >> 4


def _no_tail(offset: Tensor) -> Tensor:
    offset[:, -1] = 0
    return offset


def _drop_bias(graph: fx.Graph) -> None:
    node = find(graph, "qalora.group_linear")
    node.args = (*node.args[:4], None, *node.args[5:])


def _bias_twice(graph: fx.Graph) -> None:
    node = find(graph, "qalora.group_linear")
    with graph.inserting_after(node):
        again = graph.call_function(_ATEN.add.Tensor, (node, node.args[4]))
    node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
    again.meta.update(node.meta)
    node.meta.pop("qalora_site")


def _regroup(graph: fx.Graph) -> None:
    node = find(graph, "qalora.group_linear")
    node.args = (*node.args[:6], 24)  # two groups as well


def _retarget(target: str, new: Any, index: int = 0) -> Callable[[fx.Graph], None]:
    def change(graph: fx.Graph) -> None:
        find(graph, target, index).target = new

    return change


def _argument(target: str, place: int, value: Any, index: int = 0) -> Callable[[fx.Graph], None]:
    def change(graph: fx.Graph) -> None:
        find(graph, target, index).update_arg(place, value)

    return change


def _drop_residual(graph: fx.Graph) -> None:
    node = find(graph, "aten.add", -1)
    kept = node.args[1]
    assert isinstance(kept, fx.Node)
    node.replace_all_uses_with(kept)


def _other_residual(graph: fx.Graph) -> None:
    find(graph, "aten.add", -1).update_arg(0, find(graph, "aten.embedding"))


def _keep_dropout(graph: fx.Graph) -> None:
    node = find(graph, "aten.dropout")
    with graph.inserting_after(node):
        kept = graph.call_function(_ATEN.native_dropout.default, (node.args[0], 0.1, True))
    with graph.inserting_after(kept):
        value = graph.call_function(operator.getitem, (kept, 0))
    node.replace_all_uses_with(value)


def _through_half(graph: fx.Graph) -> None:
    node = find(graph, "aten.silu")
    with graph.inserting_after(node):
        half = graph.call_function(_ATEN.to.dtype, (node, torch.float16))
    with graph.inserting_after(half):
        wide = graph.call_function(_ATEN.to.dtype, (half, torch.float32))
    node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not half)


def _flipped_input(graph: fx.Graph) -> None:
    """A missed transpose around a layer: the words of a sentence in the wrong order."""
    node = find(graph, "aten.layer_norm", 1)
    with graph.inserting_after(node):
        flipped = graph.call_function(_ATEN.flip.default, (node, [1]))
    node.replace_all_uses_with(flipped, delete_user_cb=lambda user: user is not flipped)


def _split_tie(source: qc.Program) -> qc.Program:
    """The head gets a copy of the embedding of its own, rounded to eight bits."""
    graph, tensors = source.copy_graph(), source.tensors()
    head = find(graph, "aten.linear", -1)
    table = tensors[str(head.args[1].target)].detach()  # type: ignore[union-attr]
    step = table.abs().max() / 127
    with graph.inserting_before(head):
        own = graph.get_attr("lm_head.own")
    head.update_arg(1, own)
    tensors |= {"lm_head.own": (table / step).round() * step}
    return source.evolve(graph=graph, tensors=tensors)


def _exchange_inputs(graph: fx.Graph) -> None:
    """The second layer of the network reads what the first one reads."""
    up = find(graph, "qalora.group_linear", 3)
    up.update_arg(0, find(graph, "aten.layer_norm", 0))


def _stale_sums(graph: fx.Graph) -> None:
    """The correction of `up` takes the group-sums that were made for q, k and v."""
    first, second = (find(graph, "qalora.group_sum", i) for i in (0, 1))
    second.replace_all_uses_with(first)


def _drop_correction(graph: fx.Graph) -> None:
    node = find(graph, "qalora.matmul_nbits")
    total = next(iter(node.users))
    total.replace_all_uses_with(node)
    node.meta.update(total.meta)
    graph.erase_node(total)


def _part(kind: str, name: str) -> Tensor:
    return program(f"adapted+{kind}").tensors()[name].detach()


def _floored(packed: Tensor) -> Tensor:
    """Trained codes of `down` rounded down, not to the nearest: two codes of 4 bits to a byte."""
    old, shift = _part("qat", "down.qweight"), _part("qat", "down.adapter_shift")
    codes = torch.stack([old & 15, old >> 4], -1).flatten(1)
    moved = (codes + STEP * shift).floor().clamp(0, 15).to(torch.uint8)
    return moved[:, ::2] | moved[:, 1::2] << 4


def _fixed_codes(graph: fx.Graph) -> None:
    find(graph, "qalora.affine_linear").update_arg(10, None)


def _scramble(correction: Tensor) -> Tensor:
    return correction.t().reshape(correction.shape).contiguous()


QKV = (("q.qweight", "k.qweight"), ("q.scale", "k.scale"), ("q.offset", "k.offset"))

PROGRAM_FAULTS = [
    # folding: adapted against folded
    Fault("adapter dropped", "program folded", _folded_with("q", 0.0), "q:"),
    Fault("scaling squared", "program folded", _folded_with("k", 2.0), "k:"),
    Fault("pooling: sum for mean", "program folded", _folded_with("v", 32.0), "v:"),
    Fault("pooling: mean × groups for mean", "program folded", _folded_with("up", 2.0), "up:"),
    Fault("pooling: mean taken twice", "program folded", _folded_with("down", 1 / 32), "down:"),
    Fault("update subtracted", "program folded", _folded_with("q", -1.0), "q:"),
    Fault("sign of the offset", "program folded", _tensors(k__offset=torch.neg), "k:"),
    Fault("zero-points rounded", "program folded", _tensors(q__offset=_rounded), "q:"),
    Fault(
        "zero-point off by one",
        "program folded",
        lambda p: with_tensors(p, {"v.offset": lambda t: t + p.tensors()["v.scale"]}),
        "v:",
    ),
    Fault(
        "scale and offset exchanged",
        "program folded",
        _swapped(("up.scale", "up.offset")),
        "up:",
    ),
    Fault("groups permuted", "program folded", _tensors(q__offset=lambda t: t.flip(1)), "q:"),
    Fault(
        "update along the wrong axis",
        "program folded",
        _tensors(q__offset=lambda t: t.roll(1, 0)),
        "q:",
    ),
    Fault("tail group dropped", "program folded", _tensors(q__offset=_no_tail), "q:"),
    Fault(
        "one code changed",
        "program folded",
        _tensors(down__qweight=_at(3, 5, lambda c: c ^ 1)),
        "down:",
    ),
    Fault("nibbles swapped", "program folded", _tensors(v__qweight=_nibbles), "v:"),
    Fault("missed transpose", "program folded", _tensors(q__qweight=_transposed_codes), "q:"),
    Fault(
        "scale of one group",
        "program folded",
        _tensors(up__scale=_at(7, 1, lambda s: s * 1.01)),
        "up:",
    ),
    Fault("weights of q and k exchanged", "program folded", _swapped(*QKV), "q:"),
    Fault("bias missing", "program folded", _graph(_drop_bias), "q:"),
    Fault("bias twice", "program folded", _graph(_bias_twice), "q:"),
    Fault("biases of q and k exchanged", "program folded", _swapped(("q.bias", "k.bias")), "q:"),
    Fault("other group size, as many groups", "program folded", _graph(_regroup), "q:"),
    # what stands around the layers
    Fault(
        "activation replaced",
        "program folded",
        _graph(_retarget("aten.silu", _ATEN.gelu.default)),
        "input of down",
        "down",
    ),
    Fault(
        "gate replaced",
        "program folded",
        _graph(_retarget("aten.sigmoid", _ATEN.tanh.default)),
        "input of up",
        "up",
    ),
    Fault(
        "residual removed",
        "program folded",
        _graph(_drop_residual),
        "output output",
        "lm_head",
        node="lm_head",
    ),
    Fault(
        "residual of another tensor",
        "program folded",
        _graph(_other_residual),
        "output output",
        "lm_head",
        node="lm_head",
    ),
    Fault(
        "eps of a norm",
        "program folded",
        _graph(_argument("aten.layer_norm", 4, 1e-3)),
        "input of q",
        "q",
    ),
    Fault("dropout left on", "program folded", _graph(_keep_dropout), "input of up", "up"),
    Fault(
        "cast to half and back", "program folded", _graph(_through_half), "input of down", "down"
    ),
    Fault("an axis reversed", "program folded", _graph(_flipped_input), "input of up", "up"),
    Fault(
        "layer reads another tensor",
        "program folded",
        _graph(_exchange_inputs),
        "input of up",
        "up",
    ),
    Fault(
        "tied weight split",
        "program folded",
        _split_tie,
        "output output",
        "lm_head",
        node="lm_head",
    ),
    # adapters themselves: folded against adapted
    Fault("adapter of another site", "program adapted", _swapped(("q.lora_A", "k.lora_A")), "q:"),
    Fault(
        "scaling of one adapter",
        "program adapted",
        _graph(_argument("qalora.pooled_adapter", 3, 2.0, 1)),
        "k:",
    ),
    # scales and codes that train
    Fault(
        "factor missing in the offsets",
        "program folded+affine",
        _tensors(
            q__offset=lambda t: t - _part("affine", "q.offset") * _part("affine", "q.adapter_gain")
        ),
        "q:",
    ),
    Fault(
        "factor missing in the scales",
        "program folded+affine",
        _tensors(k__scale=lambda t: _part("affine", "k.scale")),
        "k:",
    ),
    Fault(
        "factors permuted", "program folded+affine", _tensors(v__scale=lambda t: t.flip(0)), "v:"
    ),
    Fault(
        "factor of another site",
        "program adapted+affine",
        _swapped(("q.adapter_gain", "k.adapter_gain")),
        "q:",
    ),
    Fault(
        "trained codes not folded",
        "program folded+qat",
        _tensors(up__qweight=lambda t: _part("qat", "up.qweight")),
        "up:",
    ),
    Fault(
        "trained codes rounded down",
        "program folded+qat",
        _tensors(down__qweight=_floored),
        "down:",
    ),
    Fault("codes of one site fixed", "program adapted+qat", _graph(_fixed_codes), "q:"),
    # lowering: folded against lowered
    Fault("correction dropped", "program lowered:ort-stock", _graph(_drop_correction), "q:"),
    Fault(
        "correction scrambled", "program lowered:ort-stock", _tensors(v__correction=_scramble), "v:"
    ),
    Fault(
        "sign of the correction", "program lowered:onnx", _tensors(k__correction=torch.neg), "k:"
    ),
    Fault("stale group-sums", "program lowered:ort-stock", _graph(_stale_sums), "up:"),
    Fault("stale group-sums in digits", "program lowered:digits", _graph(_stale_sums), "up:"),
    Fault(
        "zero-point rounded for ort",
        "program lowered:ort",
        _tensors(q__zero_point=torch.round),
        "q:",
    ),
]
