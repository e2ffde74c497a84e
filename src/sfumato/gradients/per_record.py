"""The reference path: the gradient of each record alone, by `torch.func.vmap`, then clipped and summed.

Obviously right and slow: it holds the gradients of a whole microbatch at once. Faster paths stand beside it and are tested
against it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from sfumato.errors import UnsupportedModelError
from sfumato.gradients.clipped import ClippedSum, Loss
from sfumato.gradients.clipping import MAX_UNITS, UNCLIPPED, Clipping
from sfumato.gradients.support import check_model, refuse_memories, running, trainable
from sfumato.privacy.bounded import Bounded


def clipped_gradient_sum(
    model: nn.Module,
    loss: Loss,
    features: Tensor,
    targets: Tensor,
    *,
    clipping: Clipping,
    microbatch: int = 256,
    views: bool = False,
) -> ClippedSum:
    """Return the sum of the records' clipped gradients.

    **Guarantee**: adding or removing one record moves the sum by at most `clipping.bound` in l2 norm over all trainable
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
        features: Shape (batch, ...), or (batch, views, ...).
        targets: Shape (batch, ...).
        clipping: How records are clipped, and at which norm.
        microbatch: Records whose gradients are held in memory at once; it never changes the result beyond rounding.
        views: Whether features hold several views of each record: the loss is then their mean.

    Raises:
        UnsupportedModelError: the model mixes records, or cannot be run one record at a time.
    """
    check_model(model)
    parameters = trainable(model)
    if len(features) > MAX_UNITS:
        raise UnsupportedModelError(f"A batch may hold at most {MAX_UNITS} records; lower the batch size.")
    # Every place of every parameter once; functional_call would leave a module that stands in two places changed.
    name_of = {id(tensor): name for name, tensor in parameters.items()}
    places = {
        f"{path}.{key}" if path else key: name_of[id(tensor)]
        for path, module in model.named_modules()
        for key, tensor in module.named_parameters(recurse=False)
        if id(tensor) in name_of
    }
    total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in parameters.items()}

    def loss_of_one(weights: dict[str, Tensor], feature: Tensor, target: Tensor) -> Tensor:
        placed = {place: weights[name] for place, name in places.items()}
        if views:
            outputs = functional_call(model, placed, (feature,), tie_weights=False)
            losses = loss(outputs, target.expand(len(feature), *target.shape))
            return losses if losses.dim() == 0 else losses.mean()
        outputs = functional_call(model, placed, (feature.unsqueeze(0),), tie_weights=False)
        return loss(outputs, target.unsqueeze(0)).sum()

    per_record = vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness="different")
    detached = {name: tensor.detach() for name, tensor in parameters.items()}
    nonfinite, count = 0, torch.zeros((), dtype=torch.float64)
    for start in range(0, len(features), microbatch):
        part = slice(start, start + microbatch)
        # The fused attention kernels have no batched form, and torch would warn.
        with running(model, "one record at a time", quote=False), sdpa_kernel(SDPBackend.MATH):
            gradients = per_record(detached, features[part], targets[part])
        refuse_memories(model, loss)
        squared = {n: g.to(torch.float64).reshape(len(g), -1).square().sum(1) for n, g in gradients.items()}
        factors, broken = clipping.factors(squared, parameters)
        nonfinite += int(broken.sum())
        for name, gradient in gradients.items():
            # 0 * NaN is NaN, so broken records are taken out before the weighted sum.
            kept = torch.where(broken.view(-1, *[1] * (gradient.dim() - 1)), 0.0, gradient.to(torch.float64))
            total[name] += torch.tensordot(factors[name], kept, dims=1)
        count += clipping.count(next(iter(factors.values())), broken)
    if clipping.counted:
        total[UNCLIPPED] = count
    return ClippedSum(Bounded(total, clipping.bound), nonfinite)
