"""Clients that open an edge folder without an option compute what torch computes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

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
from tests.clients.record import record_client
from tests.clients.speed import ROUNDS, next_to_float, recording

pytestmark = pytest.mark.slow
SMOLLM2, MINILM = "SmolLM2-135M", "all-MiniLM-L6-v2"
TOKENS = f"torch's {NEW_TOKENS} tokens"
SPEED_TOKENS = 8
"""The answer to the prompt is that long; the first token is not in the time."""
NEAR = 2e-2
"""8 bits against float."""


def js_version() -> str:
    """The version of transformers.js in examples/web."""
    package = WEB / "node_modules" / "@huggingface" / "transformers" / "package.json"
    return str(json.loads(package.read_text("utf-8"))["version"])


def version_in(python: Path, package: str) -> str:
    """The version of a package in another interpreter's environment."""
    code = f"import json, importlib.metadata as m; print(json.dumps(m.version({package!r})))"
    return str(run([python, "-c", code]))


def plan(kind: str, text: str, models: tuple[str, str], **more: Any) -> str:
    """What turns.js runs, as JSON."""
    few = {"tokens": SPEED_TOKENS, "rounds": ROUNDS}
    return json.dumps({"kind": kind, "text": text, "models": models} | few | more)


def speed_in_node(node: str, model: Exported) -> str:
    """Decoding, next to float; empty where no row is recorded."""
    if not recording():
        return ""
    models = (model.folder.name, model.as_float().name)
    words: list[str | Path] = [WEB, model.folder.parent, plan("text-generation", PROMPT, models)]
    return next_to_float(run([node, script("turns.mjs"), *words]))


def speed_in_python(python: Path, function: str, model: Exported, *words: str) -> str:
    """A function of python_clients.py on the model and on its float form, like the above."""
    if not recording():
        return ""
    both: list[str | Path] = [model.folder, model.as_float()]
    return next_to_float(run([python, script("python_clients.py"), function, *both, *words]))


def speed_on_page(
    python: Path, chromium: str, site: tuple[str, Path], model: Exported, **asked: Any
) -> str:
    """What turns.html measures, like the above; `asked`: kind, text and device."""
    if not recording():
        return ""
    address, models = site
    for name, folder in (("tuned", model.folder), ("float", model.as_float())):
        (models / name).symlink_to(folder)
    stated = plan(models=("tuned", "float"), **asked)
    found = run(
        [python, script("browser.py"), chromium, f"{address}/turns.html?plan={quote(stated)}"]
    )
    assert (found["state"], found["problems"]) == ("answered", []), found["status"]
    return next_to_float(json.loads(found["found"]))


@pytest.mark.parametrize("form", ["language_model", "web_model"])
def test_transformers_js_in_node_generates_torch_s_tokens(
    form: str, node: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(form)
    words: list[str | Path] = [model.folder, PROMPT, str(NEW_TOKENS), "--json"]
    found = run([node, WEB / "generate.mjs", *words])
    assert found["ids"] == model.expected
    preset = "" if form == "language_model" else ", preset web"
    record_client(
        f"transformers.js in Node.js{preset}",
        js_version(),
        "ort",
        SMOLLM2,
        TOKENS,
        speed=speed_in_node(node, model),
    )


def test_optimum_generates_torch_s_tokens(language_model: Exported, python: Path) -> None:
    words: list[str | Path] = [script("python_clients.py"), "optimum_tokens", language_model.folder]
    found = run([python, *words, PROMPT, str(NEW_TOKENS)])
    assert found == language_model.expected
    few = (PROMPT, str(SPEED_TOKENS), str(ROUNDS))
    record_client(
        "optimum-onnx",
        version_in(python, "optimum-onnx"),
        "ort",
        SMOLLM2,
        TOKENS,
        speed=speed_in_python(python, "optimum_seconds", language_model, *few),
    )


def test_sentence_transformers_computes_torch_s_vectors(encoder: Exported, python: Path) -> None:
    words: list[str | Path] = ["sentence_vectors", encoder.folder, *TEXTS]
    found = torch.tensor(run([python, script("python_clients.py"), *words]))
    assert found.shape == encoder.expected.shape
    error = float((found - encoder.expected).abs().max())
    assert error < NEAR
    record_client(
        "sentence-transformers",
        version_in(python, "sentence-transformers"),
        "ort",
        f"{MINILM}, 8 bits",
        f"vectors within {error:.1g} of float's",
        speed=speed_in_python(python, "sentence_seconds", encoder, str(ROUNDS), *TEXTS),
    )


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


def test_the_page_chats_in_a_browser(
    web_model: Exported, python: Path, chromium: str, site: tuple[str, Path]
) -> None:
    address, models = site
    shutil.copytree(web_model.folder, models / "edge")
    found = run([python, script("browser.py"), chromium, address, "#prompt", PROMPT])
    assert (found["state"], found["problems"], found["outside"]) == ("answered", [], [])
    assert json.loads(found["ids"])[: len(web_model.expected)] == web_model.expected
    assert "Paris" in found["answer"]
    assert found["pieces"] > 1, "the answer is streamed"
    assert re.search(r"\d tokens/s on wasm", found["status"])
    record_client(
        "transformers.js in Chromium, WASM, preset web",
        js_version(),
        "ort",
        SMOLLM2,
        TOKENS,
        speed=speed_on_page(python, chromium, site, web_model, kind="text-generation", text=PROMPT),
    )


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
    record_client(
        "transformers.js in Chromium, WebGPU (SwiftShader)",
        js_version(),
        "ort",
        SMOLLM2,
        f"torch's {FEW_TOKENS} tokens, two layers",
        speed="not measured: an emulated GPU",
    )


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
    error = max(abs(scores[label] - value) for label, value in classifier.expected.items())
    asked = {"kind": "text-classification", "text": TEXTS[0]}
    record_client(
        "transformers.js in Chromium, WASM, preset web",
        js_version(),
        "ort",
        f"{MINILM} with a head, 8 bits",
        f"probabilities within {error:.1g} of float's",
        speed=speed_on_page(python, chromium, site, classifier, **asked),
    )
