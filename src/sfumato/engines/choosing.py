"""Which way of running clients is the fastest: tried on the clients that are due anyway, so that no work is thrown away."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from sfumato.learning.group_data import ALONE, STACKED

_CACHES = (2**21, 2**22, 2**24)  # numbers that a chunk's models may have together, from small to large caches
_MOST_STACKED = 256
_ALONE = 4  # clients that a worker trains one by one before it hands in their sum
_LEAST_TIMED = 3  # trials of each choice; the first one warms up
_GIVE_UP = 1.5  # a choice that is so much slower than the best is not tried again


@final
@dataclass(frozen=True)
class Choice:
    """One way to run clients.

    Attributes:
        way: How the clients of a chunk are trained.
        chunk: Clients of a chunk.
        workers: Threads, each with a chunk of its own.
        threads: Torch's own threads within each worker.
    """

    way: str
    chunk: int
    workers: int
    threads: int


@final
@dataclass
class Watch:
    """What a trial reports: how many records it trained."""

    records: int = 0


@final
@dataclass
class _Trial:
    choice: Choice
    times: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """Seconds a record, without the first trial if there are others."""
        return min(self.times[1:] or self.times, default=math.inf)


@final
class Chooser:
    """Goes through the choices, then stays with the fastest.

    Args:
        ways: That the clients can be trained in.
        workers: Numbers of threads to try, each with the numbers of torch's own threads that a worker of them may have.
        size: Numbers in one client's model.
    """

    def __init__(self, ways: Sequence[str], workers: Mapping[int, Sequence[int]], size: int) -> None:
        choices: list[Choice] = []
        for way in ways:
            chunks = _stacks(size) if way == STACKED else [_ALONE]
            for count, inner in workers.items():
                choices += [Choice(way, chunk, count, threads) for threads in inner for chunk in chunks]
        # The surest way first: it sets the time that the others have to beat.
        self._trials = [_Trial(choice) for choice in reversed(list(dict.fromkeys(choices)))]
        self._at = 0

    @property
    def settled(self) -> bool:
        """Whether the fastest choice is known."""
        return self._at >= len(self._trials)

    @property
    def choice(self) -> Choice:
        """What the next clients are run with."""
        if not self.settled:
            return self._trials[self._at].choice
        return min(self._trials, key=lambda trial: trial.best).choice

    @contextlib.contextmanager
    def timed(self) -> Iterator[Watch]:
        """Time the present choice on some clients, and go on to the next choice when it is known well enough."""
        watch, trial = Watch(), self._trials[self._at]
        start = time.perf_counter()
        yield watch
        if self.settled or trial is not self._trials[self._at]:
            return  # it was refused
        trial.times.append((time.perf_counter() - start) / max(1, watch.records))
        best = min((other.best for other in self._trials if other is not trial), default=math.inf)
        slow = len(trial.times) == _LEAST_TIMED - 1 and trial.best > _GIVE_UP * best
        if len(trial.times) >= _LEAST_TIMED or slow:
            self._at += 1

    def refuse(self, way: str) -> None:
        """Try a way no longer; one by one is what is left if it was the only one."""
        left = [trial for trial in self._trials if trial.choice.way != way]
        self._trials = left or [_Trial(dataclasses.replace(self._trials[0].choice, way=ALONE, chunk=_ALONE))]


def _stacks(size: int) -> list[int]:
    """Return the sizes of chunks that are worth trying."""
    sizes = {min(_MOST_STACKED, max(2, numbers // max(1, size))) for numbers in _CACHES}
    return sorted(sizes)
