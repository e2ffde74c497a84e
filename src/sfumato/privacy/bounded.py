"""Values before and after noise: `Bounded` knows its sensitivity, `Released` may leave.

The only road from the first to the second goes through `sfumato.privacy.mechanisms`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NoReturn, final

from torch import Tensor

from sfumato import _checks
from sfumato.errors import PlanError, SfumatoError
from sfumato.privacy.budget import Relation

Tensors = Mapping[str, Tensor]
"""Named tensors, usually one for each trainable parameter of a model."""


@final
@dataclass(frozen=True, repr=False)
class Bounded:
    """A sum over units (records or clients) to which each unit adds a vector of l2 norm at most `norm_bound`.

    The value is private: it has no printed form and cannot be pickled.

    Args:
        value: Named tensors, float; together they are the vector whose norm is bounded.
        norm_bound: The bound on one unit's part, > 0, a public number.
    """

    value: Tensors
    norm_bound: float

    def __post_init__(self) -> None:
        _checks.positive("norm_bound", self.norm_bound)
        object.__setattr__(self, "value", MappingProxyType(dict(self.value)))

    @property
    def size(self) -> int:
        """Number of coordinates of the whole vector."""
        return sum(tensor.numel() for tensor in self.value.values())

    def sensitivity(self, relation: Relation) -> float:
        """Return how far the value can move, in l2 norm, between neighbouring data sets.

        Raises:
            PlanError: the relation is unknown.
        """
        match relation:
            case Relation.ADD_OR_REMOVE_ONE:
                return self.norm_bound
            case Relation.REPLACE_ONE:
                return 2 * self.norm_bound
            case _:
                raise PlanError(f"The sensitivity under the relation {relation!r} is unknown.")

    def plus(self, other: Bounded) -> Bounded:
        """Return the sum of two sums over disjoint units; the bound of one unit's part is the larger of the two.

        Raises:
            SfumatoError: the two do not have the same names and shapes.
        """
        if {name: tensor.shape for name, tensor in self.value.items()} != {
            name: tensor.shape for name, tensor in other.value.items()
        }:
            raise SfumatoError("Two bounded sums with different names or shapes cannot be added.")
        value = {name: tensor + other.value[name] for name, tensor in self.value.items()}
        return Bounded(value, max(self.norm_bound, other.norm_bound))

    def __repr__(self) -> str:
        return f"Bounded(norm_bound={self.norm_bound:g}, value=<private>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A bounded value is private and cannot be pickled; release it through a mechanism.")


RELEASE = object()
"""The key that only `sfumato.privacy.mechanisms` uses to make a `Released`."""


@final
@dataclass(frozen=True)
class Released:
    """A value that carries its noise and may leave; made only by `sfumato.privacy.mechanisms`.

    Attributes:
        value: Named tensors in the dtype of the sum. In float64 every coordinate is a multiple of `grid`; narrower ones are
            rounded after the release.
        noise_std: Standard deviation of the noise on each coordinate.
        grid: The public spacing on which both the sum and the noise were put.
        draw: Which of the charge's draws it used.
    """

    value: Tensors
    noise_std: float
    grid: float
    draw: int
    key: object = field(repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if self.key is not RELEASE:
            raise SfumatoError("Only sfumato.privacy.mechanisms can release a value.")
        object.__setattr__(self, "key", None)
        object.__setattr__(self, "value", MappingProxyType(dict(self.value)))
