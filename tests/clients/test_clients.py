"""Clients that open an edge folder without an option compute what torch computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.clients.conftest import (
    FEW_TOKENS,
    NEW_TOKENS,
    PROMPT,
    TEXTS,
    WEB,
    Exported,
    run,
    script,
)

pytestmark = pytest.mark.slow
NEAR = 2e-2
"""8 bits against float."""


@pytest.mark.parametrize("form", ["language_model", "web_model"])
def test_transformers_js_in_node_generates_torch_s_tokens(
    form: str, node: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(form)
    words: list[str | Path] = [model.folder, PROMPT, str(NEW_TOKENS), "--json"]
    found = run([node, WEB / "generate.mjs", *words])
    assert found["ids"] == model.expected


def test_optimum_generates_torch_s_tokens(language_model: Exported, python: Path) -> None:
    words: list[str | Path] = [script("python_clients.py"), "optimum_tokens", language_model.folder]
    found = run([python, *words, PROMPT, str(NEW_TOKENS)])
    assert found == language_model.expected


def test_sentence_transformers_computes_torch_s_vectors(encoder: Exported, python: Path) -> None:
    words: list[str | Path] = ["sentence_vectors", encoder.folder, *TEXTS]
    found = torch.tensor(run([python, script("python_clients.py"), *words]))
    assert found.shape == encoder.expected.shape
    assert float((found - encoder.expected).abs().max()) < NEAR


def test_the_page_chats_in_a_browser(
    web_model: Exported, python: Path, chromium: str, site: tuple[str, Path]
) -> None:
    address, models = site
    shutil.copytree(web_model.folder, models / "edge")
    found = run([python, script("browser.py"), chromium, address, "#prompt", PROMPT])
    assert (found["state"], found["problems"], found["outside"]) == ("answered", [], [])
    assert json.loads(found["ids"])[: len(web_model.expected)] == web_model.expected
    assert "Paris" in found["answer"]
    assert "tokens/s on wasm" in found["status"]


def test_the_page_chats_on_webgpu(
    webgpu_model: Exported, python: Path, chromium: str, site: tuple[str, Path]
) -> None:
    address, models = site
    shutil.copytree(webgpu_model.folder, models / "edge")
    page = f"{address}/?device=webgpu&tokens={FEW_TOKENS}"
    found = run([python, script("browser.py"), chromium, page, "#prompt", PROMPT])
    if not found["adapter"]:
        pytest.skip("this Chromium has no WebGPU adapter, not even SwiftShader")
    assert (found["state"], found["problems"], found["outside"]) == ("answered", [], [])
    assert json.loads(found["ids"]) == webgpu_model.expected


def test_the_page_classifies_in_a_browser(
    classifier: Exported, python: Path, chromium: str, site: tuple[str, Path]
) -> None:
    address, models = site
    shutil.copytree(classifier.folder, models / "mine")
    page = f"{address}/classify.html?model=mine"
    found = run([python, script("browser.py"), chromium, page, "#text", TEXTS[0]])
    assert (found["state"], found["problems"], found["outside"]) == ("answered", [], [])
    scores = {row["label"]: row["score"] for row in json.loads(found["found"])}
    assert scores == pytest.approx(classifier.expected, abs=NEAR)
