"""What the fast path does with a model: one row for each layer, and what it would refuse."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sfumato.errors import InputError, UnsupportedModelError
from sfumato.gradients.clipped import Loss
from sfumato.gradients.clipping import Clipping
from sfumato.gradients.compute import DEFAULT, Compute
from sfumato.gradients.private import PrivateGradient
from sfumato.gradients.strategies import CHOICES
from sfumato.gradients.support import problems, trainable
from sfumato.gradients.tape import Use
from sfumato.gradients.terms.term import Term, Weighting


@final
@dataclass(frozen=True)
class Row:
    """One use of a layer's parameters.

    Attributes:
        layer: The module's name.
        operation: The torch function that was called.
        rule: Which rule follows it; "reference (...)" is the slow path for that operation alone.
        strategy: How the gradients of its largest parameter are measured and summed.
        parameters: Number of trained coordinates.
        memory_mb: Megabytes that its gradients hold until the sum is made, for one microbatch.
        share: Of the time of the whole gradient, 0 to 1.
    """

    layer: str
    operation: str
    rule: str
    strategy: str
    parameters: int
    memory_mb: float
    share: float


@final
@dataclass(frozen=True)
class Explanation:
    """The table, printed by `print`.

    Attributes:
        rows: One for each use of a layer, in the order of the forward.
        refused: What would be refused and how to mend it; empty if the model can be trained privately.
        microbatch: Records that are computed together.
        memory_mb: Estimated megabytes that a microbatch takes besides the model.
    """

    rows: tuple[Row, ...]
    refused: tuple[str, ...]
    microbatch: int
    memory_mb: float

    def __str__(self) -> str:
        lines = [f"refused: {sentence}" for sentence in self.refused]
        if self.rows:
            head = ("layer", "operation", "rule", "strategy", "parameters", "MB", "time")
            body = [
                (r.layer, r.operation, r.rule, r.strategy, f"{r.parameters:,}", f"{r.memory_mb:.1f}", f"{r.share:.1%}")
                for r in self.rows
            ]
            widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
            for line in [head, *body]:
                cells = [
                    cell.rjust(width) if column > 3 else cell.ljust(width)
                    for column, (cell, width) in enumerate(zip(line, widths, strict=True))
                ]
                lines.append("  ".join(cells).rstrip())
            lines.append(f"{self.microbatch} records at a time take about {self.memory_mb:.0f} MB besides the model.")
        return "\n".join(lines)


def explain(
    model: nn.Module, batch: Tensor | tuple[Tensor, Tensor], *, loss: Loss | None = None, compute: Compute = DEFAULT
) -> Explanation:
    """Return how the model's per-record gradients are computed on a batch, and what would be refused.

    It runs the model on the batch without noise. Times and sizes depend on the shapes, so made-up records of the right
    shape do as well as real ones, and cost no privacy.

    Args:
        model: Any module; it is not changed.
        batch: Features, shape (batch, ...), or a pair of features and targets.
        loss: As for `sfumato.train`; without it, the sum of the outputs.
        compute: Speed knobs.

    Raises:
        InputError: the batch is empty, or not what is described above.
    """
    features, targets = _pair(batch)
    model = copy.deepcopy(model)  # a forward may change buffers
    refused = tuple(problems(model))
    if refused:
        return Explanation((), refused, 0, 0.0)
    try:
        gradient = PrivateGradient(model, loss or _sum, Clipping(1.0), compute=compute)
        for _ in range(3):  # sizes, strategies, and once more with both known
            begun = time.perf_counter()
            gradient.sum(features, targets)
            whole = time.perf_counter() - begun
        size = gradient.microbatch(len(features), len(features))
        rows = _rows(gradient, model, features[:size], targets[:size], whole * size / len(features))
    except UnsupportedModelError as error:
        return Explanation((), (str(error),), 0, 0.0)
    return Explanation(tuple(rows), (), size, gradient.estimate(size) / 1e6)


def _rows(gradient: PrivateGradient, model: nn.Module, features: Tensor, targets: Tensor, whole: float) -> list[Row]:
    parameters = trainable(model)
    tape, losses = gradient.forward(parameters, features, targets)
    rows: dict[int, Row] = {}

    def take(use: Use, terms: list[Term]) -> None:
        sizes, seconds, held = 0, 0.0, 0
        for term in terms:
            way = term.strategies()[CHOICES.name(term, math.inf, timed=False)]
            ones = Weighting(torch.ones(term.records, dtype=torch.float64, device=term.device))
            begun = time.perf_counter()
            way.make().weighted_sum(ones)
            seconds += time.perf_counter() - begun
            sizes += parameters[term.name].numel()
            held += way.bytes
        largest = max(terms, key=lambda term: parameters[term.name].numel())  # beside it a bias is nothing
        strategy = CHOICES.name(largest, math.inf, timed=False)
        layer = use.layer.rpartition(".")[0] or "(the model itself)"
        share = min(1.0, seconds / whole)
        rows[use.number] = Row(layer, use.operation, use.rule, strategy, sizes, held / 1e6, share)

    tape.backward(losses, take)
    return [rows[number] for number in sorted(rows)]


def _pair(batch: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    features, targets = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
    if not isinstance(features, Tensor) or features.dim() < 1 or not len(features):
        raise InputError("batch must be a tensor of features with at least one record, or a pair (features, targets).")
    if targets is None:
        targets = torch.zeros(len(features), device=features.device)
    if not isinstance(targets, Tensor) or not targets.dim() or len(targets) != len(features):
        raise InputError(f"The batch has {len(features)} features and not as many targets; give one target a record.")
    return features, targets


def _sum(outputs: Any, targets: Tensor) -> Tensor:
    return torch.stack([value.float().sum() for value in _tensors(outputs)]).sum()


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """Yield the tensors in what a model returned: a tensor, or something with tensors in it."""
    for value in tree_leaves(outputs):
        if isinstance(value, Tensor):
            if value.is_floating_point():
                yield value
        elif hasattr(value, "__dict__"):
            yield from _tensors(list(vars(value).values()))
