"""GPTQ and AWQ folders keep their codes; kinds of zero-points; permuted groups."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.capture.causal_lm import capture_causal_lm
from qalora_compile.capture.load_source import load_source
from qalora_compile.capture.skeleton import skeleton_of
from qalora_compile.errors import QaloraError, UserInputError
from qalora_compile.passes.recipes.replay import replay
from qalora_compile.runtime.session import open_session
from tests.capture.checkpoints.models import Quantize, example, rewrite, weights_of, write_folder
from tests.capture.checkpoints.packing import pack_awq, pack_words, quantize_integer_zero
from tests.models import assert_close, randomize_adapters, slow

GROUP = 32
UP = "model.layers.0.mlp.up_proj"


def gptq_layer(
    wanted: list[Tensor],
    bits: int = 4,
    *,
    symmetric: bool = False,
    version: int = 1,
    act_order: bool = False,
    floating: str = "",
    zero: int | None = None,
) -> Quantize:
    """Quantize a layer, store it as GPTQ does, and note its weight."""

    def quantize(module: nn.Linear) -> dict[str, Tensor]:
        weight, k = module.weight.detach(), module.in_features
        order = torch.arange(k)
        if act_order:
            order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
        codes, scale, zeros = quantize_integer_zero(
            weight[:, order], bits, GROUP, symmetric=symmetric
        )
        if zero is not None:  # the codes move along, so that the weights stay about 0
            codes = (codes.int() + zero - 2 ** (bits - 1)).clamp(0, 2**bits - 1).to(torch.uint8)
            zeros = torch.full_like(zeros, zero)
        scale = scale.half().float()
        levels = codes.float().unflatten(1, (-1, GROUP)) - zeros[..., None].float()
        made = torch.empty_like(weight)
        made[:, order] = (levels * scale[..., None]).flatten(1)
        wanted.append(made)
        g_idx = torch.empty(k, dtype=torch.int32)
        g_idx[order] = (torch.arange(k) // GROUP).to(torch.int32)
        unsorted = torch.empty_like(codes)
        unsorted[:, order] = codes
        stored = (zeros.int() - (2 - version)) % 2**bits
        forms = {
            "": pack_words(stored.t(), bits),
            "float": zeros.t().float(),
            "offset": (-zeros.float() * scale).t(),
        }
        return {
            "qweight": pack_words(unsorted, bits).t(),
            "qzeros": forms[floating],
            "scales": scale.t().half(),
            "g_idx": g_idx,
        }

    return quantize


def gptq_config(bits: int = 4, tag: str = "gptq", **more: Any) -> dict[str, Any]:
    said = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": tag}
    return {"quantization_config": said | more}


def awq_layer(wanted: list[Tensor]) -> Quantize:
    """Quantize a layer, store it as AWQ does, and note its weight."""

    def quantize(module: nn.Linear) -> dict[str, Tensor]:
        codes, scale, zero = quantize_integer_zero(
            module.weight.detach(), 4, GROUP, symmetric=False
        )
        scale = scale.half().float()
        levels = codes.float().unflatten(1, (-1, GROUP)) - zero[..., None].float()
        wanted.append((levels * scale[..., None]).flatten(1))
        parts = {"qweight": codes, "qzeros": zero}
        return {n: pack_awq(p.t()) for n, p in parts.items()} | {"scales": scale.t().half()}

    return quantize


AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": GROUP}}


def check_weights(folder: Path, wanted: list[Tensor], **options: Any) -> Any:
    """Load; the weights are those that were stored."""
    source = load_source(str(folder), **options)
    found = list(weights_of(source.model).values())
    assert len(found) == len(wanted) == 14
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    return source


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_weights_of_both_versions(bits: int, version: int, tmp_path: Path) -> None:
    wanted: list[Tensor] = []
    layer = gptq_layer(wanted, bits, version=version)
    tag = "gptq" if version == 1 else "gptq_v2"
    write_folder(tmp_path / "model", layer, gptq_config(bits, tag))
    assert len(check_weights(tmp_path / "model", wanted).stored()[0]) == 14


@pytest.mark.parametrize("said", [{"sym": True}, {}])
@pytest.mark.parametrize("tag", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("version", [1, 2])
def test_symmetric_zero_points_show_a_wrong_tag(
    said: dict[str, bool], tag: str, version: int, tmp_path: Path
) -> None:
    wanted: list[Tensor] = []
    layer = gptq_layer(wanted, symmetric=True, version=version)
    write_folder(tmp_path / "model", layer, gptq_config(tag=tag, **said))
    source = check_weights(tmp_path / "model", wanted)
    disagree = tag != ("gptq" if version == 1 else "gptq_v2")
    assert any(f"read as v{version}" in note for note in source.stored()[1]) == disagree


def test_a_layer_that_happens_to_look_like_the_other_version_does_not_outweigh_the_tag(
    tmp_path: Path,
) -> None:
    """All zero-points of one asymmetric layer are 7, stored as 7 in version 2."""
    wanted: list[Tensor] = []
    seven = itertools.chain([True], itertools.repeat(False))

    def layer(module: nn.Linear) -> dict[str, Tensor]:
        odd = next(seven)
        return gptq_layer(wanted, version=2, symmetric=odd, zero=7 if odd else None)(module)

    write_folder(tmp_path / "model", layer, gptq_config(tag="gptq_v2"))
    (note,) = check_weights(tmp_path / "model", wanted).stored()[1]
    assert "model.layers.0.self_attn.q_proj, 8, are stored as 7 (1 layers): read as v2" in note


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tag_that_all_weights_speak_against_is_refused(symmetric: bool, tmp_path: Path) -> None:
    """Read by the tag, all weights would be off by one step; one symmetric layer is no proof."""
    first = itertools.chain([symmetric], itertools.repeat(False))

    def layer(module: nn.Linear) -> dict[str, Tensor]:
        return gptq_layer([], symmetric=next(first), version=2)(module)

    write_folder(tmp_path / "model", layer, gptq_config(tag="gptq"))
    with pytest.raises(UserInputError, match=r"\(14 layers\) are all too .* one step") as caught:
        load_source(str(tmp_path / "model"))
    assert "zero_points='v2'" in str(caught.value.hint)


@pytest.mark.parametrize("tag", ["gptq", "gptq_v2"])
def test_symmetric_layers_of_both_versions_are_each_read_by_their_own(
    tag: str, tmp_path: Path
) -> None:
    wanted: list[Tensor] = []
    versions = itertools.cycle([1, 2])

    def layer(module: nn.Linear) -> dict[str, Tensor]:
        return gptq_layer(wanted, symmetric=True, version=next(versions))(module)

    write_folder(tmp_path / "model", layer, gptq_config(tag=tag, sym=True))
    (note, *_) = check_weights(tmp_path / "model", wanted).stored()[1]
    assert "(7 layers)" in note
    assert f"read as {'v2' if tag == 'gptq' else 'v1'}" in note


def test_symmetric_by_word_alone_is_noted(tmp_path: Path) -> None:
    wanted: list[Tensor] = []
    write_folder(tmp_path / "model", gptq_layer(wanted), gptq_config(sym=True))
    (note, *_) = check_weights(tmp_path / "model", wanted).stored()[1]
    assert "14 layers are symmetric by config.json" in note
    assert "are not: read as v1" in note


def test_the_configuration_in_a_file_of_its_own(tmp_path: Path) -> None:
    """AutoGPTQ's `quantize_config.json`; without it there is nothing to read the codes by."""
    wanted: list[Tensor] = []
    folder = tmp_path / "model"
    write_folder(folder, gptq_layer(wanted), {})
    with pytest.raises(UserInputError, match="has no tensor .*weight.* an unknown .*qweight|g_idx"):
        load_source(str(folder))
    said = gptq_config()["quantization_config"]
    del said["quant_method"]  # its first versions did not say
    (folder / "quantize_config.json").write_text(json.dumps(said))
    assert len(check_weights(folder, wanted).stored()[0]) == 14


def with_biases(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".qweight")]:
            bias = torch.full((tensors[name].shape[1],), value, dtype=torch.float16)
            tensors[f"{name.removesuffix('.qweight')}.bias"] = bias

    return change


def test_biases_of_zeros_that_the_model_has_not_are_left_out(tmp_path: Path) -> None:
    """Some tools write one for each layer."""
    wanted: list[Tensor] = []
    write_folder(tmp_path / "model", gptq_layer(wanted), gptq_config())
    rewrite(tmp_path / "model", with_biases(0.0))
    notes = check_weights(tmp_path / "model", wanted).stored()[1]
    assert any("14 biases that the model does not have are ignored" in note for note in notes)


def test_other_biases_that_the_model_has_not_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", gptq_layer([]), gptq_config())
    rewrite(tmp_path / "model", with_biases(0.5))
    with pytest.raises(UserInputError, match=r"unknown tensor model\.layers.*\.bias"):
        load_source(str(tmp_path / "model"))


def test_the_caller_has_the_last_word(tmp_path: Path) -> None:
    wanted: list[Tensor] = []
    layer = gptq_layer(wanted, version=2)
    write_folder(tmp_path / "model", layer, gptq_config(tag="gptq"))
    notes = check_weights(tmp_path / "model", wanted, zero_points="v2").stored()[1]
    assert not notes
    with pytest.raises(AssertionError):
        check_weights(tmp_path / "model", wanted, zero_points="v1")


DYNAMIC: dict[str, Any] = {
    "-:.*k_proj": {},
    r"+:.*\.mlp\.down_proj": {"bits": 8, "group_size": GROUP},
    r".*\.[kv]_proj": {"bits": 3},  # the first that matches decides, so v alone
    "proj": {"bits": 2},  # matches no beginning
}


@pytest.mark.parametrize(("version", "tag"), [(2, "gptq"), *slow((1, "gptq"), (2, "gptq_v2"))])
def test_layers_with_options_of_their_own(version: int, tag: str, tmp_path: Path) -> None:
    wanted: list[Tensor] = []
    names = itertools.cycle(("q", "k", "v", "o", "gate", "up", "down"))

    def layer(module: nn.Linear) -> dict[str, Tensor]:
        name = next(names)
        if name == "k":
            wanted.append(module.weight.detach())
            return {"weight": wanted[-1]}
        bits = {"v": 3, "down": 8}.get(name, 4)
        return gptq_layer(wanted, bits, symmetric=True, version=version)(module)

    config = gptq_config(tag=tag, sym=True, dynamic=DYNAMIC)
    write_folder(tmp_path / "model", layer, config)
    source = check_weights(tmp_path / "model", wanted)
    codes, notes = source.stored()
    assert len(codes) == 12
    assert any("read as v2" in note for note in notes) == (version == 2 and tag == "gptq")
    plan = qc.quantize_groups(source.capture(), stored=codes).plan
    kept = {s.path.rpartition(".")[2]: (s.bits, s.why_bits) for s in plan.to_quantize()}
    assert kept["down_proj"] == (8, "GPTQ 8 bits, as stored")
    assert kept["v_proj"] == (3, "GPTQ 3 bits, as stored")
    assert kept["q_proj"] == (4, "GPTQ 4 bits, as stored")


@pytest.mark.parametrize("floating", ["float", "offset"])
@pytest.mark.parametrize("stated", [True, False])
def test_floating_zero_points_of_the_script_and_of_its_fork(
    floating: str, stated: bool, tmp_path: Path
) -> None:
    wanted: list[Tensor] = []
    write_folder(tmp_path / "model", gptq_layer(wanted, floating=floating), gptq_config())
    check_weights(tmp_path / "model", wanted, zero_points=floating if stated else None)


@pytest.mark.parametrize("odd", ["float", "offset"])
def test_floating_zero_points_are_distinguished_layer_by_layer(odd: str, tmp_path: Path) -> None:
    """One layer of another form than all others; one is enough for a wrong model."""
    wanted: list[Tensor] = []
    others = {"float": "offset", "offset": "float"}[odd]
    forms = itertools.chain([others, others, odd], itertools.repeat(others))

    def layer(module: nn.Linear) -> dict[str, Tensor]:
        return gptq_layer(wanted, floating=next(forms))(module)

    write_folder(tmp_path / "model", layer, gptq_config())
    (note,) = check_weights(tmp_path / "model", wanted).stored()[1]
    assert f"{1 if odd == 'offset' else 13} layers" in note
    (note,) = load_source(str(tmp_path / "model"), zero_points=others).stored()[1]
    assert (
        "the weights of model.layers.0.self_attn.v_proj (1 layers) have a mean farther from 0"
        in note
    )


def without_order(every: bool) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(".g_idx") and (every or UP in n)]:
            del tensors[name]

    return change


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize(
    "said", [{"desc_act": True}, {"dynamic": {r".*\.up_proj": {"desc_act": True}}}]
)
def test_a_promised_order_that_is_missing_is_refused(
    said: dict[str, Any], every: bool, tmp_path: Path
) -> None:
    write_folder(tmp_path / "model", gptq_layer([], act_order=True), gptq_config(**said))
    rewrite(tmp_path / "model", without_order(every))
    with pytest.raises(UserInputError, match=r"no tensor .*\.g_idx, and .* desc_act: true"):
        load_source(str(tmp_path / "model"))


def test_one_order_that_is_missing_is_refused_without_a_promise(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", gptq_layer([], act_order=True), gptq_config())
    rewrite(tmp_path / "model", without_order(False))
    with pytest.raises(UserInputError, match=rf"no tensor {UP}\.g_idx, and .* another order"):
        load_source(str(tmp_path / "model"))


def test_no_order_is_needed_where_none_is_promised(tmp_path: Path) -> None:
    wanted: list[Tensor] = []
    write_folder(tmp_path / "model", gptq_layer(wanted), gptq_config(desc_act=False))
    rewrite(tmp_path / "model", without_order(True))
    check_weights(tmp_path / "model", wanted)


def test_awq_weights(tmp_path: Path) -> None:
    wanted: list[Tensor] = []
    write_folder(tmp_path / "model", awq_layer(wanted), AWQ)
    check_weights(tmp_path / "model", wanted)


@pytest.mark.slow
def test_activation_order_goes_through_to_onnx(tmp_path: Path) -> None:
    """Permuted groups: the input is selected in their order, once for q, k and v."""
    wanted: list[Tensor] = []
    layer = gptq_layer(wanted, act_order=True)
    write_folder(tmp_path / "model", layer, gptq_config(desc_act=True))
    source = check_weights(tmp_path / "model", wanted)
    captured, ids = source.capture(), example(source.model)
    call = (ids, torch.ones_like(ids))
    program = qc.quantize_groups(captured, stored=source.stored()[0])
    assert {s.why_bits for s in program.plan.to_quantize()} == {"GPTQ 4 bits, act-order, as stored"}
    assert str(program).count("aten.index_select") == 2 * 4  # q, k, v; o; gate, up; down
    assert_close(program(*call).logits, captured(*call).logits, relative=1e-5)
    adapted = randomize_adapters(qc.insert_adapters(program))
    folded = qc.fold_adapters(adapted)
    assert_close(folded(*call).logits, adapted(*call).logits, relative=1e-5)
    qc.export_model(folded, tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", library=False, exact=True)
    feed = dict(zip([i.name for i in session.get_inputs()], [t.numpy() for t in call], strict=True))
    assert_close(torch.from_numpy(session.run(None, feed)[0]), folded(*call).logits, relative=1e-5)
    certificate = qc.prove_equivalence(folded, tmp_path / "model.onnx")
    assert certificate.check(allow_sampled=True).sites  # masks without a cache are sampled
    folded.save(tmp_path / "folded")
    again = qc.Program.load(tmp_path / "folded")
    assert torch.equal(again(*call).logits, folded(*call).logits)
    cached = replay(folded, capture_causal_lm(skeleton_of(source.model)))
    orders = {n: t for n, t in folded.tensors().items() if n.endswith(".order")}
    assert orders
    assert all(torch.equal(cached.tensors()[name], order) for name, order in orders.items())


@pytest.mark.slow
def test_an_svd_start_knows_the_order(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", gptq_layer([], act_order=True), gptq_config())
    source = load_source(str(tmp_path / "model"))
    captured = source.capture()
    program = qc.quantize_groups(captured, stored=source.stored()[0])
    spec = qc.AdapterSpec(rank=2, init="svd")
    started = qc.insert_adapters(program, spec, source=captured)
    ids = example(source.model)
    mask = torch.ones_like(ids)  # nothing was lost, so there is nothing to correct
    assert_close(started(ids, mask).logits, captured(ids, mask).logits, relative=1e-4)


# Faults


def replaced(part: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.{part}"] = value(tensors[f"{UP}.{part}"]).contiguous()

    return change


def without_scales(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{UP}.scales"]


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "packed zero-points of another width": (
        replaced("qzeros", lambda t: t[:, :-1]),
        "scales of .* need",
    ),
    "packed zero-points of the scales' shape": (
        replaced("qzeros", lambda t: torch.zeros(2, 96, dtype=torch.int32)),
        r"int32 \[2, 96\], but scales of \[2, 96\] need \[2, 12\]",
    ),
    "zero-points in floating point and packed ones": (
        replaced("qzeros", lambda t: torch.full((2, 96), 7.0)),
        "up_proj.qzeros is in floating point, and .*qzeros packed integers",
    ),
    "scales of one axis": (replaced("scales", torch.flatten), "not floating"),
    "no scales": (without_scales, "no tensor .*scales"),
    "scales cut": (replaced("scales", lambda t: t[:-1]), "qzeros is"),
    "codes cut": (replaced("qweight", lambda t: t[:-4]), "g_idx is|codes"),
    "codes as floats": (replaced("qweight", lambda t: t.float()), "not int32"),
    "unlike groups": (replaced("g_idx", torch.zeros_like), "not of 32 columns each"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_inconsistent_tensors_are_refused(kind: str, tmp_path: Path) -> None:
    change, words = FAULTS[kind]
    write_folder(tmp_path / "model", gptq_layer([]), gptq_config())
    rewrite(tmp_path / "model", change)
    with pytest.raises(QaloraError, match=words):
        load_source(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("part", "words"),
    [("qzeros", "qzeros is .* need"), ("scales", "qzeros is .* need"), ("qweight", "scale is")],
)
def test_inconsistent_tensors_of_awq_are_refused(part: str, words: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "model", awq_layer([]), AWQ)
    rewrite(
        tmp_path / "model", replaced(part, lambda t: t[:-GROUP] if part == "qweight" else t[:-1])
    )
    with pytest.raises(QaloraError, match=words):
        load_source(str(tmp_path / "model"))


OPTIONS: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "another packing": (gptq_config(tag="marlin"), None, "packed as 'marlin'"),
    "no bits": ({"quantization_config": {"quant_method": "gptq"}}, None, "bits is missing"),
    "a rule that is none": (gptq_config(dynamic={"+:(": {}}), None, r"the rule '\+:\('"),
    "a rule without options": (gptq_config(dynamic={".*": 4}), None, r"\.\* is 4"),
    "a rule of 0 bits": (gptq_config(dynamic={".*": {"bits": 0}}), None, "bits is 0"),
    "codes of a float": (gptq_config(dynamic={"-:.*up": {}}), None, "quantized, but the rule"),
    "floats said of integers": (gptq_config(), "offset", "stored as integers"),
    "an unknown word": (gptq_config(), "v3", "zero_points is 'v3'"),
    "awq of another layout": (
        {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemv"}},
        None,
        "layout 'gemv'",
    ),
    "zero-points said of AWQ": (AWQ, "v1", "not GPTQ's"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_options_that_cannot_be_are_refused(kind: str, tmp_path: Path) -> None:
    config, zero_points, words = OPTIONS[kind]
    write_folder(tmp_path / "model", gptq_layer([]), config)
    with pytest.raises(QaloraError, match=words):
        load_source(str(tmp_path / "model"), zero_points=zero_points)


def test_integers_said_of_floats_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", gptq_layer([], floating="float"), gptq_config())
    with pytest.raises(QaloraError, match="stored in floating point"):
        load_source(str(tmp_path / "model"), zero_points="v1")


def test_floats_that_may_be_zero_points_or_offsets_are_refused(tmp_path: Path) -> None:
    """Between 0 and 1/2 either could be meant; the caller says which."""
    write_folder(tmp_path / "model", gptq_layer([], floating="float"), gptq_config())

    def change(tensors: dict[str, Tensor]) -> None:
        tensors |= {n: torch.full_like(t, 0.25) for n, t in tensors.items() if "qzeros" in n}

    rewrite(tmp_path / "model", change)
    with pytest.raises(UserInputError, match="median of 0.25 may be zero-points or offsets"):
        load_source(str(tmp_path / "model"))
    read = [
        weights_of(load_source(str(tmp_path / "model"), zero_points=word).model)[UP]
        for word in ("float", "offset")
    ]
    assert not torch.equal(*read)
