"""MLX and HQQ folders, written by those libraries, keep their codes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.capture.load_source import load_source
from qalora_compile.errors import QaloraError, UnsupportedError, UserInputError
from qalora_compile.ir.packing.bitstream import unpack_codes
from tests.capture.checkpoints.models import Quantize, example, rewrite, weights_of, write_folder
from tests.models import randomize_adapters

GROUP = 32


def mlx_layer(bits: int, dequantized: list[Tensor]) -> Quantize:
    """Quantize by MLX; what MLX itself dequantizes to is kept."""
    mx = pytest.importorskip("mlx.core", reason="mlx has no package for this platform")

    def quantize(module: nn.Linear) -> dict[str, Tensor]:
        weight = mx.array(module.weight.detach().numpy())
        parts = mx.quantize(weight, group_size=GROUP, bits=bits)
        complete = mx.dequantize(*parts, group_size=GROUP, bits=bits)
        dequantized.append(torch.tensor(complete.tolist()))
        packed, scales, biases = parts
        raw = torch.tensor(packed.tolist(), dtype=torch.int64).to(torch.uint32)
        floats = {"scales": scales, "biases": biases}
        return {"weight": raw} | {n: torch.tensor(v.tolist()) for n, v in floats.items()}

    return quantize


def hqq_layer(bits: int, dequantized: list[Tensor]) -> Quantize:
    """Quantize by HQQ; what HQQ itself dequantizes to is kept."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    def quantize(module: nn.Linear) -> dict[str, Tensor]:
        config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
        plain = copy.deepcopy(module).requires_grad_(False)
        layer = HQQLinear(plain, config, compute_dtype=torch.float32, device="cpu")
        dequantized.append(layer.dequantize().float())
        return {name: t.clone() for name, t in layer.state_dict().items()}

    return quantize


FORMATS: dict[str, tuple[Callable[[int, list[Tensor]], Quantize], tuple[int, ...]]] = {
    "mlx": (mlx_layer, (2, 3, 4, 5, 6, 8)),
    "hqq": (hqq_layer, (2, 3, 4, 8)),
}


def config_of(name: str, bits: int) -> dict[str, Any]:
    """What `config.json` says of it."""
    if name == "mlx":
        return {"quantization": {"group_size": GROUP, "bits": bits}}
    return {"quantization_config": {"quant_method": name}}


CASES = [(name, bits) for name, (_, widths) in FORMATS.items() for bits in widths]


def written(folder: Path, name: str, bits: int) -> list[Tensor]:
    """A folder in a format; what its library dequantizes to, layer by layer."""
    dequantized: list[Tensor] = []
    write_folder(folder, FORMATS[name][0](bits, dequantized), config_of(name, bits))
    return dequantized


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_weights_are_those_of_the_library(name: str, bits: int, tmp_path: Path) -> None:
    wanted = written(tmp_path / "model", name, bits)
    source = load_source(str(tmp_path / "model"))
    found = list(weights_of(source.model).values())
    assert len(found) == len(wanted) == 14
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    codes, notes = source.stored()
    assert len(codes) == 14
    assert any("in 8 bits each" in note for note in notes) == (bits in (5, 6))


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_kept_to_the_folded_program(name: str, tmp_path: Path) -> None:
    written(tmp_path / "model", name, 3)
    source = load_source(str(tmp_path / "model"))
    captured, (codes, _) = source.capture(), source.stored()
    program = qc.quantize_groups(captured, stored=codes)
    ids = example(source.model)
    mask = torch.ones_like(ids)
    assert torch.equal(program(ids, mask).logits, captured(ids, mask).logits)
    folded = qc.fold_adapters(randomize_adapters(qc.insert_adapters(program)))
    for site in folded.plan.to_quantize():
        assert (site.bits, site.group_size) == (3, GROUP)
        held = codes.find(captured.tensors()[site.weight].detach())
        assert held is not None
        packed = folded.tensors()[f"{site.path}.qweight"]
        assert torch.equal(unpack_codes(packed, 3, site.k), held.affine.codes)


def test_halves_are_widened_with_a_note(tmp_path: Path) -> None:
    written(tmp_path / "model", "mlx", 4)

    def narrow(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if tensors[name].dtype == torch.float32:
                tensors[name] = tensors[name].half()

    rewrite(tmp_path / "model", narrow)
    source = load_source(str(tmp_path / "model"))
    assert {p.dtype for p in source.model.parameters()} == {torch.float32}
    assert "are float16 and computed in float32" in source.stored()[1][-1]


@pytest.mark.parametrize(("bits", "dtype"), [(3, torch.float32), (4, torch.float16)])
def test_words_of_hqq_seen_as_floats(bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Read where the file says that they are, refused where it does not."""
    wanted = written(tmp_path / "model", "hqq", bits)

    def view(tensors: dict[str, Tensor]) -> None:
        tensors |= {n: t.view(dtype) for n, t in tensors.items() if n.endswith("W_q")}

    def say(tensors: dict[str, Tensor]) -> None:
        tensors |= {n: t.fill_(1) for n, t in tensors.items() if n.endswith("view_as_float")}

    rewrite(tmp_path / "model", view)
    with pytest.raises(UserInputError, match=rf"W_q is {dtype} .* not .* words"):
        load_source(str(tmp_path / "model"))
    rewrite(tmp_path / "model", say)
    source = load_source(str(tmp_path / "model"))
    assert len(source.stored()[0]) == len(wanted)
    for mine, theirs in zip(weights_of(source.model).values(), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


# Faults

UP = "model.layers.0.mlp.up_proj"


def cut(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1].contiguous()


FAULTS: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "mlx biases missing": ("mlx", lambda t: t.pop(f"{UP}.biases"), "no tensor .*biases"),
    "mlx scales cut": ("mlx", lambda t: cut(t, f"{UP}.scales"), "scale is"),
    "mlx codes as int32": (
        "mlx",
        lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].view(torch.int32)}),
        "not uint32",
    ),
    "mlx codes without scales and biases": (
        "mlx",
        lambda t: [t.pop(f"{UP}.{part}") for part in ("scales", "biases")],
        rf"no tensor {UP}\.scales",
    ),
    "a norm NaN": ("mlx", lambda t: t["model.norm.weight"].fill_(torch.nan), "model.norm.*NaN"),
    "mlx scale NaN": ("mlx", lambda t: t[f"{UP}.scales"].fill_(torch.nan), "NaN"),
    "a norm missing": ("mlx", lambda t: t.pop("model.norm.weight"), "has no tensor model.norm"),
    "an unknown tensor": (
        "mlx",
        lambda t: t.update({"model.layers.7.odd": torch.ones(2)}),
        "an unknown tensor model.layers.7.odd",
    ),
    "hqq zero missing": ("hqq", lambda t: t.pop(f"{UP}.zero"), "no tensor .*zero"),
    "hqq zero packed": ("hqq", lambda t: cut(t, f"{UP}.zero"), "one value for each of"),
    "hqq codes cut": ("hqq", lambda t: cut(t, f"{UP}.W_q"), "groups of 32"),
    "hqq of one axis": ("hqq", lambda t: cut(t, f"{UP}.shape"), "not 2 integers"),
    "hqq along the outputs": ("hqq", lambda t: t[f"{UP}.axis"].fill_(0), "along axis 0"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_inconsistent_tensors_are_refused(kind: str, tmp_path: Path) -> None:
    name, change, words = FAULTS[kind]
    written(tmp_path / "model", name, 4)
    rewrite(tmp_path / "model", lambda tensors: (change(tensors), None)[1])
    with pytest.raises(QaloraError, match=words) as caught:
        load_source(str(tmp_path / "model"))
    assert isinstance(caught.value, (UserInputError, UnsupportedError))
    assert str(tmp_path / "model") in str(caught.value.where)


@pytest.mark.parametrize(
    ("own", "part", "words"),
    [
        ({"bits": 4, "group_size": GROUP}, "scales", rf"no tensor {UP}\.scales"),
        (False, "", rf"{UP} is quantized, but .* not"),
    ],
)
def test_mlx_layers_are_those_that_the_configuration_names(
    own: object, part: str, words: str, tmp_path: Path
) -> None:
    config = {"quantization": {"group_size": GROUP, "bits": 4, UP: own}}
    write_folder(tmp_path / "model", mlx_layer(4, []), config)
    if part:
        rewrite(tmp_path / "model", lambda t: (t.pop(f"{UP}.{part}"), None)[1])
    with pytest.raises(UserInputError, match=words):
        load_source(str(tmp_path / "model"))


def test_weights_off_center_are_noted(tmp_path: Path) -> None:
    """A layer with wrong zero-points, in a format that has no second reading."""
    written(tmp_path / "model", "hqq", 4)
    assert not any("farther from 0" in n for n in load_source(str(tmp_path / "model")).stored()[1])
    rewrite(tmp_path / "model", lambda t: (t[f"{UP}.zero"].sub_(9), None)[1])
    notes = load_source(str(tmp_path / "model")).stored()[1]
    assert any(
        f"the weights of {UP} (1 layers) have a mean farther from 0" in note for note in notes
    )


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "model", "mlx", 4)
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserInputError):
        load_source(str(tmp_path / "model"))


def test_a_method_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    write_folder(tmp_path / "model", lambda module: {"weight": module.weight.detach()}, config)
    with pytest.raises(UnsupportedError, match="bitsandbytes cannot be read") as caught:
        load_source(str(tmp_path / "model"))
    assert "GGUF" in str(caught.value.hint)
