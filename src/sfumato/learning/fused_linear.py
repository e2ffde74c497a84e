"""Plain SGD through linear layers without a weight gradient in memory: the step is added to the weight where it arises.

A linear layer's weight gradient is as large as the weight. Written out, read back and added, it is most of the memory traffic
of a small client's training; added inside the backward pass, it is never there. Only for weights that one forward pass uses
once, as the weight of a linear layer and nowhere else, which is watched in every forward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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
@dataclass
class Sink:
    """Where the gradients of fused weights go.

    Attributes:
        rate: The learning rate.
        anchor: A scalar that requires a gradient, so that the backward pass reaches layers whose input needs none.
        is_open: Whether the backward pass of the step is on; any other, inside of a forward pass, must not move a weight.
    """

    rate: float
    anchor: Tensor
    is_open: bool = False


@final
class _Linear(torch.autograd.Function):
    """rows @ weight.T + bias, whose backward pass subtracts rate * gradient from weight and bias.

    Shapes: one client's rows (rows, in), weight (out, in), bias (out,); or stacked, with the clients in front of each.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(rows, weight, bias)
        ctx.sink = sink
        if weight.dim() == 2:
            if weight.numel() >= _LARGE and len(rows) < _FEW_ROWS and weight.device.type == "cpu":
                out = torch.mm(weight, rows.t()).t().contiguous()
                return out if bias is None else out.add_(bias)
            return torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
        return torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        if not ctx.sink.is_open:
            raise NotFusable  # a gradient that the forward pass asks for
        rows, weight, bias = ctx.saved_tensors
        (given,) = gradients
        # Before the weight moves: the gradient of the rows is taken at the weight of the forward pass.
        before = torch.matmul(given, weight) if ctx.needs_input_grad[0] else None
        if weight.dim() == 2:
            weight.addmm_(given.t(), rows, alpha=-ctx.sink.rate)
        else:
            weight.baddbmm_(given.mT, rows, alpha=-ctx.sink.rate)
        if bias is not None:
            bias.sub_(given.sum(-2), alpha=ctx.sink.rate)
        return before, None, None, None, None


_apply = cast("Callable[..., Tensor]", _Linear.apply)
_functorch = torch._C._functorch
_hooks_on_saved = torch._C._autograd._top_saved_tensors_default_hooks


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, sink: Sink) -> Tensor:
    # Per client, also under vmap. Whatever is unusual is left to written-out gradients.
    plain = weight.dim() == 2 and x.dim() > 0 and x.numel() > 0 and x.dtype == weight.dtype
    fits = bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype)
    if not (plain and fits) or torch.is_autocast_enabled(x.device.type) or _hooks_on_saved(True) is not None:
        raise NotFusable
    if not _functorch.is_batchedtensor(weight):
        if _functorch.is_functorch_wrapped_tensor(x):
            raise NotFusable
        rows = _apply(x.reshape(-1, x.shape[-1]), weight, bias, sink.anchor, sink)
        return rows.view(*x.shape[:-1], weight.shape[0])
    level = _functorch.maybe_get_level(weight)
    held = [_stacked(tensor, level) for tensor in (weight, bias) if tensor is not None]
    clients = held[0].shape[0]
    given = _stacked(x, level) if _functorch.is_functorch_wrapped_tensor(x) else x.expand(clients, *x.shape)
    # Under vmap, `apply` looks up signatures and walks trees at each call, which takes longer than the layer of a small model;
    # so the function is applied outside of it, to what the batched tensors hold.
    with temporarily_pop_interpreter_stack():
        stacked_bias = held[1] if bias is not None else None
        rows = _apply(given.reshape(clients, -1, given.shape[-1]), held[0], stacked_bias, sink.anchor, sink)
        out = rows.view(*given.shape[:-1], held[0].shape[1])
    return _functorch._add_batch_dim(out, 0, level)


def _stacked(tensor: Tensor, level: int) -> Tensor:
    """Return what a tensor batched at this level, and no other, holds, with the clients in front."""
    if not _functorch.is_batchedtensor(tensor) or _functorch.maybe_get_level(tensor) != level:
        raise NotFusable
    value: Tensor = _functorch.get_unwrapped(tensor)
    if _functorch.is_functorch_wrapped_tensor(value):
        raise NotFusable
    return value.movedim(_functorch.maybe_get_bdim(tensor), 0)


@final
class Fusing(TorchFunctionMode):
    """While it is entered, linear layers over the fused weights are `_Linear`; how every weight is used is watched.

    Args:
        weights: The trained parameters by name, as the forward pass will see them.
        fused: Names to be fused; empty to only watch.
        sink: Where the gradients of fused weights go.
    """

    def __init__(self, weights: Mapping[str, Tensor], fused: Iterable[str], sink: Sink) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in weights.items()}
        self._fused, self._sink = frozenset(fused), sink
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

    def returned(self, outputs: object) -> None:
        """Take note of what the forward pass returned: a loss may use weights that are in it.

        Raises:
            NotFusable: it may hold a fused weight.
        """
        if not isinstance(outputs, Tensor) or id(outputs) in self._names:
            self._elsewhere.update(self._names.values())
            if self._fused:
                raise NotFusable

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
            return _linear(input, weight, bias, self._sink)
        return functional.linear(input, weight, bias)

    def _used(self, values: Iterable[Any]) -> set[str]:
        found = set()
        for value in values:
            if isinstance(value, (list, tuple)):
                found |= self._used(value)
            elif id(value) in self._names:
                found.add(self._names[id(value)])
        return found
