"""The commands of the how-to pages run, on small models and data instead of those they name."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from qalora_compile.cli.main import main
from tests.cli.tiny import BAD, GOOD, write_data, write_encoder, write_model
from tests.ground.test_docs_site import DOCS, commands
from tests.media import write_image_model, write_images

PAGES = sorted((DOCS / "how-to").glob("*.md"))
SHORTER = {"--steps": "2", "--seq-len": "16", "--limit": "2", "--eval-every": "1"}
"""Options whose values are made smaller."""
STANDS_FOR = {"first/SmolLM2.gguf": "SmolLM2", "model.gguf": "SmolLM2", "./Llama": "SmolLM2"}
NOT_HERE = {
    "serve edge": "it runs until it is stopped: tests/serving",
    "quantize ./Llama-GPTQ": "tests/capture/checkpoints",
    "bench edge": "it measures for a minute: tests/cli/test_commands",
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the pages take for granted, and a run, folded and exported."""
    root = tmp_path_factory.mktemp("how-to")
    write_model(root / "SmolLM2", layers=1)
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    (root / "SmolLM2" / "chat_template.jinja").write_text(template, "utf-8")
    texts = ("train", "test", "more", "news", "manuals", "chats")
    for name in (*texts, "first/topics", "first/topics_test"):
        (root / name).parent.mkdir(exist_ok=True)
        file = write_data(root / f"{name}.jsonl")
        file.write_text(3 * file.read_text("utf-8"), "utf-8")  # for method learned
    write_encoder(root / "first" / "MiniLM")
    labels = [{"text": word, "label": word[:1]} for word in (*GOOD[:1], *BAD[:1])]
    pairs = [{"prompt": "red is a", "chosen": " colour", "rejected": " number"}]
    for name, rows in (("first/reviews", labels), ("first/reviews_test", labels), ("pairs", pairs)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    _write_adapter(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for data, run in (("train", "run"), ("more", "sft")):
            words = ["finetune", "SmolLM2", "--data", f"{data}.jsonl", "--eval-data", "test.jsonl"]
            assert main([*words, "--steps", "2", "--out", run]) == 0
        assert main(["fold", "run", "--out", "folded"]) == 0
        assert main(["fold", "sft", "--out", "other"]) == 0
        assert main(["export", "folded", "--out", "edge"]) == 0
        assert main(["export", "other", "--out", "reviews", "--external-data"]) == 0
    return root


def _write_adapter(root: Path) -> None:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(root / "SmolLM2")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    wrapped.save_pretrained(str(root / "adapter"))


def _small(words: list[str]) -> list[str]:
    """The words of a command, with what is here in the place of what they name."""
    learned = ("--learn-steps", "4") if "learned" in words else ()
    return [
        SHORTER.get(before, STANDS_FOR.get(word, word))
        for before, word in zip(["", *words, *learned], [*words, *learned], strict=False)
    ]


def _runs(page: Path) -> list[list[str]]:
    found = list(commands(page.read_text("utf-8")))
    return [each for each in found if " ".join(each[:2]) not in NOT_HERE]


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if _runs(p)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(
    page: Path,
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = shutil.copytree(workspace, tmp_path / "here")
    monkeypatch.chdir(root)
    if page.stem == "image_model":
        write_image_model(root / "vit")
        for name in ("train", "test"):
            data = write_images(root / f"{name}-images")
            rows = data.read_text("utf-8").replace("images/", f"{name}-images/images/")
            (root / f"{name}.jsonl").write_text(rows, "utf-8")
    for words in _runs(page):
        if "dpo" in words:
            shutil.copy(root / "pairs.jsonl", root / "test.jsonl")
        if "--out" in words and "--resume" not in words:
            shutil.rmtree(root / words[words.index("--out") + 1], ignore_errors=True)
        monkeypatch.setattr("sys.stdin", io.StringIO("red is a\n"))
        code = main(_small(words))
        said = capsys.readouterr()
        assert code == 0, f"{' '.join(words)}\n{said.err[-2000:]}"


def test_every_command_that_is_left_out_is_on_a_page() -> None:
    texts = [" ".join(each) for page in PAGES for each in commands(page.read_text("utf-8"))]
    assert [name for name in NOT_HERE if not any(t.startswith(name) for t in texts)] == []
