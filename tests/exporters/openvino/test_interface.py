"""Key-value caches of OpenVINO models: as state, and as inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qalora_compile as qc
from tests.exporters.openvino.running import compiled
from tests.exporters.test_kv_cache import PROMPT, fold, greedy
from tests.models import gpt2, llama

NEW_TOKENS = 12


def generate(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of a compiled model with any of the two forms of a cache."""
    request, feed, seen, tokens = model.create_infer_request(), list(prompt), 0, list[int]()
    past = {
        leaf.any_name: np.zeros([1, leaf.partial_shape[1].get_length(), 0, 16], np.float32)
        for leaf in model.inputs
        if leaf.any_name.startswith("past_key_values.")
    }
    taken = {leaf.any_name for leaf in model.inputs}
    while len(tokens) < count:
        given = {
            "input_ids": np.array([feed]),
            "attention_mask": np.ones((1, seen + len(feed)), np.int64),
            "position_ids": np.arange(seen, seen + len(feed))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        found = request.infer({n: v for n, v in (given | past).items() if n in taken})
        values = {output.any_name: value.copy() for output, value in found.items()}
        seen += len(feed)
        feed = [int(values.pop("logits")[0, -1].argmax())]
        tokens += feed
        past = {n.replace("present.", "past_key_values."): v for n, v in values.items()}
    return tokens


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("stateful", [True, False])
def test_tokens_equal_those_of_torch(
    build: Callable[[], nn.Module], stateful: bool, tmp_path: Path
) -> None:
    model, folded = fold(build)
    path = tmp_path / "model.xml"
    cached = qc.add_kv_cache(folded, model, last_logits=None)
    qc.export_model(cached, path, qc.ExportSpec(target="openvino", stateful=stateful))
    found = compiled(path)
    names = [leaf.any_name for leaf in found.inputs]
    own = ["beam_idx"] if stateful else [leaf.name for leaf in cached.signature.cache]
    assert names == ["input_ids", "attention_mask", "position_ids", *own]
    assert len(found.outputs) == (1 if stateful else 1 + len(cached.signature.cache))
    assert generate(found, PROMPT, NEW_TOKENS) == greedy(folded, NEW_TOKENS)


def test_beams_are_reordered_inside_the_model(tmp_path: Path) -> None:
    model, folded = fold(llama)
    path = tmp_path / "model.xml"
    qc.export_model(qc.add_kv_cache(folded, model), path, qc.ExportSpec(target="openvino"))
    request = compiled(path).create_infer_request()
    rows = np.array([PROMPT, PROMPT[::-1]])

    def step(ids: Any, seen: int, beams: list[int]) -> Any:
        stop = seen + ids.shape[1]
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((2, stop), np.int64),
            "position_ids": np.arange(seen, stop)[None].repeat(2, 0),
            "beam_idx": np.array(beams, np.int32),
        }
        return request.infer(given)["logits"].copy()

    step(rows, 0, [0, 1])
    later = step(np.array([[9], [9]]), 4, [1, 1])
    full = torch.tensor([[*PROMPT[::-1], 9]])
    with torch.no_grad():
        expected = folded(full).logits[0, -1].numpy()
    for row in later[:, -1]:
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)
