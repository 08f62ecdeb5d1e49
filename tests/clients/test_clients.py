"""Clients that open an edge folder without an option compute what torch computes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.clients.conftest import NEW_TOKENS, PROMPT, TEXTS, WEB, Exported, run, script

pytestmark = pytest.mark.slow
NEAR = 2e-2
"""8 bits against float."""


def test_transformers_js_in_node_generates_torch_s_tokens(
    language_model: Exported, node: str
) -> None:
    words: list[str | Path] = [language_model.folder, PROMPT, str(NEW_TOKENS), "--json"]
    found = run([node, WEB / "generate.mjs", *words])
    assert found["ids"] == language_model.expected


def test_optimum_generates_torch_s_tokens(language_model: Exported, python: Path) -> None:
    words: list[str | Path] = [script("python_clients.py"), "optimum_tokens", language_model.folder]
    found = run([python, *words, PROMPT, str(NEW_TOKENS)])
    assert found == language_model.expected


def test_sentence_transformers_computes_torch_s_vectors(encoder: Exported, python: Path) -> None:
    words: list[str | Path] = ["sentence_vectors", encoder.folder, *TEXTS]
    found = torch.tensor(run([python, script("python_clients.py"), *words]))
    assert found.shape == encoder.expected.shape
    assert float((found - encoder.expected).abs().max()) < NEAR


def card_says(folder: Path, client: str, command: list[str]) -> str:
    """What the code of the model card prints, run as the card says: in the folder."""
    text = (folder / "README.md").read_text("utf-8")
    found = re.search(rf"### {re.escape(client)}\n\n```\w+\n(.*?)```", text, re.DOTALL)
    assert found is not None, client
    done = subprocess.run(
        [*command, found[1]], cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("client", ["ONNX Runtime", "ONNX Runtime GenAI", "optimum"])
def test_the_code_of_the_card_generates(
    language_model: Exported, python: Path, client: str
) -> None:
    interpreter = str(python) if client == "optimum" else sys.executable
    assert "Paris" in card_says(language_model.folder, client, [interpreter, "-c"])


def test_the_code_of_the_card_runs_in_node(
    language_model: Exported, node: str, tmp_path: Path
) -> None:
    folder = tmp_path / "edge"
    shutil.copytree(language_model.folder, folder)
    (folder / "node_modules").symlink_to(WEB / "node_modules")
    assert "Paris" in card_says(folder, "transformers.js", [node, "--input-type=module", "-e"])


def test_the_code_of_the_card_embeds_and_classifies(
    encoder: Exported, classifier: Exported, python: Path
) -> None:
    said = card_says(encoder.folder, "sentence-transformers", [str(python), "-c"])
    assert "(2, 384)" in said
    said = card_says(classifier.folder, "optimum", [str(python), "-c"])
    assert said.strip().splitlines()[-1] in ("bad", "so so", "good")
    assert "logits (1, 3)" in card_says(classifier.folder, "ONNX Runtime", [sys.executable, "-c"])


@pytest.mark.parametrize("device", ["wasm"])
def test_the_page_chats_in_a_browser(
    language_model: Exported,
    python: Path,
    chromium: str,
    site: tuple[str, Path],
    device: str,
) -> None:
    address, models = site
    shutil.copytree(language_model.folder, models / "edge")
    found = run(
        [python, script("browser.py"), chromium, f"{address}/?device={device}", "#prompt", PROMPT]
    )
    assert (found["state"], found["problems"], found["outside"]) == ("answered", [], [])
    expected = language_model.expected
    assert json.loads(found["ids"])[: len(expected)] == expected
    assert "Paris" in found["answer"]
    assert f"tokens/s on {device}" in found["status"]


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
