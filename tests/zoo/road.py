"""The command line end to end with one architecture: quantize; finetune, fold, export, verify."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qalora_compile.cli.main import main
from tests.media import write_rows, write_tone
from tests.zoo.architectures import (
    ENCODERS,
    EXPERTS,
    IMAGES,
    SOUNDS,
    VOCABULARY,
    WITHOUT_CACHE,
    build,
)

WORDS = ("red", "green", "blue", "one", "two", "three")
QUANTIZE, QUANTIZED, FINETUNE, FOLD, EXPORT, VERIFY = STEPS = (
    "quantize",
    "quantized",
    "finetune",
    "fold",
    "export",
    "verify",
)
"""`quantized` compares what `quantize` wrote with the model in float."""
_ROUNDING = {True: "0.9", False: "0.2"}
"""What 8 bits may change, as a part of the output: another expert is another output."""
_GROUPS = ("--group-size", "16")
TRAINING = ("--steps", "1", "--rank", "4", *_GROUPS)


@dataclass(frozen=True)
class Result:
    """How one step ended.

    Attributes:
        step: One of `STEPS`.
        code: The exit code.
        said: What was printed.
    """

    step: str
    code: int
    said: str

    def reason(self) -> str:
        """The error's first line."""
        lines = [line.strip() for line in self.said.splitlines() if line.strip()]
        found = (line for line in lines if line.startswith(("error:", "internal error:")))
        return next(found, lines[-1] if lines else "")


def write_model(name: str, folder: Path, layers: int = 2) -> None:
    """Write a small model with a byte-level tokenizer, or with a processor of images or audio."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast, Wav2Vec2FeatureExtractor
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    build(name, layers).save_pretrained(folder)
    if name in IMAGES:
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
        return
    if name in SOUNDS:
        Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
        return
    cutter = ByteLevelBPETokenizer()
    specials = ["<pad>", "<s>", "</s>"]
    cutter.train_from_iterator([" ".join(WORDS)], vocab_size=VOCABULARY, special_tokens=specials)
    PreTrainedTokenizerFast(
        tokenizer_object=cutter._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def write_data(name: str, path: Path) -> None:
    """Write six examples of words and their kind, as texts or labels; or four files with labels."""
    if name in (*IMAGES, *SOUNDS):
        _write_media(name, path)
        return
    kinds = {word: "colour" if word in WORDS[:3] else "number" for word in WORDS}
    labels = {"colour": "LABEL_0", "number": "LABEL_1"}  # as configurations call classes
    rows = [
        {"text": word, "label": labels[kind]}
        if name in ENCODERS
        else {"prompt": f"{word} is a", "completion": f" {kind}"}
        for word, kind in kinds.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _write_media(name: str, path: Path) -> None:
    from PIL import Image

    rows = []
    for index in range(4):
        medium, suffix = ("image", "png") if name in IMAGES else ("audio", "wav")
        file = path.with_name(f"{index}.{suffix}")
        if name in IMAGES:
            Image.new("RGB", (40, 32), (200 * (index % 2), 60, 60)).save(file)
        else:
            write_tone(file, 300 + 400 * (index % 2), 1600, rate=16_000)
        rows.append({medium: file.name, "label": f"LABEL_{index % 2}"})
    write_rows(path, rows)


def walk(name: str, folder: Path, layers: int = 2) -> Iterator[Result]:
    """Run one architecture end to end; a step that fails ends what follows from it."""
    model, data = folder / "model", folder / "data.jsonl"
    write_model(name, model, layers)
    write_data(name, data)
    expert = name.removesuffix("ForCausalLM") in EXPERTS or "Moe" in name or "Switch" in name
    edge = folder / "quantized"
    cache = ("--no-kv-cache",) if name in WITHOUT_CACHE else ()
    modes = (
        (
            (QUANTIZE, str(model), "--out", str(edge), "--bits", "8", *_GROUPS, *cache),
            (QUANTIZED, str(model), str(edge), "--max-rel", _ROUNDING[expert]),
        ),
        (
            (FINETUNE, str(model), "--data", str(data), "--out", str(folder / "run"), *TRAINING),
            (FOLD, str(folder / "run"), "--out", str(folder / "folded")),
            (EXPORT, str(folder / "folded"), "--out", str(folder / "edge"), *cache),
            (VERIFY, str(folder / "folded"), str(folder / "edge"), "--max-rel", "1e-3"),
        ),
    )
    for way in modes[1:] if name in (*IMAGES, *SOUNDS) else modes:  # quantize reads texts
        for step, *arguments in way:
            result = run(step, arguments)
            yield result
            if result.code:
                break


def run(step: str, arguments: list[str]) -> Result:
    """Run one step."""
    printed = io.StringIO()
    command = VERIFY if step == QUANTIZED else step
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main([command, *arguments])
    return Result(step, code, printed.getvalue())
