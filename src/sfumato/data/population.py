"""Populations: the clients of a federation by name and by number, made when they are drawn."""

from __future__ import annotations

import array
import hashlib
import itertools
import json
import math
import mmap
import operator
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from sfumato import _checks
from sfumato.data.records import Records, _as_features, _as_targets, _check_classes, _check_finite
from sfumato.errors import InputError

if TYPE_CHECKING:
    import polars as pl

    from sfumato.data import tables
    from sfumato.data.schema import Schema
    from sfumato.data.tables import TablePath

_Array: TypeAlias = npt.NDArray[Any]
_Ints: TypeAlias = npt.NDArray[np.int64]

# Rows of a Parquet file that are held at a time while one client's rows are picked out of them.
_WINDOW = 65_536
_MAPPING = "pass a mapping of name to Records, for example records.by_owner()"


class ClientNames(ABC):
    """The names of a population in their order."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def at(self, index: int) -> str:
        """Return the name at an index that lies within the population."""

    @abstractmethod
    def index_of(self, name: object) -> int | None:
        """Return the index of a name, or None where no client has it."""

    @abstractmethod
    def text(self) -> str:
        """Return what tells these names from others."""


@final
@dataclass(frozen=True)
class Numbered(ClientNames):
    """Names by a rule, `client-000017`, with as many digits as the last one needs.

    Raises:
        InputError: prefix is no text or empty, or count is no whole number of at least 1.
    """

    prefix: str
    count: int

    def __post_init__(self) -> None:
        if not isinstance(self.prefix, str) or not self.prefix:
            raise InputError('The name of a population must be a text such as "client".')
        _checks.count("The number of clients", self.count)

    @override
    def __len__(self) -> int:
        return self.count

    @override
    def at(self, index: int) -> str:
        return f"{self.prefix}-{index:0{len(str(self.count - 1))}d}"

    @override
    def index_of(self, name: object) -> int | None:
        if not isinstance(name, str):
            return None
        digits = name.removeprefix(f"{self.prefix}-")
        if not (digits.isascii() and digits.isdigit() and len(digits) <= len(str(self.count))):
            return None
        index = int(digits)
        return index if index < self.count and self.at(index) == name else None

    @override
    def text(self) -> str:
        return f"numbered {self.count} {self.prefix}"


@final
class Listed(ClientNames):
    """Names as they are given; they take memory for every client.

    Raises:
        InputError: there is none, one is no text or empty, comes twice, or is "all".
    """

    def __init__(self, names: Sequence[str]) -> None:
        if isinstance(names, str):
            raise InputError("The names of the clients must be a list of texts, not one text.")
        self._names = tuple(names)
        if not self._names:
            raise InputError("A federation needs at least one client; pass a mapping of name to Records.")
        for name in self._names:
            check_name(name)
        self._places = {name: index for index, name in enumerate(self._names)}
        if len(self._places) < len(self._names):
            twice = next(name for index, name in enumerate(self._names) if self._places[name] != index)
            raise InputError(f'Two clients are called "{twice}"; give each a name of its own.')

    @override
    def __len__(self) -> int:
        return len(self._names)

    @override
    def at(self, index: int) -> str:
        return self._names[index]

    @override
    def index_of(self, name: object) -> int | None:
        return self._places.get(name) if isinstance(name, str) else None

    @override
    def text(self) -> str:
        return f"listed {json.dumps(self._names)}"


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
            first, last = self._names.at(0), self._names.at(len(self._names) - 1)
            raise KeyError(f'No client has this name; the names run from "{first}" to "{last}".')
        return index

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
            raise InputError(f"The index of a client must be a whole number, not {_kind_of(index)}.") from None
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
        _check_mapping(clients)
        alike = _Alike()
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
            InputError: an argument is of the wrong kind; when a client is drawn: it is no Records, has no record, or
                differs in shape or dtype from the first one drawn.
        """
        if not callable(make):
            raise InputError(f"make must be a function of a client's number, not {_kind_of(make)}.")
        if not isinstance(version, str):
            raise InputError(f"version must be a text, not {_kind_of(version)}.")
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
        x, y, cuts = _numpy("features", features), _numpy("targets", targets), _numpy("offsets", offsets)
        if x.ndim == 0 or len(x) != len(y):
            raise InputError(
                "features and targets do not hold the same number of records; give each record one target."
            )
        whole = cuts.dtype.kind in "iu" and cuts.ndim == 1 and len(cuts) > 1
        if not whole or cuts[0] != 0 or cuts[-1] != len(x):
            raise InputError(
                "offsets must be whole numbers (clients + 1,) that begin with 0 and end with the number of records."
            )
        chosen = Numbered(name, len(cuts) - 1) if names is None else Listed(names)
        if len(chosen) != len(cuts) - 1:
            raise InputError(f"{len(chosen)} names are given for {len(cuts) - 1} clients; give one for each.")
        rises = np.asarray(cuts[1:] > cuts[:-1])
        if not rises.all():
            bad = chosen.at(int(rises.argmin()))
            raise InputError(
                f'Client "{bad}" has no records; leave it out of offsets, which must rise from client to client.'
            )
        if feature_names and (x.ndim != 2 or x.shape[1] != len(feature_names)):
            raise InputError(f"{len(feature_names)} feature_names do not fit the features; give one name per column.")
        declared = None if classes is None else tuple(classes)
        return _Stacked(chosen, x, y, cuts, declared, tuple(feature_names))

    @staticmethod
    def from_folder(path: str | Path) -> Population:
        """Return the population in a folder that `write_folder` made; its arrays stay on disk until a client is drawn.

        The arrays are `features.npy`, `targets.npy` and `offsets.npy`, as for `from_arrays`; a folder that holds these three
        alone will do.

        Raises:
            InputError: a file is missing or is not what it should be; later as for `from_arrays`.
        """
        folder = Path(path)
        x, y, cuts = (_mapped(folder / f"{part}.npy") for part in ("features", "targets", "offsets"))
        names, name, classes, columns = _declarations(folder)
        try:
            return Population.from_arrays(x, y, cuts, names=names, name=name, classes=classes, feature_names=columns)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None

    @staticmethod
    def write_folder(clients: Mapping[str, Records], path: str | Path) -> None:
        """Write clients into a new folder for `from_folder`: one pass, one client in memory at a time, whole or not at all.

        Raises:
            InputError: the folder is there already or cannot be made, or the clients are not what `of` takes or do
                not declare the same classes and columns.
        """
        target = Path(path)
        _check_mapping(clients)
        if target.exists():
            raise InputError(f"{target} is there already; choose another folder, or remove it.")
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            _or_refuse(target, temporary.mkdir)
            _write(clients, temporary)
            _or_refuse(target, lambda: temporary.rename(target))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

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

        return _Tabled.indexed(path, schemas.declared(schema))


def check_name(name: object) -> None:
    """Refuse what cannot be the name of a client.

    Raises:
        InputError: it is no text, is empty, or is "all".
    """
    if not isinstance(name, str):
        raise InputError(f"The name of a client must be of type str, not {_kind_of(name)}; {_MAPPING}.")
    if not name:
        raise InputError("The name of a client is empty; give every client a name.")
    if name == "all":
        raise InputError('"all" is what the sum over the clients is called; give the client another name.')


def check_client(name: object, records: object) -> None:
    """Refuse what cannot be a client.

    Raises:
        InputError: the name cannot be one, or there are no Records or no record.
    """
    check_name(name)
    if not isinstance(records, Records):
        raise InputError(f'clients["{name}"] must be of type Records, not {_kind_of(records)}; {_MAPPING}.')
    if not len(records):
        raise InputError(f'Client "{name}" has no records; leave it out of the federation.')


def digest_of(parts: Sequence[str]) -> str:
    """Return the SHA-256 of texts, one a line."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@final
class _Alike:
    """Refuses a client whose records differ in shape or dtype from those of the first one it was shown."""

    def __init__(self) -> None:
        self._first: tuple[str, tuple[torch.Size, torch.dtype, torch.dtype]] | None = None

    def check(self, name: str, records: Records) -> None:
        x, y = records.features, records.targets
        if y.ndim != 1 or x.ndim == 0 or len(x) != len(y):
            raise InputError(f'Client "{name}" does not have one target per record; make it with Records.from_arrays.')
        layout = (x.shape[1:], x.dtype, y.dtype)
        if self._first is None:
            self._first = (name, layout)
        elif layout != self._first[1]:
            first, other = self._first
            raise InputError(
                f'Client "{name}" has {_told(layout)} where client "{first}" has {_told(other)}; '
                "give all clients the same columns and types."
            )


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
        self._make, self._version, self._alike = make, version, _Alike()

    @override
    def _made(self, index: int) -> Records:
        records: object = self._make(index)
        if not isinstance(records, Records) or not len(records):
            what = "no record" if isinstance(records, Records) else f"not Records but {_kind_of(records)}"
            raise InputError(
                f'The factory gives {what} for client "{self.name_at(index)}"; return Records with at least one record.'
            )
        self._alike.check(self.name_at(index), records)
        return records

    @override
    def identity(self) -> str:
        return digest_of(["factory", self._names.text(), self._version])


@final
class _Stacked(Population):
    """Clients that are slices of arrays."""

    def __init__(
        self,
        names: ClientNames,
        features: _Array,
        targets: _Array,
        offsets: _Array,
        classes: tuple[str, ...] | None,
        feature_names: tuple[str, ...],
    ) -> None:
        super().__init__(names, "slices of arrays")
        self._arrays = (features, targets, offsets)
        # A plain view of a memory map: slicing the map itself takes several times as long.
        self._features, self._targets, self._offsets = (part.view(np.ndarray) for part in self._arrays)
        self._classes, self._feature_names = classes, feature_names
        # Types that no record may have are refused now, not when the first client is drawn.
        _as_features("features", _tensor("features", self._features[:0]))
        y = _as_targets("targets", _tensor("targets", self._targets[:0]))
        if classes is not None:
            _check_classes("targets", y, classes)

    @override
    def _made(self, index: int) -> Records:
        name = self._names.at(index)
        held = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        x = _as_features(f"{name}: features", _tensor("features", self._features[held]))
        y = _as_targets(f"{name}: targets", _tensor("targets", self._targets[held]))
        for what, values in (("features", x), ("targets", y)):
            # A sum is finite only if every value is, and is much faster than looking at each.
            if values.is_floating_point() and not math.isfinite(values.sum().item()):
                _check_finite(f"{name}: {what}", values, self._feature_names if what == "features" else ())
        if self._classes is not None:
            _check_classes(name, y, self._classes)
        return Records(x, y, name, self._feature_names, self._classes)

    @override
    def identity(self) -> str:
        declared = json.dumps([self._classes, self._feature_names])
        return digest_of(["arrays", self._names.text(), declared, *map(_fingerprint, self._arrays)])


@final
class _Tabled(Population):
    """Clients that are rows of Parquet files."""

    def __init__(self, files: Sequence[Path], heights: Sequence[int], owners: _Ints, schema: Schema) -> None:
        assert schema.owner is not None
        column, owner = schema.owner
        super().__init__(Listed(owner.values), "rows of Parquet files")
        from sfumato.data.schema import Ignore, Schema  # noqa: PLC0415

        self._files, self._stamps = tuple(files), tuple(map(_stamp, files))
        self._starts = np.cumsum([0, *heights])
        # Row numbers over all files, client after client, those of a client in their order.
        self._rows = np.argsort(owners, kind="stable")
        held = np.bincount(owners, minlength=len(owner.values))
        if not held.all():
            raise InputError(
                f'The declared owner "{owner.values[int(held.argmin())]}" has no records; '
                "correct the owner column or the declared owners."
            )
        self._offsets = np.cumsum([0, *held])
        self._declared = schema
        # The index knows the owners; encoding their column again for every client would look at all their names.
        self._schema = Schema(columns={**schema.columns, column: Ignore()}, missing_values=schema.missing_values)
        self._columns = [name for name, kind in self._schema.columns.items() if not isinstance(kind, Ignore)]

    @classmethod
    def indexed(cls, path: TablePath | Sequence[TablePath], schema: Schema) -> _Tabled:
        """Read who holds which row."""
        import polars as pl  # noqa: PLC0415

        from sfumato.data import tables  # noqa: PLC0415

        if schema.owner is None:
            raise InputError('The schema declares no owner; declare the column of the owners with kind = "owner".')
        if isinstance(path, Mapping):
            raise InputError("Files by owner are for Records.from_parquet; pass one path or a list of paths.")
        files = [Path(path)] if isinstance(path, str | Path) else [Path(one) for one in path]
        if not files or len(set(files)) < len(files):
            raise InputError("Pass at least one path, and each file once, for its records would count twice.")
        column, owner = schema.owner
        codes: list[_Ints] = []
        for file in files:
            empty = tables._declared_text(
                tables._Text(str(file), _read(file, 0, 0, None), np.zeros(0, np.int64)), schema
            )
            text = _read(file, 0, None, [column])[column].cast(pl.String).str.strip_chars().fill_null("")
            if not len(text):
                raise InputError(f"{file} has no rows. Fix: give a file with at least one row of values.")
            table = tables._Text(empty.file, pl.DataFrame({column: text}), np.arange(1, len(text) + 1))
            codes.append(tables._codes(table, column, owner, schema.missing_texts(column)))
            table.refuse(codes[-1] < 0, column, "is a missing owner. Fix: say who holds the record.")
        return cls(files, [len(part) for part in codes], np.concatenate(codes), schema)

    @override
    def _made(self, index: int) -> Records:
        from sfumato.data import tables  # noqa: PLC0415

        rows = self._rows[self._offsets[index] : self._offsets[index + 1]]
        cuts = np.searchsorted(rows, self._starts)
        parts = [
            tables._encode(self._text(number, rows[first:last] - self._starts[number]), self._schema)
            for number, (first, last) in enumerate(itertools.pairwise(cuts))
            if first < last
        ]
        return Records.from_arrays(
            np.concatenate([part.features for part in parts]),
            np.concatenate([part.targets for part in parts]),
            name=self._names.at(index),
            feature_names=self._schema.feature_names,
            classes=self._schema.target[1].class_names,
        )

    def _text(self, number: int, rows: _Ints) -> tables._Text:
        """Return rows of one file, with the numbers that they have there."""
        import polars as pl  # noqa: PLC0415

        from sfumato.data import tables  # noqa: PLC0415

        file = self._files[number]
        if _stamp(file) != self._stamps[number]:
            raise InputError(f"{file} has changed since the population was made; make the population again.")
        parts = []
        for inside in np.split(rows, np.flatnonzero(np.diff(rows // _WINDOW)) + 1):
            first = int(inside[0])
            parts.append(_read(file, first, int(inside[-1]) - first + 1, self._columns)[inside - first])
        return tables._Text(str(file), pl.concat(parts), rows + 1)

    @override
    def identity(self) -> str:
        return digest_of(["parquet", self._declared.model_dump_json(), *self._stamps])


def _read(file: Path, first: int, rows: int | None, columns: list[str] | None) -> pl.DataFrame:
    """Return some rows of a Parquet file as a polars frame."""
    import polars as pl  # noqa: PLC0415

    try:
        with file.open("rb"):
            lazy = pl.scan_parquet(file, glob=False)
            return (lazy if columns is None else lazy.select(columns)).slice(first, rows).collect()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}). Fix: check the path.") from None
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):  # it panics on some damaged files
        raise InputError(f"{file} is not a readable Parquet file. Fix: write it again.") from None


@final
class _Growing:
    """An array file that is filled client by client; how many rows it has is written into its head at the end."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._rows = path, path.open("xb"), 0
        self._form: tuple[np.dtype[Any], tuple[int, ...]] | None = None

    def append(self, values: Tensor) -> None:
        block = values.detach().cpu().contiguous().numpy()
        if self._form is None:
            self._form = (block.dtype, block.shape[1:])
            self._head()
        self._file.write(block.data)
        self._rows += len(block)

    def finish(self) -> None:
        self._file.seek(0)
        self._head()
        _synced(self._file)

    def close(self) -> None:
        self._file.close()

    def _head(self) -> None:
        assert self._form is not None
        dtype, shape = self._form
        # numpy leaves room for the first number to grow, so that the head keeps its length.
        head = {"descr": dtype.str, "fortran_order": False, "shape": (self._rows, *shape)}
        np.lib.format.write_array_header_1_0(self._file, head)


def _write(clients: Mapping[str, Records], folder: Path) -> None:
    alike, offsets = _Alike(), array.array("q", [0])
    rule: Numbered | None = None
    declared: tuple[object, object] | None = None
    x, y = _Growing(folder / "features.npy"), _Growing(folder / "targets.npy")
    names = (folder / "names.txt").open("x", encoding="utf-8")
    try:
        for index, (name, records) in enumerate(clients.items()):
            check_client(name, records)
            alike.check(name, records)
            if index == 0:
                prefix = name.rpartition("-")[0]
                rule = Numbered(prefix, len(clients)) if prefix else None
                declared = (records.classes, records.feature_names)
            if declared != (records.classes, records.feature_names):
                raise InputError(
                    f'Client "{name}" declares other classes or columns than the first client; use the same.'
                )
            rule = rule if rule is not None and rule.at(index) == name else None
            names.write(f"{json.dumps(name)}\n")
            x.append(records.features)
            y.append(records.targets)
            offsets.append(offsets[-1] + len(records))
        x.finish()
        y.finish()
        _synced(names)
    finally:
        for file in (x, y, names):
            file.close()
    if rule is not None:
        (folder / "names.txt").unlink()
    with (folder / "offsets.npy").open("xb") as cuts:
        np.save(cuts, np.frombuffer(offsets, dtype=np.int64))
        _synced(cuts)
    assert declared is not None
    told = {"classes": declared[0], "feature_names": declared[1]} | ({"name": rule.prefix} if rule else {})
    with (folder / "declared.json").open("x", encoding="utf-8") as text:
        json.dump(told, text)
        _synced(text)


def _declarations(folder: Path) -> tuple[list[str] | None, str, list[str] | None, list[str]]:
    """Return the names, or else what numbered ones begin with, and the classes and columns of a written folder."""
    told, listed = folder / "declared.json", folder / "names.txt"
    try:
        found = json.loads(told.read_text("utf-8")) if told.exists() else {}
        names = [json.loads(line) for line in listed.read_text("utf-8").splitlines()] if listed.exists() else None
        name, classes, columns = found.get("name", "client"), found.get("classes"), found.get("feature_names", [])
    except (AttributeError, json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{folder}: declared.json or names.txt is damaged. Fix: write the folder again.") from None
    if not isinstance(columns, list) or not (classes is None or isinstance(classes, list)):
        raise InputError(f"{folder}: declared.json must hold lists of texts. Fix: write the folder again.")
    return names, name, classes, columns


def _synced(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _or_refuse(folder: Path, action: Callable[[], object]) -> None:
    try:
        action()
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); choose another folder.") from None


def _mapped(file: Path) -> _Array:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}). Fix: check the path.") from None
    except (ValueError, EOFError):
        raise InputError(f"{file} is not a readable array file. Fix: write the folder again.") from None


def _numpy(what: str, values: object) -> _Array:
    """Return an array without copying one; what is memory-mapped stays so."""
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    try:
        return np.asanyarray(values)
    except ValueError:
        raise InputError(f"{what} are ragged; give every record the same shape.") from None


def _tensor(what: str, values: _Array) -> Tensor:
    """Return a tensor over the same memory, or over a copy where that must not be written."""
    try:
        return torch.from_numpy(values if values.flags.writeable else values.copy())
    except (TypeError, ValueError):
        raise InputError(f"{what} must be numbers that torch knows, not {values.dtype}; convert them first.") from None


def _fingerprint(values: _Array) -> str:
    """Return what tells an array from others: of a whole file its stamp, of memory a digest of the values."""
    form = f"{values.shape} {values.dtype}"
    base: object = values.base
    if isinstance(values, np.memmap) and isinstance(base, mmap.mmap) and values.filename is not None:
        return f"{_stamp(Path(values.filename))} {values.offset} {form}"
    return f"{hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()} {form}"


def _stamp(file: Path) -> str:
    try:
        found = file.stat()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}). Fix: check the path.") from None
    return f"{file.resolve()} {found.st_size} {found.st_mtime_ns}"


def _check_mapping(clients: object) -> None:
    if not isinstance(clients, Mapping):
        raise InputError(f"clients must be of type Mapping, not {_kind_of(clients)}; {_MAPPING}.")
    if not clients:
        raise InputError("A federation needs at least one client; pass a mapping of name to Records.")


def _told(layout: tuple[torch.Size, torch.dtype, torch.dtype]) -> str:
    shape, *dtypes = layout
    features, targets = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"features ({', '.join(['n', *map(str, shape)])}) {features} and targets (n) {targets}"


def _kind_of(value: object) -> str:
    """Return what a value is, never what it holds: it may be records."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
