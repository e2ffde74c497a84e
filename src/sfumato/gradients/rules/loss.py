"""Losses without parameters, computed for all records at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from sfumato.gradients.rules.registry import together
from sfumato.gradients.tape import Tape


@together(F.cross_entropy)
def cross_entropy(
    tape: Tape, input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    """Follow `torch.nn.functional.cross_entropy` for class indices; vmap would take it apart into many small steps."""
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0
    shapes = input.dim() == 2 and target.dim() == 1 and not target.is_floating_point()
    if not (plain and shapes and tape.has_records(input) and tape.has_records(target)):
        return NotImplemented
    scores, classes = tape.open(input), tape.open(target)
    losses = F.cross_entropy(scores.flatten(0, 1), classes.flatten(), reduction="none", ignore_index=ignore_index)
    losses = losses.view(classes.shape)
    if reduction == "mean":
        # As in torch, a record of nothing but ignored targets has no mean.
        losses = losses.sum(1) / (classes != ignore_index).sum(1)
    elif reduction == "sum":
        losses = losses.sum(1)
    return tape.close(losses)
