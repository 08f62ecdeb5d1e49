"""Peak memory and time of `qalora-compile quantize` as models grow: memory must not grow with them.

Writes Llama checkpoints of random weights (bfloat16 safetensors in shards, as model hubs have
them), quantizes each in a process of its own, and reads that process's peak resident set from the
operating system. Free disk space is checked first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

EXAMPLES = """examples:
  python -m benchmarks.export_memory                      135 million, 1.2 and 7 billion weights
  python -m benchmarks.export_memory --shapes 135M 1.2B --scratch /large/disk
"""
FIXED_BYTES, PER_LAYER = 1.2e9, 6  # design: peak ≤ 1.2 GB + largest layer × 6
SHARD_BYTES = 1 << 30
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
    "135M": (576, 1536, 30, 9, 3, 49152, True),
    "1.2B": (2048, 8192, 16, 32, 8, 128256, True),
    "7B": (4096, 11008, 32, 32, 32, 32000, False),
}


@dataclass(frozen=True)
class Row:
    """What was measured of one shape; bytes."""

    shape: str
    weights: int
    checkpoint: int
    largest_layer: int
    peak: int
    reach: float
    written: int
    seconds: float


def config(shape: str) -> dict[str, object]:
    """`config.json` of a shape."""
    hidden, inner, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def tensor_shapes(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the checkpoint."""
    hidden, inner, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    narrow = hidden // heads * kv_heads
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(layers):
        lead = f"model.layers.{i}"
        for name, rows in (("q", hidden), ("k", narrow), ("v", narrow), ("o", hidden)):
            yield f"{lead}.self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{lead}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{lead}.mlp.up_proj.weight", (inner, hidden)
        yield f"{lead}.mlp.down_proj.weight", (hidden, inner)
        yield f"{lead}.input_layernorm.weight", (hidden,)
        yield f"{lead}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (vocabulary, hidden)


def count(shape: Sequence[int]) -> int:
    """Elements of a shape."""
    return int(torch.Size(shape).numel())


def write_checkpoint(shape: str, folder: Path) -> None:
    """A checkpoint of random weights, shard by shard."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(shape)), "utf-8")
    generator = torch.Generator().manual_seed(0)
    noise = (0.02 * torch.randn(1 << 22, generator=generator)).bfloat16()
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(index.values())) + 1:05}.safetensors"
        save_file(shard, folder / name)
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, size in tensor_shapes(shape):
        if len(size) == 1:
            shard[name] = torch.ones(size, dtype=torch.bfloat16)
        else:
            shard[name] = noise.repeat(-(-count(size) // noise.numel()))[: count(size)].view(size)
        if sum(t.numel() * 2 for t in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    value = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(value), "utf-8")


def measure(shape: str, scratch: Path) -> Row:
    """Write, quantize, look."""
    sizes = [count(size) for _, size in tensor_shapes(shape)]
    checkpoint = 2 * sum(sizes)
    free = shutil.disk_usage(scratch).free
    if 1.6 * checkpoint > free:
        sys.exit(f"{shape} needs {1.6 * checkpoint / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    source, out = scratch / shape, scratch / f"{shape}-edge"
    # In a process of its own: what this one has used would count as its child's.
    writer = multiprocessing.get_context("spawn").Process(
        target=write_checkpoint, args=(shape, source)
    )
    writer.start()
    writer.join()
    command = [sys.executable, "-m", "qalora_compile", "quantize", str(source), "--out", str(out)]
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"quantize failed on {shape}")
    hidden, inner = SHAPES[shape][:2]
    largest = 4 * hidden * inner  # a linear layer in float32
    row = Row(
        shape=shape,
        weights=sum(sizes),
        checkpoint=checkpoint,
        largest_layer=largest,
        peak=usage.ru_maxrss * 1024,
        reach=FIXED_BYTES + PER_LAYER * largest,
        written=sum(f.stat().st_size for f in out.iterdir()),
        seconds=time.monotonic() - started,
    )
    shutil.rmtree(source)
    shutil.rmtree(out)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--scratch", type=Path, help="folder on a disk with room")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    rows = []
    print("shape  weights  checkpoint  largest layer    peak   reach  written  seconds", flush=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for shape in options.shapes:
            row = measure(shape, Path(scratch))
            rows.append(row)
            print(
                f"{row.shape:>5} {row.weights / 1e9:6.2f} B {row.checkpoint / 1e9:8.2f} GB "
                f"{row.largest_layer / 1e6:11.0f} MB {row.peak / 1e9:6.2f} "
                f"{row.reach / 1e9:7.2f} GB {row.written / 1e9:5.2f} GB {row.seconds:8.0f}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), "utf-8")


if __name__ == "__main__":
    main()
