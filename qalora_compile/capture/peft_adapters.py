"""`read_peft_adapter`: reads adapters trained by PEFT, plain LoRA and `use_qalora`.

A folder holds `adapter_config.json` and `adapter_model.safetensors` with the tensors
`base_model.model.<path>.lora_A.weight` `[r, K]`, or `[r, L]` with `use_qalora`, `….lora_B.weight`
`[N, r]`, and the full parameters of `modules_to_save`. PEFT computes

    y += s · B A x                      plain
    y += s · B A mean(x in group) · L   use_qalora: its mean times the number L of groups

with s = alpha / r, or alpha / √r (`use_rslora`). Any other variant in its settings is refused, not
ignored.

The script of QA-LoRA's authors saves the same files, with A `[r, K / g]`, but does not record that
it pools. `as_pooled` needs the kind of pooling, because the sum of the paper is a mean in the code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qalora_compile.capture.peft_settings import CONFIG_FILE, PeftSettings
from qalora_compile.config import one_of
from qalora_compile.config.choices import MEAN, PEFT_POOLINGS, SUM
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.lora_update import LowRankUpdate, check_pools
from qalora_compile.ir.safetensors_io import load_tensors

WEIGHTS_FILE, PICKLE_FILE = "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<path>.+)\.lora_(?P<part>[AB])\.weight")


@dataclass(frozen=True)
class PeftAdapter:
    """A trained adapter.

    Attributes:
        name: Name of its folder.
        updates: Updates by the path of the layer.
        saved: Full parameters, by name, that were trained with it and replace the base's.
        base: The base model that the adapter names.
    """

    name: str
    updates: Mapping[str, LowRankUpdate]
    saved: Mapping[str, Tensor]
    base: str


def read_peft_adapter(folder: str | Path, *, weight: float = 1.0) -> PeftAdapter:
    """Read an adapter.

    Args:
        folder: A folder written by PEFT's `save_pretrained`, with a single adapter.
        weight: Factor of the update in a sum of several adapters.

    Raises:
        UserInputError: the folder or a file is missing or malformed, or it holds several adapters
            or a pickle.
        UnsupportedError: the adapter is neither plain LoRA nor `use_qalora`.
    """
    folder = Path(folder)
    settings = PeftSettings.read(folder)
    tensors = _read_tensors(folder)
    factors: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        match = _LORA.fullmatch(name)
        if match is not None:
            factors.setdefault(match["path"], {})[match["part"]] = tensor
        elif "lora_" in name:
            raise UnsupportedError(
                f"the adapter holds {name}, which no LoRA of a linear layer has",
                where=str(folder / WEIGHTS_FILE),
                hint="adapters of linear layers can be taken, not those of embeddings",
            )
        elif ".original_module." not in name:  # the original of a saved module is not used
            # the names of PEFT's wrapper modules
            saved[re.sub(r"\.(modules_to_save|base_layer)\.", ".", name)] = tensor
    _check_targets(factors, settings)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserInputError(
                f"{key} holds a NaN or an infinity",
                where=str(folder / WEIGHTS_FILE),
                hint="training diverged: use an earlier checkpoint",
            )
    if not factors:
        raise UserInputError("the adapter adapts no layer", where=str(folder / WEIGHTS_FILE))
    updates = {
        path: _update(path, parts, settings, weight, folder) for path, parts in factors.items()
    }
    return PeftAdapter(folder.name, updates, saved, settings.base)


def _check_targets(layers: Iterable[str], settings: PeftSettings) -> None:
    """Check that the layers in the file are those that the settings name.

    Raises:
        UserInputError: one is not, which PEFT would silently ignore.
    """
    for path in layers:
        why = settings.why_not(path)
        if why:
            raise UserInputError(
                f"the file adapts {path}, which is {why}",
                where=settings.where,
                hint="the settings and the tensors do not belong together: get both again",
            )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file() and (folder / PICKLE_FILE).is_file():
        raise UserInputError(
            f"the adapter is pickled ({PICKLE_FILE}); pickles can run code and are never loaded",
            where=str(folder / PICKLE_FILE),
            hint='convert it once, where you trust it: python -c "import torch; from '
            "safetensors.torch import save_file; save_file(torch.load('adapter_model.bin', "
            "weights_only=True), 'adapter_model.safetensors')\"",
        )
    return load_tensors(path)


def _update(
    path: str, parts: Mapping[str, Tensor], settings: PeftSettings, weight: float, folder: Path
) -> LowRankUpdate:
    where = f"{folder / WEIGHTS_FILE}: {path}"
    if parts.keys() != {"A", "B"}:
        missing = "".join({"A", "B"} - parts.keys())
        raise UserInputError(f"lora_{missing} is missing", where=where)
    a, b = parts["A"], parts["B"]
    floating = a.is_floating_point() and b.is_floating_point()
    if not floating or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise UserInputError(
            f"lora_A is {a.dtype} {list(a.shape)} and lora_B {b.dtype} {list(b.shape)}: their "
            "ranks differ, or they do not belong to a linear layer",
            where=where,
        )
    rank = a.shape[0]
    if rank < 1 or b.shape[0] < 1 or a.shape[1] < 1:
        raise UserInputError(
            f"lora_A is {list(a.shape)} and lora_B {list(b.shape)}: the adapter is empty",
            where=where,
        )
    if (stated := settings.rank(path)) != rank:
        raise UserInputError(
            f"the tensors have rank {rank}, {CONFIG_FILE} says {stated}", where=where
        )
    scaling, pool = weight * settings.scaling(path), settings.pool()
    return LowRankUpdate(a, b, scaling if pool is None else scaling * a.shape[1] / pool, pool)


def as_pooled(adapter: PeftAdapter, model: nn.Module, pooling: str | None) -> PeftAdapter:
    """Declare the pooling of an adapter whose files do not record it.

    Args:
        adapter: The adapter as it was read.
        model: The model, whose layer widths determine the groups.
        pooling: What A multiplies for each group, one of `PEFT_POOLINGS`. None: the adapter does
            not pool, or records how, and is returned unchanged.

    Raises:
        UserInputError: the adapter's shapes show pooling but `pooling` is None, or the reverse.
    """
    if pooling is not None:
        one_of("pooling", pooling, PEFT_POOLINGS)
    plain = {path: update for path, update in adapter.updates.items() if update.pool is None}
    groups = {_group_of(update, *_sizes(model, path)) for path, update in plain.items()}
    group = max(1, *groups) if len(groups) == 1 else 1
    if pooling is None and group == 1:
        return adapter
    if pooling is None:
        raise UserInputError(
            f"by lora_A, inputs are pooled in groups of {group}, but {CONFIG_FILE} does not "
            "say how",
            where=adapter.name,
            hint=f"state it: adapt --pooling {MEAN}, as in the script of QA-LoRA's authors, or "
            f"{SUM}, as in their paper (as_pooled)",
        )
    if group == 1:
        sizes = ", ".join(map(str, sorted(groups))) or "those that it records"
        raise UserInputError(
            f"the adapter should pool its inputs ({pooling}) in groups of one size, but by its "
            f"shapes has groups of {sizes}",
            where=adapter.name,
            hint="leave pooling out, or give the model that the adapter was trained on",
        )
    part = 1 / group if pooling == MEAN else 1.0
    made = {
        path: replace(update, factor=update.factor * part, pool=group)
        for path, update in plain.items()
    }
    return replace(adapter, updates={**adapter.updates, **made})


def _group_of(update: LowRankUpdate, n: int, k: int) -> int:
    """How many inputs share a column of A; 0 if the layer has other sizes."""
    groups = update.a.shape[1]
    return k // groups if update.b.shape[0] == n and k % groups == 0 else 0


def _sizes(model: nn.Module, path: str) -> tuple[int, int]:
    """N, K of a linear layer."""
    weight = _weight_of(model, path)
    transposed = not isinstance(model.get_submodule(path), nn.Linear)
    n, k = weight.shape[::-1] if transposed else weight.shape
    return int(n), int(k)


def put_saved_(model: nn.Module, adapters: Sequence[PeftAdapter]) -> tuple[str, ...]:
    """Copy the full parameters of adapters into a model; returns their names.

    Raises:
        UserInputError: the model has no such parameter, it has another shape, or two adapters have
            it. The model is then unchanged.
        UnsupportedError: the model ties it to another one, which the adapter does not change.
    """
    owners: dict[str, Tensor] = {}
    known = dict(model.named_parameters(remove_duplicate=False))
    for adapter in adapters:
        _check_ties(known, adapter)
        for name, values in adapter.saved.items():
            own = known.get(name)
            if own is None or own.shape != values.shape or name in owners:
                problem = "no such parameter" if own is None else f"one of {list(own.shape)}"
                raise UserInputError(
                    f"two adapters have the parameter {name}"
                    if name in owners
                    else f"the adapter has {name} {list(values.shape)}, the model has {problem}",
                    where=adapter.name,
                    hint="give the model that the adapter was trained on",
                )
            owners[name] = values
    with torch.no_grad():
        for name, values in owners.items():
            model.get_parameter(name).copy_(values)
    return tuple(owners)


def _check_ties(known: Mapping[str, Tensor], adapter: PeftAdapter) -> None:
    """Refuse a tied parameter: PEFT trains a copy, and the other one keeps its old values.

    Raises:
        UnsupportedError: the parameter is tied; the error gives both names.
    """
    for name, values in adapter.saved.items():
        tied = [other for other, own in known.items() if own is known.get(name) and other != name]
        for other in tied:
            theirs = adapter.saved.get(other)
            if theirs is None or not torch.equal(theirs, values):
                raise UnsupportedError(
                    f"the adapter has {name}, which the model ties to {other}: that would "
                    "change too, but with PEFT it does not",
                    where=adapter.name,
                    hint="save the base with tie_word_embeddings=False and both weights, and give "
                    "that",
                )


def merge_(model: nn.Module, updates: Mapping[str, Sequence[LowRankUpdate]]) -> dict[str, Tensor]:
    """Add updates to the float weights of a model, in float64, in place.

    Returns:
        The sums in float32, by parameter name, if the model's dtype is narrower, because rounding
        to it would lose much of a small update.

    Raises:
        UserInputError: the model has no such layer, or one of other sizes; the error names the
            first.
        UnsupportedError: another module shares the weight, such as a tied embedding.
    """
    merged: dict[str, Tensor] = {}
    for path, several in updates.items():
        weight = _weight_of(model, path)
        stored = weight if isinstance(model.get_submodule(path), nn.Linear) else weight.mT
        n, k = stored.shape
        for update in several:
            check_pools(update, k, path)
            wide = update.a.shape[1] * (update.pool or 1)
            if (update.b.shape[0], wide) != (n, k):
                raise UserInputError(
                    f"the adapter is of another model: it is for a layer of {wide}×"
                    f"{update.b.shape[0]}, the model's is {k}×{n}",
                    where=path,
                    hint="give the model that the adapter was trained on",
                )
        total = stored.detach().double() + sum(update.matrix(k) for update in several)
        merged[path] = total if stored is weight else total.mT
    unrounded: dict[str, Tensor] = {}
    with torch.no_grad():
        for path, values in merged.items():
            weight = _weight_of(model, path)
            weight.copy_(values)
            if weight.dtype.itemsize < torch.float32.itemsize:
                unrounded[f"{path}.weight"] = values.float()
    return unrounded


def _weight_of(model: nn.Module, path: str) -> Tensor:
    """The weight of a linear layer, `[N, K]`, or `[K, N]` of GPT-2's Conv1D."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    weight = getattr(module, "weight", None)
    if not (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
        raise UserInputError(
            f"the adapter is of another model: this one has no linear layer {path}",
            where=path,
            hint="give the model that the adapter was trained on",
        )
    assert isinstance(weight, Tensor), "a linear layer has a weight"
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(names) > 1:
        raise UnsupportedError(
            f"the weight is shared by {', '.join(names)}: merging would change all of them",
            where=path,
            hint="save the model with tie_word_embeddings=False first",
        )
    return weight
