"""The two graphs of optimum's interface: torch's tokens, in the form that the clients ask for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qalora_compile as qc
from qalora_compile.errors import UnsupportedError
from qalora_compile.runtime import EncoderDecoder, kernel_level, open_session
from qalora_compile.runtime.encoder_decoder import Encoded
from qalora_compile.untrusted.artifacts import ENCODER_FILE, MERGED_FILE
from tests.exporters.test_encoder_decoder import START, build
from tests.models import randomize_adapters
from tests.zoo.entries import ENTRIES

pytestmark = pytest.mark.slow

NEW_TOKENS, STATES = 8, "encoder_hidden_states"
FORMS = ({"target": "ort"}, {"target": "ort-stock"}, {"target": "onnx"}, {"expansion": "float"})


@pytest.fixture(scope="module", params=["t5", "bart", "whisper"])
def split(request: pytest.FixtureRequest) -> tuple[str, Any, qc.Program, tuple[qc.Program, ...]]:
    """The name in the zoo, the model with its adapters, the program, encoder and decoder."""
    plain = build(request.param, layers=2 if request.param == "t5" else 1)
    model = copy.deepcopy(plain)
    _, kwargs = ENTRIES[request.param].inputs(2, 7, 0)
    adapted = qc.adapt_module_(model, (), kwargs, adapter=qc.AdapterSpec(rank=4))
    folded = qc.fold_adapters(randomize_adapters(adapted).eval())
    return request.param, model.eval(), folded, qc.split_encoder_decoder(folded, plain, merged=True)


def export(parts: tuple[qc.Program, ...], folder: Path, **form: Any) -> None:
    """Write both files to the folder."""
    (folder / ENCODER_FILE).parent.mkdir()
    for file, part in zip((ENCODER_FILE, MERGED_FILE), parts, strict=True):
        qc.export_model(part, folder / file, qc.ExportSpec(**form))


def test_it_has_the_names_that_the_clients_ask_for(split: Any) -> None:
    _, _, _, (encoder, decoder) = split
    assert encoder.signature.outputs == ("last_hidden_state",)
    inputs = {leaf.name: leaf for leaf in decoder.signature.inputs}
    assert STATES in inputs
    assert "use_cache_branch" not in inputs
    past = {name for name in inputs if name.startswith("past_key_values.")}
    assert {name.replace("past_key_values", "present") for name in past} | {"logits"} == set(
        decoder.signature.outputs
    )
    lengths = {inputs[name].shape[2] for name in past}
    assert lengths == {"past_sequence", "encoder_past_sequence"}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_it_generates_the_tokens_of_torch(split: Any, form: dict[str, str], tmp_path: Path) -> None:
    name, model, _, parts = split
    export(parts, tmp_path, **form)
    kwargs = ENTRIES[name].inputs(1, 9, 3)[1]
    kwargs.pop("decoder_input_ids")
    expected = tokens_of_torch(model, kwargs, START[name])
    feed = {key: value.numpy() for key, value in kwargs.items()}
    for library in (
        (False, True) if kernel_level() and form.get("target", "ort") == "ort" else (False,)
    ):
        files = (tmp_path / ENCODER_FILE, tmp_path / MERGED_FILE)
        exported = EncoderDecoder(*(open_session(f, library=library, exact=True) for f in files))
        found = exported.generate(feed, prompt=[START[name]], max_new_tokens=NEW_TOKENS)
        assert list(found) == expected
    assert len(set(expected)) > 1, "a degenerate continuation would show nothing"


def tokens_of_torch(model: Any, kwargs: dict[str, torch.Tensor], start: int) -> list[int]:
    """Greedy tokens, each from a complete forward pass."""
    tokens = [start]
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = model(**kwargs, decoder_input_ids=torch.tensor([tokens])).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[1:]


def test_verify_runs_both(split: Any, tmp_path: Path) -> None:
    name, _, folded, parts = split
    export(parts, tmp_path)
    kwargs = ENTRIES[name].inputs(2, 9, 3)[1]
    report = qc.verify_equivalence(folded, tmp_path, [kwargs], qc.Tolerance(max_rel=1e-4)).check()
    assert {row.name for row in report.outputs} == {"logits", "encoder_last_hidden_state"}


def test_halves_of_two_models_are_refused(split: Any, tmp_path: Path) -> None:
    _, _, _, (encoder, _) = split
    export((encoder, encoder), tmp_path)
    with pytest.raises(UnsupportedError, match="not the two graphs of one model"):
        EncoderDecoder.open(tmp_path)


def test_after_the_first_step_no_state_is_read(split: Any, tmp_path: Path) -> None:
    """The decoder reads the encoder's states once: later ones may be anything."""
    name, _, _, parts = split
    export(parts, tmp_path)
    exported = EncoderDecoder.open(tmp_path)
    kwargs = ENTRIES[name].inputs(1, 9, 3)[1]
    kwargs.pop("decoder_input_ids")
    encoded = exported.encode({key: value.numpy() for key, value in kwargs.items()})
    _, cache = exported.step(np.array([[2]]), encoded, exported.empty_cache())
    expected, _ = exported.step(np.array([[3]]), encoded, cache)
    states = encoded.values[STATES]
    zeros = type(states).ortvalue_from_numpy(states.numpy() * 0)
    others = Encoded({**encoded.values, STATES: zeros}, encoded.batch)
    found, _ = exported.step(np.array([[3]]), others, cache)
    assert np.array_equal(found, expected)
