"""Gradients of a convolution's kernel, in any number of dimensions, with stride, padding, dilation and groups.

The gradient of one record is the product of its output gradient with the patches that the kernel saw. Which way to it is
fastest differs by shape and machine, so there are several:

- grouped: one call of torch's own kernel in which every record is a group of channels of its own;
- patches: the patches of a few records are copied out through a strided view, then multiplied;
- patches, channels last: the same with the channels innermost, where copies of many channels are contiguous;
- ghost norm: as for a linear layer, on the patches; pays where the image is small and the channels are many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from sfumato.gradients.terms.held import Held
from sfumato.gradients.terms.product import Product
from sfumato.gradients.terms.term import Part, Strategy, Term, Weighting, squared_norms, wide, with_slack

_BLOCK = 2**21  # numbers of patches that are copied out together
_backward = torch.ops.aten.convolution_backward.default


@final
@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over its input.

    Args:
        kernel: Shape of the parameter: (out channels, in channels / groups, *kernel size).
        stride: One number a dimension.
        padding: One number a dimension.
        dilation: One number a dimension.
        groups: Number of groups.
    """

    kernel: torch.Size
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def dims(self) -> int:
        """Spatial dimensions."""
        return len(self.stride)


@final
class Convolution(Term):
    """The term for a kernel.

    Args:
        name: The parameter.
        inputs: Shape (records, images, in channels, *size); a record usually is one image.
        gradients: Of the outputs, shape (records, images, out channels, *output size).
        geometry: Of the kernel.
    """

    def __init__(self, name: str, inputs: Tensor, gradients: Tensor, geometry: Geometry) -> None:
        self.name, self.geometry = name, geometry
        self.inputs, self.gradients = wide(inputs), wide(gradients)
        if self.inputs.dtype != self.gradients.dtype:
            dtype = torch.promote_types(self.inputs.dtype, self.gradients.dtype)
            self.inputs, self.gradients = self.inputs.to(dtype), self.gradients.to(dtype)
        self.records, self.images = inputs.shape[:2]
        self.device = inputs.device
        self.size = math.prod(geometry.kernel)
        self.positions = self.images * math.prod(gradients.shape[3:])
        self.signature = ("convolution", geometry, inputs.shape[1:], self.inputs.dtype, self.inputs.device.type)
        self.work = self.records * self.positions * self.size

    @override
    def strategies(self) -> Mapping[str, Strategy]:
        kernels: dict[str, Callable[[slice], _Rows]] = {"grouped": self._grouped, "patches": self._from_patches}
        if self.geometry.groups == 1 and self.inputs.shape[2] > 1:
            kernels["patches, channels last"] = self._from_patches_channels_last
        held = self.inputs.element_size() * self.records * self.size
        ways = {
            f"per record, {name}": Strategy(lambda kernel=kernel: _held(kernel(slice(None))), held)  # type: ignore[misc]
            for name, kernel in kernels.items()
        }
        ways |= {
            f"in blocks, {name}": Strategy(lambda kernel=kernel: _Direct(self, self._in_blocks(kernel)), 0)  # type: ignore[misc]
            for name, kernel in kernels.items()
        }
        out, rest = self.geometry.kernel[0], self.size // self.geometry.kernel[0]
        if self.geometry.groups == 1 and self.positions * (out + rest) <= 4 * self.size:
            ways["ghost norm"] = Strategy(lambda: _Direct(self, self._ghost()), 0)
        return ways

    @override
    def per_record(self) -> Tensor:
        rows = self._grouped(slice(None))
        return rows.rows.view(self.records, *self.geometry.kernel)

    def direct(self, weighting: Weighting, masses: tuple[Tensor, Tensor]) -> Tensor:
        """Return the weighted sum in one call of torch's kernel for the batch."""
        gradients, inputs = weighting.balanced(self.gradients, self.inputs, *masses)
        return self._kernel_gradient(inputs.flatten(0, 1), gradients.flatten(0, 1), 1)

    def masses(self) -> tuple[Tensor, Tensor]:
        """Return the squared norms of each record's gradients and inputs, shape (records,), float64."""
        return squared_norms(self.gradients.flatten(1)), squared_norms(self.inputs.flatten(1))

    def _kernel_gradient(self, inputs: Tensor, gradients: Tensor, times: int) -> Tensor:
        """Return torch's gradient of a kernel with `times` as many groups, (times * out, in / groups, *size)."""
        geometry, dims = self.geometry, self.geometry.dims
        # Only the shape of the kernel matters here; its values would be needed for the inputs' gradient alone.
        kernel = inputs.new_empty(times * geometry.kernel[0], *geometry.kernel[1:])
        result: Tensor = _backward(
            gradients, inputs, kernel, None, geometry.stride, geometry.padding, geometry.dilation, False, [0] * dims,
            times * geometry.groups, [False, True, False],
        )[1]  # fmt: skip
        return result

    def _grouped(self, part: slice) -> _Rows:
        inputs, gradients = self.inputs[part], self.gradients[part]
        records = len(inputs)
        result = self._kernel_gradient(
            inputs.transpose(0, 1).flatten(1, 2), gradients.transpose(0, 1).flatten(1, 2), records
        )
        kernel = self.geometry.kernel
        return _Rows(result.reshape(records, self.size), lambda row: row.view(kernel))

    def _from_patches(self, part: slice) -> _Rows:
        geometry, kernel = self.geometry, self.geometry.kernel
        groups = geometry.groups
        inputs, gradients = self._padded(self.inputs[part]), self.gradients[part]
        records = len(inputs)
        rows = self._memory(records, inputs).view(records, groups, kernel[0] // groups, -1)
        for block in self._blocks(records):
            patches = self._patches(inputs[block]).unflatten(2, (groups, -1))  # (r, images, groups, in, *kernel, *out)
            patches = patches.movedim(1, 3 + geometry.dims)  # (r, groups, in, *kernel, images, *out)
            count = len(patches)
            left = gradients[block].unflatten(2, (groups, -1)).permute(0, 2, 3, 1, *range(4, 4 + geometry.dims))
            torch.bmm(
                left.reshape(count * groups, kernel[0] // groups, self.positions),
                patches.reshape(count * groups, -1, self.positions).transpose(1, 2),
                out=rows[block].view(count * groups, kernel[0] // groups, -1),
            )
        return _Rows(rows.view(records, self.size), lambda row: row.view(kernel))

    def _from_patches_channels_last(self, part: slice) -> _Rows:
        geometry, kernel = self.geometry, self.geometry.kernel
        inputs, gradients = self._padded(self.inputs[part]), self.gradients[part]
        inputs = inputs.movedim(2, -1).contiguous().movedim(-1, 2)
        records = len(inputs)
        rows = self._memory(records, inputs).view(records, kernel[0], -1)
        for block in self._blocks(records):
            patches = self._patches(inputs[block])  # (r, images, in, *kernel, *out)
            dims = geometry.dims
            order = (0, 1, *range(3 + dims, 3 + 2 * dims), *range(3, 3 + dims), 2)
            right = patches.permute(order).reshape(len(patches), self.positions, -1)
            left = gradients[block].transpose(1, 2).reshape(len(patches), kernel[0], self.positions)
            torch.bmm(left, right, out=rows[block])
        last = (kernel[0], *kernel[2:], kernel[1])
        return _Rows(rows.view(records, self.size), lambda row: row.view(last).movedim(-1, 1).contiguous())

    def _memory(self, records: int, like: Tensor) -> Tensor:
        if self.space is None:
            return like.new_empty(records, self.size)
        return self.space.rows(self.name, records, self.size, like)

    def _padded(self, inputs: Tensor) -> Tensor:
        sides = [side for pad in reversed(self.geometry.padding) for side in (pad, pad)]
        return F.pad(inputs, sides) if any(sides) else inputs.contiguous()

    def _patches(self, inputs: Tensor) -> Tensor:
        """Return a view of padded inputs, (records, images, in, *kernel size, *output size)."""
        geometry = self.geometry
        strides, sizes = inputs.stride(), self.gradients.shape[3:]
        space = strides[3:]
        within = [stride * step for stride, step in zip(space, geometry.dilation, strict=True)]
        between = [stride * step for stride, step in zip(space, geometry.stride, strict=True)]
        shape = (*inputs.shape[:3], *geometry.kernel[2:], *sizes)
        return inputs.as_strided(shape, (*strides[:3], *within, *between), inputs.storage_offset())

    def _blocks(self, records: int) -> Iterator[slice]:
        channels = self.inputs.shape[2] * math.prod(self.geometry.kernel[2:])
        step = max(1, _BLOCK // max(1, self.positions * channels))
        for start in range(0, records, step):
            yield slice(start, min(start + step, records))

    def _in_blocks(self, kernel: Callable[[slice], _Rows]) -> Tensor:
        squared = torch.empty(self.records, dtype=torch.float64, device=self.inputs.device)
        step = max(1, _BLOCK // self.size)
        for start in range(0, self.records, step):
            part = slice(start, start + step)
            squared[part] = squared_norms(kernel(part).rows)
        # The patches hold every input at most once for each place of the kernel.
        gradients, inputs = self.masses()
        return with_slack(squared, gradients * inputs * math.prod(self.geometry.kernel[2:]), self.inputs.dtype)

    def _ghost(self) -> Tensor:
        squared = torch.empty(self.records, dtype=torch.float64, device=self.inputs.device)
        inputs = self._padded(self.inputs)
        out = self.geometry.kernel[0]
        for block in self._blocks(self.records):
            patches = self._patches(inputs[block]).movedim(1, 2 + self.geometry.dims)
            right = patches.reshape(len(patches), -1, self.positions).transpose(1, 2)
            left = self.gradients[block].transpose(1, 2).reshape(len(patches), out, self.positions).transpose(1, 2)
            product = Product(self.name, left, right, self.geometry.kernel)
            squared[block] = product.ghost(*product.masses())
        return squared


@final
@dataclass(frozen=True)
class _Rows:
    rows: Tensor
    finish: Callable[[Tensor], Tensor]


def _held(rows: _Rows) -> Held:
    return Held(rows.rows, rows.finish)


@final
class _Direct(Part):
    """Measured without holding the gradients."""

    def __init__(self, term: Convolution, squared: Tensor) -> None:
        self._term, self.squared = term, squared

    @override
    def weighted_sum(self, weighting: Weighting) -> Tensor:
        return self._term.direct(weighting, self._term.masses())
