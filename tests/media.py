"""Tiny folders of image and audio models with random weights, and data of colours and tones."""

from __future__ import annotations

import json
import math
import wave
from pathlib import Path

import numpy as np
import torch

RATE = 2000
COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
TONES = {"low": 150.0, "high": 600.0}


def write_image_model(folder: Path, *, classes: int | None = None) -> Path:
    """Write a ViT of one layer; with `classes`, with a head for them."""
    from transformers import ViTConfig, ViTForImageClassification, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
        **({} if classes is None else {"num_labels": classes}),
    )
    torch.manual_seed(0)
    (ViTModel if classes is None else ViTForImageClassification)(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def write_audio_model(folder: Path, *, mask: bool = False) -> Path:
    """Write a Wav2Vec2 of one layer for 2,000 samples a second; `mask`: it takes one."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer" if mask else "group",
        vocab_size=8,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    Wav2Vec2Model(config).save_pretrained(folder)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=mask)
    extractor.save_pretrained(folder)
    return folder


def write_images(folder: Path, count: int = 12) -> Path:
    """Write images of three colours, of several sizes and forms, and their data file."""
    from PIL import Image

    noise = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for index in range(count):
        name = list(COLOURS)[index % len(COLOURS)]
        size = (20 + index, 24, 3)
        pixels = np.array(COLOURS[name]) + noise.integers(-30, 31, size)
        file = f"images/{index}.{('png', 'jpg', 'webp')[index % 3]}"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / file)
        rows.append({"image": file, "label": name})
    return write_rows(folder / "images.jsonl", rows)


def write_recordings(folder: Path, count: int = 8) -> Path:
    """Write tones of several lengths as WAV files, and their data file."""
    (folder / "sounds").mkdir(parents=True)
    rows = []
    for index in range(count):
        name = list(TONES)[index % len(TONES)]
        file = f"sounds/{index}.wav"
        write_tone(folder / file, TONES[name], 400 + 40 * index)
        rows.append({"audio": file, "label": name})
    return write_rows(folder / "sounds.jsonl", rows)


def write_tone(
    path: Path, hertz: float, samples: int, *, rate: int = RATE, width: int = 2, channels: int = 1
) -> Path:
    """Write a sine as a WAV file, with samples of `width` bytes."""
    values = [math.sin(2 * math.pi * hertz * i / rate) / 2 for i in range(samples)]
    largest = 2 ** (8 * width - 1)
    data = b"".join(
        (round(v * (largest - 1)) + (128 if width == 1 else 0)).to_bytes(
            width, "little", signed=width > 1
        )
        * channels
        for v in values
    )
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(data)
    return path


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path
