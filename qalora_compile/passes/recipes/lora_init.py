"""The part of the quantization error that pooled adapters can correct, for each weight.

Codes do not tell the error, so the float weights come from the program before quantization.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qalora_compile.config import AUTO, AdapterSpec
from qalora_compile.errors import PreconditionError, UserInputError
from qalora_compile.ir.affine import dequantize, expand_groups
from qalora_compile.ir.lazy_tensor import is_lazy
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.ops.affine_linear import STEP
from qalora_compile.ir.pattern import get_tensor, match_linear
from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import Site
from qalora_compile.ir.stages import ADAPTER_NAMES, ANNOTATED, CODE_NAMES, FLOAT, SHIFT
from qalora_compile.passes.analysis.select_sites import format_choices
from qalora_compile.passes.framework.base import Pass
from qalora_compile.passes.framework.pipeline import Pipeline
from qalora_compile.passes.insert_adapters import InsertAdapters
from qalora_compile.passes.sort_columns import SortColumns
from qalora_compile.progress import track
from qalora_compile.quantizers.budget import distribute_ranks
from qalora_compile.quantizers.low_rank import PooledCorrection
from qalora_compile.quantizers.statistics import ActivationStatistics

QUANTIZING = "quantize-groups"
_INSIDE = 0.49
"""The largest distance of a latent weight from its code at the start, in codes."""


def annotated_source(source: Program, quantized: Program) -> Program:
    """The program from which `quantized` was made, at stage `annotated`.

    Args:
        source: As captured, or annotated.
        quantized: Its passes before quantize-groups are run on `source`.

    Raises:
        PreconditionError: `source` is at another stage.
    """
    if source.stage not in (FLOAT, ANNOTATED):
        raise PreconditionError(
            f"the float weights are wanted, this program is {source.stage}",
            hint="give the program as it was captured: source=captured",
        )
    steps: list[Pass] = []
    for entry in quantized.history[len(source.history) :]:
        (step,) = Pipeline.parse(entry).passes
        if step.name == QUANTIZING:
            break
        if isinstance(step, SortColumns):
            step = step.with_orders_of(quantized)
        steps.append(step)
    return Pipeline(steps)(source).program if steps else source


def float_weights(annotated: Program) -> dict[str, Tensor]:
    """The matrices to quantize, `[N, K]` or `[E, N, K]`, by path: views of the parameters.

    Raises:
        PreconditionError: a weight has no values yet.
    """
    nodes = {site_of(node): node for node in annotated.graph.nodes}
    found = {}
    for site in annotated.plan.weights_to_quantize():
        linear = match_linear(nodes[site.name])
        tensor = get_tensor(annotated.module, site.weight)
        assert linear is not None and tensor is not None, "the plan was made from this module"
        if is_lazy(tensor):
            raise PreconditionError(
                "the weight was not read yet, so that its error cannot be measured",
                where=site.name,
                hint="give a program whose weights have values",
            )
        found[site.path] = linear.matrix(tensor.detach())
    return found


@dataclass(frozen=True)
class LoraInit:
    """The part of one weight's quantization error that adapters could correct.

    Attributes:
        site: The first row of the weight.
        parts: One decomposition, or one for each expert.
        weight: The weight before quantization, `[N, K]` or `[E, N, K]`.
        statistics: Statistics of the layer's input, if there are any.
    """

    site: Site
    parts: tuple[PooledCorrection, ...]
    weight: Tensor
    statistics: ActivationStatistics | None

    def gains(self) -> list[float]:
        """The share of the layer's output energy that each further rank corrects; falling."""
        wide = self.weight.double()
        if self.statistics is None:
            energy = float(wide.square().sum())
        else:
            energy = self.statistics.output_error(wide)
        values = torch.stack([part.values for part in self.parts])
        return [gain / energy if energy > 0 else 0.0 for gain in values.square().sum(0).tolist()]


def find_lora_init(
    annotated: Program,
    quantized: Program,
    insert: InsertAdapters,
    statistics: Mapping[str, ActivationStatistics],
) -> Iterator[LoraInit]:
    """Compare the quantized weights with the float weights, one at a time.

    Args:
        annotated: See `annotated_source`.
        quantized: At stage `quantized`.
        insert: The pass that defines what the adapters pool.
        statistics: Statistics of the layers' inputs, by path; without, all inputs weigh the same.

    Raises:
        PreconditionError: `annotated` is of another model, or its weights have no values yet.
    """
    weights = float_weights(annotated)
    for site in track(quantized.plan.weights_to_adapt(), "correct"):
        weight = weights.get(site.path)
        lead = (site.experts,) if site.experts else ()
        if weight is None or tuple(weight.shape) != (*lead, site.n, site.k):
            raise PreconditionError(
                "the source has no such weight", where=site.name, hint="give the program before it"
            )
        known = statistics.get(site.path)
        matrices = weight.double().reshape(-1, site.n, site.k)
        changes = matrices - _on_codes(quantized, site).reshape_as(matrices)
        pool = insert.pool_of(site)
        parts = tuple(PooledCorrection.of(change, pool, known) for change in changes)
        yield LoraInit(site, parts, weight, known)


def choose_ranks(
    spec: AdapterSpec, find: Callable[[InsertAdapters], Iterable[LoraInit]]
) -> tuple[InsertAdapters, dict[str, str]]:
    """The pass for a specification, and the reasons of the ranks for the plan, by site path.

    Rank `"auto"` assigns ranks where they lower the output error most per parameter, with each
    layer's error relative to its output (see `distribute_ranks`).

    Args:
        spec: The specification of the adapters.
        find: `find_lora_init` of the program to adapt.

    Raises:
        UserInputError: the budget does not give every weight rank 1.
    """
    options = spec.to_json() | {"init": "zeros", "rank_budget": None}
    if spec.rank != AUTO:
        return InsertAdapters(**options), {}
    gains, costs = {}, {}
    for correction in find(InsertAdapters(**options | {"rank": 1})):
        site = correction.site
        gains[site.path] = correction.gains()
        groups = correction.parts[0].right.shape[1]
        costs[site.path] = (site.experts or 1) * (site.n + groups)
    assert spec.rank_budget is not None, "checked with the specification"
    ranks = distribute_ranks(gains, costs, spec.rank_budget)
    (usual, _), *_ = Counter(ranks.values()).most_common(1)
    others = {path: rank for path, rank in ranks.items() if rank != usual}
    insert = InsertAdapters(**options | {"rank": usual, "ranks": format_choices(others)})
    return insert, {path: _why(gains[path], rank) for path, rank in ranks.items()}


def _why(gains: list[float], rank: int) -> str:
    """The gain of a weight's ranks, and that of the next one."""
    following = f"the next {gains[rank]:.1e}" if rank < len(gains) else "there is no more"
    return f"ranks correct {sum(gains[:rank]):.1e} of the output, {following}"


def _on_codes(quantized: Program, site: Site) -> Tensor:
    """The dequantized weights, float64, experts concatenated: `[.. N, K]`."""
    tensors = quantized.tensors()
    qweight, scale, offset = (tensors[f"{site.path}.{part}"] for part in CODE_NAMES)
    assert site.bits is not None and site.group_size is not None, "it is quantized"
    return dequantize(
        qweight.flatten(0, -2),
        scale.flatten(0, -2).double(),
        offset.flatten(0, -2).double(),
        bits=site.bits,
        group_size=site.group_size,
        k=site.k,
    )


def start_codes(adapted: Program, annotated: Program) -> Program:
    """The program whose latent weights are the float weights, as far as they round to the codes.

    The function stays the same: what is farther from a code than half a step is drawn near to it.

    Args:
        adapted: With adapters of kind `qat`.
        annotated: See `annotated_source`.
    """
    tensors, weights = adapted.tensors(), float_weights(annotated)
    for site in adapted.plan.weights_to_adapt():
        scale = tensors[f"{site.path}.scale"].double()
        change = weights[site.path].double() - _on_codes(adapted, site)
        assert site.group_size is not None, "it is quantized"
        steps = change / expand_groups(
            scale.masked_fill(scale == 0, math.inf), site.group_size, site.k
        )
        shift = steps.clamp(-_INSIDE, _INSIDE) / STEP
        tensors[f"{site.path}.{SHIFT}"] = nn.Parameter(
            shift.to(tensors[f"{site.path}.scale"].dtype)
        )
    return adapted.evolve(graph=adapted.copy_graph(), tensors=tensors)


def start_from(
    adapted: Program, insert: InsertAdapters, corrections: Iterable[LoraInit]
) -> Program:
    """The adapted program with A and B such that scaling · f · B A is the best correction.

    Each row of A is as large as one of the random start, and B takes the other factor, so training
    moves both as from that start. Ranks beyond those of the correction keep the random start.

    Raises:
        UserInputError: the scaling is 0, so that no A and B give a correction.
    """
    tensors = adapted.tensors()
    for correction in corrections:
        site, factor = correction.site, insert.factor_of(correction.site)
        if factor == 0:
            raise UserInputError("init is 'svd' with alpha 0", hint="use an alpha that is not 0")
        names = [f"{site.path}.{part}" for part in ADAPTER_NAMES]
        lora_a, lora_b = (tensors[name].detach().clone() for name in names)
        stacks = zip(
            lora_a.view(-1, *lora_a.shape[-2:]),
            lora_b.view(-1, *lora_b.shape[-2:]),
            correction.parts,
            strict=True,
        )
        for a, b, part in stacks:
            left, right = part.factors(insert.rank_of(site))
            rows = right.shape[0]
            size = right.square().mean(1).sqrt() / (insert.start_of(site) / 3**0.5)
            a[:rows] = right / size[:, None]
            b[:, :rows] = left * size / factor
        tensors |= zip(names, map(nn.Parameter, (lora_a, lora_b)), strict=True)
    return adapted.evolve(graph=adapted.copy_graph(), tensors=tensors)
