"""The codes of GGUF files are kept as they are, checked against the package gguf."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file

import qalora_compile as qc
from qalora_compile.capture import transformers_internals
from qalora_compile.capture.checkpoints.gguf import read_gguf_codes
from qalora_compile.capture.load_source import load_source
from qalora_compile.cli.main import main
from qalora_compile.errors import QaloraError, UserInputError
from qalora_compile.ir.packing.bitstream import pack_codes
from tests.capture.checkpoints.gguf_files import example_ids, nested, write_llama, write_tensors
from tests.capture.checkpoints.matrix import by_gguf
from tests.capture.checkpoints.models import weights_of
from tests.models import randomize_adapters

FORMS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@pytest.mark.parametrize("form", FORMS)
def test_codes_dequantize_to_what_the_library_gives(form: str, tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((6, 96)).astype(np.float32)
    values[2] = 0.25  # flat groups
    values[3, 32:64] = 0
    path = write_tensors(tmp_path / "a.gguf", {"w.weight": (values, form)})
    codes, notes = read_gguf_codes(path)
    kind = gguf.GGMLQuantizationType[form]
    wanted = torch.from_numpy(dequantize(quantize(values, kind), kind))
    found = codes.find(wanted)
    assert found is not None
    assert torch.equal(found.affine.dequantize(), wanted)
    assert (found.form, found.affine.group_size) == (form, 32)
    assert found.affine.bits == (4 if form.startswith("Q4") else 8)
    assert [("8 bits" in note) for note in notes] == [True] * form.startswith("Q5")


@pytest.mark.parametrize("form", ["Q4_1", "Q5_0"])
def test_a_llama_keeps_its_codes_to_the_folded_program(form: str, tmp_path: Path) -> None:
    source = load_source(str(write_llama(tmp_path / "llama.gguf", form)))
    codes, _ = source.stored()
    captured, ids = source.capture(), example_ids()
    program = qc.quantize_groups(captured, stored=codes)
    sites = program.plan.to_quantize()
    assert len(sites) == 14
    assert {site.why_bits for site in sites} == {f"{form}, as stored"}
    mask = torch.ones_like(ids)
    assert torch.equal(program(ids, mask).logits, captured(ids, mask).logits)
    adapted = randomize_adapters(qc.insert_adapters(program, qc.AdapterSpec(rank=4)))
    folded = qc.fold_adapters(adapted)
    for site in sites:
        held = codes.find(captured.tensors()[site.weight].detach())
        assert held is not None
        packed = folded.tensors()[f"{site.path}.qweight"]
        assert torch.equal(packed, pack_codes(held.affine.codes, held.affine.bits))
    assert not torch.equal(folded(ids, mask).logits, captured(ids, mask).logits)


def test_other_tensors_are_quantized_and_say_so(tmp_path: Path) -> None:
    """A head that is float in the file has no codes to keep."""
    source = load_source(str(write_llama(tmp_path / "llama.gguf")))
    program = qc.quantize_groups(
        source.capture(),
        qc.QuantSpec(bits=8, group_size=16),
        targets=["re:.*"],
        stored=source.stored()[0],
    )
    kinds = {site.name: (site.bits, site.group_size) for site in program.plan.to_quantize()}
    assert kinds.pop("lm_head") == (8, 16)
    assert set(kinds.values()) == {(4, 32)}


def test_nested_scales_are_dequantized_with_a_note(tmp_path: Path) -> None:
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q6_K][1]
    raw = np.zeros((4, block), np.uint8)
    codes, notes = read_gguf_codes(write_tensors(tmp_path / "k.gguf", {"w": (raw, "Q6_K")}))
    assert len(codes) == 0
    assert notes == ("1 tensors in Q6_K were dequantized: codes with nested scales cannot be kept",)


@pytest.mark.parametrize("form", ["Q4_K", "Q6_K"])
def test_nested_scales_are_dequantized_as_the_library_does(form: str, tmp_path: Path) -> None:
    raw = nested(np.random.default_rng(0), 3, 512, form)
    assert dequantize(raw, gguf.GGMLQuantizationType[form]).shape == (3, 512)
    path = write_llama(tmp_path / "llama.gguf", form, hidden=256, mlp=256)
    source = load_source(str(path))
    codes, notes = source.stored()
    assert len(codes) == 0
    assert any(f"14 tensors in {form} were dequantized" in note for note in notes)
    for mine, theirs in zip(weights_of(source.model).values(), by_gguf(path), strict=True):
        assert float(theirs.std()) > 1e-3
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("form", ["F16", "BF16", "F32"])
def test_floats_are_read_exactly(form: str, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "llama.gguf", form, embedding=form)
    source = load_source(str(path))
    codes, notes = source.stored()
    assert (len(codes), notes) == (0, ())
    for mine, theirs in zip(weights_of(source.model).values(), by_gguf(path), strict=True):
        assert torch.equal(mine, theirs)
    stored = {t.name: t for t in gguf.GGUFReader(str(path)).tensors}["token_embd.weight"]
    assert stored.tensor_type.name == form
    embedding = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
    assert torch.equal(source.model.get_parameter("model.embed_tokens.weight"), embedding)


def test_loading_parses_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = write_llama(tmp_path / "llama.gguf"), Counter[str]()

    def count(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        monkeypatch.setattr(module, name, call)

    count(transformers_internals, "open_gguf")
    count(gguf, "get_tensor_name_map")
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    load_source(str(path))
    assert calls == {"open_gguf": 1, "get_tensor_name_map": 1}
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


@pytest.mark.slow
def test_the_command_keeps_codes_unless_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_llama(tmp_path / "llama.gguf")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "one and", "completion": " two"}\n' * 4)
    common = ["finetune", str(model), "--data", str(data), "--steps", "1", "--batch-size", "2"]
    assert main([*common, "--out", str(tmp_path / "kept")]) == 0
    assert "stored" in capsys.readouterr().out
    assert main([*common, "--out", str(tmp_path / "anew"), "--bits", "3"]) == 0
    assert "requantized" in "".join(capsys.readouterr())
    widths = [
        load_file(tmp_path / run / "quantized.safetensors")[
            "model.layers.0.mlp.up_proj.qweight"
        ].shape[1]
        for run in ("kept", "anew")
    ]
    assert widths == [64 * 4 // 8, 64 * 3 // 8]


# Faults


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "llama.gguf")
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(UserInputError) as caught:
        read_gguf_codes(path)
    assert "fetch the file again" in str(caught.value.hint)


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "a weight missing": (
        {"without": "blk.1.ffn_up.weight"},
        r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight \(1 in all\)",
    ),
    "a layer more": ({"more": {"blk.2.ffn_up.weight": np.ones((96, 64))}}, "a layer that the"),
    "a bias": ({"more": {"blk.0.attn_q.bias": np.ones(64)}}, r"attn_q\.bias, for .* no parameter"),
    "frequencies": ({"more": {"rope_freqs.weight": np.full(8, 4.0)}}, "rope_freqs"),
    "long factors": ({"more": {"rope_factors_long.weight": np.ones(8)}}, "rope_factors_long"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_transformers_would_draw_at_random_or_pass_over_is_refused(
    kind: str, tmp_path: Path
) -> None:
    odd, words = ODD[kind]
    path = write_llama(tmp_path / "llama.gguf", **odd)
    with pytest.raises(QaloraError, match=words) as caught:
        load_source(str(path))
    assert str(path) in str(caught.value.where)


def test_frequencies_that_change_nothing_are_read_over(tmp_path: Path) -> None:
    plain = load_source(str(write_llama(tmp_path / "plain.gguf")))
    path = write_llama(tmp_path / "llama.gguf", more={"rope_freqs.weight": np.ones(8)})
    source = load_source(str(path))
    assert len(source.stored()[0]) == len(plain.stored()[0]) == 14
    wanted = plain.model.state_dict()
    found = source.model.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_chosen_bits_and_kept_codes_exclude_each_other(tmp_path: Path) -> None:
    source = load_source(str(write_llama(tmp_path / "llama.gguf")))
    spec = qc.QuantSpec(bits="auto", budget=3.0)
    with pytest.raises(UserInputError, match="keep those of their checkpoint"):
        qc.quantize_groups(
            source.capture(), spec, stored=source.stored()[0], calibration=[source.kwargs]
        )


@pytest.mark.parametrize("nibbles", ["swapped", "interleaved"])
def test_codes_in_another_order_are_not_taken(
    nibbles: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault in the decoder: no row is found, so nothing wrong is kept."""
    from qalora_compile.capture.checkpoints import gguf as gguf_codes

    def wrong(raw: np.ndarray) -> np.ndarray:
        low, high = raw & np.uint8(15), raw >> np.uint8(4)
        if nibbles == "swapped":
            return np.concatenate([high, low], axis=1)
        return np.stack([low, high], axis=2).reshape(len(raw), -1)

    monkeypatch.setattr(gguf_codes, "_nibbles", wrong)
    source = load_source(str(write_llama(tmp_path / "llama.gguf")))
    codes, _ = source.stored()
    weight = source.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert codes.find(weight.detach()) is None
