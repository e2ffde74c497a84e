"""How a client trains on its own: steps or epochs, batches, optimiser; and which record is in which batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from sfumato import _checks
from sfumato.errors import InputError

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Makes an optimiser for given parameters, for example `functools.partial(torch.optim.SGD, lr=0.1)`."""

_ANY = (torch.zeros(1),)
_BY_ELEMENT = (SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop)


class Settings(NamedTuple):
    """What an optimiser does with some parameters.

    Attributes:
        kind: Its class.
        is_hooked: Whether something else runs before or after its steps.
        each: The settings of the group that each parameter is in, in their order.
    """

    kind: type[Optimizer]
    is_hooked: bool
    each: tuple[dict[str, Any], ...]


@final
@dataclass(frozen=True)
class LocalTraining:
    """What every client of a round does on its own records.

    Args:
        optimizer: Makes the client's optimiser, anew in every round.
        steps: Number of steps; or give `epochs`.
        epochs: Passes over the client's records; the last batch of a pass may be smaller.
        batch_size: Records of a step; None means all of the client's.
        proximal: FedProx's mu: pulls with mu * (weights - where the client started), at least 0.

    Raises:
        InputError: a number is out of range, or both or none of steps and epochs are given.
    """

    optimizer: MakeOptimizer
    steps: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    proximal: float = 0.0

    def __post_init__(self) -> None:
        if not callable(self.optimizer):
            raise InputError(
                "The local optimiser must be a function of parameters, for example functools.partial(torch.optim.SGD, lr=0.1)."
            )
        if (self.steps is None) == (self.epochs is None):
            raise InputError("Give either local_steps or local_epochs, and only one of them.")
        for name, count in (
            ("local_steps", self.steps),
            ("local_epochs", self.epochs),
            ("batch_size", self.batch_size),
        ):
            if count is not None:
                _checks.count(name, count)
        _checks.non_negative("proximal", self.proximal)

    def plain_rate(self, parameters: Iterable[Tensor] = _ANY) -> float | None:
        """Return the learning rate, if for such parameters a step is w - rate * gradient and nothing else."""
        made = self.settings(parameters)
        if made.kind is not SGD or made.is_hooked or self.proximal:
            return None
        for one in made.each:
            if one["momentum"] or one["weight_decay"] or one["maximize"] or not isinstance(one["lr"], (int, float)):
                return None
        rates = {float(one["lr"]) for one in made.each}
        return rates.pop() if len(rates) == 1 else None

    def stacks(self, parameters: Iterable[Tensor]) -> bool:
        """Return whether stacked clients take the steps they take alone.

        So it is if the optimiser is known to treat every coordinate alone, and gives a parameter the same settings with one
        more dimension. Any other might let one client move another, for example by a norm over all it holds.
        """
        given = list(parameters)
        alone, many = self.settings(given), self.settings([value.expand(2, *value.shape) for value in given])
        return alone.kind in _BY_ELEMENT and not alone.is_hooked and alone.each == many.each

    def settings(self, parameters: Iterable[Tensor] = _ANY) -> Settings:
        """Return what the optimiser does with parameters of these shapes: it may have groups that depend on them."""
        given = list(parameters)
        shapes = tuple(value.shape for value in given)
        if shapes not in self._known:
            stand_ins = [nn.Parameter(value.new_zeros(()).expand(value.shape)) for value in given]
            optimizer = self.optimizer(stand_ins)
            found = {
                id(parameter): {name: value for name, value in group.items() if name != "params"}
                for group in optimizer.param_groups
                for parameter in group["params"]
            }
            hooked = bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
            held = tuple(found[id(parameter)] for parameter in stand_ins if id(parameter) in found)
            self._known[shapes] = Settings(type(optimizer), hooked, held)
        return self._known[shapes]

    @cached_property
    def _known(self) -> dict[tuple[torch.Size, ...], Settings]:
        return {}


@final
@dataclass(frozen=True)
class Batches:
    """Which records are in which step.

    Attributes:
        index: (clients, steps, batch) int64; places beyond `count` repeat the client's record 0.
        count: (clients, steps) int64; 0 in steps that a client does not take.
    """

    index: Tensor
    count: Tensor

    @property
    def are_padded(self) -> bool:
        """Whether in some step one client has fewer records than another."""
        return bool(((self.count > 0) & (self.count < self.count.max(0).values)).any())


def batches_of(training: LocalTraining, sizes: Tensor, key: int, clients: Tensor) -> Batches:
    """Return the batches of each client, a function of the round's key and the client alone.

    In steps, every batch is full and what is left of an epoch is dropped; in epochs, the last batch may be smaller.

    Args:
        training: What every client does.
        sizes: Records of each client, (clients,) int64, at least 1 each.
        key: A random 64-bit number of the round.
        clients: The clients' numbers, (clients,) int64.
    """
    batch = sizes if training.batch_size is None else sizes.clamp(max=training.batch_size)
    if training.steps is None:
        per_epoch = (sizes + batch - 1) // batch
        assert training.epochs is not None
        steps = per_epoch * training.epochs
    else:
        per_epoch = sizes // batch
        steps = torch.full_like(sizes, training.steps)
    longest, largest = int(steps.max()), int(batch.max())
    number = torch.arange(longest).expand(len(sizes), -1)
    epoch, place = number // per_epoch[:, None], number % per_epoch[:, None]
    count = torch.minimum(batch[:, None], sizes[:, None] - place * batch[:, None])
    count = count.masked_fill(number >= steps[:, None], 0)
    within = torch.arange(largest)
    position = (place * batch[:, None]).unsqueeze(2) + within
    position = position.masked_fill(within >= count.unsqueeze(2), 0)
    if bool((batch == sizes).all()):  # every record in every step: their order is no matter
        return Batches(position, count)
    orders = torch.stack([_order(sizes, key, clients, number) for number in range(int(epoch[:, -1].max()) + 1)], 1)
    width = orders.shape[2]
    index = orders.flatten(1).gather(1, (epoch.unsqueeze(2) * width + position).flatten(1)).view(position.shape)
    return Batches(index.masked_fill(within >= count.unsqueeze(2), 0), count)


def _order(sizes: Tensor, key: int, clients: Tensor, epoch: int) -> Tensor:
    """Return each client's records in random order, (clients, most records), places beyond its own last."""
    place = torch.arange(int(sizes.max()))
    stream = mixed(mixed(clients + key) + epoch)
    words = mixed(stream[:, None] + place) >> 1
    return words.masked_fill(place >= sizes[:, None], torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)


def mixed(words: Tensor) -> Tensor:
    """Return 64-bit words scrambled one by one (splitmix64, Steele, Lea and Flood 2014): for batches, never for noise."""
    words = words * -7046029254386353131
    words = (words ^ ((words >> 30) & (2**34 - 1))) * -4658895280553007687
    words = (words ^ ((words >> 27) & (2**37 - 1))) * -7723592293110705685
    return words ^ ((words >> 31) & (2**33 - 1))
