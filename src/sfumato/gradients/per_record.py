"""The reference path: the gradient of each record alone, by `torch.func.vmap`, then clipped and summed.

Obviously right and slow: it holds the gradients of a whole microbatch at once. Faster paths stand beside it and are tested
against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from sfumato.errors import UnsupportedModelError
from sfumato.gradients.clipping import MAX_UNITS, clip_factors
from sfumato.gradients.support import check_model, running, trainable
from sfumato.privacy.bounded import Bounded

Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps (outputs, targets) of a batch to the loss; it is always called with a batch of one record."""


@final
@dataclass(frozen=True)
class ClippedSum:
    """The clipped gradients of a batch, added up.

    Attributes:
        bounded: The sum; one record moves it by at most the clip norm.
        nonfinite: How many records had a NaN or infinite gradient and added zero. Private: not covered by any budget.
    """

    bounded: Bounded
    nonfinite: int


def clipped_gradient_sum(
    model: nn.Module,
    loss: Loss,
    features: Tensor,
    targets: Tensor,
    *,
    clip_norm: float,
    microbatch: int = 256,
) -> ClippedSum:
    """Return the sum over records of min(1, clip_norm / norm) * gradient.

    **Guarantee**: adding or removing one record moves the sum by at most `clip_norm` in l2 norm over all trainable
    parameters together, whatever that record holds. The rounding of the float64 sum is covered; the rounding inside the
    model is not: float kernels may round one record differently beside others, which moves a smooth model by about
    1e-6 of the clip norm a record, and an input that lies on the very edge of a ReLU by more.

    **Edge cases**

    | case | what it adds |
    | --- | --- |
    | empty batch | zero |
    | a record whose gradient is NaN or infinite | zero, and is counted |
    | a parameter that the output does not depend on | zero |
    | random layers (dropout) | each record draws its own mask |

    Args:
        model: Any module that `check_model` accepts; it is not changed.
        loss: Called as loss(outputs, targets) with one record at a time, outputs of shape (1, ...).
        features: Shape (batch, ...).
        targets: Shape (batch, ...).
        clip_norm: C > 0.
        microbatch: Records whose gradients are held in memory at once; it never changes the result beyond rounding.

    Raises:
        UnsupportedModelError: the model mixes records, or cannot be run one record at a time.
    """
    check_model(model)
    parameters = trainable(model)
    if len(features) > MAX_UNITS:
        raise UnsupportedModelError(f"A batch may hold at most {MAX_UNITS} records; lower the batch size.")
    frozen: dict[str, Tensor] = {n: tensor for n, tensor in model.named_parameters() if n not in parameters}
    frozen.update(model.named_buffers())
    total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in parameters.items()}

    def loss_of_one(weights: dict[str, Tensor], feature: Tensor, target: Tensor) -> Tensor:
        outputs = functional_call(model, (weights, frozen), (feature.unsqueeze(0),))
        return loss(outputs, target.unsqueeze(0)).sum()

    per_record = vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness="different")
    detached = {name: tensor.detach() for name, tensor in parameters.items()}
    nonfinite = 0
    for start in range(0, len(features), microbatch):
        part = slice(start, start + microbatch)
        with running(model, "one record at a time", quote=False):
            gradients = per_record(detached, features[part], targets[part])
        squared = torch.stack([g.to(torch.float64).flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
        factors, broken = clip_factors(squared, clip_norm)
        nonfinite += int(broken.sum())
        for name, gradient in gradients.items():
            # 0 * NaN is NaN, so broken records are taken out before the weighted sum.
            kept = torch.where(broken.view(-1, *[1] * (gradient.dim() - 1)), 0.0, gradient.to(torch.float64))
            total[name] += torch.tensordot(factors, kept, dims=1)
    return ClippedSum(Bounded(total, clip_norm), nonfinite)
