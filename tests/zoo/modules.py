"""Small torch modules of the zoo: shapes of model that no transformers class has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

WIDTH = 64


def sequential() -> nn.Module:
    """Linear layers with a dropout between them."""
    return nn.Sequential(
        nn.Linear(WIDTH, 96),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(96, 96),
        nn.ReLU(),
        nn.Linear(96, 8),
    )


class Bottleneck(nn.Module):
    """ResNet's block: 1×1, 3×3 and 1×1 convolutions; a strided 1×1 one beside them."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(width, half, 1, bias=False), nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, stride=stride, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 1), nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(width, width, 1, stride=stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]`."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.shortcut(x) + self.bn3(self.conv3(y)))


class ConvNet(nn.Module):
    """A small ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Bottleneck(WIDTH, 1), Bottleneck(WIDTH, 2))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Class scores `[B, 10]`."""
        y = self.blocks(torch.relu(self.stem(image)))
        return self.head(functional.adaptive_avg_pool2d(y, 1).flatten(1))


class Pointwise(nn.Module):
    """Depthwise-separable convolutions along time: kernel-1 Conv1d, as in speech models."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv1d(WIDTH, 128, 1)
        self.depth = nn.Conv1d(64, 64, 5, padding=2, groups=64)
        self.down = nn.Conv1d(64, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Frames `[B, T, C]`."""
        y = functional.glu(self.up(x.transpose(1, 2)), dim=1)
        return x + self.down(functional.silu(self.depth(y))).transpose(1, 2)


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` on one tensor: its in_proj is one packed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, dropout=0.1, batch_first=True)
        self.out = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences `[B, S, 64]`."""
        return self.out(self.attention(x, x, x, need_weights=False)[0])


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention` between two tensors: its in_proj is used in two pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.out = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Queries `[B, S, 64]` and memory `[B, T, 64]`."""
        return self.out(self.attention(x, memory, memory, need_weights=False)[0])


class Encoder(nn.Module):
    """`nn.TransformerEncoder`, which has a fused path in evaluation."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences `[B, S, 64]`."""
        return self.out(self.encoder(x))


class Recurrent(nn.Module):
    """A classifier on a recurrent network."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.rnn = kind(WIDTH, WIDTH, 2, batch_first=True)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of the last step."""
        return self.head(torch.tanh(self.hidden(self.rnn(x)[0][:, -1])))


class Tied(nn.Module):
    """An embedding whose weight is also the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, WIDTH)
        self.mid = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, 128, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of each position."""
        return self.lm_head(torch.tanh(self.mid(self.embed(input_ids))))


class Looped(nn.Module):
    """One block called in a loop, and once more under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(WIDTH, 96), nn.ReLU(), nn.Linear(96, WIDTH))
        self.alias = self.block
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors `[.., 64]`."""
        for _ in range(3):
            x = x + self.block(x)
        return self.head(self.alias(x))


@dataclass
class Scores:
    """A model's answer as a dataclass."""

    scores: Tensor
    hidden: Tensor | None = None


pytree.register_dataclass(Scores, serialized_type_name="tests.zoo.Scores")


class Structured(nn.Module):
    """Keyword inputs, a dict inside a dataclass-like answer, and an option that is a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(WIDTH, WIDTH)
        self.image = nn.Linear(32, WIDTH)
        self.head = nn.Linear(WIDTH, 8)

    def forward(
        self, *, text: Tensor, features: dict[str, Tensor], normalize: bool = True
    ) -> dict[str, Scores]:
        """Text `[B, S, 64]` and `features["image"]` `[B, 32]`."""
        hidden = self.text(text).mean(1) + self.image(features["image"])
        if normalize:
            hidden = functional.layer_norm(hidden, (WIDTH,))
        return {"answer": Scores(self.head(hidden), hidden)}


class OddReadings(nn.Module):
    """Parameters that linear maps read through views: stacked heads, slices, a `[K, N]` matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.randn(4, 16, WIDTH) / 8)
        self.packed = nn.Parameter(torch.randn(2, WIDTH, 32) / 8)
        self.mixer = nn.Parameter(torch.randn(32, 8) / 8)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors `[.., 64]`."""
        y = functional.linear(x, self.heads.view(64, WIDTH))
        z = (x @ self.packed[0]) * torch.sigmoid(y @ self.packed[1])
        return z @ self.mixer


class BatchedExperts(nn.Module):
    """Experts as one 3-D weight each, applied to all tokens by a batched product, then weighted."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, WIDTH, 96) / 8)
        self.down = nn.Parameter(torch.randn(experts, 96, WIDTH) / 8)
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors `[B, S, 64]`."""
        flat = x.reshape(-1, WIDTH)
        scores, chosen = torch.topk(torch.softmax(self.router(flat), -1), 2)
        gate = torch.zeros_like(self.router(flat)).scatter(1, chosen, scores)
        every = flat.expand(self.up.shape[0], -1, -1)
        y = torch.bmm(torch.relu(torch.bmm(every, self.up)), self.down)
        return self.head((y * gate.t()[..., None]).sum(0).reshape(x.shape))
