"""Populations over Parquet files: one client for each declared owner, read when it is drawn."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, final

import numpy as np
import numpy.typing as npt
import polars as pl
from typing_extensions import override

from sfumato.data import tables
from sfumato.data.client_names import Listed
from sfumato.data.population import Population, digest_of, stamp_of
from sfumato.data.records import Records
from sfumato.data.schema import Ignore, Schema
from sfumato.data.tables import TablePath
from sfumato.errors import InputError

_Ints: TypeAlias = npt.NDArray[np.int64]

# Rows of a Parquet file that are held at a time while one client's rows are picked out of them.
_WINDOW = 65_536


@final
class TabledPopulation(Population):
    """Clients that are rows of Parquet files."""

    def __init__(self, files: Sequence[Path], heights: Sequence[int], owners: _Ints, schema: Schema) -> None:
        assert schema.owner is not None
        column, owner = schema.owner
        super().__init__(Listed(owner.values), "rows of Parquet files")
        self._files, self._stamps = tuple(files), tuple(map(stamp_of, files))
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
    def indexed(cls, path: TablePath | Sequence[TablePath], schema: Schema) -> TabledPopulation:
        """Read who holds which row.

        Raises:
            InputError: a file or an owner is not what the schema declares, or a declared owner has no record.
        """
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
            empty = tables.declared_text(tables.Text(str(file), _read(file, 0, 0, None), np.zeros(0, np.int64)), schema)
            text = _read(file, 0, None, [column])[column].cast(pl.String).str.strip_chars().fill_null("")
            if not len(text):
                raise InputError(f"{file} has no rows. Fix: give a file with at least one row of values.")
            table = tables.Text(empty.file, pl.DataFrame({column: text}), np.arange(1, len(text) + 1))
            codes.append(tables.codes(table, column, owner, schema.missing_texts(column)))
            table.refuse(codes[-1] < 0, column, "is a missing owner. Fix: say who holds the record.")
        return cls(files, [len(part) for part in codes], np.concatenate(codes), schema)

    @override
    def _made(self, index: int) -> Records:
        rows = self._rows[self._offsets[index] : self._offsets[index + 1]]
        cuts = np.searchsorted(rows, self._starts)
        parts = [
            tables.encode(self._text(number, rows[first:last] - self._starts[number]), self._schema)
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

    def _text(self, number: int, rows: _Ints) -> tables.Text:
        """Return rows of one file, with the numbers that they have there."""
        file = self._files[number]
        if stamp_of(file) != self._stamps[number]:
            raise InputError(f"{file} has changed since the population was made; make the population again.")
        parts = []
        for inside in np.split(rows, np.flatnonzero(np.diff(rows // _WINDOW)) + 1):
            first = int(inside[0])
            parts.append(_read(file, first, int(inside[-1]) - first + 1, self._columns)[inside - first])
        return tables.Text(str(file), pl.concat(parts), rows + 1)

    @override
    def identity(self) -> str:
        return digest_of(["parquet", self._declared.model_dump_json(), *self._stamps])


def _read(file: Path, first: int, rows: int | None, columns: list[str] | None) -> pl.DataFrame:
    """Return some rows of a Parquet file as a polars frame."""
    try:
        with file.open("rb"):
            lazy = pl.scan_parquet(file, glob=False)
            return (lazy if columns is None else lazy.select(columns)).slice(first, rows).collect()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}). Fix: check the path.") from None
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):  # it panics on some damaged files
        raise InputError(f"{file} is not a readable Parquet file. Fix: write it again.") from None
