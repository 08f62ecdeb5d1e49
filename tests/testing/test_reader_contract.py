"""Every reader keeps the contract of readers, and one that breaks it is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile import extend
from qalora_compile.capture.checkpoints.registry import READERS
from qalora_compile.errors import UserInputError
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.quantizers.minmax import quantize_minmax
from qalora_compile.testing import ContractError, check_reader
from tests.capture.checkpoints.models import write_folder
from tests.capture.checkpoints.test_folders import config_of, hqq_layer, mlx_layer
from tests.capture.checkpoints.test_gptq import AWQ, awq_layer, gptq_config, gptq_layer
from tests.exporters.checkpoint_cases import affine_of, llama_and_program, with_integer_zeros
from tests.models import slow

FOREIGN: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "awq": (lambda: awq_layer([]), AWQ),
    "gptq": (lambda: gptq_layer([]), gptq_config()),
    "hqq": (lambda: hqq_layer(4, []), config_of("hqq", 4)),
    "mlx": (lambda: mlx_layer(4, []), config_of("mlx", 4)),
}
OURS = {"qalora-weights": "safetensors", "compressed-tensors": "compressed-tensors"}


@pytest.mark.parametrize("name", [*(n for n in READERS.builtin if n not in OURS), *slow(*OURS)])
def test_every_reader_keeps_the_contract(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    if name in FOREIGN:
        layer, config = FOREIGN[name]
        write_folder(path, layer(), config)
        check_reader(name, path)
        return
    model, program = llama_and_program()
    program = with_integer_zeros(program) if name == "compressed-tensors" else program
    qc.export_model(program, path, qc.ExportSpec(target=OURS[name]), model=model)
    expected = {site.name: affine_of(program, site) for site in program.plan.to_quantize()}
    check_reader(name, path, expected)


# A reader of an extension, and planted faults.


def stored_plainly(module: nn.Linear) -> dict[str, Tensor]:
    affine = quantize_minmax(module.weight.detach(), qc.QuantSpec(group_size=16))
    return {"q": affine.codes, "s": affine.scale, "o": affine.offset}


CONFIG = {"quantization_config": {"quant_method": "plain", "group_size": 16}}


def read_plain(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: extend.OpenFolder
) -> extend.Decoded:
    group = config["quantization_config"].get("group_size")
    if type(group) is not int or group < 1:
        raise UserInputError(f"group_size is {group!r}", where="config.json")
    modules = [name.removesuffix(".q") for name in tensors if name.endswith(".q")]
    weights, used = {}, set()
    for module in modules:
        for part in ("s", "o"):
            if f"{module}.{part}" not in tensors:
                raise UserInputError(f"the checkpoint has no tensor {module}.{part}", where=module)
        q, s, o = (tensors[f"{module}.{part}"] for part in ("q", "s", "o"))
        weights[module] = extend.CheckpointWeight(
            GroupAffine(q, s, o, 4, group).validate(), "plain"
        )
        used |= {f"{module}.{part}" for part in ("q", "s", "o")}
    return extend.Decoded(weights, frozenset(used))


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Path]:
    write_folder(tmp_path / "model", stored_plainly, CONFIG)
    with extend.scoped():
        yield tmp_path / "model"


def test_a_reader_of_an_extension_keeps_it(plain: Path) -> None:
    extend.register_reader("plain", read_plain)
    check_reader("plain", plain)


def without_checks(tensors: Any, config: Any, folder: Any) -> extend.Decoded:
    """Dies of its own on what is damaged."""
    modules = [name.removesuffix(".q") for name in tensors if name.endswith(".q")]
    group = config["quantization_config"]["group_size"]
    weights, used = {}, set()
    for module in modules:
        q, s, o = (tensors[f"{module}.{part}"] for part in ("q", "s", "o"))
        weights[module] = extend.CheckpointWeight(GroupAffine(q, s, o, 4, group), "plain")
        used |= {f"{module}.{part}" for part in ("q", "s", "o")}
    return extend.Decoded(weights, frozenset(used))


def lenient(tensors: Any, config: Any, folder: Any) -> extend.Decoded:
    """Takes any group size for 16."""
    said = {"quantization_config": {"group_size": 16}}
    return read_plain(tensors, said, folder)


def repairing(tensors: Any, config: Any, folder: Any) -> extend.Decoded:
    """Takes 0 for what is not finite."""
    mended = {n: torch.nan_to_num(t) if t.is_floating_point() else t for n, t in tensors.items()}
    return read_plain(mended, config, folder)


def editing(tensors: Any, config: Any, folder: Any) -> extend.Decoded:
    found = read_plain(tensors, config, folder)
    next(t for n, t in tensors.items() if n.endswith(".s")).add_(1)
    return found


_calls: list[int] = []


def unsteady(tensors: Any, config: Any, folder: Any) -> extend.Decoded:
    found = read_plain(tensors, config, folder)
    _calls.append(1)
    first = next(iter(found.weights))
    affine = found.weights[first].affine
    moved = dataclasses.replace(affine, offset=affine.offset + len(_calls))
    return dataclasses.replace(
        found, weights=found.weights | {first: extend.CheckpointWeight(moved, "plain")}
    )


FAULTS = {
    "errors of its own": (without_checks, "damage"),
    "values repaired": (repairing, "damage: .* nan at one place"),
    "tensors edited": (editing, "purity"),
    "another reading": (unsteady, "determinism"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reader_that_breaks_a_clause_is_named(fault: str, plain: Path) -> None:
    reader, clause = FAULTS[fault]
    extend.register_reader("plain", reader)
    with pytest.raises(ContractError, match=f"the reader plain.*\n  clause: {clause}"):
        check_reader("plain", plain)


def test_an_entry_that_is_not_read_may_say_anything(plain: Path) -> None:
    extend.register_reader("plain", lenient)
    check_reader("plain", plain)


def test_other_weights_than_expected_are_named(plain: Path) -> None:
    extend.register_reader("plain", read_plain)
    module = "model.layers.0.self_attn.q_proj"
    wrong = quantize_minmax(torch.ones(4, 16), qc.QuantSpec(group_size=16))
    with pytest.raises(ContractError, match=f"clause: exactness: {module} is what was written"):
        check_reader("plain", plain, {module: wrong})


def test_a_reader_that_is_not_registered_is_named(plain: Path) -> None:
    with pytest.raises(ContractError, match="there is no reader 'plain'"):
        check_reader("plain", plain)
