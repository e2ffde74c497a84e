"""Which strategy measures and sums a term: timed once for each kind and shape of layer, on the first batch that has it."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from sfumato.gradients.terms.term import Strategy, Term, Weighting

_WORTH_TIMING = 10**7  # multiplications; below, every strategy is over in a fraction of a millisecond
_LESS_MEMORY = 1.1  # how much slower than the fastest a strategy may be if it holds less


class Choices:
    """What was chosen, by the signature of the term. The choice only changes the order in which floats are added."""

    def __init__(self) -> None:
        self._chosen: dict[tuple[object, ...], str] = {}

    def name(self, term: Term, room: float, *, timed: bool) -> str:
        """Return the name of the strategy for a term.

        Args:
            term: The term.
            room: Bytes that its part may hold.
            timed: Whether to time what has not been timed before, if that pays.
        """
        if term.signature in self._chosen:
            return self._chosen[term.signature]
        ways = term.strategies()
        if not timed or len(ways) == 1 or term.work < _WORTH_TIMING:
            return next(iter(ways))
        return self._chosen.setdefault(term.signature, _fastest(ways, term, room))

    def choose(self, term: Term, room: float, *, timed: bool) -> Strategy:
        """Return the strategy for a term; see `name`."""
        return term.strategies()[self.name(term, room, timed=timed)]


CHOICES = Choices()
"""One for the process, so that equal layers are computed alike in every run."""


def _fastest(ways: Mapping[str, Strategy], term: Term, room: float) -> str:
    ones = Weighting(torch.ones(term.records, dtype=torch.float64, device=term.device))
    fitting = {name: way for name, way in ways.items() if way.bytes <= room} or ways
    times = {name: _seconds(way, ones) for name, way in fitting.items()}
    promising = [name for name in times if times[name] <= 3 * min(times.values())]
    for name in promising:
        times[name] = min(times[name], _seconds(fitting[name], ones), _seconds(fitting[name], ones))
    best = min(times.values())
    good = [name for name in times if times[name] <= best * _LESS_MEMORY]
    return min(good, key=lambda name: ways[name].bytes)


def _seconds(way: Strategy, weighting: Weighting) -> float:
    _wait(weighting.factors)
    begun = time.perf_counter()
    way.make().weighted_sum(weighting)
    _wait(weighting.factors)
    return time.perf_counter() - begun


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
