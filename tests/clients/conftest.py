"""Real models in edge folders, and the clients that `make clients` installs."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification, LlamaForCausalLM

from benchmarks.peers.sources import assets, write_smollm2
from qalora_compile.capture.load_source import load_source
from qalora_compile.cli.main import main
from tests.chromium import ROOT, browser, python_with_clients
from tests.clients.speed import write_float

WEB = ROOT / "examples" / "web"
PROMPT = "What is the capital of France?"
NEW_TOKENS, FEW_TOKENS = 24, 4
TEXTS = ("a film to remember", "it drags on and on, and then it ends", "music")


@dataclass(frozen=True)
class Exported:
    """An edge folder, what torch computes with the model it was made from, and that model."""

    folder: Path
    expected: Any
    source: Path

    def as_float(self) -> Path:
        """The same folder with the model as floats, next to this one; written when asked for."""
        made = self.folder.with_name(f"{self.folder.name}-float")
        return made if made.is_dir() else write_float(self.source, self.folder, made)


def run(command: list[str | Path]) -> Any:
    """What a client prints on its last line, as JSON."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-500:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """SmolLM2-135M in float, with the values of its GGUF file, and torch's tokens."""
    folder = tmp_path_factory.mktemp("clients") / "float"
    write_smollm2(folder, folder.parent)
    return Exported(folder, generated(folder, NEW_TOKENS), folder)


def generated(folder: Path, tokens: int, **changed: Any) -> list[int]:
    """Greedy tokens of torch, with those of the prompt; `changed` replaces settings."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    model: Any = LlamaForCausalLM.from_pretrained(folder, **changed)
    ids = model.generate(**chat, max_new_tokens=tokens, do_sample=False)
    return [int(token) for token in ids[0]]


def quantized(source: Exported, folder: Path, *words: str) -> Exported:
    """An edge folder. The GGUF file is 4 bits itself: it has the weights that torch has."""
    assert main(["quantize", str(source.folder), "--out", str(folder), *words]) == 0
    return Exported(folder, source.expected, source.folder)


@pytest.fixture(scope="session")
def language_model(smollm2: Exported, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The default, without an option."""
    return quantized(smollm2, tmp_path_factory.mktemp("clients") / "smollm2")


@pytest.fixture(scope="session")
def web_model(smollm2: Exported, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The preset for WASM."""
    return quantized(smollm2, tmp_path_factory.mktemp("clients") / "web", "--preset", "web")


@pytest.fixture(scope="session")
def webgpu_model(smollm2: Exported, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The preset for WebGPU, and two layers of the model: SwiftShader computes on the CPU."""
    made, few = tmp_path_factory.mktemp("clients"), {"num_hidden_layers": 2}
    model: Any = LlamaForCausalLM.from_pretrained(smollm2.folder, **few)
    model.save_pretrained(made / "float")
    AutoTokenizer.from_pretrained(smollm2.folder).save_pretrained(made / "float")
    source = Exported(made / "float", generated(made / "float", FEW_TOKENS), made / "float")
    return quantized(source, made / "webgpu", "--preset", "web", "--expansion", "nbits")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """all-MiniLM-L6-v2 on 8 bits, and the float model's vectors."""
    base, folder = Path(assets().encoder_path()), tmp_path_factory.mktemp("clients") / "minilm"
    words = ["--bits", "8", "--pooling", "mean", "--normalize"]
    assert main(["quantize", str(base), "--out", str(folder), *words]) == 0
    source = load_source(str(base))
    encoded = source.tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    model: Any = source.model
    with torch.no_grad():
        hidden = model(**encoded).last_hidden_state
    mask = encoded.attention_mask[..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    return Exported(folder, vectors, base)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """all-MiniLM-L6-v2 with a random head of three classes, and the float model's probabilities."""
    base, made = Path(assets().encoder_path()), tmp_path_factory.mktemp("clients")
    torch.manual_seed(0)
    names = dict(enumerate(("bad", "so so", "good")))
    model: Any = BertForSequenceClassification.from_pretrained(base, id2label=names, num_labels=3)
    torch.nn.init.normal_(model.classifier.weight, std=0.3)
    model.eval().save_pretrained(made / "float")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(made / "float")
    words = ["--bits", "8", "--preset", "web"]
    assert main(["quantize", str(made / "float"), "--out", str(made / "classifier"), *words]) == 0
    with torch.no_grad():
        found = model(**tokenizer(TEXTS[0], return_tensors="pt")).logits[0].softmax(0)
    expected = dict(zip(names.values(), found.tolist(), strict=True))
    return Exported(made / "classifier", expected, made / "float")


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter with the Python clients."""
    return python_with_clients()


@pytest.fixture(scope="session")
def node() -> str:
    """Node.js, with transformers.js in examples/web."""
    found = shutil.which("node")
    if found is None or not (WEB / "node_modules").is_dir():
        pytest.skip("Node.js or transformers.js is not installed: make clients")
    return found


@pytest.fixture(scope="session")
def chromium(python: Path, node: str) -> str:
    """A browser, driven by playwright."""
    return browser()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002: the base class's name
        """Print no line for each request."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a server of `examples/web`, and the folder of its models."""
    for file in (*WEB.iterdir(), script("turns.html"), script("turns.js")):
        (tmp_path / file.name).symlink_to(file)
    models = tmp_path / "models"
    models.mkdir(exist_ok=True)
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", models
        server.shutdown()


def script(name: str) -> Path:
    """A program of this folder that another interpreter runs."""
    return Path(__file__).parent / name
