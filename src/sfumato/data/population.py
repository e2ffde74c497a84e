"""Populations: the clients of a federation by name and by number, made when they are drawn."""

from __future__ import annotations

import hashlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias, final

import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from sfumato import _checks
from sfumato.data.client_names import MAPPING_FIX, ClientNames, Listed, Numbered, check_name, kind_of
from sfumato.data.records import Records
from sfumato.errors import InputError, SfumatoError

if TYPE_CHECKING:
    from sfumato.data.schema import Schema
    from sfumato.data.tables import TablePath

_Array: TypeAlias = npt.NDArray[Any]

_CHECKED_WAY = "make its records with Records.from_arrays"
_SEARCHED = 1000  # names among which the nearest to a wrong one is looked for


class Population(Mapping[str, Records], ABC):
    """The clients of a federation: a mapping of name to Records whose clients are made when they are asked for.

    Make one with `of`, `from_factory`, `from_arrays`, `from_folder` or `from_parquet`, or with `sfumato.partitions`. Nothing
    but `of` holds the clients, so memory grows with those that a round draws. Clients are numbered from 0 in the
    order of their names; iterating makes no client, while `items` and `values` make every one, one after another.

    The number of clients is public; how many records each has is not, and `repr` tells the first only. Two
    populations are equal if they are the same object: comparing clients would make them all.

    Raises:
        InputError: from `at` and `p[name]`, if the client that is made is not what the population promises.
        KeyError: from `p[name]` and `index_of`, if there is no such client.
    """

    def __init__(self, names: ClientNames, source: str) -> None:
        self._names, self._source = names, source

    @abstractmethod
    def _made(self, index: int) -> Records:
        """Return the client at an index that lies within the population."""

    @abstractmethod
    def identity(self) -> str:
        """Return a digest that tells populations apart, for checkpoints. It may depend on private values.

        Where clients are in memory it covers every record. Otherwise it covers what is known without making
        every client: their number and names, the paths, sizes and times of files, the declared version of a factory.
        """

    @final
    def at(self, index: SupportsIndex) -> Records:
        """Return the records of the client with this number, from 0.

        Raises:
            InputError: there is no such client, or it is not what the population promises.
        """
        return self._made(self._checked(index))

    @final
    def name_at(self, index: SupportsIndex) -> str:
        """Return the name of the client with this number, from 0.

        Raises:
            InputError: there is no such client.
        """
        return self._names.at(self._checked(index))

    @final
    def index_of(self, name: object) -> int:
        """Return the number of the client with this name.

        Raises:
            KeyError: there is no such client.
        """
        index = self._names.index_of(name)
        if index is None:
            raise KeyError(self._missing(name))
        return index

    def _missing(self, name: object) -> str:
        if not isinstance(name, str):
            return f"The name of a client is a text, not {kind_of(name)}."
        if len(self) <= _SEARCHED:
            return f'No client is called "{name}".{_checks.did_you_mean(name, self)}'
        return (
            f'No client is called "{name}"; the names run from "{self.name_at(0)}" to "{self.name_at(len(self) - 1)}".'
        )

    @final
    @override
    def __getitem__(self, name: str) -> Records:
        return self._made(self.index_of(name))

    @final
    @override
    def __contains__(self, name: object) -> bool:
        return self._names.index_of(name) is not None

    @final
    @override
    def __iter__(self) -> Iterator[str]:
        return map(self._names.at, range(len(self._names)))

    @final
    @override
    def __len__(self) -> int:
        return len(self._names)

    @final
    @override
    def __eq__(self, other: object) -> bool:
        return self is other

    @final
    @override
    def __hash__(self) -> int:
        return id(self)

    @final
    @override
    def __repr__(self) -> str:
        return f"Population(clients={len(self)}, {self._source})"

    def _checked(self, index: SupportsIndex) -> int:
        try:
            place = operator.index(index)
        except TypeError:
            raise InputError(f"The index of a client must be a whole number, not {kind_of(index)}.") from None
        if not 0 <= place < len(self._names):
            raise InputError(
                f"The index of a client must lie in [0, {len(self._names)}), not {place}; negative ones do not count back."
            )
        return place

    @staticmethod
    def of(clients: Mapping[str, Records]) -> Population:
        """Return the population of clients that are in memory; a population is returned as it is.

        Raises:
            InputError: `clients` is no mapping of names to Records or is empty, a client is called "all" or has no
                record, or clients differ in the shape or dtype of their records.
        """
        if isinstance(clients, Population):
            return clients
        check_mapping(clients)
        alike = Alike()
        for name, records in clients.items():
            check_client(name, records)
            alike.check(name, records)
        return _Held(Listed(tuple(clients)), tuple(clients.values()))

    @staticmethod
    def from_factory(
        count: int, make: Callable[[int], Records], *, name: str = "client", version: str = ""
    ) -> Population:
        """Return a population whose clients a function makes, each time that one is drawn.

        Args:
            count: The public number of clients.
            make: Called with the number of a client, from 0; must give the same records every time.
                `Records(features, targets)` of float32 and int64 tensors is the fastest way to make them.
            name: What the names begin with: `client-000017`.
            version: Declares what `make` makes; change it when the records change. A checkpoint tells two
                factories of the same count and name apart by this alone.

        Raises:
            InputError: an argument is of the wrong kind; when a client is drawn: `make` fails, or what it makes is no
                Records, has no record, or differs in shape or dtype from the first one drawn.
        """
        if not callable(make):
            raise InputError(f"make must be a function of a client's number, not {kind_of(make)}.")
        if not isinstance(version, str):
            raise InputError(f"version must be a text, not {kind_of(version)}.")
        return _Manufactured(Numbered(name, count), make, version)

    @staticmethod
    def from_arrays(
        features: _Array | Tensor,
        targets: _Array | Tensor,
        offsets: _Array | Tensor | Sequence[int],
        *,
        names: Sequence[str] | None = None,
        name: str = "client",
        classes: Sequence[str] | None = None,
        feature_names: Sequence[str] = (),
    ) -> Population:
        """Return a population over arrays that are sorted by client, in memory or memory-mapped.

        float32 and int64 arrays that can be written to are not copied, so do not write into them; other types are converted
        and read-only arrays copied, a client at a time, when that client is drawn.

        Args:
            features: (n, ...); floating or boolean becomes float32, whole numbers become int64.
            targets: (n,); whole numbers or booleans become int64 classes, floating becomes float32.
            offsets: (clients + 1,); client i holds the records from offsets[i] up to, not including, offsets[i + 1].
            names: One for each client; by default they are numbered.
            name: What numbered names begin with.
            classes: Class names in the order of their indices; only for int64 targets.
            feature_names: One name per column; only for (n, features) features.

        Raises:
            InputError: the arrays do not fit or a client has no record; when a client is drawn: a value is not finite or
                not one of the classes.
        """
        # Imported here: the module is built on this one.
        from sfumato.data.stored_population import StoredPopulation  # noqa: PLC0415

        return StoredPopulation.over(
            features, targets, offsets, names=names, name=name, classes=classes, feature_names=feature_names
        )

    @staticmethod
    def from_folder(path: str | Path) -> Population:
        """Return the population in a folder that `write_folder` made; its arrays stay on disk until a client is drawn.

        The arrays are `features.npy`, `targets.npy` and `offsets.npy`, as for `from_arrays`; a folder that holds these three
        alone will do.

        Raises:
            InputError: a file is missing or is not what it should be; later as for `from_arrays`.
        """
        # Imported here: the module is built on this one.
        from sfumato.data import stored_population  # noqa: PLC0415

        return stored_population.read_folder(path)

    @staticmethod
    def write_folder(clients: Mapping[str, Records], path: str | Path) -> None:
        """Write clients into a new folder for `from_folder`: one pass, one client in memory at a time, whole or not at all.

        Raises:
            InputError: the folder is there already or cannot be made, or the clients are not what `of` takes or do
                not declare the same classes and columns.
        """
        # Imported here: the module is built on this one.
        from sfumato.data import stored_population  # noqa: PLC0415

        stored_population.write_folder(clients, path)

    @staticmethod
    def from_parquet(path: TablePath | Sequence[TablePath], schema: Schema | Mapping[str, object]) -> Population:
        """Return a population over Parquet files, one client for each declared owner.

        Only the owner column is read now; memory holds one row number for each row. A drawn client is read from the files
        and encoded, which takes some ten milliseconds where its rows lie together, and one read for every 65,536 rows over
        which they are scattered where they do not. For many rounds of many clients, sort the table by owner or turn it
        into arrays once: `Population.write_folder(Population.from_parquet(path, schema), "clients")`.

        Args:
            path: A file, or several that are read as one table.
            schema: The declared columns, one of them the owner.

        Raises:
            InputError: a file or an owner is not what the schema declares, or a declared owner has no record; when a client
                is drawn: a row or value is not, or the file has changed since.
        """
        # Imported here: polars and pydantic take their time, and only tables need them.
        from sfumato.data import schema as schemas  # noqa: PLC0415
        from sfumato.data.tabled_population import TabledPopulation  # noqa: PLC0415

        return TabledPopulation.indexed(path, schemas.declared(schema))


@final
class _Held(Population):
    """Clients in memory."""

    def __init__(self, names: ClientNames, clients: tuple[Records, ...]) -> None:
        super().__init__(names, "in memory")
        self._clients = clients

    @override
    def _made(self, index: int) -> Records:
        return self._clients[index]

    @override
    def identity(self) -> str:
        return digest_of([f"{self.name_at(i)} {records.digest()}" for i, records in enumerate(self._clients)])


@final
class _Manufactured(Population):
    """Clients by a function of their number."""

    def __init__(self, names: ClientNames, make: Callable[[int], Records], version: str) -> None:
        super().__init__(names, "made by a factory")
        self._make, self._version, self._alike = make, version, Alike()

    @override
    def _made(self, index: int) -> Records:
        try:
            records: object = self._make(index)
        except SfumatoError:
            raise
        except Exception as error:
            # Its own words may hold values of the records.
            raise InputError(
                f'The factory raised {type(error).__name__} for client "{self.name_at(index)}"; mend it: called with {index} '
                "it tells more."
            ) from None
        if isinstance(records, Records):
            check_form(self.name_at(index), records)
        if not isinstance(records, Records) or not len(records):
            what = "no record" if isinstance(records, Records) else f"not Records but {kind_of(records)}"
            raise InputError(
                f'The factory gives {what} for client "{self.name_at(index)}"; return Records with at least one record.'
            )
        self._alike.check(self.name_at(index), records)
        return records

    @override
    def identity(self) -> str:
        return digest_of(["factory", self._names.text(), self._version])


@final
class Alike:
    """Refuses a client whose records differ in shape or dtype from those of the first one it was shown."""

    def __init__(self) -> None:
        self._first: tuple[str, tuple[torch.Size, torch.dtype, torch.dtype]] | None = None

    def check(self, name: str, records: Records) -> None:
        """Refuse the client, whose form is checked, if it does not fit the first one.

        Raises:
            InputError: it differs.
        """
        x, y = records.features, records.targets
        layout = (x.shape[1:], x.dtype, y.dtype)
        if self._first is None:
            self._first = (name, layout)
        elif layout != self._first[1]:
            first, other = self._first
            raise InputError(
                f'Client "{name}" has {_told(layout)} where client "{first}" has {_told(other)}; '
                "give all clients the same columns and types."
            )


def check_client(name: object, records: object) -> None:
    """Refuse what cannot be a client.

    Raises:
        InputError: the name cannot be one, there are no Records or no record, or they are not what `Records` says of itself.
    """
    check_name(name)
    if not isinstance(records, Records):
        raise InputError(f'clients["{name}"] must be of type Records, not {kind_of(records)}; {MAPPING_FIX}.')
    check_form(str(name), records)
    if not len(records):
        raise InputError(f'Client "{name}" has no records; leave it out of the federation.')


def check_form(name: str, records: Records) -> None:
    """Refuse Records that were built directly from what they do not hold; no value of a record is looked at.

    Raises:
        InputError: features or targets are no tensors of floating or int64 numbers, or there is not one target per record.
    """
    for what, values in (("features", records.features), ("targets", records.targets)):
        held: object = values
        if not isinstance(held, Tensor):
            raise InputError(f'Client "{name}": {what} must be a tensor, not {kind_of(held)}; {_CHECKED_WAY}.')
        if not held.is_floating_point() and held.dtype != torch.int64:
            dtype = str(held.dtype).removeprefix("torch.")
            raise InputError(f'Client "{name}": {what} must be floating or int64, not {dtype}; {_CHECKED_WAY}.')
    x, y = records.features, records.targets
    if y.ndim != 1 or x.ndim == 0 or len(x) != len(y):
        raise InputError(f'Client "{name}" does not have one target per record; {_CHECKED_WAY}.')


def check_mapping(clients: object) -> None:
    """Refuse what cannot be the clients of a federation; each one is for `check_client`.

    Raises:
        InputError: it is no mapping, or is empty.
    """
    if not isinstance(clients, Mapping):
        raise InputError(f"clients must be of type Mapping, not {kind_of(clients)}; {MAPPING_FIX}.")
    if not clients:
        raise InputError("A federation needs at least one client; pass a mapping of name to Records.")


def _told(layout: tuple[torch.Size, torch.dtype, torch.dtype]) -> str:
    shape, *dtypes = layout
    features, targets = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"features ({', '.join(['n', *map(str, shape)])}) {features} and targets (n) {targets}"


def digest_of(parts: Sequence[str]) -> str:
    """Return the SHA-256 of texts, one a line."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def stamp_of(file: Path) -> str:
    """Return the path, size and time of a file, which tell it from others without reading it.

    Raises:
        InputError: there is no such file.
    """
    try:
        found = file.stat()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}). Fix: check the path.") from None
    return f"{file.resolve()} {found.st_size} {found.st_mtime_ns}"
