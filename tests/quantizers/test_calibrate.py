"""Second moments of what layers read, from runs of annotated and of quantized programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.errors import PreconditionError, UserInputError
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.passes.canonicalize.canonicalize_pointwise import CanonicalizePointwise
from qalora_compile.quantizers.calibrate import collect_statistics
from qalora_compile.quantizers.sensitivity import measure_sensitivities
from qalora_compile.quantizers.sequential_calibration import replace_in_order
from qalora_compile.quantizers.statistics import ActivationStatistics
from qalora_compile.training.calibration import calibration_calls
from qalora_compile.training.data.example import Example
from tests.models import MLP, ThreeReaders, UsedTwice, adapted, assert_close, bert, token_ids


def annotated(model: nn.Module, args: tuple[Any, ...]) -> qc.Program:
    program = CanonicalizePointwise()(qc.capture_model(model.eval(), args)).program
    return AnnotateLinears()(program).program


def test_every_layer_has_the_moments_of_its_own_input() -> None:
    model, calls = MLP(12, 7, 5).double(), [torch.randn(n, 12).double() for n in (2, 5)]
    program = annotated(model, (calls[0],))
    found = collect_statistics(program, [(calls[0],), {"x": calls[1]}])
    x = torch.cat(calls)
    expected = {"layers.0": x, "layers.1": torch.tanh(model.layers[0](x))}
    assert list(found) == list(expected)
    for path, rows in expected.items():
        assert found[path].rows == 7
        torch.testing.assert_close(found[path].moment, ActivationStatistics.of(rows).moment)


def test_a_quantized_program_gives_what_its_own_layers_read() -> None:
    model, x = MLP(16, 8, 4), torch.randn(6, 16)
    program = qc.quantize_groups(qc.capture_model(model, (x,)), qc.QuantSpec(bits=2))
    after_first = torch.tanh(first_layer(program, x))
    found = collect_statistics(program, [(x,)], ["layers.1"])
    assert list(found) == ["layers.1"]
    torch.testing.assert_close(
        found["layers.1"].moment, ActivationStatistics.of(after_first).moment
    )


def first_layer(program: qc.Program, x: Tensor) -> Tensor:
    parts = [program.tensors()[f"layers.0.{name}"] for name in ("qweight", "scale", "offset")]
    bias = program.tensors()["layers.0.bias"]
    y: Tensor = torch.ops.qalora.group_linear(x, *parts, bias, 2, 32)
    return y


def test_layers_that_read_one_tensor_share_one_moment() -> None:
    found = collect_statistics(
        annotated(ThreeReaders(), (torch.randn(2, 64),)), [(torch.randn(9, 64),)]
    )
    assert found["q"] is found["k"] is found["v"]


def test_uses_of_one_weight_are_merged() -> None:
    model, x = UsedTwice().double(), torch.randn(3, 32).double()
    found = collect_statistics(annotated(model, (x,)), [(x,)])
    rows = torch.cat([x, torch.relu(model.shared(x))])
    assert found["shared"].rows == 6
    torch.testing.assert_close(found["shared"].moment, ActivationStatistics.of(rows).moment)


@pytest.fixture(scope="module")
def masked() -> qc.Program:
    ids = token_ids(2, 8)
    return annotated(bert(), (ids, torch.ones_like(ids)))


def test_padding_does_not_count(masked: qc.Program) -> None:
    ids = token_ids(2, 8)
    short = (ids, torch.ones_like(ids))
    padding = torch.zeros(2, 4, dtype=torch.int64)
    padded = (torch.cat([ids, token_ids(2, 4)], 1), torch.cat([torch.ones_like(ids), padding], 1))
    found, expected = (collect_statistics(masked, [call]) for call in (padded, short))
    assert len(found) == 13
    for path, statistics in expected.items():
        assert found[path].rows == statistics.rows == (2 if "pooler" in path else 16)
        assert_close(found[path].moment, statistics.moment, relative=1e-5)


class EncoderDecoder(nn.Module):
    """A decoder that reads the sum of what an encoder gives."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.encoder, self.decoder, self.cross = (nn.Linear(8, 8) for _ in range(3))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        states = self.encoder(self.embedding(input_ids)) * attention_mask[..., None]
        x = self.decoder(self.embedding(decoder_input_ids))
        if decoder_attention_mask is not None:
            x = x * decoder_attention_mask[..., None]
        return x + self.cross(states).sum(1, keepdim=True), states


@pytest.mark.parametrize("length", [4, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_each_side_of_an_encoder_decoder_has_its_own_padding(length: int, masked: bool) -> None:
    ids, mask = torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)
    mask[1, 2:] = 0
    tokens, own = (torch.ones(2, length, dtype=torch.long) for _ in range(2))
    own[0, 1:] = 0
    call = (ids, mask, tokens, own) if masked else (ids, mask, tokens)
    program = annotated(EncoderDecoder(), call)
    rows = {path: found.rows for path, found in collect_statistics(program, [call]).items()}
    assert rows == {
        "encoder": 8,
        "cross": 8,
        "decoder": length + 1 if masked else 2 * length,
    }
    in_order: dict[str, int] = {}

    def replace(path: str, statistics: ActivationStatistics) -> Tensor:
        in_order[path] = statistics.rows
        weight: Tensor = program.tensors()[f"{path}.weight"].detach()
        return weight

    replace_in_order(program, [call], replace)
    assert in_order == rows


def test_the_gradients_of_a_decoder_do_not_follow_the_mask_of_its_encoder() -> None:
    ids = torch.ones(2, 6, dtype=torch.long)
    model = EncoderDecoder()
    program = annotated(model, (ids, ids, ids))
    half = ids.clone()
    half[:, :3] = 0
    complete, masked = (
        measure_sensitivities(program, [(ids, mask, ids)])["decoder"].gain for mask in (ids, half)
    )
    assert masked == complete


def test_calls_of_a_model_with_an_encoder_hold_one_example_without_padding() -> None:
    ids = torch.ones(2, 6, dtype=torch.long)
    program = annotated(EncoderDecoder(), (ids, ids, ids[:, :4]))
    sizes = [(2, 5), (4, 4), (3, 2)]
    examples = [Example((1,) * t, (1,) * t, source=(2,) * s) for t, s in sizes]
    calls = calibration_calls(program, examples, 3)
    assert [call["decoder_input_ids"].shape for call in calls] == [(1, t) for t, _ in sizes]
    rows = {path: found.rows for path, found in collect_statistics(program, calls).items()}
    assert rows == {"encoder": 11, "cross": 11, "decoder": 9}


def test_data_of_nothing_but_padding_are_refused(masked: qc.Program) -> None:
    ids = token_ids(2, 8)
    with pytest.raises(UserInputError, match="no input row") as caught:
        collect_statistics(masked, [(ids, torch.zeros_like(ids))])
    assert caught.value.where == "encoder.layer.0.attention.self.query"


def test_nan_is_refused_with_the_layer() -> None:
    program = annotated(MLP(4, 4, 4), (torch.randn(2, 4),))
    with pytest.raises(UserInputError, match="NaN") as caught:
        collect_statistics(program, [(torch.full((2, 4), float("nan")),)])
    assert caught.value.where == "layers.0"


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (5, "calibration is int"),
        (torch.randn(2, 4), "calibration is Tensor"),
        ({"x": torch.randn(2, 4)}, "calibration is dict"),
        ([None], "a calibration call is NoneType"),
        ([torch.randn(2, 4)], "a calibration call is Tensor"),
    ],
)
@pytest.mark.parametrize("bits", [3, "auto"])
def test_what_is_no_calibration_is_refused(calibration: Any, words: str, bits: int | str) -> None:
    captured = qc.capture_model(MLP(4, 4).eval(), (torch.randn(2, 4),))
    spec = qc.QuantSpec(bits=bits, budget=4.0 if bits == "auto" else None)
    with pytest.raises(UserInputError, match=words) as caught:
        qc.quantize_groups(captured, spec, calibration=calibration)
    assert "calibration=[(x,)]" in str(caught.value.hint)
    start = qc.AdapterSpec(init="svd")
    with pytest.raises(UserInputError, match=words):
        qc.insert_adapters(
            qc.quantize_groups(captured), start, source=captured, calibration=calibration
        )


def test_bad_requests_are_refused() -> None:
    program = annotated(MLP(4, 4), (torch.randn(2, 4),))
    with pytest.raises(UserInputError, match="no calibration data"):
        collect_statistics(program, [])
    with pytest.raises(UserInputError, match="no layer 'fc'"):
        collect_statistics(program, [(torch.randn(2, 4),)], ["fc"])
    with pytest.raises(UserInputError, match="shape"):
        collect_statistics(program, [(torch.randn(2, 5),)])
    with pytest.raises(PreconditionError, match="adapted"):
        collect_statistics(adapted(MLP(4, 4), (torch.randn(2, 4),)), [(torch.randn(2, 4),)])


def test_nothing_runs_after_the_last_layer_asked_for() -> None:
    model, x = MLP(4, 4, 4), torch.randn(2, 4)
    program = annotated(model, (x,))
    with torch.no_grad():
        program.tensors()["layers.0.weight"].fill_(float("nan"))
    assert collect_statistics(program, [(x,)], ["layers.0"])["layers.0"].rows == 2
    with pytest.raises(UserInputError, match="NaN"):
        collect_statistics(program, [(x,)])


def test_the_mode_is_restored() -> None:
    program = annotated(MLP(4, 4), (torch.randn(2, 4),)).train()
    collect_statistics(program, [(torch.randn(2, 4),)])
    assert program.module.training
