"""`check_reader`: the contract of a reader of quantized checkpoints."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora_compile.api import quantize_groups
from qalora_compile.capture.checkpoints.base import CONFIG, Decoded, OpenFolder
from qalora_compile.capture.checkpoints.open_folder import SECTIONS, load_stored, modules_of
from qalora_compile.capture.checkpoints.registry import get_reader
from qalora_compile.capture.load_source import load_source
from qalora_compile.errors import QaloraError
from qalora_compile.files import write_json
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.packing.bitstream import unpack_codes
from qalora_compile.ir.safetensors_io import load_tensors, save_tensors
from qalora_compile.testing.contract import Contract, bits_of, bits_of_all
from qalora_compile.untrusted import read_json

Read = Callable[[dict[str, Tensor], dict[str, Any]], Decoded]
_HOSTILE: tuple[Any, ...] = (-1, 0, 10**12, 2.5, True, "x", None, [], {}, [10**9] * 3)


def check_reader(
    name: str, folder: str | Path, expected: Mapping[str, GroupAffine] | None = None
) -> None:
    """Assert that a registered reader keeps the contract of readers, on one good checkpoint.

    The clauses:
      * reading: the folder is read, every weight satisfies `GroupAffine.validate`, and the tensors
        that it was made from are named;
      * exactness: the weights are `expected`, if given, bit for bit; a program that is quantized
        with the codes of the checkpoint has those codes;
      * determinism, purity: a second reading is equal, and tensors and `config.json` do not change;
      * damage: a tensor of a weight that is missing, cut, empty, of another shape or dtype, or not
        finite is refused with an error of this package, or changes no weight;
      * hostile configuration: an entry that is replaced by another number, text, list or nothing is
        refused in the same way, or changes no weight.

    Args:
        name: Of the method, `quantization_config.quant_method`.
        folder: A small checkpoint of a model of transformers, with `config.json` and safetensors.
        expected: The weights that were written, by module, or some of them.

    Raises:
        ContractError: a clause does not hold; it is named.
    """
    __tracebackhide__ = True
    contract, path = Contract(f"the reader {name}"), Path(folder)
    with contract.clause("reading: the folder is read, and its weights are valid"):
        reader = get_reader(name)
        config: dict[str, Any] = dict(read_json(path / CONFIG))
        tensors: dict[str, Tensor] = {}
        for file in sorted(path.glob("*.safetensors")):
            tensors |= load_tensors(file)
        opened = OpenFolder(path, partial(modules_of, path))

        def read(given: dict[str, Tensor], said: dict[str, Any]) -> Decoded:
            return reader(given, said, opened)

        kept, said = bits_of_all(tensors), copy.deepcopy(config)
        good = read(tensors, config)
        for stored in good.weights.values():
            stored.affine.validate()
        assert good.weights, "there is no quantized weight"
        assert good.used and good.used <= tensors.keys(), "used names other tensors"
    same = (bits_of_all(tensors), config) == (kept, said)
    contract.need("purity: tensors and config.json stay as they are", same, "they changed")
    with contract.clause("determinism: a second reading gives the same"):
        assert not (found := _changed(good, read(tensors, config))), found
    for module, affine in (expected or {}).items():
        with contract.clause(f"exactness: {module} is what was written"):
            assert not (found := _unlike(good.weights[module].affine, affine)), found
    _check_codes(contract, path, good)
    _check_damage(contract, read, tensors, config, good, path)
    _check_config(contract, read, tensors, config, good, path)


def _unlike(first: GroupAffine, second: GroupAffine) -> str:
    """The difference of two weights; empty if there is none. Offsets −0 and 0 are equal."""
    if (first.bits, first.group_size) != (second.bits, second.group_size):
        return f"{first.bits} bits in groups of {first.group_size}"
    for part in ("codes", "scale", "offset"):
        mine, other = getattr(first, part), getattr(second, part)
        if mine.dtype != other.dtype or not torch.equal(mine, other):
            return part
    return ""


def _changed(good: Decoded, found: Decoded) -> str:
    """The first weight that is missing or decoded differently; empty if there is none."""
    for module, stored in good.weights.items():
        other = found.weights.get(module)
        if other is None:
            return f"{module} is missing"
        if _unlike(stored.affine, other.affine) or bits_of(stored.dequantize()) != bits_of(
            other.dequantize()
        ):
            return f"{module} is another weight"
    return ""


def _check_codes(contract: Contract, path: Path, good: Decoded) -> None:
    with contract.clause("exactness: a program keeps the codes of the checkpoint"):
        source = load_source(str(path))
        captured, codes = source.capture(), source.stored()[0]
        program = quantize_groups(captured, stored=codes)
        floats, tensors = captured.tensors(), program.tensors()
        known = {bits_of(row) for each in good.weights.values() for row in each.affine.codes}
        kept = 0
        for site in program.plan.weights_to_quantize():
            if site.experts or codes.find(floats[site.weight].detach()) is None:
                continue  # a stack of several, or a weight that the checkpoint holds in float
            assert site.bits is not None
            held = unpack_codes(tensors[f"{site.path}.qweight"], site.bits, site.k)
            odd = [at for at, row in enumerate(held) if bits_of(row) not in known]
            assert not odd, f"row {odd[0]} of {site.name} is not one of the checkpoint's"
            kept += 1
        assert kept, "no weight of the program was found in the checkpoint"


def _check_damage(
    contract: Contract,
    read: Read,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    good: Decoded,
    path: Path,
) -> None:
    first = next(iter(good.weights))
    for tensor in sorted(n for n in good.used if n.startswith(f"{first}.")):
        for what, damaged in _damages(tensors[tensor]):
            changed = {n: t for n, t in tensors.items() if n != tensor or damaged is not None}
            if damaged is not None:
                changed[tensor] = damaged
            clause = f"damage: {tensor} that is {what} is refused, or changes no weight"
            with contract.clause(clause):
                try:
                    found = _changed(good, read(changed, config))
                except QaloraError:
                    continue
                if found:
                    _must_be_refused(path, changed, config, found)


def _damages(tensor: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    yield "missing", None
    yield "empty", tensor.new_zeros((0,) * max(1, tensor.dim()))
    yield "of one more axis", tensor[None]
    if tensor.dim():
        yield "cut at its end", tensor[..., :-1].clone()
        yield "cut at its beginning", tensor[1:].clone()
        yield "twice as long", torch.cat([tensor, tensor], -1)
    if tensor.is_floating_point():
        yield "of integers", tensor.to(torch.int32)
        for value in ("nan", "inf"):
            odd = tensor.clone()
            odd.view(-1)[-1:] = float(value)
            yield f"{value} at one place", odd
    else:
        yield "of floats", tensor.to(torch.float32)


def _must_be_refused(
    path: Path, tensors: dict[str, Tensor], config: dict[str, Any], found: str
) -> None:
    """Load the model, which shows what a reader cannot see: a missing weight, another shape."""
    with tempfile.TemporaryDirectory() as scratch:
        damaged = Path(scratch) / "model"
        shutil.copytree(path, damaged)
        for file in damaged.glob("*.safetensors"):
            file.unlink()
        save_tensors(tensors, damaged / "model.safetensors")
        write_json(damaged / CONFIG, config)
        try:
            load_stored(damaged)
        except QaloraError:
            return
    raise AssertionError(f"the model was loaded, and {found}")


def _check_config(
    contract: Contract,
    read: Read,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    good: Decoded,
    path: Path,
) -> None:
    for place in [(key, *rest) for key in SECTIONS for rest in _leaves(config.get(key), ())]:
        if place[-1] == "quant_method":
            continue
        for value in _HOSTILE:
            said = copy.deepcopy(config)
            inner: Any = said
            for step in place[:-1]:
                inner = inner[step]
            inner[place[-1]] = value
            clause = f"hostile configuration: {'.'.join(map(str, place))} = {value!r}"
            with contract.clause(clause):
                try:
                    found = _changed(good, read(tensors, said))
                except QaloraError:
                    continue
                if found:
                    _must_be_refused(path, tensors, said, found)


def _leaves(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The places of all values inside lists and mappings."""
    if place:
        yield place
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*place, key))
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from _leaves(inner, (*place, at))
