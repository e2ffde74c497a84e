"""Where randomness comes from: an AES-256-CTR keystream, turned into numbers with vectorised torch.

`SecureSource` is keyed by the operating system and is the default everywhere. `SeededSource` makes the same stream
from a seed, for tests and comparisons; whoever knows the seed can subtract the noise, so it is only used when named.

**Tails.** A normal draw comes from a uniform u by r = sqrt(-2 ln u), so the smallest u bounds how far the noise can
reach. With 24 random bits in u (what a float32 transform has) the tail ends at 5.77 standard deviations, where an ideal
Gaussian still has mass 8e-9 a draw: over a million coordinates that is missing privacy. With 53 bits it ends at 8.57
(1e-17). Here u keeps the full relative precision of a 64-bit word, so the tail ends at 9.42 (5e-21), and the transform is
always computed in float64; `dtype=torch.float32` only rounds the result (Box and Muller 1958).
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NoReturn, final

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from sfumato import _checks
from sfumato.errors import SfumatoError

_PAIRS = 65_536  # a block stays in the cache, and pays for starting two threads: fastest of 2**14..2**19 on two cores
_FEW = 16_384  # units for whose coins a keystream takes no time to speak of
_COIN = 2**53  # as many sides has a coin; a rate is rounded down to a multiple of one over it


class RandomSource(ABC):
    """A stream of random words and the numbers made from it.

    A source belongs to the process that made it: in a forked child it refuses, because two processes would draw the
    same noise. For the same reason it cannot be pickled.
    """

    is_secure: bool

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()  # the buffers below are shared by all calls
        self._stream = Cipher(algorithms.AES(self._key()), modes.CTR(bytes(16))).encryptor()
        self._zeros = memoryview(bytes(16 * _PAIRS))
        self._buffer = bytearray(16 * _PAIRS + 15)
        self._words = torch.frombuffer(self._buffer, dtype=torch.int64, count=2 * _PAIRS)
        self._half = torch.tensor(2.0**-64, dtype=torch.float64)
        self._radius, self._angle, self._spare = torch.empty(3, _PAIRS, dtype=torch.float64)

    @abstractmethod
    def _key(self) -> bytes:
        """Return the 32 bytes of the AES key."""

    @final
    def words(self, count: int) -> Tensor:
        """Return `count` uniformly random 64-bit words, shape (count,), int64."""
        self._refuse_fork()
        out = torch.empty(count, dtype=torch.int64)
        with self._lock:
            for start in range(0, count, 2 * _PAIRS):
                size = min(2 * _PAIRS, count - start)
                out[start : start + size] = self._next(size)
        return out

    @final
    def normal(self, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return `count` standard normal draws, shape (count,); computed in float64, rounded to `dtype`."""
        self._refuse_fork()
        out = torch.empty(count, dtype=dtype)
        with self._lock:
            for first, second, radius, angle in self._pairs(out, 1.0):
                torch.mul(torch.cos(angle, out=self._spare[: len(angle)]), radius, out=first)
                torch.mul(angle[: len(second)].sin_(), radius[: len(second)], out=second)
        return out

    @final
    def add_normal(self, total: Tensor, std: float) -> None:
        """Add a normal draw of mean 0 to every number of `total`, in place.

        Args:
            total: Shape (count,), float64, on the CPU.
            std: Standard deviation.
        """
        self._refuse_fork()
        with self._lock:
            for first, second, radius, angle in self._pairs(total, std):
                first.addcmul_(torch.cos(angle, out=self._spare[: len(angle)]), radius)
                second.addcmul_(angle[: len(second)].sin_(), radius[: len(second)])

    def _pairs(self, out: Tensor, std: float) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield block by block two parts of `out` with the radius and angle of their points: cosines go first, sines second."""
        for start in range(0, len(out), 2 * _PAIRS):
            block = out[start : start + 2 * _PAIRS]
            size = (len(block) + 1) // 2
            words = self._next(2 * size)
            # (word + 1/2) / 2**63 is symmetric around 0 and never 0; its square makes the sign vanish.
            radius = self._radius[:size].copy_(words[:size])
            torch.add(self._half, radius, alpha=2.0**-63, out=radius)
            radius.square_().log_().mul_(-(std**2)).sqrt_()
            angle = self._angle[:size].copy_(words[size:]).mul_(math.pi * 2.0**-63)
            yield block[:size], block[size:], radius, angle

    @final
    def bernoulli(self, count: int, rate: float) -> Tensor:
        """Return `count` independent coin flips, shape (count,), bool; True with probability at most `rate`.

        The probability is `rate` rounded down to a multiple of 2**-53, so that a claimed rate is never exceeded.
        """
        threshold = _threshold(rate)
        return (self.words(count) >> 11).bitwise_and_(_COIN - 1) < threshold

    @final
    def chosen(self, count: int, rate: float) -> Tensor:
        """Return which of `count` units an independent coin flip each has chosen, ascending, shape (any,), int64.

        The same law as `bernoulli`, at an eighth of the randomness: the first byte of a coin of 53 bits tells it from the
        threshold but for one unit in 256, and only these units draw the other 45 bits. Up to 16,384 units are drawn by
        `bernoulli` itself, so that a seed chooses the same of them in one call as in several.
        """
        if count <= _FEW:
            return self.bernoulli(count, rate).nonzero().squeeze(1)
        first, rest = divmod(_threshold(rate), 2**45)
        self._refuse_fork()
        parts = []
        for start in range(0, count, 16 * _PAIRS):
            units = min(16 * _PAIRS, count - start)
            with self._lock:
                # In numpy: torch would share out these few operations among threads, which takes longer than they do.
                drawn = self._next(-(-units // 8)).numpy().view(np.uint8)[:units]
                found = np.flatnonzero(drawn <= first)
                undecided = np.flatnonzero(drawn[found] == first)  # none for a rate of one, where `first` is 256
            taken = np.ones(len(found), dtype=np.bool_)
            taken[undecided] = (self.words(len(undecided)).numpy() & (2**45 - 1)) < rest
            parts.append(found[taken] + start)
        return torch.from_numpy(np.concatenate(parts))

    @final
    def permutation(self, count: int) -> Tensor:
        """Return a uniformly random order of 0..count-1, shape (count,), int64."""
        return torch.argsort(self.words(count))

    def _refuse_fork(self) -> None:
        # Before the lock, which a thread of the parent may have held at the fork.
        if os.getpid() != self._pid:
            raise SfumatoError(
                "A random source was carried into a forked process, which would repeat its noise; make a new source there."
            )

    def _next(self, count: int) -> Tensor:
        self._stream.update_into(self._zeros[: 8 * count], self._buffer)
        return self._words[:count]

    def __reduce__(self) -> NoReturn:
        raise TypeError("A random source cannot be copied or pickled: two copies would draw the same noise.")


@final
class SecureSource(RandomSource):
    """Cryptographically secure randomness: AES-256-CTR under a fresh key from the operating system."""

    is_secure = True

    def _key(self) -> bytes:
        return os.urandom(32)


@final
class SeededSource(RandomSource):
    """Reproducible randomness for tests and comparisons. It protects nobody who can guess the seed.

    Args:
        seed: Any whole number of at least 0; the same seed gives the same draws on every machine with the same torch.
    """

    is_secure = False

    def __init__(self, seed: int) -> None:
        self._seed = _checks.count("seed", seed, minimum=0)
        super().__init__()

    def _key(self) -> bytes:
        return hashlib.sha256(f"sfumato seeded source {self._seed}".encode()).digest()


def _threshold(rate: float) -> int:
    """Return how many sides of a coin count as a hit."""
    return math.floor(_checks.fraction("rate", rate, allow_zero=True, allow_one=True) * _COIN)


def keyed_source(key: Sequence[int], index: int) -> RandomSource:
    """Return the stream number `index` under a secret key of four random 64-bit words, to be drawn again at will."""
    seed = int.from_bytes(b"".join(word.to_bytes(8, "big", signed=True) for word in [*key, index]), "big")
    return SeededSource(seed)
