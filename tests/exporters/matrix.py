"""What each format keeps, declared and measured: the table of docs/reference/checkpoints.md.

A format that is read adds a function to `STUDIES` that gives rows of direction `READ`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch

import qalora_compile as qc
from qalora_compile.capture.load_source import load_source
from qalora_compile.config import CHECKPOINT_TARGETS
from qalora_compile.exporters.checkpoints.registry import get_format
from qalora_compile.ir.site_plan import Site
from tests.capture.checkpoints.matrix import FORMATS as READ_FORMATS
from tests.capture.checkpoints.matrix import Written, _folders, _gptq, read_cells
from tests.capture.checkpoints.models import linears, weights_of, write_folder
from tests.capture.checkpoints.test_gptq import gptq_config, gptq_layer
from tests.exporters.checkpoint_cases import (
    causal_lm,
    llama_and_program,
    weight_of,
    with_integer_zeros,
)
from tests.exporters.decoders import DECODERS, Array

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "checkpoints.md"
START, END = "<!-- written by scripts/write_checkpoints.py -->", "<!-- end -->"
WRITE, READ = "write", "read"
WIDTHS = ((4, 32), (3, 64), (8, 32))
KEPT, NO_CODES = "layers whose codes are kept", "it has none"
DECODED = "packing read bit by bit"
SEEN = "largest change seen: {} bits, g = {}"
UNSUPPORTED = "unsupported"
_FLOAT32 = 1.3e-7


@dataclass(frozen=True)
class Row:
    """A format in one direction.

    Attributes:
        name: Of the target, or of the format that is read.
        direction: `write` or `read`.
        library: Who else reads or writes it.
        cells: Property → what happens to it.
    """

    name: str
    direction: str
    library: str
    cells: dict[str, str]


def write_rows(folder: Path) -> list[Row]:
    """Every target: what it declares, and the largest change of a weight that decoders find."""
    rows = []
    for target in CHECKPOINT_TARGETS:
        kind = get_format(target)
        declared = kind.capabilities(qc.ExportSpec(target=target))
        cells = {name: str(value) for name, value in declared.items()}
        for bits, group_size in WIDTHS:
            seen = written_error(target, bits, group_size, folder)
            cells[SEEN.format(bits, group_size)] = seen
        rows.append(Row(target, WRITE, kind.library, cells))
    return rows


def read_rows(folder: Path) -> list[Row]:
    """Every format that is read: its forms, and what of them was kept."""
    rows = [
        Row(name, READ, library, read_cells(name, folder, number))
        for name, (_, library) in READ_FORMATS.items()
    ]
    return [*rows, Row("float", READ, "transformers", float_cells(folder))]


def more_gptq(folder: Path) -> Written:
    """What `tests.capture.checkpoints.matrix` has of GPTQ, symmetric zero-points, and offsets."""
    yield from _gptq(folder)
    yield from _folders(
        folder / "gptq",
        {
            "symmetric": (partial(gptq_layer, symmetric=True), gptq_config(sym=True)),
            "float offsets": (partial(gptq_layer, floating="offset"), gptq_config()),
        },
    )


def exported(target: str, folder: Path) -> Written:
    """Folders that this package writes, and their weights by decoders written for the tests."""
    for bits, group_size in WIDTHS:
        model, program = llama_and_program(bits, group_size)
        program = with_integer_zeros(program) if target == "compressed-tensors" else program
        path = folder / target / f"{bits}-{group_size}"
        qc.export_model(program, path, qc.ExportSpec(target=target), model=model)
        names = [name for name, _ in linears(model)]
        weights = [torch.from_numpy(DECODERS[target](path, name)).float() for name in names]
        yield f"{bits} bits", path, weights


def own_folders(folder: Path) -> Written:
    """Our own folders, and one of a base in activation order."""
    yield from exported("safetensors", folder)
    weights: list[torch.Tensor] = []
    base, path = folder / "safetensors" / "base", folder / "safetensors" / "act-order"
    write_folder(base, gptq_layer(weights, act_order=True), gptq_config())
    source = load_source(str(base))
    program = qc.quantize_groups(source.capture(), stored=source.stored()[0])
    qc.export_model(program, path, qc.ExportSpec(target="safetensors"), model=base)
    yield "act-order", path, weights


READ_FORMATS |= {
    "gptq": (more_gptq, READ_FORMATS["gptq"][1]),
    "compressed-tensors": (partial(exported, "compressed-tensors"), DECODED),
    "safetensors": (own_folders, DECODED),
}
"""`read_cells` looks them up there."""


def float_cells(folder: Path) -> dict[str, str]:
    """Plain floats of three widths: what transformers saves, and what is read."""
    largest = 0.0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, path = causal_lm().to(dtype), folder / f"plain-{dtype}"
        model.save_pretrained(path)  # type: ignore[operator]
        found = weights_of(load_source(str(path)).model)
        for name, wanted in weights_of(model).items():
            largest = max(largest, float((found[name].double() - wanted.double()).abs().max()))
    return {
        "forms": "float32, bfloat16, float16",
        KEPT: NO_CODES,
        "largest change of a weight": number(largest),
    }


def number(value: float) -> str:
    """One significant digit, so that another run writes the same page."""
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def written_error(target: str, bits: int, group_size: int, folder: Path) -> str:
    """The largest change of a weight that is written on codes, as a part of its layer's largest.

    Formats of integer zero-points are given a program that has them. The changes are those from the
    program's float32 weights to what a decoder computes in float64: up to 2^-23 they are rounding
    of the float32 weights themselves, and count as none.
    """
    model, program = llama_and_program(bits, group_size)
    kind = get_format(target)
    if kind.capabilities(qc.ExportSpec(target=target))["real zero-point"].kind == UNSUPPORTED:
        program = with_integer_zeros(program)
    if target == "gguf" and bits == 8:
        return "refused"  # no layer is on codes, see test_gguf.py
    path = folder / f"{target}-{bits}{kind.suffix}"
    qc.export_model(program, path, qc.ExportSpec(target=target), model=model)
    largest = 0.0
    for site in program.plan.to_quantize():
        wanted = weight_of(program, site).double().numpy()
        difference = np.abs(decode(target, path, site) - wanted).max() / np.abs(wanted).max()
        largest = max(largest, float(difference))
    return number(largest if largest > _FLOAT32 else 0.0)


def decode(target: str, path: Path, site: Site) -> Array:
    """The weight of a layer, read back."""
    if target != "gguf":
        return DECODERS[target](path, site.name)
    block, part = site.name.split(".")[2], site.name.rpartition(".")[2]
    names = {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    stored = tensors[f"blk.{block}.{names[part]}.weight"]
    values: Array = gguf.quants.dequantize(stored.data, stored.tensor_type)
    heads = {"q_proj": 4, "k_proj": 2}.get(part)
    if heads is not None:  # neighbours back to halves of a head
        values = values.reshape(heads, -1, 2, site.k).swapaxes(1, 2).reshape(values.shape)
    return values


Study = Callable[[Path], list[Row]]
STUDIES: tuple[Study, ...] = (write_rows, read_rows)


def tables(rows: Iterable[Row]) -> str:
    """A table for each direction: properties down, formats across."""
    parts, found = [], list(rows)
    for direction, title in ((WRITE, "What is written"), (READ, "What is read")):
        chosen = [row for row in found if row.direction == direction]
        if not chosen:
            continue
        names = list(dict.fromkeys(name for row in chosen for name in row.cells))
        lines = [["", *(f"`{row.name}`" for row in chosen)], ["---"] * (len(chosen) + 1)]
        title_of = "other libraries" if direction == WRITE else "checked against"
        lines.append([title_of, *(row.library for row in chosen)])
        lines += [[name, *(row.cells.get(name, "–") for row in chosen)] for name in names]
        text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        parts.append(f"### {title}\n\n{text}\n")
    return "\n".join(parts)


def put_into(page: str, text: str) -> str:
    """The page with the tables between its marks replaced.

    Raises:
        ValueError: the marks are missing.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"the page has no marks {START} and {END}")
    return f"{before}{START}\n\n{text}\n{END}{after}"
