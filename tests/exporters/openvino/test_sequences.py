"""Encoder-decoder models for OpenVINO: two files, the own cache as state, torch's tokens."""

from __future__ import annotations

import copy
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qalora_compile as qc
from qalora_compile.api.run_folder import MODEL, load_run, save_description, write_run_file
from qalora_compile.cli.main import main
from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.meta import OPENVINO_SETTINGS
from qalora_compile.runtime import EncoderDecoder
from qalora_compile.untrusted.artifacts import OPENVINO_DECODER_FILE, OPENVINO_ENCODER_FILE
from tests.capture.test_merged_decoder import NEW_TOKENS, tokens_of_torch
from tests.clients.record import TOY, record_client
from tests.exporters.test_encoder_decoder import START, build
from tests.models import randomize_adapters
from tests.zoo.entries import ENTRIES

openvino = pytest.importorskip("openvino", reason="openvino is not installed")


@pytest.fixture(scope="module", params=["t5", pytest.param("whisper", marks=pytest.mark.slow)])
def edge(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Any, Path]:
    """The name in the zoo, the model with its adapters, and the folder with `folded` and `edge`."""
    plain = build(request.param)
    model = copy.deepcopy(plain)
    adapted = qc.adapt_module_(model, (), ENTRIES[request.param].inputs(2, 7, 0)[1])
    folder = tmp_path_factory.mktemp("openvino")
    program = qc.fold_adapters(randomize_adapters(adapted).eval())
    program.save(folder / "folded")
    save_description(plain, folder / "folded")
    write_run_file(folder / "folded", {"model": request.param})
    words = [str(folder / "folded"), "--out", str(folder / "edge"), "--target", "openvino"]
    assert main(["export", *words]) == 0
    return request.param, model.eval(), folder


def test_both_caches_are_state_and_the_tokens_torch_s(edge: Any) -> None:
    name, model, folder = edge
    kwargs = ENTRIES[name].inputs(1, 9, 3)[1]
    kwargs.pop("decoder_input_ids")
    encoder, decoder = (
        openvino.Core().compile_model(folder / "edge" / file, "CPU", dict(OPENVINO_SETTINGS))
        for file in (OPENVINO_ENCODER_FILE, OPENVINO_DECODER_FILE)
    )
    feed = {key: value.numpy() for key, value in kwargs.items()}
    if "input_ids" in feed:
        feed["attention_mask"] = np.ones_like(feed["input_ids"])
    (states,) = encoder(feed).values()
    request, tokens = decoder.create_infer_request(), [START[name]]
    constant = {"encoder_hidden_states": states, "beam_idx": np.zeros(1, np.int32)}
    if "attention_mask" in feed:
        constant["encoder_attention_mask"] = feed["attention_mask"]
    assert {one.any_name for one in decoder.inputs} == {"input_ids", *constant}
    for _ in range(NEW_TOKENS):
        (logits,) = request.infer({"input_ids": np.array([tokens[-1:]]), **constant}).values()
        tokens.append(int(logits[0, -1].argmax()))
    assert tokens[1:] == tokens_of_torch(model, kwargs, START[name])
    record_client(
        "OpenVINO",
        metadata.version("openvino"),
        "openvino",
        f"{type(model).__name__}, random weights",
        f"torch's {NEW_TOKENS} tokens",
        speed=TOY,
    )


def test_verify_and_inspect_read_both(edge: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = edge[2]
    paths = [str(folder / "folded"), str(folder / "edge")]
    assert main(["verify", *paths, "--max-rel", "1e-3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in report["outputs"]} == {"logits", "encoder_last_hidden_state"}
    assert main(["inspect", str(folder / "edge"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    files = {row["file"] for row in found["layers"]}
    assert files == {OPENVINO_ENCODER_FILE, OPENVINO_DECODER_FILE}
    assert OPENVINO_DECODER_FILE in (folder / "edge" / "README.md").read_text("utf-8")


def test_the_layers_of_the_decoder_are_proved(edge: Any) -> None:
    """What is state is read from the node that computes it first."""
    folder = edge[2]
    program, _ = load_run(folder / "folded")
    _, decoder = qc.split_encoder_decoder(program, folder / "folded" / MODEL, state=True)
    proof = qc.prove_equivalence(decoder, folder / "edge" / OPENVINO_DECODER_FILE)
    assert {site.status for site in proof.sites} == {"proved"}
    assert len(proof.sites) > 16, "the keys and values of cross-attention too"


def test_onnx_runtime_does_not_open_it(edge: Any) -> None:
    with pytest.raises(UnsupportedError, match="for OpenVINO"):
        EncoderDecoder.open(edge[2] / "edge")
