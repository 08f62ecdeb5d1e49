"""Programs on disk: `program.json` and safetensors, no pickle.

==========================  =================================================================
`program.json`              format version, stage, plan, signature, history, graph, ties
`quantized.safetensors`     every tensor but the adapters: packed codes, scale, offset, floats
`adapters.safetensors`      what trains: adapters, heads; only at stage `adapted`
`example.safetensors`       tensors of the example inputs, by flat position
==========================  =================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qalora_compile.errors import UserInputError
from qalora_compile.files import recover
from qalora_compile.ir import ops  # noqa: F401 - registers the operators that graphs name
from qalora_compile.ir.graph_json import graph_from_json, graph_to_json
from qalora_compile.ir.lazy_tensor import keep_recipe
from qalora_compile.ir.module import build_module
from qalora_compile.ir.program_parts import ProgramParts
from qalora_compile.ir.program_record import (
    ADAPTERS_FILE,
    EXAMPLE_FILE,
    TENSORS_FILE,
    admit_file,
    read_record,
    write_record,
)
from qalora_compile.ir.safetensors_io import lazy_tensors, load_tensors, save_tensors
from qalora_compile.ir.signature import Signature, input_spec
from qalora_compile.ir.site_plan import SitePlan
from qalora_compile.ir.stages import LEGALIZED, STAGES
from qalora_compile.ir.tensor_identity import storage_key
from qalora_compile.ir.torch_internals import pytree
from qalora_compile.sealed import digest_of_file
from qalora_compile.untrusted.artifacts import PROGRAM_FILE


def write_program(program: ProgramParts, folder: Path) -> None:
    """Write the files of `program` into an existing folder."""
    tensors = program.tensors()
    unique, ties = _untie(tensors)
    adapters = {n: unique[n] for n, _ in program.named_adapter_parameters() if n in unique}
    base = {n: t for n, t in unique.items() if n not in adapters}
    leaves = program.leaves(program.example[0], program.example[1])
    save_tensors(base, folder / TENSORS_FILE)
    if adapters:
        save_tensors(adapters, folder / ADAPTERS_FILE)
    example = {str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    save_tensors(example, folder / EXAMPLE_FILE)
    write_record(
        folder,
        {
            "stage": program.stage,
            "training": program.module.training,
            "plan": program.plan.to_json(),
            "signature": program.signature.to_json(),
            "history": list(program.history),
            "notes": list(program.notes),
            "trained": list(program.trained),
            "ties": ties,
            "trainable": [n for n, t in tensors.items() if t.requires_grad],
            "parameters": [n for n, t in tensors.items() if isinstance(t, nn.Parameter)],
            "graph": graph_to_json(program.graph, program.module),
        },
    )


def replace_adapters(adapters: Mapping[str, Tensor], folder: Path) -> None:
    """Replace the adapters of a program folder.

    The record admits both the old and the new digest until the new file has its final name, so that
    a process that dies in between leaves a readable folder.
    """
    path, scratch = folder / ADAPTERS_FILE, folder / f".{ADAPTERS_FILE}.new"
    save_tensors(adapters, scratch)
    digests = [digest_of_file(file) for file in (path, scratch) if file.is_file()]
    admit_file(folder, ADAPTERS_FILE, digests)
    scratch.replace(path)
    admit_file(folder, ADAPTERS_FILE, digests[-1:])


def read_parts(folder: Path, *, lazy: bool = False) -> dict[str, Any]:
    """The parts of a program, by name, from the files that `write_program` wrote.

    Args:
        folder: Where they are.
        lazy: Leave the values of large tensors in their file until they are asked for.
    """
    recover(folder)
    value = read_record(folder)
    load = lazy_tensors if lazy else load_tensors
    tensors = load(folder / TENSORS_FILE)
    if (folder / ADAPTERS_FILE).exists():
        tensors |= load_tensors(folder / ADAPTERS_FILE)
    try:
        return _assemble(value, tensors, load_tensors(folder / EXAMPLE_FILE), folder)
    except (KeyError, TypeError, ValueError) as error:
        raise UserInputError(
            f"{PROGRAM_FILE} is malformed: {error!r}", where=str(folder / PROGRAM_FILE)
        ) from error


def _assemble(
    value: Mapping[str, Any], tensors: dict[str, Tensor], example: dict[str, Tensor], folder: Path
) -> dict[str, Any]:
    stage = str(value["stage"])
    if stage not in STAGES and not stage.startswith(LEGALIZED):
        raise ValueError(f"unknown stage {stage!r}")
    trainable, parameters = set(value["trainable"]), set(value["parameters"])
    for name in parameters & tensors.keys():
        parameter = nn.Parameter(tensors[name], requires_grad=name in trainable)
        tensors[name] = keep_recipe(tensors[name], parameter)
    for alias, owner in value["ties"].items():
        tensors[alias] = tensors[owner]
    graph, subgraphs = graph_from_json(value["graph"])
    read = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    missing = sorted(read - tensors.keys() - subgraphs.keys())
    if missing:
        raise UserInputError(
            f"the tensor {missing[0]} is missing (and {len(missing) - 1} more)", where=str(folder)
        )
    holder = nn.Module()
    for target, subgraph in subgraphs.items():
        holder.add_module(target, subgraph)
    module = build_module(graph, tensors, submodules=holder, training=value["training"])
    module.move_graph(torch.device("cpu"))  # it may have been captured or trained on another device
    signature = Signature.from_json(value["signature"])
    leaves = [
        leaf.value if leaf.dtype is None else example[str(i)]
        for i, leaf in enumerate(signature.inputs)
    ]
    args, kwargs = pytree.tree_unflatten(leaves, input_spec(graph))
    return {
        "module": module,
        "stage": stage,
        "plan": SitePlan.from_json(value["plan"]),
        "signature": signature,
        "example": (args, kwargs),
        "history": tuple(value["history"]),
        "notes": tuple(value["notes"]),
        "trained": tuple(value.get("trained", ())),
    }


def _untie(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store, each once, and alias → owner for those that share memory."""
    unique: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    owners: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        key = storage_key(tensor)
        if key in owners:
            ties[name] = owners[key]
        else:
            owners[key] = name
            unique[name] = tensor
    return unique, ties
