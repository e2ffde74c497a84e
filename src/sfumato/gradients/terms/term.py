"""The contract: a term is one parameter's gradient in factored form, a part is a term made ready for norms and a sum.

**Rounding.** A factored gradient is measured by one formula and summed by another, so where terms cancel inside a record
the two could disagree by the rounding of what cancelled. Every part that does so adds to its squared norm (`with_slack`) 16
unit roundoffs of the largest value that it could have had, by Cauchy-Schwarz, and 1024 where nearly all of it cancels. Such
a record is thereby scaled down, never up.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

_CHUNK, _LONG_CHUNK = 64, 512  # summed in the tensor's own dtype; the chunks are summed in float64
_LARGE, _SMALL = 2.0**60, 2.0**-60  # squares beyond these may have overflowed or vanished in float32
_ROUNDOFFS = 16
_BACKENDS: Any = torch.backends


@final
class Weighting:
    """The factors of one sum.

    Args:
        factors: Of each record, shape (records,), float64, at least 0.
        broken: The records to leave out, shape (records,), bool; None if there are none.
    """

    def __init__(self, factors: Tensor, broken: Tensor | None = None) -> None:
        self.factors, self.broken = factors, broken
        used = factors[factors > 0]
        # Beyond, a product with a value in float32 could overflow, or be rounded up where numbers are few.
        self.is_gentle = comfortable(used)

    def of(self, records: Tensor) -> Weighting:
        """Return the factors of each row, where `records` tells whose it is, shape (rows,), int64."""
        return Weighting(self.factors[records], None if self.broken is None else self.broken[records])

    def scaled(self, values: Tensor, by: Tensor | None = None) -> Tensor:
        """Return each record's values times its factor (and times `by`), zeros for the broken.

        Args:
            values: Shape (records, ...).
            by: Shape (records,), float64; with it, or where the factors are not gentle, the products are taken in float64.
        """
        whole = without(values, self.broken)
        shape = (-1, *[1] * (values.dim() - 1))
        if by is None and self.is_gentle:
            return whole * self.factors.to(values.dtype).view(shape)
        factors = self.factors if by is None else self.factors * by
        if self.broken is not None:
            factors = torch.where(self.broken, 0.0, factors)
        return (whole.to(torch.float64) * factors.view(shape)).to(values.dtype)

    def balanced(self, left: Tensor, right: Tensor, left_mass: Tensor, right_mass: Tensor) -> tuple[Tensor, Tensor]:
        """Return two factors of a product such that their product carries the weights and neither leaves its dtype.

        Args:
            left: Shape (records, ...).
            right: Shape (records, ...).
            left_mass: Squared norms of left, shape (records,), float64.
            right_mass: Squared norms of right, shape (records,), float64.
        """
        if self.is_gentle and comfortable(left_mass) and comfortable(right_mass):
            return self.scaled(left), without(right, self.broken)
        norms = torch.nan_to_num(right_mass.sqrt(), posinf=0.0)
        return self.scaled(left, norms), unit(without(right, self.broken), right_mass)


@final
class _FullPrecision:
    """The switches of one kind of device, which are the process's: the first user turns them, the last one turns them back."""

    def __init__(self, places: Sequence[Any]) -> None:
        self._places = places
        self._lock = threading.Lock()
        self._users = 0
        self._before: list[tuple[Any, str]] = []

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                found = [(place, place.fp32_precision) for place in self._places]
                self._before = [(place, precision) for place, precision in found if precision not in ("none", "ieee")]
                for place, _ in self._before:
                    place.fp32_precision = "ieee"

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                for place, precision in self._before:
                    place.fp32_precision = precision


_FULL = {
    "cuda": _FullPrecision((_BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn)),
    "cpu": _FullPrecision((_BACKENDS.mkldnn.matmul, _BACKENDS.mkldnn.conv, _BACKENDS.mkldnn.rnn)),
}


@contextlib.contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Take norms and sums in full precision, whatever the user allows for the model (autocast, TF32, bfloat16 products).

    A norm and a sum that round differently would not keep the bound.
    """
    with _FULL.get(device.type, contextlib.nullcontext()):
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield


class Part(ABC):
    """One parameter's gradient of every record, measured, and ready to be summed.

    Attributes:
        squared: Squared l2 norm for each record, shape (records,), float64; NaN or infinite where the gradient is.
    """

    squared: Tensor

    @abstractmethod
    def weighted_sum(self, weighting: Weighting) -> Tensor:
        """Return the sum of factor * gradient over the records, in the parameter's shape."""

    def add_weighted_sum(self, total: Tensor, weighting: Weighting) -> None:
        """Add the weighted sum to `total`, in place."""
        total.add_(self.weighted_sum(weighting))


@final
@dataclass(frozen=True)
class Strategy:
    """One way to turn a term into a part.

    Attributes:
        make: Does it.
        bytes: Memory that the part holds until the sum is made, beyond the term itself.
    """

    make: Callable[[], Part]
    bytes: int


@final
class Workspace:
    """Memory that is used again from step to step: fresh pages cost more than the products that are written to them."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self.lock = threading.RLock()  # held for as long as what was handed out is in use

    def rows(self, name: str, records: int, size: int, like: Tensor) -> Tensor:
        """Return uninitialised memory of shape (records, size), in the dtype and on the device of `like`.

        What was handed out before under this name is overwritten.
        """
        kept = self._kept.get(name)
        wanted = records * size
        if kept is None or kept.numel() < wanted or (kept.dtype, kept.device) != (like.dtype, like.device):
            kept = self._kept[name] = like.new_empty(wanted)
        return kept[:wanted].view(records, size)


class Term(ABC):
    """One parameter's gradient as one operation gives it, for every record.

    Attributes:
        name: The parameter.
        space: Where gradients of records may be put; without it they get fresh memory.
        records: Number of records.
        device: Where it lies.
        signature: Equal for terms of the same kind and per-record shapes: they share their choice of strategy.
        work: Multiplications that one weighted sum takes, to tell whether timing the strategies is worth its time.
    """

    name: str
    space: Workspace | None = None
    records: int
    device: torch.device
    signature: tuple[object, ...]
    work: int

    @abstractmethod
    def strategies(self) -> Mapping[str, Strategy]:
        """Return what can be done, by name; the first is taken where timing does not pay."""

    @abstractmethod
    def per_record(self) -> Tensor:
        """Return the gradient of every record, shape (records, *shape of the parameter)."""

    def merged(self, others: Sequence[Term]) -> Term | None:
        """Return one term for several uses of the parameter, or None if they do not go together."""
        return None


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor detached and in float32 or wider, the least in which norms and sums are taken."""
    tensor = tensor.detach()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def squared_norms(vectors: Tensor) -> Tensor:
    """Return the squared l2 norm of each row, shape (rows,), float64, for values of any size.

    Args:
        vectors: Shape (rows, size), float32 or float64.
    """
    size = vectors.shape[1]
    if vectors.dtype is torch.float64 or size < _CHUNK:
        return vectors.to(torch.float64).square().sum(1)
    chunk = _CHUNK if size < 8 * _LONG_CHUNK else _LONG_CHUNK
    whole = size - size % chunk
    chunks: Tensor = torch.linalg.vector_norm(vectors[:, :whole].unflatten(1, (-1, chunk)), dim=2)
    squared = chunks.to(torch.float64).square_().sum(1)
    if whole < size:
        squared += vectors[:, whole:].to(torch.float64).square().sum(1)
    if not comfortable(squared):
        doubtful = ~((squared > _SMALL) & (squared < _LARGE))
        squared[doubtful] = vectors[doubtful].to(torch.float64).square().sum(1)
    return squared


def unit(values: Tensor, mass: Tensor) -> Tensor:
    """Return each record's values scaled to norm 1, also where their squares would leave float32; zeros stay zeros.

    Args:
        values: Shape (records, ...).
        mass: Their squared norms, shape (records,), float64.
    """
    norms = mass.sqrt()
    size = torch.where(torch.isfinite(norms) & (norms > 0), norms, 1.0)
    return (values.to(torch.float64) / size.view(-1, *[1] * (values.dim() - 1))).to(values.dtype)


def comfortable(squared: Tensor) -> bool:
    """Tell whether products of values with these squared norms stay far from the ends of float32."""
    if not len(squared):
        return True
    low, high = torch.aminmax(squared)
    return bool(low > _SMALL) and bool(high < _LARGE)  # NaN fails both


def with_slack(squared: Tensor, mass: Tensor, dtype: torch.dtype) -> Tensor:
    """Return squared norms with what the rounding of the sum may add where much has cancelled.

    Args:
        squared: Squared norms, shape (records,), float64.
        mass: Squared bounds on the gradients by Cauchy-Schwarz, shape (records,), float64.
        dtype: In which the sum will be computed.
    """
    # A record's share in the sum is off by about u * sqrt(mass / squared * positions) of the clip norm. Up to this ratio that
    # is within the margin of clipping; beyond, nearly all of the record cancels, and it is scaled down much more.
    roundoffs = torch.where(squared < mass * 2.0**-16, 64.0 * _ROUNDOFFS, _ROUNDOFFS)
    return squared + mass * roundoffs * (torch.finfo(dtype).eps / 2)


def without(tensor: Tensor, broken: Tensor | None) -> Tensor:
    """Return the tensor with zeros for the broken records, because 0 * NaN is NaN."""
    if broken is None:
        return tensor
    return tensor.masked_fill(broken.view(-1, *[1] * (tensor.dim() - 1)), 0.0)
