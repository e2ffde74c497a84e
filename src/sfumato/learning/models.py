"""Small models to start from; each trains record by record, so each can be trained privately."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from sfumato import _checks
from sfumato.errors import InputError

KINDS = ("logistic", "mlp", "cnn", "tanh-cnn")
_CHANNELS = (16, 32)
_LEAST_PIXELS = {"cnn": 4, "tanh-cnn": 14}


def build(kind: str, input_shape: Sequence[int], outputs: int, hidden: Sequence[int] | None = None) -> nn.Sequential:
    """Return a fresh model from features (batch, *input_shape) to scores (batch, outputs).

    Bounded activations (tanh) train better under clipping and noise than ReLU (Papernot et al. 2021).

    Args:
        kind: "logistic" (one linear layer), "mlp" (tanh layers), "cnn" (two tanh convolutions, for images) or "tanh-cnn"
            (those of Papernot et al. 2021, with strides and max-pooling: 26,010 parameters on MNIST).
        input_shape: Shape of one record's features; (channels, height, width) for "cnn" and "tanh-cnn".
        outputs: Number of classes, or 1 for regression.
        hidden: Widths of the dense layers before the last; 32 unless told, none for "logistic".

    Raises:
        InputError: the kind is unknown, a size is below 1, or the kind does not fit the shape.
    """
    if kind not in KINDS:
        raise InputError(f'There is no model kind "{kind}".{_checks.did_you_mean(kind, KINDS)}')
    for size in (*input_shape, outputs, *(hidden or ())):
        _checks.count("a model size", size)
    if kind == "logistic":
        if hidden:
            raise InputError('A "logistic" model has no hidden layers; remove hidden or choose kind "mlp".')
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), outputs))
    dense = (32,) if hidden is None else tuple(hidden)
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), *_dense((math.prod(input_shape), *dense, outputs)))
    least = _LEAST_PIXELS[kind]
    if len(input_shape) != 3 or min(input_shape[1:]) < least:
        raise InputError(
            f'A "{kind}" model takes images of shape (channels, height, width) of at least {least} by {least} pixels, not '
            f'{tuple(input_shape)}; choose kind "mlp" or "logistic".'
        )
    channels, height, width = input_shape
    first, second = _CHANNELS
    if kind == "cnn":
        return nn.Sequential(
            nn.Conv2d(channels, first, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
            nn.Conv2d(first, second, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
            nn.Flatten(),
            *_dense((second * (height // 4) * (width // 4), *dense, outputs)),
        )  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(channels, first, 8, stride=2, padding=3), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Conv2d(first, second, 4, stride=2), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Flatten(),
        *_dense((second * _strided(height) * _strided(width), *dense, outputs)),
    )  # fmt: skip


def _strided(pixels: int) -> int:
    """Return how many of `pixels` in a line are left after the convolutions and pools of "tanh-cnn"."""
    first = (pixels - 2) // 2
    return (first - 4) // 2


def _dense(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.Tanh()]
    return layers[:-1]
