"""Folders of checkpoints: read back by decoders of our own, and by the formats' libraries."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qalora_compile as qc
from qalora_compile.errors import (
    OutputError,
    PreconditionError,
    UnsupportedError,
    UserInputError,
)
from qalora_compile.exporters.checkpoints import hf_folder, hqq
from qalora_compile.exporters.checkpoints.registry import get_format
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.packing.bitstream import pack_words
from tests.exporters.checkpoint_cases import (
    affine_of,
    causal_lm,
    llama_and_program,
    weight_of,
    with_integer_zeros,
    write_tokenizer,
)
from tests.exporters.decoders import DECODERS, bits_of, config, tensors
from tests.models import (
    MLP,
    OneLinear,
    bert,
    capture_transformer,
    gpt2,
    scale_of,
    token_ids,
    worst,
)

INTEGER_ONLY = ("gptq", "compressed-tensors")
FOLDERS = tuple(DECODERS)
ROUNDING = {"hqq": 2.0**-22}
"""HQQ's zero-point is rounded to float32; parts of the largest weight. All others are exact."""


def program_for(target: str, bits: int = 4, group_size: int = 32) -> tuple[nn.Module, qc.Program]:
    model, program = llama_and_program(bits, group_size)
    return model, with_integer_zeros(program) if target in INTEGER_ONLY else program


def export(
    program: qc.Program, folder: Path, target: str, model: Any = None, **options: Any
) -> Any:
    spec = qc.ExportSpec(target=target, **options)
    return qc.export_model(program, folder, spec, model=model)


@pytest.mark.parametrize("target", FOLDERS)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (3, 64)])
def test_every_weight_comes_back(tmp_path: Path, target: str, bits: int, group_size: int) -> None:
    model, program = program_for(target, bits, group_size)
    report = export(program, tmp_path / "out", target, model)
    assert report.quantized_layers == len(program.plan.to_quantize()) == 14
    for site in program.plan.to_quantize():
        wanted = weight_of(program, site).double().numpy()
        found = DECODERS[target](tmp_path / "out", site.name)
        error = float(np.abs(found - wanted).max())
        assert error <= max(ROUNDING.get(target, 0), 2.0**-23) * np.abs(wanted).max()
    stored = tensors(tmp_path / "out")
    for name, tensor in program.tensors().items():
        if name.endswith("norm.weight"):
            assert np.array_equal(stored[name], tensor.detach().numpy())
    assert "model.embed_tokens.weight" in stored
    assert "lm_head.weight" not in stored, "a tied weight is stored once, by its first name"
    assert not any("inv_freq" in name for name in stored)


@pytest.mark.parametrize("target", FOLDERS)
def test_a_fault_in_a_code_is_noticed(tmp_path: Path, target: str) -> None:
    model, program = program_for(target)
    site = program.plan["model.layers.0.mlp.up_proj"]
    wanted = weight_of(program, site).double().numpy()
    tensor = program.tensors()[f"{site.path}.qweight"]
    before = int(tensor[5, 7])
    tensor[5, 7] = before ^ 1
    try:
        export(program, tmp_path / "out", target, model)
    finally:
        tensor[5, 7] = before
    found = DECODERS[target](tmp_path / "out", site.name)
    assert np.abs(found - wanted).max() > 1e-3 * np.abs(wanted).max()


def test_mlx_reads_it(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    for bits, group_size in ((4, 32), (3, 64)):
        model, program = program_for("mlx", bits, group_size)
        folder = tmp_path / str(bits)
        export(program, folder, "mlx", model)
        found = mx.load(str(folder / "model.safetensors"))
        for site in program.plan.to_quantize():
            parts = [found[f"{site.name}.{part}"] for part in ("weight", "scales", "biases")]
            size = site.k // parts[1].shape[1]
            weight = np.array(mx.dequantize(*parts, group_size=size, bits=bits))
            assert np.array_equal(weight, weight_of(program, site).numpy())


def test_hqq_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("hqq.core.quantize")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for bits, group_size in ((4, 32), (3, 64)):
        model, program = program_for("hqq", bits, group_size)
        export(program, tmp_path / str(bits), "hqq", model)
        found = {n: torch.from_numpy(t) for n, t in tensors(tmp_path / str(bits)).items()}
        for site in program.plan.to_quantize():
            layer = library.HQQLinear(
                None, None, device="cpu", compute_dtype=torch.float32, initialize=False
            )
            prefix = f"{site.name}."
            layer.load_state_dict(
                {n[len(prefix) :]: t for n, t in found.items() if n.startswith(prefix)}
            )
            wanted = weight_of(program, site)
            assert worst(layer.dequantize(), wanted) <= ROUNDING["hqq"] * scale_of(wanted)


def test_compressed_tensors_reads_it(tmp_path: Path) -> None:
    packed = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    model, program = program_for("compressed-tensors")
    export(program, tmp_path / "out", "compressed-tensors", model)
    found = {n: torch.from_numpy(t) for n, t in tensors(tmp_path / "out").items()}
    groups = config(tmp_path / "out")["quantization_config"]["config_groups"]
    scheme = schemes.QuantizationScheme(**groups["group_0"])
    for site in program.plan.to_quantize():
        prefix = f"{site.name}."
        state = {n[len(prefix) :]: t for n, t in found.items() if n.startswith(prefix)}
        weight = packed.PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        assert torch.equal(weight, weight_of(program, site))


@pytest.mark.parametrize("target", INTEGER_ONLY)
def test_real_zero_points_are_refused(tmp_path: Path, target: str) -> None:
    model, program = llama_and_program()
    with pytest.raises(UnsupportedError, match="rounding them would change the model") as caught:
        export(program, tmp_path / "out", target, model)
    assert caught.value.where == "model.layers.0.self_attn.q_proj"
    assert list(tmp_path.iterdir()) == []


# Hugging Face → ours → Hugging Face


def test_a_float_folder_is_the_model_again(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, program = llama_and_program()
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)  # type: ignore[operator]
    write_tokenizer(first)
    report = export(program, second, "float", first)
    assert {row.form for row in report.stored} == {"float32"}
    again = AutoModelForCausalLM.from_pretrained(second, dtype="auto").eval()
    ids = token_ids(2, 11)
    assert worst(again(ids).logits, program(ids).logits) <= 1e-6 * scale_of(program(ids).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    before, after = config(first), config(second)
    assert before | {"dtype": "float32", "rope_theta": 1e4} == after
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert json.loads((first / name).read_text()) == json.loads((second / name).read_text())
    assert AutoTokenizer.from_pretrained(second)("45 trains").input_ids
    assert set(tensors(first)) == set(tensors(second))


@pytest.mark.parametrize("make", [gpt2, bert])
def test_other_architectures_as_floats(tmp_path: Path, make: Any) -> None:
    model = make()
    program = qc.quantize_groups(capture_transformer(model))
    report = export(program, tmp_path / "out", "float", model)
    assert report.notes == ()
    again = type(model).from_pretrained(tmp_path / "out").eval()
    again.config.use_cache = False
    ids = token_ids(2, 11)
    assert worst(again(ids)[0], program(ids)[0]) <= 1e-6 * scale_of(program(ids)[0])


def test_a_head_on_codes_is_no_longer_tied(tmp_path: Path) -> None:
    model = causal_lm()
    captured = capture_transformer(model)
    program = qc.quantize_groups(captured, targets=["lm_head", "mlp.up_proj"])
    export(program, tmp_path / "out", "float", model)
    assert config(tmp_path / "out")["tie_word_embeddings"] is False
    again = type(model).from_pretrained(tmp_path / "out").eval()  # type: ignore[attr-defined]
    ids = token_ids(2, 11)
    assert worst(again(ids).logits, program(ids).logits) <= 1e-6 * scale_of(program(ids).logits)
    # tables on codes: one set of codes serves the table and the head that is tied to it
    tables = qc.quantize_groups(captured, embeddings=qc.QuantSpec(bits=8, group_size=32))
    for target in ("float", "mlx", "hqq"):
        export(tables, tmp_path / target, target, model)
    stored = tensors(tmp_path / "mlx")
    assert stored["model.embed_tokens.weight"].dtype == np.uint32
    assert "lm_head.weight" not in stored
    site = tables.plan["model.embed_tokens"]
    wanted = weight_of(tables, site).numpy()
    assert np.array_equal(DECODERS["mlx"](tmp_path / "mlx", "model.embed_tokens"), wanted)
    for target in ("float", "hqq"):
        found = tensors(tmp_path / target)["model.embed_tokens.weight"]
        assert np.array_equal(found, wanted)


def test_large_models_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(hf_folder.FolderWriter.__init__, "__kwdefaults__", {
        "tag": "pt", "shard_bytes": 100_000})  # fmt: skip
    model, program = llama_and_program()
    export(program, tmp_path / "out", "float", model)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = token_ids(1, 5)
    assert worst(again(ids).logits, program(ids).logits) <= 1e-6 * scale_of(program(ids).logits)


def test_models_of_any_kind_need_no_description(tmp_path: Path) -> None:
    model = MLP(48, 40, 8)
    program = qc.quantize_groups(qc.capture_model(model, (torch.randn(3, 48),)))
    for target in ("float", "safetensors"):
        export(program, tmp_path / target, target)
        assert not (tmp_path / target / "config.json").exists()
        for site in program.plan.to_quantize():
            found = DECODERS[target](tmp_path / target, site.name)
            assert np.allclose(found, weight_of(program, site).double(), rtol=0, atol=1e-7)
    state = {n: torch.from_numpy(t) for n, t in tensors(tmp_path / "float").items()}
    model.load_state_dict(state)
    x = torch.randn(5, 48)
    assert worst(model(x), program(x)) <= 1e-6


# What a format does not have is written as floats, with the reason, or refused


@pytest.mark.parametrize(
    ("target", "sizes", "bits", "words"),
    [
        ("mlx", (64, 80, 32), 4, "in rows of 80"),
        ("gptq", (64, 64, 8), 4, "not a multiple of 32"),
        ("hqq", (48, 64, 7), 2, "cannot be packed"),
    ],
)
def test_layers_that_do_not_fit_are_floats(
    tmp_path: Path, target: str, sizes: tuple[int, ...], bits: int, words: str
) -> None:
    captured = qc.capture_model(MLP(*sizes), (torch.randn(3, sizes[0]),))
    program = qc.quantize_groups(captured, qc.QuantSpec(bits=bits, group_size=64))
    program = with_integer_zeros(program) if target in INTEGER_ONLY else program
    report = export(program, tmp_path / "out", target)
    odd = [row for row in report.stored if row.remark]
    assert odd
    assert all(words in row.remark for row in odd)
    assert len(odd) < report.quantized_layers
    for row in odd:
        site = program.plan[row.source]
        found = tensors(tmp_path / "out")[f"{row.source}.weight"]
        assert np.array_equal(found, weight_of(program, site).numpy())


def test_widths_that_differ_are_said(tmp_path: Path) -> None:
    model = MLP(64, 64, 64, 64)
    captured = qc.capture_model(model, (torch.randn(3, 64),))
    plan = qc.Pipeline.parse("canonicalize-pointwise,annotate-linears")(captured).program
    changes = {
        site.name: {"chosen_bits": bits, "chosen_group": 32}
        for site, bits in zip(plan.plan.to_quantize(), (4, 4, 3), strict=True)
    }
    mixed = plan.evolve(plan=plan.plan.update(changes))
    program = with_integer_zeros(qc.quantize_groups(mixed))
    assert [site.bits for site in program.plan] == [4, 4, 3]
    for target in FOLDERS:
        export(program, tmp_path / target, target)
        for site in program.plan:
            found = DECODERS[target](tmp_path / target, site.name)
            assert np.allclose(found, weight_of(program, site).double(), rtol=0, atol=1e-7), target


def test_weights_stored_the_other_way_are_refused(tmp_path: Path) -> None:
    model = gpt2()
    program = with_integer_zeros(qc.quantize_groups(capture_transformer(model)))
    for target in ("mlx", "hqq", "compressed-tensors"):
        with pytest.raises(UnsupportedError, match=r"stores this weight as \[K, N\]"):
            export(program, tmp_path / "out", target, model)
    export(program, tmp_path / "gptq", "gptq", model)
    site = program.plan["transformer.h.0.attn.c_proj"]
    found = DECODERS["gptq"](tmp_path / "gptq", site.name)
    assert np.allclose(found, weight_of(program, site).double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("target", ["float", "mlx", "hqq", "gptq", "compressed-tensors"])
def test_half_parameters_round_and_say_so(tmp_path: Path, target: str) -> None:
    model, program = program_for(target)
    report = export(program, tmp_path / "out", target, model, parameter_dtype="float16")
    assert report.capabilities["scale"].kind == "rounds"
    assert 0 < max(row.relative_error for row in report.stored) < 2e-3
    record = json.loads((tmp_path / "out" / "export.json").read_text("utf-8"))
    assert record["capabilities"]["scale"] == "rounds(float16)"
    site = program.plan["model.layers.0.mlp.up_proj"]
    wanted = weight_of(program, site).double().numpy()
    error = np.abs(DECODERS[target](tmp_path / "out", site.name) - wanted).max()
    row = next(row for row in report.stored if row.source == site.name)
    assert row.max_abs_error == pytest.approx(error, rel=1e-4)
    tensor = program.tensors()["model.norm.weight"]
    with torch.no_grad():
        tensor[0] += 1e6
    try:
        with pytest.raises(UserInputError, match="float16 holds at most 65504"):
            export(program, tmp_path / "b", target, model, parameter_dtype="float16")
    finally:
        with torch.no_grad():
            tensor[0] -= 1e6
    assert not (tmp_path / "b").exists()


def test_flat_groups_are_exact_in_the_zero_form() -> None:
    codes = torch.randint(0, 16, (3, 8), dtype=torch.uint8)
    scale = torch.tensor([[0.0, 1.0], [1e-45, 0.5], [0.25, 0.0]])
    offset = torch.tensor([[3.5, -2.0], [7.0, 0.5], [0.0, 0.0]])
    affine = GroupAffine(codes, scale, offset, 4, 4)
    new, factors, zeros = hqq.zero_form(affine, torch.float32)
    assert bool(torch.isfinite(zeros).all())
    again = (new.double() - zeros.repeat_interleave(4, 1)) * factors.repeat_interleave(4, 1)
    assert worst(again, affine.dequantize().double()) < 1e-6


@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from((2, 3, 4, 8)), st.integers(0, 99))
def test_words_are_the_bit_stream(rows: int, k: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, k), generator=generator, dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert words.shape == (rows, -(-k * bits // 32))
    assert np.array_equal(bits_of(words.numpy(), bits, k), codes.numpy())


@given(st.integers(1, 30), st.integers(1, 5), st.sampled_from((2, 3, 4, 8)))
def test_rows_are_packed_by_parts(count: int, width: int, bits: int) -> None:
    lanes = {8: 1, 4: 2, 3: 10, 2: 4}[bits]
    codes = torch.randint(0, 2**bits, (count * lanes, width), dtype=torch.uint8)
    packed = hqq.pack_rows(codes, bits).long()
    parts = [packed >> bits * (lanes - 1 - part) & 2**bits - 1 for part in range(lanes)]
    assert torch.equal(torch.cat(parts), codes.long())


# Bad input


@pytest.mark.parametrize("target", FOLDERS)
def test_adapters_have_to_be_folded(tmp_path: Path, target: str) -> None:
    model, program = llama_and_program()
    for stage, words in (("adapted", "adapters are not folded"), ("float", "not quantized")):
        with pytest.raises(PreconditionError, match=words):
            export(dataclasses.replace(program, stage=stage), tmp_path / "out", target, model)


def test_parts_of_parameters_are_refused(tmp_path: Path) -> None:
    layer = nn.MultiheadAttention(64, 4, batch_first=True)
    x = torch.randn(2, 5, 64)
    program = qc.quantize_groups(qc.capture_model(layer.eval(), (x, x, x)))
    with pytest.raises(UnsupportedError, match="cannot be stored in a checkpoint"):
        export(program, tmp_path / "out", "float")


def test_another_model_is_refused(tmp_path: Path) -> None:
    _, program = llama_and_program()
    with pytest.raises(UserInputError, match="the described model") as caught:
        export(program, tmp_path / "out", "float", causal_lm(intermediate_size=64))
    assert "mlp" in str(caught.value.where)
    with pytest.raises(UnsupportedError, match="not a transformers model"):
        export(program, tmp_path / "out", "float", OneLinear(8, 8))
    with pytest.raises(UserInputError, match="without a model"):
        spec = qc.ExportSpec(target="float")
        qc.export_model(program, tmp_path / "out", spec, tokenizer=tmp_path)
    with pytest.raises(UserInputError, match="model and tokenizer are given for target ort"):
        qc.export_model(program, tmp_path / "a.onnx", model=tmp_path)
    with pytest.raises(UserInputError, match="resume is given"):
        qc.export_model(program, tmp_path / "o", qc.ExportSpec(target="mlx"), resume="x")


def test_a_folder_is_complete_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, program = llama_and_program()
    out = tmp_path / "out"
    export(program, out, "mlx", model)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(UserInputError, match="already exists"):
        export(program, out, "mlx", model)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserInputError, match="writes a folder"):
        export(program, tmp_path / "file", "mlx", model, overwrite=True)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_folder, "save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        export(program, out, "mlx", model, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]
    assert (out / "model.safetensors").read_bytes() == before


def test_unused_weights_are_said(tmp_path: Path) -> None:
    class Spare(OneLinear):
        def __init__(self) -> None:
            super().__init__(64, 32)
            self.spare = nn.Linear(64, 8)

    program = qc.quantize_groups(qc.capture_model(Spare(), (torch.randn(2, 64),)))
    report = export(program, tmp_path / "out", "float")
    assert report.notes == ("1 weights that the graph does not read are left out: spare.weight",)


def test_every_target_has_a_format() -> None:
    from qalora_compile.config import CHECKPOINT_TARGETS

    assert set(CHECKPOINT_TARGETS) == {*FOLDERS, "gguf"}
    formats = {name: get_format(name) for name in CHECKPOINT_TARGETS}
    properties = [set(f.capabilities(qc.ExportSpec(target=t))) for t, f in formats.items()]
    assert all(found - {"activations"} == properties[1] for found in properties)


@pytest.mark.parametrize("target", ["mlx", "gptq", "hqq"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_as_floats_is_declared_as_these(
    tmp_path: Path, target: str, dtype: str
) -> None:
    sizes = {"mlx": (64, 80, 32), "gptq": (64, 64, 8), "hqq": (64, 64, 7)}[target]
    bits = 2 if target == "hqq" else 4
    captured = qc.capture_model(MLP(*sizes), (torch.randn(3, sizes[0]),))
    program = qc.quantize_groups(captured, qc.QuantSpec(bits=bits, group_size=64))
    program = with_integer_zeros(program) if target in INTEGER_ONLY else program
    report = export(program, tmp_path / "out", target, parameter_dtype=dtype)
    (odd,) = [row for row in report.stored if row.remark]
    kind = "exact" if dtype == "float32" else "rounds"
    assert (odd.max_abs_error > 0) == (kind == "rounds")
    declared = get_format(target).capabilities(qc.ExportSpec(target=target, parameter_dtype=dtype))
    assert {declared[name].kind for name in ("groups", "tail groups")} == {kind}
    assert report.capabilities["groups"] == declared["groups"]
    has_tail = any(row.k % 64 for row in program.plan.to_quantize())
    assert ("tail groups" in report.capabilities) == has_tail


def test_narrow_floats_of_gguf_are_declared() -> None:
    names = ("codes of 8 bits", "groups", "tail groups", "matrices of floats")
    for float_type, kind in ((None, "exact"), ("f32", "exact"), ("q8_0", "rounds")):
        spec = qc.ExportSpec(target="gguf", float_type=float_type)
        declared = get_format("gguf").capabilities(spec)
        assert {declared[name].kind for name in names} == {kind}


def test_cut_groups_hold_the_same_weight() -> None:
    from qalora_compile.exporters.checkpoints.named_tensors import read_checkpoint

    for k, group_size, size in ((96, 64, 32), (96, 64, 16), (40, 128, 8), (64, 64, 64)):
        model = OneLinear(k, 6)
        spec = qc.QuantSpec(group_size=group_size)
        program = qc.quantize_groups(qc.capture_model(model, (torch.randn(2, k),)), spec)
        layer = read_checkpoint(program, None).layers[0]
        assert layer.unit % size == 0
        wanted = affine_of(program, program.plan["fc"]).dequantize()
        assert torch.equal(layer.cut(size).validate().dequantize(), wanted)
