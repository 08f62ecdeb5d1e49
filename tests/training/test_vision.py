"""Regression on a vision model through the API: loss falls, the fold is exact, ONNX is equal."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import qalora_compile as qc
from tests.models import assert_close

SIZE = 8
DIGITS = (
    ("111", "101", "101", "101", "111"),
    ("010", "110", "010", "010", "111"),
    ("111", "001", "111", "100", "111"),
    ("111", "001", "111", "001", "111"),
    ("101", "101", "111", "001", "001"),
)
"""Figures of 5 by 3 dots."""


def digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images `[n, 1, 8, 8]` of a figure somewhere, with noise, and its place `[n, 2]`, 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.1 * torch.randn(count, 1, SIZE, SIZE, generator=generator)
    places = torch.empty(count, 2)
    for index in range(count):
        figure = torch.tensor([[float(dot) for dot in row] for row in DIGITS[index % len(DIGITS)]])
        top, left = (int(torch.randint(0, most, (1,), generator=generator)) for most in (4, 6))
        images[index, 0, top : top + 5, left : left + 3] += figure
        places[index] = torch.tensor([top / 3, left / 5])
    return images, places


class Locator(nn.Module):
    """A small ViT of transformers, and where in the image the figure is."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=SIZE,
            patch_size=2,
            num_channels=1,
            initializer_range=0.2,
        )
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.head = nn.Linear(32, 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The place `[n, 2]` of images `[n, 1, 8, 8]`."""
        hidden = self.vit(pixel_values=pixel_values).last_hidden_state
        place: Tensor = self.head(hidden.mean(1))
        return place


def test_regression_on_images_from_capture_to_onnx(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, places = digits(128, 0)
    held_out, held_places = digits(40, 1)
    program = qc.capture_model(Locator().eval(), (images[:4],))
    program = qc.quantize_groups(program, qc.QuantSpec(group_size=4), exclude="head")
    program = qc.insert_adapters(program, qc.AdapterSpec(rank=8, alpha=16.0), train="head")
    assert program.trained == ("head.weight", "head.bias")

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(program(x), y)

    optimizer = torch.optim.AdamW(program.adapter_parameters(), lr=1e-2, weight_decay=0.0)
    with program.evaluating():
        before = float(loss_of(held_out, held_places))
    program.train()
    for step in range(60):
        rows = slice(step % 4 * 32, step % 4 * 32 + 32)
        optimizer.zero_grad()
        loss_of(images[rows], places[rows]).backward()
        optimizer.step()
    program.eval()
    with torch.no_grad():
        after = float(loss_of(held_out, held_places))
    guess = float((held_places - places.mean(0)).square().mean())  # without looking
    assert after < 0.5 * min(before, guess), (before, after, guess)

    folded = qc.fold_adapters(program)
    assert_close(folded(held_out), program(held_out), relative=1e-5)
    qc.export_model(folded, tmp_path / "model.onnx")
    calls = [(held_out,), (held_out[:3],)]
    tolerance = qc.Tolerance(max_rel=1e-5)
    assert qc.verify_equivalence(program, tmp_path / "model.onnx", calls, tolerance).passed
