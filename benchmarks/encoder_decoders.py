"""The two forms of an encoder-decoder model, in turns: the default one and the merged decoder.

python -m benchmarks.encoder_decoders                       # T5 of t5-small's sizes
python -m benchmarks.encoder_decoders --tokens 16 1500

The weights are random: time does not depend on them. Columns: tokens of the encoder's input; time
of a token after the first, with the default form; that time of the merged form as a ratio to it in
the same round; the ratio of encoder and first step together.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qalora_compile as qc
from benchmarks.ratios import ratios
from qalora_compile.runtime import EncoderDecoder
from qalora_compile.untrusted.artifacts import DECODER_FILE, ENCODER_FILE, MERGED_FILE

SIZES: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "use_cache": False,
    "decoder_start_token_id": 0,
}
STEPS = 24


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 128, 512], metavar="N")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="the first is left out")
    parser.add_argument("--stock", action="store_true", help="without the operator library")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        forms = [
            EncoderDecoder.open(folder, threads=1, library=not options.stock)
            for folder in exported(Path(scratch))
        ]
        print("| tokens | a token, ms | merged | encoder and first step |\n|---|---|---|---|")
        for tokens in options.tokens:
            rounds = [[timed(form, tokens) for form in forms] for _ in range(options.rounds)][1:]
            each = [statistics.median(r[0][1] for r in rounds) * 1e3]
            step, begin = (
                ratios([r[1][k] for r in rounds], [r[0][k] for r in rounds]) for k in (1, 0)
            )
            print(f"| {tokens} | {each[0]:.2f} | {step} | {begin} |", flush=True)


def exported(folder: Path) -> tuple[Path, Path]:
    """The folders of both forms."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    plain = T5ForConditionalGeneration(T5Config(**SIZES)).eval()
    ids = torch.ones(2, 7, dtype=torch.int64)
    call = {"input_ids": ids, "attention_mask": ids, "decoder_input_ids": ids[:, :5]}
    folded = qc.fold_adapters(qc.adapt_module_(copy.deepcopy(plain), (), call))
    made = []
    for merged, name in ((False, DECODER_FILE), (True, MERGED_FILE)):
        parts = qc.split_encoder_decoder(folded, plain, merged=merged)
        made.append(folder / name.replace("/", "-"))
        (made[-1] / ENCODER_FILE).parent.mkdir(parents=True)
        for file, part in zip((ENCODER_FILE, name), parts, strict=True):
            qc.export_model(part, made[-1] / file)
    return made[0], made[1]


def timed(model: EncoderDecoder, tokens: int) -> tuple[float, float]:
    """Seconds of the encoder with the first step, and of each later step."""
    ids, begin = np.array([[2]], np.int64), time.perf_counter()
    encoded = model.encode({"input_ids": np.full((1, tokens), 7, np.int64)})
    _, cache = model.step(ids, encoded, model.empty_cache())
    first = time.perf_counter()
    for _ in range(STEPS):
        _, cache = model.step(ids, encoded, cache)
    return first - begin, (time.perf_counter() - first) / STEPS


if __name__ == "__main__":
    main()
