"""The models and batches that `gradients.py` times. Plain torch only, so that every peer's environment can import it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Recurrent = Callable[..., nn.Module]
"""`nn.LSTM`, or a peer's layer that stands in for it."""


@dataclass(frozen=True)
class Workload:
    """A model and the shape of its one batch, which is the whole data set.

    Attributes:
        batch: Records in a step.
        record: Shape of one record's features.
        classes: Number of target classes.
        build: Makes a fresh model; its argument is the LSTM layer to use.
        words: Size of the vocabulary where features are token ids, else 0.
    """

    batch: int
    record: tuple[int, ...]
    classes: int
    build: Callable[[Recurrent], nn.Module]
    words: int = 0

    def data(self) -> tuple[Tensor, Tensor]:
        """Return features (batch, *record), float32 or int64, and targets (batch,), the same in every process."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, *self.record)
        targets = torch.randint(self.classes, (self.batch,), generator=generator)
        if self.words:
            return torch.randint(self.words, shape, generator=generator), targets
        return torch.randn(shape, generator=generator), targets


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))


def mnist_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=3), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10),
    )  # fmt: skip


def cifar_cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for place, (before, after) in enumerate(pairwise((3, 32, 32, 64, 64, 128, 128))):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.Tanh()]
        if place % 2:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 128), nn.Tanh(), nn.Linear(128, 10))


class Block(nn.Module):
    """Two 3x3 convolutions with GroupNorm, beside a shortcut that is a 1x1 convolution where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(8, after)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(8, after)
        changes = before != after or stride != 1
        self.shortcut = nn.Conv2d(before, after, 1, stride=stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(hidden)) + self.shortcut(x))


def resnet() -> nn.Module:
    blocks = [
        Block(before, after, 1 if before == after else 2)
        for before, after in pairwise((16, 16, 16, 32, 32, 64, 64))
    ]  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.GroupNorm(8, 16), nn.ReLU(),
        *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


class Attention(nn.Module):
    """Self-attention with one linear layer for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv: nn.Module = nn.Linear(width, 3 * width)
        self.out: nn.Module = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class EncoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed(self.feed_norm(x))


class Transformer(nn.Module):
    """Two encoder layers over word and position embeddings, mean pooling, and a linear head."""

    def __init__(self, words: int = 5000, tokens: int = 128, width: int = 128, classes: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        # Not a bare parameter: Opacus takes parameters only inside layers, and wants the batch first in their input.
        self.positions = nn.Embedding(tokens, width)
        self.layers = nn.Sequential(*(EncoderLayer(width, 4, 512) for _ in range(2)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens), 1)
        hidden = self.layers(self.words(tokens) + self.positions(places))
        return self.head(self.norm(hidden).mean(1))


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained product of two thin ones (Hu et al. 2021), without scaling."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def lora() -> nn.Module:
    model = Transformer().requires_grad_(False)
    model.head.requires_grad_(True)
    for module in list(model.modules()):
        if isinstance(module, Attention):
            module.qkv = LoRALinear(module.qkv, rank=8)
            module.out = LoRALinear(module.out, rank=8)
    return model


class LastState(nn.Module):
    """Word embeddings, an LSTM, and a linear head on its last output."""

    def __init__(self, recurrent: Recurrent) -> None:
        super().__init__()
        self.words = nn.Embedding(1000, 64)
        self.recurrent = recurrent(64, 128, batch_first=True)
        self.head = nn.Linear(128, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs, _ = self.recurrent(self.words(tokens))
        return self.head(outputs[:, -1])


WORKLOADS = {
    "mlp": Workload(256, (784,), 10, lambda _: mlp()),
    "mnist-cnn": Workload(256, (1, 28, 28), 10, lambda _: mnist_cnn()),
    "cifar-cnn": Workload(128, (3, 32, 32), 10, lambda _: cifar_cnn()),
    "resnet": Workload(128, (3, 32, 32), 10, lambda _: resnet()),
    "transformer": Workload(32, (128,), 2, lambda _: Transformer(), words=5000),
    "lstm": Workload(32, (64,), 2, LastState, words=1000),
    "lora": Workload(32, (128,), 2, lambda _: lora(), words=5000),
}
