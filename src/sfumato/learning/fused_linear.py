"""Plain SGD through linear layers without a weight gradient in memory: the step is added to the weight where it arises.

A linear layer's weight gradient is as large as the weight. Written out, read back and added, it is most of the memory traffic
of a small client's training; added inside the backward pass, it is never there. Only for weights that one forward pass uses
once, as the weight of a linear layer and nowhere else, which is watched in every forward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast, final

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.nn import functional
from torch.overrides import TorchFunctionMode


_LARGE, _FEW_ROWS = 2**19, 64  # where a weight far larger than its input is read twice as fast from the left


class NotFusable(Exception):  # noqa: N818 (a signal within this folder, never an error that a user sees)
    """A fused weight is used in another way as well, so the step has to be computed with written-out gradients."""


@final
class _Linear(torch.autograd.Function):
    """x @ weight.T + bias, whose backward pass subtracts rate * gradient from weight and bias.

    Shapes: one client x (..., in), weight (out, in), bias (out,); or stacked, with the clients in front of each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, rate: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.rate = rate
        rows = _rows(x, weight)
        if weight.dim() == 2:
            if weight.numel() >= _LARGE and len(rows) < _FEW_ROWS and weight.device.type == "cpu":
                out = torch.mm(weight, rows.t()).t().contiguous()
                out = out if bias is None else out.add_(bias)
            else:
                out = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
            return out.view(*x.shape[:-1], -1)
        if bias is None:
            out = torch.bmm(rows, weight.mT)
        else:
            out = torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
        return out.view(*x.shape[:-1], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight, bias = ctx.saved_tensors
        (gradient,) = gradients
        rows, given = _rows(x, weight), _rows(gradient, weight)
        # Before the weight moves: the gradient of x is taken at the weight of the forward pass.
        before = torch.matmul(given, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        if weight.dim() == 2:
            weight.addmm_(given.t(), rows, alpha=-ctx.rate)
        else:
            weight.baddbmm_(given.mT, rows, alpha=-ctx.rate)
        if bias is not None:
            bias.sub_(given.sum(-2), alpha=ctx.rate)
        return before, None, None, None, None


_apply = cast("Callable[..., Tensor]", _Linear.apply)
_functorch = torch._C._functorch


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, rate: float) -> Tensor:
    if not _functorch.is_batchedtensor(weight):
        return _apply(x, weight, bias, anchor, rate)
    stacked = [_stacked(tensor) for tensor in (weight, bias) if tensor is not None]
    clients = stacked[0].shape[0]
    given = _stacked(x) if _functorch.is_batchedtensor(x) else x.expand(clients, *x.shape)
    # Under vmap, `apply` looks up signatures and walks trees at each call, which takes longer than the layer of a small model;
    # so the function is applied outside of it, to what the batched tensors hold.
    level = _functorch.maybe_get_level(weight)
    with temporarily_pop_interpreter_stack():
        out = _apply(given, stacked[0], stacked[1] if bias is not None else None, anchor, rate)
    return _functorch._add_batch_dim(out, 0, level)


def _stacked(tensor: Tensor) -> Tensor:
    """Return what a batched tensor holds, with the clients in front."""
    value: Tensor = _functorch.get_unwrapped(tensor)
    place = _functorch.maybe_get_bdim(tensor)
    if _functorch.is_functorch_wrapped_tensor(value) or place < 0:
        raise NotFusable
    return value if place == 0 else value.movedim(place, 0)


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """Return the vectors of x in one dimension: (rows, size), or (clients, rows, size) if the weight is stacked."""
    return x.reshape(*weight.shape[:-2], -1, x.shape[-1])


@final
class Fusing(TorchFunctionMode):
    """While it is entered, linear layers over the fused weights are `_Linear`; how every weight is used is watched.

    Args:
        weights: The trained parameters by name, as the forward pass will see them.
        fused: Names to be fused; empty to only watch.
        anchor: A scalar that requires a gradient, so that the backward pass reaches layers whose input needs none.
        rate: The learning rate.
    """

    def __init__(self, weights: Mapping[str, Tensor], fused: Iterable[str], anchor: Tensor, rate: float) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in weights.items()}
        self._fused, self._anchor, self._rate = frozenset(fused), anchor, rate
        self._linear: Counter[str] = Counter()
        self._pairs: list[tuple[str, ...]] = []
        self._elsewhere: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            return self._on_linear(*args, **kwargs)
        for name in self._used(args) | self._used(kwargs.values()):
            self._elsewhere.add(name)
            if name in self._fused:
                raise NotFusable
        return func(*args, **kwargs)

    def fusable(self) -> frozenset[str]:
        """Return the names that the forward pass used once, in a linear layer, and nowhere else."""
        once = {name for name, count in self._linear.items() if count == 1} - self._elsewhere
        return frozenset(name for pair in self._pairs if once.issuperset(pair) for name in pair)

    def _on_linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        entered = self._used([input])
        self._elsewhere |= entered
        if not self._fused.isdisjoint(entered):
            raise NotFusable
        pair = [self._names.get(id(tensor)) for tensor in (weight, bias) if tensor is not None]
        names = tuple(name for name in pair if name is not None)
        if len(names) == len(pair):
            self._pairs.append(names)
            self._linear.update(names)
        else:
            self._elsewhere.update(names)
        if not self._fused.isdisjoint(names):
            if not self._fused.issuperset(pair) or any(self._linear[name] > 1 for name in names):
                raise NotFusable
            return _linear(input, weight, bias, self._anchor, self._rate)
        return functional.linear(input, weight, bias)

    def _used(self, values: Iterable[Any]) -> set[str]:
        found = set()
        for value in values:
            if isinstance(value, (list, tuple)):
                found |= self._used(value)
            elif id(value) in self._names:
                found.add(self._names[id(value)])
        return found
