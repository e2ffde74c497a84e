"""Partitions: one data set dealt out to clients, evenly or with a stated skew, to try a federation on.

Each function gives every record to exactly one client; the same seed gives the same partition, and the global random state
is neither read nor changed. A partition is made from private records, targets and owners among them: it is for
experiments, where one person holds all the records anyway, and is not covered by any budget.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import SupportsIndex, TypeAlias, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from sfumato import _checks
from sfumato.data.client_names import ClientNames, Listed, Numbered
from sfumato.data.population import Population, digest_of
from sfumato.data.records import Records
from sfumato.errors import InputError

__all__ = ["Partition", "by_feature", "by_owner", "dirichlet", "feature_noise", "iid", "quantity", "shards"]

_Ints: TypeAlias = npt.NDArray[np.int64]
_Floats: TypeAlias = npt.NDArray[np.float64]


@final
class Partition(Population):
    """A population over the records of one data set. A client is picked out of them when it is drawn, in their order.

    Args:
        records: The data set.
        holders: (n,) whole numbers: which client, from 0, holds each record. So no record is held by two.
        names: One for each client; by default they are numbered: `client-07`.
        noise: For each client the standard deviation of the normal noise on its features, or None. The
            noise of a client is the same each time that it is drawn.
        seed: Of the noise.

    Raises:
        InputError: an argument is not what it should be, or a client from 0 to the largest number holds no record.
    """

    def __init__(
        self,
        records: Records,
        holders: Tensor,
        *,
        names: Sequence[str] | None = None,
        noise: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        _check_records(records)
        owned = isinstance(holders, Tensor) and holders.dtype == torch.int64 and holders.shape == (len(records),)
        # Each client holds a record, so no number can reach that of the records.
        if not owned or not 0 <= int(holders.min()) <= int(holders.max()) < len(records):
            raise InputError(
                f"{records.name}: holders must give the number of a client, int64 from 0 without gaps, for each record."
            )
        sizes = torch.bincount(holders.cpu(), minlength=1 if names is None else len(names))
        given: ClientNames = Numbered("client", len(sizes)) if names is None else Listed(names)
        if len(given) != len(sizes):
            raise InputError(
                f"{records.name}: {len(given)} names are given for {len(sizes)} clients; give one for each."
            )
        if not bool(sizes.all()):
            fix = "fill the gap in holders" if names is None else "correct the owners of the records, or the names"
            bare = given.at(int((sizes == 0).to(torch.uint8).argmax()))
            raise InputError(f'{records.name}: client "{bare}" has no records; {fix}.')
        super().__init__(given, "parts of one data set")
        if noise is not None and (len(noise) != len(sizes) or not records.features.is_floating_point()):
            raise InputError(
                f"{records.name}: noise needs floating features and one standard deviation for each client."
            )
        self._scales = None if noise is None else [_checks.non_negative("noise", float(scale)) for scale in noise]
        self._seed = _checks.count("seed", seed, minimum=0)
        self._records = records
        self._order = torch.argsort(holders.cpu(), stable=True)
        self._offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).numpy()

    @property
    def records(self) -> Records:
        """The data set."""
        return self._records

    def indices(self, index: SupportsIndex) -> Tensor:
        """Return where in the data set the records of the client with this number are, (k,) int64, rising.

        Raises:
            InputError: there is no such client.
        """
        return self._held(self._checked(index)).clone()

    def _held(self, index: int) -> Tensor:
        return self._order[self._offsets[index] : self._offsets[index + 1]]

    @override
    def _made(self, index: int) -> Records:
        records, held = self._records, self._held(index)
        first, count = int(held[0]), len(held)
        # Indices rise, so they are a run if the last one is as far from the first as there are others.
        together = int(held[-1]) - first == count - 1
        picked = held if together else held.to(records.features.device)

        def part(values: Tensor) -> Tensor:
            return values.narrow(0, first, count) if together else values.index_select(0, picked.to(values.device))

        features, name = part(records.features), self._names.at(index)
        if self._scales is not None and self._scales[index] > 0:
            random = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(index,)))
            drawn = torch.from_numpy(random.standard_normal(tuple(features.shape), dtype=np.float32))
            features = features + self._scales[index] * drawn.to(features.device)
        codes = None if records.owner_codes is None else part(records.owner_codes)
        return Records(
            features,
            part(records.targets),
            f"{records.name}/{name}",
            records.feature_names,
            records.classes,
            records.owner_names,
            codes,
        )

    @override
    def identity(self) -> str:
        dealt = [hashlib.sha256(part.tobytes()).hexdigest() for part in (self._order.numpy(), self._offsets)]
        noise = f"{self._seed} {self._scales}"
        return digest_of(["partition", self._names.text(), self._records.digest(), *dealt, noise])


def iid(records: Records, clients: int, seed: int) -> Partition:
    """Deal the records out at random, to each client the same number or one more.

    Args:
        records: The data set.
        clients: How many clients to make.
        seed: Same seed, same partition.

    Raises:
        InputError: an argument is not what it should be, or there are more clients than records.
    """
    random = _random(records, clients, seed)
    return Partition(records, torch.from_numpy(random.permutation(_even(len(records), clients))))


def dirichlet(records: Records, clients: int, alpha: float, seed: int, minimum: int = 1) -> Partition:
    """Skew the labels: each class is dealt out by shares over the clients from a symmetric Dirichlet distribution.

    That is the "distribution-based label imbalance" of Li et al. 2022 ("Federated Learning on Non-IID Data Silos: An
    Experimental Study"), in which clients also come to differ in size; Hsu et al. 2019 draw for each client its shares over the
    classes instead, which cannot use every record once. Small alpha: a class lies with few clients.

    Args:
        records: The data set; its targets are classes.
        clients: How many clients to make.
        alpha: Of the distribution: 0.1 is a strong skew, 100 nearly none.
        seed: Same seed, same partition.
        minimum: Least number of records of a client. Who would get less takes records at random from the largest clients;
            Li et al. draw anew instead, which never ends with many clients.

    Raises:
        InputError: an argument is not what it should be, or there are too few records.
    """
    random = _random(records, clients, seed, _checks.count("minimum", minimum))
    if records.targets.is_floating_point():
        raise InputError(f"{records.name}: a skew of labels needs classes, not numbers; use quantity or by_feature.")
    labels, sizes = np.unique(records.targets.cpu().numpy(), return_inverse=True, return_counts=True)[1:]
    holders = np.empty(len(records), dtype=np.int64)
    for label, size in enumerate(sizes):
        dealt = np.repeat(np.arange(clients), _cut(size, _shares(random, clients, alpha)))
        holders[labels == label] = random.permutation(dealt)
    return Partition(records, torch.from_numpy(_filled(random, holders, clients, minimum)))


def shards(records: Records, clients: int, per_client: int, seed: int) -> Partition:
    """Sort the records by target, cut them into equal shards and deal each client `per_client` of these at random.

    After McMahan et al. 2017 ("Communication-Efficient Learning of Deep Networks from Decentralized Data"): with two
    shards, most clients see two classes.

    Args:
        records: The data set.
        clients: How many clients to make.
        per_client: Shards of each client.
        seed: Same seed, same partition.

    Raises:
        InputError: an argument is not what it should be, or there are more shards than records.
    """
    random = _random(records, clients, seed, _checks.count("per_client", per_client))
    dealt = random.permutation(np.repeat(np.arange(clients), per_client))
    order = np.argsort(records.targets.cpu().numpy(), kind="stable")
    holders = np.empty(len(records), dtype=np.int64)
    holders[order] = dealt[_even(len(records), clients * per_client)]
    return Partition(records, torch.from_numpy(holders))


def quantity(records: Records, clients: int, alpha: float, seed: int, minimum: int = 1) -> Partition:
    """Skew the sizes: records are dealt out at random, as many to each client as shares from a symmetric Dirichlet say.

    The "quantity skew" of Li et al. 2022.

    Args:
        records: The data set.
        clients: How many clients to make.
        alpha: Of the distribution: 0.5 is a strong skew, 100 nearly none.
        seed: Same seed, same partition.
        minimum: Least number of records of a client. Who would get less takes records at random from the largest clients;
            Li et al. draw anew instead, which never ends with many clients.

    Raises:
        InputError: an argument is not what it should be, or there are too few records.
    """
    random = _random(records, clients, seed, _checks.count("minimum", minimum))
    sizes = _cut(len(records), _shares(random, clients, alpha))
    holders = random.permutation(np.repeat(np.arange(clients), sizes))
    return Partition(records, torch.from_numpy(_filled(random, holders, clients, minimum)))


def feature_noise(records: Records, clients: int, scale: float, seed: int) -> Partition:
    """Skew the features: as `iid`, and client i of 1, ..., clients sees normal noise on its features.

    Its standard deviation is scale * i / clients, so the last client has `scale`. The "noise-based feature imbalance"
    of Li et al. 2022. The noise is made when the client is drawn, always the same; it protects nobody.

    Args:
        records: The data set; its features are floating.
        clients: How many clients to make.
        scale: Standard deviation of the last client's noise, in the unit of the features.
        seed: Same seed, same partition and same noise.

    Raises:
        InputError: an argument is not what it should be, or there are more clients than records.
    """
    random = _random(records, clients, seed)
    top = _checks.non_negative("scale", scale)
    holders = torch.from_numpy(random.permutation(_even(len(records), clients)))
    return Partition(records, holders, noise=[top * (i + 1) / clients for i in range(clients)], seed=seed)


def by_feature(records: Records, clients: int, column: int | str) -> Partition:
    """Sort the records by one feature and cut them into equal parts; equal values stay in their order.

    Args:
        records: The data set; its features are (n, features).
        clients: How many clients to make.
        column: The name of the feature, or its number from 0.

    Raises:
        InputError: an argument is not what it should be, or there are more clients than records.
    """
    _check_room(records, clients)
    if records.features.ndim != 2:
        raise InputError(f"{records.name}: by_feature needs features of shape (n, features).")
    if isinstance(column, str):
        if column not in records.feature_names:
            hint = _checks.did_you_mean(column, records.feature_names) if records.feature_names else ""
            raise InputError(f'{records.name}: no feature is called "{column}".{hint}')
        column = records.feature_names.index(column)
    if _checks.count("column", column, minimum=0) >= records.features.shape[1]:
        raise InputError(f"{records.name}: column must be below {records.features.shape[1]}, not {column}.")
    order = np.argsort(records.features[:, column].cpu().numpy(), kind="stable")
    holders = np.empty(len(records), dtype=np.int64)
    holders[order] = _even(len(records), clients)
    return Partition(records, torch.from_numpy(holders))


def by_owner(records: Records) -> Partition:
    """Give each declared owner its own records, in the declared order: `Records.by_owner` without copying them.

    Raises:
        InputError: the records have no owners, or a declared owner has no record.
    """
    _check_records(records)
    if records.owner_codes is None:
        raise InputError(f"{records.name}: the records have no owners. Fix: pass owners=, or declare an owner column.")
    return Partition(records, records.owner_codes, names=records.owner_names)


def _random(records: Records, clients: int, seed: int, least: int = 1) -> np.random.Generator:
    """Check what the random partitions take and return the generator of the seed."""
    _check_room(records, clients, least)
    return np.random.default_rng(_checks.count("seed", seed, minimum=0))


def _check_room(records: Records, clients: int, least: int = 1) -> None:
    _check_records(records)
    if _checks.count("clients", clients) * least > len(records):
        each = "" if least == 1 else f" with at least {least} each"
        raise InputError(
            f"{records.name}: there are too few records for {clients} clients{each}; choose fewer clients."
        )


def _check_records(records: object) -> None:
    if not isinstance(records, Records):
        kind = type(records).__name__
        raise InputError(f"records must be of type Records, not {kind}; make them with Records.from_arrays(...).")
    if not len(records):
        raise InputError(f"{records.name}: there is no record; pass at least one.")


def _even(count: int, parts: int) -> _Ints:
    """Return which of `parts` runs of the same length, give or take one, each of `count` places is in."""
    return np.arange(count, dtype=np.int64) * parts // count


def _shares(random: np.random.Generator, clients: int, alpha: float) -> _Floats:
    shares = random.dirichlet(np.full(clients, _checks.positive("alpha", alpha)))
    if not abs(shares.sum() - 1) < 1e-6:
        raise InputError(
            f"alpha must be a number that shares can be drawn with, not {alpha!r}; choose one from 0.01 to 1000."
        )
    return shares


def _cut(count: int, shares: _Floats) -> _Ints:
    """Return how many of `count` places go to each share, by cutting them where the shares' sums fall."""
    cuts = np.floor(np.minimum(np.cumsum(shares), 1.0) * count).astype(np.int64)
    cuts[-1] = count
    sizes: _Ints = np.diff(cuts, prepend=0)
    return sizes


def _filled(random: np.random.Generator, holders: _Ints, clients: int, minimum: int) -> _Ints:
    """Return the holders of records after clients with fewer than `minimum` took some from the largest ones."""
    sizes = np.bincount(holders, minlength=clients)
    lacking = np.maximum(minimum - sizes, 0)
    # The largest clients are lowered to one level: the highest that sets enough records free.
    low, high = minimum, int(sizes.max())
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.maximum(sizes - level, 0).sum() >= lacking.sum() else (low, level - 1)
    given = np.maximum(sizes - low, 0)
    given[np.flatnonzero(given)[: given.sum() - lacking.sum()]] -= 1
    # In random order, client after client: the first of each are those it gives.
    order = random.permutation(len(holders))
    order = order[np.argsort(holders[order], kind="stable")]
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    filled = holders.copy()
    filled[order[rank < np.repeat(given, sizes)]] = random.permutation(np.repeat(np.arange(clients), lacking))
    return filled
