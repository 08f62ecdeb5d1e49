"""Trained low-rank updates as pooled adapters of a quantized program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qalora_compile.errors import PreconditionError, UserInputError
from qalora_compile.ir.activation_order import column_orders
from qalora_compile.ir.affine import expand_groups
from qalora_compile.ir.lora_update import LowRankUpdate, check_pools, concatenate
from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import KEEP, Site, SitePlan
from qalora_compile.passes.analysis.select_sites import format_choices
from qalora_compile.passes.framework.pipeline import Pipeline
from qalora_compile.passes.insert_adapters import InsertAdapters
from qalora_compile.passes.share_group_sums import ShareGroupSums

Updates = Mapping[str, Sequence[LowRankUpdate]]
"""The updates of each layer, which are added up, by the layer's path."""

_SHOWN = 3


def check_updates(plan: SitePlan, updates: Updates) -> None:
    """Check that updates belong to this model.

    Raises:
        UserInputError: the model lacks a layer, or it has another size; the first is named.
        PreconditionError: a layer is kept in float, or is one of stacked experts.
    """
    sites = {site.path: site for site in plan if site.n}
    for path, several in updates.items():
        site = sites.get(path)
        if site is None:
            raise UserInputError(
                f"the adapter is of another model: this one has no linear layer {path}",
                where=path,
                hint="give the model that the adapter was trained on",
            )
        for update in several:
            _check_sizes(site, update)
        if site.decision == KEEP or site.experts or site.frozen_integer_zero:
            raise PreconditionError(
                "the adapter adapts a layer that has no foldable adapter: "
                f"{site.reason if site.decision == KEEP else 'experts or fixed zero-points'}",
                where=path,
                hint="name the layer in targets, so that it is quantized",
            )


def _check_sizes(site: Site, update: LowRankUpdate) -> None:
    check_pools(update, site.k, site.path)
    pool = update.pool or 1
    wide, high = update.a.shape[1] * pool, update.b.shape[0]
    if (wide, high) != (site.k, site.n):
        pools = update.pool is None and high == site.n and site.k % wide == 0
        raise UserInputError(
            f"the adapter is of another model: it is for a layer of {wide}×{high}, the model's is "
            f"{site.shape}",
            where=site.path,
            hint="give the model that the adapter was trained on"
            + (f", or say how it pools groups of {site.k // wide} (as_pooled)" if pools else ""),
        )


def losses(program: Program, updates: Updates) -> dict[str, float]:
    """The loss of each update when it is made constant inside the groups, by path.

    The fraction ‖update − nearest‖ / ‖update‖ of the sum of a layer's updates; 0 where it folds.
    """
    sites, found = _sites(program), {}
    for path, several in _in_order(program, updates).items():
        k, group = sites[path].k, sites[path].group_size or 1
        if all(_folds(update, sites[path]) for update in several):
            found[path] = 0.0
            continue
        exact = sum((update.matrix(k) for update in several[1:]), several[0].matrix(k))
        near = concatenate([update.per_group(k, group) for update in several]).matrix(k)
        size = float(exact.norm())
        found[path] = float((exact - near).norm()) / size if size else 0.0
    return found


def _sites(program: Program) -> dict[str, Site]:
    return {site.path: site for site in program.plan.to_adapt()}


def _in_order(program: Program, updates: Updates) -> dict[str, list[LowRankUpdate]]:
    """The updates with their columns in the program's order: by group, for activation order.

    Columns that an update pools need not be adjacent in the program, so it is expanded to one value
    per column.
    """
    orders, sites = column_orders(program), _sites(program)
    return {
        path: [_permuted(update, orders.get(path), sites[path].k) for update in several]
        for path, several in updates.items()
    }


def _permuted(update: LowRankUpdate, order: Tensor | None, k: int) -> LowRankUpdate:
    if order is None:
        return update
    wide = update.a if update.pool is None else expand_groups(update.a, update.pool, k)
    return LowRankUpdate(wide[:, order], update.b, update.factor, None)


def _folds(update: LowRankUpdate, site: Site) -> bool:
    """Whether an update, its columns in order, is constant inside the groups of its weight."""
    group = site.group_size or 1
    if update.pool is not None:
        return update.folds_into(group)
    return torch.equal(expand_groups(update.a[:, ::group], group, site.k), update.a)


def import_lora(program: Program, updates: Updates, *, approximate: bool = False) -> Program:
    """Insert updates as adapters: a program at stage `adapted`, ready to fold or to train further.

    Several updates of a layer are added up exactly, by concatenating their ranks. A layer without
    an update gets an adapter of rank 1 that is zero.

    Args:
        program: At stage `quantized`.
        updates: See `check_updates`.
        approximate: Replace updates that are not constant inside the quantization groups by the
            nearest that are.

    Raises:
        UserInputError, PreconditionError: see `check_updates`; or an update does not fold and
            `approximate` is false; the message says what would be lost.
    """
    check_updates(program.plan, updates)
    if not approximate:
        _check_folds(program, updates)
    sites = {site.path: site for site in program.plan.weights_to_adapt()}
    made = {
        path: concatenate(
            [update.per_group(sites[path].k, sites[path].group_size or 1) for update in several]
        )
        for path, several in _in_order(program, updates).items()
    }
    others = {path: update.rank for path, update in made.items() if update.rank != 1}
    insert = InsertAdapters(rank=1, alpha=1.0, use_rslora=True, ranks=format_choices(others))
    adapted = Pipeline([insert, ShareGroupSums()])(program).program
    tensors = adapted.tensors()
    for path, update in made.items():
        factor = insert.factor_of(sites[path])
        _put(tensors, f"{path}.lora_A", update.a)
        _put(tensors, f"{path}.lora_B", update.b / factor)
    return adapted.evolve(graph=adapted.copy_graph(), tensors=tensors)


def _put(tensors: dict[str, Tensor], name: str, values: Tensor) -> None:
    tensors[name] = nn.Parameter(values.to(tensors[name].dtype).contiguous())


def _check_folds(program: Program, updates: Updates) -> None:
    sites, orders = _sites(program), column_orders(program)
    odd = [
        (path, update)
        for path, several in _in_order(program, updates).items()
        for update, moved in zip(updates[path], several, strict=True)
        if not _folds(moved, sites[path])
    ]
    if not odd:
        return
    path, update = odd[0]
    lost = losses(program, updates)
    worst = sorted(lost, key=lambda name: -lost[name])[:_SHOWN]
    pooled = f"pools groups of {update.pool}" if update.pool else "is plain LoRA, which pools none"
    if path in orders:
        pooled += ", and the weight was quantized in activation order: groups are not contiguous"
    raise PreconditionError(
        f"the adapter {pooled}; {len(odd)} of its updates are not constant inside the weight's "
        f"groups of {sites[path].group_size}, so they do not fold. The nearest that do lose "
        f"{sum(lost.values()) / len(lost):.0%} of an update on average, at most "
        + ", ".join(f"{lost[name]:.0%} ({name})" for name in worst),
        where=path,
        hint="take the nearest all the same (adapt --plain approximate), add the adapter to the "
        "float weights before they are quantized (adapt --plain merge), or train "
        + (
            "on it with finetune, which pools in that order"
            if path in orders
            else "with finetune, whose adapters fold; PEFT's use_qalora=True pools on GPTQ layers "
            "alone, with a qalora_group_size that is a multiple of the group size"
        ),
    )
