"""Folders of codes are read back by their formats' libraries, where these are installed."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import qalora_compile as qc
from qalora_compile.capture.load_source import load_source
from qalora_compile.errors import QaloraError, UserInputError
from qalora_compile.files import write_json
from qalora_compile.untrusted import read_json
from qalora_compile.verify.runners import reference_libraries
from tests.capture.checkpoints.models import rewrite
from tests.exporters.checkpoint_cases import causal_lm, llama_and_program, made_whole, weight_of
from tests.models import capture_transformer, scale_of, worst

UP = "model.layers.0.mlp.up_proj"
LIBRARIES = {
    "mlx": "mlx.core",
    "hqq": "hqq.core.quantize",
    "compressed-tensors": "compressed_tensors.compressors.pack_quantized.base",
}


def written(target: str, folder: Path, **options: Any) -> qc.Program:
    model, program = llama_and_program(3, 64)
    program = made_whole(program) if target in ("gptq", "compressed-tensors") else program
    qc.export_model(program, folder, qc.ExportSpec(target=target, **options), model=model)
    return program


def emptied(folder: Path, program: qc.Program) -> Any:
    """The model of a folder without the weights that it has on codes."""
    model = load_source(str(folder)).model
    with torch.no_grad():
        for site in program.plan.to_quantize():
            model.get_parameter(f"{site.name}.weight").fill_(torch.nan)
    return model


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("target", LIBRARIES)
def test_every_weight_is_the_librarys(target: str, dtype: str, tmp_path: Path) -> None:
    pytest.importorskip(LIBRARIES[target])
    program = written(target, tmp_path / "out", parameter_dtype=dtype)
    model = emptied(tmp_path / "out", program)
    assert (
        reference_libraries.put_library_weights_(model, tmp_path / "out") == f"{target}, 14 weights"
    )
    bound = 1e-6 if dtype == "float32" else 4e-3
    for site in program.plan.to_quantize():
        wanted = weight_of(program, site)
        assert worst(model.get_parameter(f"{site.name}.weight"), wanted) <= bound * scale_of(wanted)


@pytest.mark.parametrize(
    ("target", "reader"),
    [
        ("gptq", "qalora-compile; GPTQModel is not asked"),
        ("safetensors", "qalora-compile"),
        ("float", "transformers"),
    ],
)
def test_who_reads_what_no_library_is_asked_for(target: str, reader: str, tmp_path: Path) -> None:
    written(target, tmp_path / "out")
    model = load_source(str(tmp_path / "out")).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert reference_libraries.put_library_weights_(model, tmp_path / "out") == reader
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_library_that_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written("hqq", tmp_path / "out")
    model = load_source(str(tmp_path / "out")).model
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
    said = reference_libraries.put_library_weights_(model, tmp_path / "out")
    assert said == "qalora-compile; hqq cannot be imported"


def test_what_a_library_cannot_read_is_no_weight(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    program = written("mlx", tmp_path / "out")
    model = emptied(tmp_path / "out", program)

    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.scales"] = tensors[f"{UP}.scales"][:, :-1].contiguous()

    rewrite(tmp_path / "out", cut)
    with pytest.raises(UserInputError, match="mlx cannot read the checkpoint") as caught:
        reference_libraries.put_library_weights_(model, tmp_path / "out")
    assert caught.value.where == str(tmp_path / "out")


def test_another_librarys_reading_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model computes with is what the library gave, not what our reader did."""
    program = written("hqq", tmp_path / "out")
    model = load_source(str(tmp_path / "out")).model
    other = {UP: torch.ones_like(weight_of(program, program.plan[UP]))}
    monkeypatch.setitem(reference_libraries._READERS, "hqq", lambda *_: other)
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", ModuleType("hqq"))
    assert reference_libraries.put_library_weights_(model, tmp_path / "out") == "hqq, 1 weights"
    assert torch.equal(model.get_parameter(f"{UP}.weight"), other[UP])


# Which group of a compressed-tensors configuration a layer is in

DOWN = [f"model.layers.{number}.mlp.down_proj" for number in range(2)]
LIBRARY = LIBRARIES["compressed-tensors"]


@cache
def of_two_widths() -> qc.Program:
    """A small Llama on 4 bits, its `down_proj` on 8, with integer zero-points."""
    captured = capture_transformer(causal_lm())
    plan = qc.Pipeline.parse("canonicalize-pointwise,annotate-linears")(captured).program
    changes = {
        site.name: {"chosen_bits": 8 if site.name in DOWN else 4, "chosen_group": 32}
        for site in plan.plan.to_quantize()
        if site.name != "lm_head"
    }
    return made_whole(qc.quantize_groups(plan.evolve(plan=plan.plan.update(changes))))


def say(folder: Path, narrow: list[str], wide: list[str], **more: Any) -> None:
    """Let `config.json` name the layers of 4 and of 8 bits so."""
    said = read_json(folder / "config.json")
    groups = said["quantization_config"]["config_groups"]
    for group in groups.values():
        group["targets"] = {4: narrow, 8: wide}[group["weights"]["num_bits"]]
    said["quantization_config"] |= more
    write_json(folder / "config.json", said)


@pytest.fixture
def two_widths(tmp_path: Path) -> tuple[qc.Program, Path]:
    """The program, and the folder that it was written to."""
    spec, folder = qc.ExportSpec(target="compressed-tensors"), tmp_path / "out"
    qc.export_model(of_two_widths(), folder, spec, model=causal_lm())
    groups = read_json(folder / "config.json")["quantization_config"]["config_groups"]
    assert {group["weights"]["num_bits"] for group in groups.values()} == {4, 8}
    return of_two_widths(), folder


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (["Linear"], ["re:.*down_proj$"]),
        (["Linear"], DOWN),
        (["Module"], ["re:model.layers.[01].mlp.down"]),
        (["re:.*self_attn", "re:.*(gate|up)_proj"], ["re:.*down"]),
        (["re:.*"], DOWN),
        (["re:model"], ["re:.*down"]),
        (["re:.*(?<!down_proj)$"], ["Linear"]),
    ],
)
def test_layers_are_named_by_class_pattern_and_name(
    narrow: list[str], wide: list[str], reverse: bool, two_widths: tuple[qc.Program, Path]
) -> None:
    """By whom ever it is read, and in whatever order the groups are."""
    pytest.importorskip(LIBRARY)
    program, folder = two_widths
    say(folder, narrow, wide, ignore=["lm_head", "re:.*embed_tokens", "LlamaRMSNorm"])
    if reverse:
        said = read_json(folder / "config.json")
        groups = said["quantization_config"]["config_groups"]
        said["quantization_config"]["config_groups"] = dict(reversed(groups.items()))
        write_json(folder / "config.json", said)
    ours, model = load_source(str(folder)).model, emptied(folder, program)
    assert (
        reference_libraries.put_library_weights_(model, folder) == "compressed-tensors, 14 weights"
    )
    for site in program.plan.to_quantize():
        wanted, name = weight_of(program, site), f"{site.name}.weight"
        assert worst(model.get_parameter(name), wanted) <= 1e-6 * scale_of(wanted)
        assert worst(ours.get_parameter(name), wanted) <= 1e-6 * scale_of(wanted)


@pytest.mark.parametrize(
    ("narrow", "ignore", "words"),
    [
        (["Linear"], ["re:.*up_proj"], "but 're:.*up_proj' of .*ignore excludes it"),
        (["Linear"], [UP], "ignore excludes it"),
        (["Linear"], ["Linear"], "but 'Linear' of .*ignore excludes it"),
        (["Linear"], ["Module"], "ignore excludes it"),
        (["re:.*mlp"], [], "self_attn.*is not quantized to integers in groups"),
        (["Embedding"], [], "is not quantized to integers in groups"),
        (["re:("], [], "cannot be read"),
        (["Linear"], ["re:("], "cannot be read"),
    ],
)
def test_layers_that_no_group_has_or_that_are_ignored_are_refused(
    narrow: list[str], ignore: list[str], words: str, two_widths: tuple[qc.Program, Path]
) -> None:
    pytest.importorskip(LIBRARY)
    program, folder = two_widths
    model = emptied(folder, program)
    say(folder, narrow, ["re:.*down"], ignore=ignore)
    with pytest.raises(UserInputError, match="compressed-tensors cannot read the checkpoint"):
        reference_libraries.put_library_weights_(model, folder)
    with pytest.raises(QaloraError, match=words):
        load_source(str(folder))


def test_of_two_patterns_the_first_by_the_alphabet_counts(
    two_widths: tuple[qc.Program, Path],
) -> None:
    """So says the library, which reads codes of the wrong width then; our reader refuses them."""
    pytest.importorskip(LIBRARY)
    program, folder = two_widths
    model = emptied(folder, program)
    say(folder, ["re:.*"], ["re:model.*down"])
    reference_libraries.put_library_weights_(model, folder)
    wanted = weight_of(program, program.plan[DOWN[0]])
    assert worst(model.get_parameter(f"{DOWN[0]}.weight"), wanted) > 0.1 * scale_of(wanted)
    with pytest.raises(QaloraError, match="codes of 4 bits take .* int32 words"):
        load_source(str(folder))
