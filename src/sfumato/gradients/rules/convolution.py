"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.gradients.rules.registry import rule
from sfumato.gradients.tape import Kept, Rule, Tape
from sfumato.gradients.terms.convolution import Convolution, Geometry
from sfumato.gradients.terms.held import Given
from sfumato.gradients.terms.term import Term, wide

_Numbers = int | tuple[int, ...] | list[int]


def _each(value: _Numbers, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _follow(
    tape: Tape, dims: int, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry,
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor], *, transposed: bool,
) -> Any:  # fmt: skip
    x = tape.open(input)
    single = x.dim() == dims + 2  # the model gave an image without a batch dimension
    images = x.unsqueeze(1) if single else x
    w, b = tape.weight(weight), tape.weight(bias)
    assert w is not None
    out = run(images.flatten(0, 1), w.value, b.value if b else None)
    kept, records = Kept(images), tape.records
    bare = dataclasses.replace(geometry, padding=(0,) * dims)

    def terms(gradients: Sequence[Tensor | None]) -> Iterator[Term]:
        (gradient,) = gradients
        assert gradient is not None
        gradient = gradient.unflatten(0, (records, -1))
        if w.name:
            # The kernel of a transposed convolution is that of the convolution which leads back.
            if transposed:
                yield Convolution(w.name, _led_back(gradient, kept.get(), geometry), kept.get(), bare)
            else:
                yield Convolution(w.name, kept.get(), gradient, geometry)
        if b is not None and b.name:
            yield Given(b.name, wide(gradient).flatten(3).sum((1, 3)))

    tape.note("transposed convolution" if transposed else "convolution", (w, b), (x,), (out,), terms)
    out = out.unflatten(0, (records, -1))
    return tape.close(out.squeeze(1) if single else out)


def _led_back(outputs: Tensor, inputs: Tensor, geometry: Geometry) -> Tensor:
    """Return what the reverse convolution sees of a transposed one's outputs: padded, and no more than leads to the inputs."""
    sides: list[int] = []
    for d in reversed(range(geometry.dims)):
        reach = geometry.dilation[d] * (geometry.kernel[2 + d] - 1) + 1
        needed = (inputs.shape[3 + d] - 1) * geometry.stride[d] + reach
        sides += [geometry.padding[d], needed - geometry.padding[d] - outputs.shape[3 + d]]
    return F.pad(outputs, sides)


def _convolution(dims: int, function: Any) -> Rule:
    def follow(
        tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: _Numbers = 1,
        padding: _Numbers | str = 0, dilation: _Numbers = 1, groups: int = 1,
    ) -> Any:  # fmt: skip
        if not tape.has_records(input) or tape.has_records(weight) or tape.has_records(bias):
            return NotImplemented
        step, spread = _each(stride, dims), _each(dilation, dims)
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                return NotImplemented
            sizes = [spread[d] * (weight.shape[2 + d] - 1) if padding == "same" else 0 for d in range(dims)]
            if any(size % 2 for size in sizes):
                input = F.pad(input, [side for size in reversed(sizes) for side in (size // 2, size - size // 2)])
                sizes = [0] * dims
            pad = tuple(size // 2 for size in sizes)
        else:
            pad = _each(padding, dims)
        geometry = Geometry(weight.shape, step, pad, spread, groups)
        return _follow(
            tape, dims, input, weight, bias, geometry, lambda x, w, b: function(x, w, b, step, pad, spread, groups),
            transposed=False,
        )  # fmt: skip

    return follow


def _transposed(dims: int, function: Any) -> Rule:
    def follow(
        tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: _Numbers = 1,
        padding: _Numbers = 0, output_padding: _Numbers = 0, groups: int = 1, dilation: _Numbers = 1,
    ) -> Any:  # fmt: skip
        if not tape.has_records(input) or tape.has_records(weight) or tape.has_records(bias):
            return NotImplemented
        step, pad, spread = _each(stride, dims), _each(padding, dims), _each(dilation, dims)
        geometry = Geometry(weight.shape, step, pad, spread, groups)
        return _follow(
            tape, dims, input, weight, bias, geometry,
            lambda x, w, b: function(x, w, b, step, pad, output_padding, groups, spread), transposed=True,
        )  # fmt: skip

    return follow


for _dims, _forward, _backward in (
    (1, torch.conv1d, torch.conv_transpose1d),
    (2, torch.conv2d, torch.conv_transpose2d),
    (3, torch.conv3d, torch.conv_transpose3d),
):
    rule(_forward)(_convolution(_dims, _forward))
    rule(_backward)(_transposed(_dims, _backward))
