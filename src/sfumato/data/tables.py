"""CSV and Parquet files to arrays, by a declared schema. Every refusal names file, row, column and fix."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl

from sfumato import _checks
from sfumato.data.schema import (
    Category,
    Ignore,
    Numeric,
    Owner,
    Schema,
    Target,
    canonical,
    declared,
    label_codes,
)
from sfumato.errors import InputError

TablePath: TypeAlias = str | Path
TablePaths: TypeAlias = TablePath | Sequence[TablePath] | Mapping[str, TablePath]
_Floats: TypeAlias = npt.NDArray[np.float64]
_Ints: TypeAlias = npt.NDArray[np.int64]
_Mask: TypeAlias = npt.NDArray[np.bool_]

_CHUNK = 65_536  # rows held as Python strings at a time; bounds the memory of a large file
_MISSING, _UNKNOWN = -1, -2
_SEPARATORS = ";\t|,"


@dataclass(frozen=True)
class TableFormat:
    """How a CSV file is laid out. Spaces around fields are dropped, blank lines are skipped.

    Args:
        separator: One character between fields.
        header: Whether the first line (after the skipped ones) holds the column names.
        column_names: The column names of a file without a header, in order.
        skip_lines: Lines to leave out at the top.

    Raises:
        InputError: The separator is not one character, or header and column_names contradict each other.
    """

    separator: str = ","
    header: bool = True
    column_names: tuple[str, ...] | None = None
    skip_lines: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.separator, str) or len(self.separator) != 1 or self.separator in '"\r\n':
            raise InputError(f"separator must be one character such as ',' or ';', not {self.separator!r}.")
        _checks.count("skip_lines", self.skip_lines, minimum=0)
        if self.header == (self.column_names is not None):
            raise InputError("Give column_names exactly when header is False: a file has one or the other.")
        if self.column_names is not None:
            object.__setattr__(self, "column_names", tuple(self.column_names))


@dataclass(frozen=True)
class EncodedTable:
    """A table as arrays.

    Attributes:
        features: (n, features) float32, every value in [-1, 1].
        targets: (n,) int64 classes, or float32 in the declared bounds.
        owners: Declared owner names and the (n,) int64 index of each record's owner, or None.
    """

    features: npt.NDArray[np.float32]
    targets: npt.NDArray[np.int64] | npt.NDArray[np.float32]
    owners: tuple[tuple[str, ...], _Ints] | None


def read_csv(
    paths: TablePaths, schema: Schema | Mapping[str, object], format: TableFormat | None = None
) -> EncodedTable:
    """Read one or more UTF-8 CSV files and encode them by `schema`.

    Args:
        paths: A path, several paths (read one after another), or a mapping of owner to path, where the
            keys declare the owners and the schema has no owner column.
        schema: The declared columns, as a Schema or as a mapping of the same shape.
        format: The layout of the files; comma-separated with a header unless told.

    Raises:
        InputError: A file, row or value is not what the schema declares. Rows are counted as lines of the
            file, starting at 1 and including the header and skipped lines.
    """
    layout = format or TableFormat()
    return _read(paths, declared(schema), lambda path: _parse_csv(path, layout))


def read_parquet(paths: TablePaths, schema: Schema | Mapping[str, object]) -> EncodedTable:
    """Read one or more Parquet files and encode them by `schema`. A null counts as the empty text.

    Raises:
        InputError: A file, row or value is not what the schema declares. The first row is row 1.
    """
    return _read(paths, declared(schema), _parse_parquet)


@dataclass(frozen=True)
class Text:
    """One file as it was read, with the line (or row) number of each record."""

    file: str
    frame: pl.DataFrame
    lines: _Ints

    def refuse(self, bad: _Mask, name: str, problem: str | Callable[[str], str]) -> None:
        """Raise for the first row where `bad` is true; `problem` may depend on the text found there."""
        if bad.any():
            row = int(bad.argmax())
            text = self.frame[name][row]
            told = problem if isinstance(problem, str) else problem(text)
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            raise InputError(f'{self.file}, row {self.lines[row]}, column "{name}": {shown!r} {told}')


def _read(paths: TablePaths, schema: Schema, parse: Callable[[str], Text]) -> EncodedTable:
    by_owner = tuple(paths) if isinstance(paths, Mapping) else None
    if isinstance(paths, str | Path):
        listed = [Path(paths)]
    else:
        listed = [Path(path) for path in (paths.values() if isinstance(paths, Mapping) else paths)]
    if not listed:
        raise InputError("No file is given. Fix: pass at least one path.")
    if by_owner is not None and schema.owner is not None:
        raise InputError(
            f'The owners are given twice: by file and by column "{schema.owner[0]}". '
            'Fix: pass a list of files, or declare the column with kind = "ignore".'
        )
    twice = {str(path) for path in listed if listed.count(path) > 1}
    if twice:
        raise InputError(f"{min(twice)} is listed twice, so each record would count twice. Fix: list it once.")
    parts = [encode(parse(str(path)), schema) for path in listed]
    owners: tuple[tuple[str, ...], _Ints] | None = None
    if by_owner is not None:
        lengths = [len(part.targets) for part in parts]
        owners = (by_owner, np.repeat(np.arange(len(parts)), lengths))
    elif schema.owner is not None:
        owners = (schema.owner[1].values, np.concatenate([part.owners[1] for part in parts if part.owners]))
    return EncodedTable(
        np.concatenate([part.features for part in parts]),
        np.concatenate([part.targets for part in parts]),
        owners,
    )


def _parse_csv(file: str, layout: TableFormat) -> Text:
    # The standard reader, because polars pads short rows with nulls and cannot tell the line of a row.
    try:
        with open(file, "rb") as raw:
            head = raw.read(4096)
        if head.startswith(b"PAR1"):
            raise InputError(f"{file} is a Parquet file. Fix: read it with from_parquet.")
        if b"\0" in head:
            raise InputError(f"{file} is not a text file. Fix: save the table as CSV in UTF-8.")
        with open(file, encoding="utf-8-sig", newline="") as stream:
            return _rows_to_text(file, stream, layout)
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text. Fix: save it in UTF-8.") from None
    except OSError as error:
        raise _unreadable(file, error) from None


def _rows_to_text(file: str, stream: Iterator[str], layout: TableFormat) -> Text:
    skipped = sum(1 for _ in islice(stream, layout.skip_lines))
    rows = _numbered_rows(file, stream, layout.separator, skipped)
    if layout.column_names is None:
        _, header = next(rows, (0, []))
        names = [name.strip() for name in header]
    else:
        names = [*layout.column_names]
    if not names:
        raise InputError(f"{file} is empty. Fix: give a file with a header line and at least one row.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f'{file} names the column "{twice[0]}" twice. Fix: rename one of the two.')
    frames: list[pl.DataFrame] = []
    lines: list[int] = []
    while chunk := [*islice(rows, _CHUNK)]:
        for line, row in chunk:
            if len(row) != len(names):
                raise InputError(
                    f"{file}, row {line} has {len(row)} fields where {len(names)} columns are named. "
                    + (
                        _right_separator(names)
                        or "Fix: complete the row, quote fields that hold the separator, or set the separator."
                    )
                )
            lines.append(line)
        frames.append(pl.DataFrame([row for _, row in chunk], schema=dict.fromkeys(names, pl.String), orient="row"))
    if not frames:
        raise InputError(f"{file} has no rows. Fix: give a file with at least one row of values.")
    return Text(file, pl.concat(frames), np.array(lines, dtype=np.int64))


def _numbered_rows(file: str, stream: Iterator[str], separator: str, skipped: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the non-blank rows, each with the line of the file on which it starts."""
    reader = csv.reader(stream, delimiter=separator, skipinitialspace=separator != " ", strict=True)
    while True:
        line = skipped + reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"{file}, row {line} is not valid CSV ({error}). Fix: close or double the quotes in it."
            ) from None
        if row:
            yield line, row


def _parse_parquet(file: str) -> Text:
    try:
        with open(file, "rb") as stream:
            frame = pl.read_parquet(stream)
    except OSError as error:
        raise _unreadable(file, error) from None
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):  # it panics on some damaged files
        raise InputError(f"{file} is not a readable Parquet file. Fix: write it again, or use from_csv.") from None
    if frame.height == 0:
        raise InputError(f"{file} has no rows. Fix: give a file with at least one row of values.")
    return Text(file, frame, np.arange(1, frame.height + 1))


def _unreadable(file: str, error: OSError) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{file} does not exist. Fix: check the path.")
    return InputError(f"{file} cannot be read ({error.strerror}). Fix: give the path of a readable file.")


def encode(table: Text, schema: Schema) -> EncodedTable:
    """Return the table as arrays, by its declared columns.

    Raises:
        InputError: A column or value is not what the schema declares.
    """
    table = declared_text(table, schema)
    features: list[npt.NDArray[np.float32]] = []
    owners = None
    for name, column in schema.columns.items():
        absent = schema.missing_texts(name)
        if isinstance(column, Numeric):
            features.append(_scaled(table, name, column, absent))
        elif isinstance(column, Category):
            features.append(_one_hot(table, name, column, absent))
        elif isinstance(column, Owner):
            indices = codes(table, name, column, absent)
            table.refuse(indices == _MISSING, name, "is a missing owner. Fix: say who holds the record.")
            owners = (column.values, indices)
    return EncodedTable(np.concatenate(features, axis=1), _targets(table, schema), owners)


def declared_text(table: Text, schema: Schema) -> Text:
    """Return the columns that the schema reads, as stripped text in which a null is the empty text.

    Raises:
        InputError: A column is missing, is not declared, or holds neither text nor numbers.
    """
    names = table.frame.columns
    for name in schema.columns:
        if name not in names and not isinstance(schema.columns[name], Ignore):
            hint = _checks.did_you_mean(name, names).strip()
            raise InputError(
                f'{table.file} has no column "{name}", which the schema declares. '
                + (_right_separator(names) or f"{hint} Fix: rename the column in the file or in the schema.")
            )
    for name in names:
        if name not in schema.columns:
            raise InputError(
                f'{table.file} has the column "{name}", which the schema does not declare. '
                'Fix: declare it, with kind = "ignore" if it is not wanted.'
            )
    columns = {}
    for name, column in schema.columns.items():
        if not isinstance(column, Ignore):
            raw = table.frame[name]
            if raw.dtype.is_nested() or raw.dtype == pl.Binary:
                raise InputError(
                    f'{table.file}, column "{name}" holds {raw.dtype}, not text or numbers. '
                    "Fix: write one value per row, or ignore the column."
                )
            columns[name] = raw.cast(pl.String).str.strip_chars().fill_null("")
    return Text(table.file, pl.DataFrame(columns), table.lines)


def _right_separator(names: Sequence[str]) -> str:
    """Return the fix for a header that was read as one column because another character separates it, or ""."""
    found = [mark for mark in _SEPARATORS if mark in names[0]] if len(names) == 1 else []
    return f"The header is a single column. Fix: set separator = {json.dumps(found[0])}." if found else ""


def _scaled(table: Text, name: str, column: Numeric, absent: Sequence[str]) -> npt.NDArray[np.float32]:
    values, missing = _numbers(table, name, absent)
    _check_missing(table, name, column, missing)
    if not column.clamp:
        table.refuse(
            ~missing & ~((values >= column.low) & (values <= column.high)),
            name,
            f"lies outside the declared bounds [{column.low:g}, {column.high:g}]. "
            "Fix: correct it, widen the bounds, or set clamp = true.",
        )
    # Halved first, so that the widest bounds do not overflow.
    middle, half = column.low / 2 + column.high / 2, column.high / 2 - column.low / 2
    inside = np.where(missing, middle, np.clip(values, column.low, column.high))
    scaled = np.clip((inside - middle) / half, -1, 1)
    return _with_indicator(scaled[:, None], missing, column)


def _one_hot(table: Text, name: str, column: Category, absent: Sequence[str]) -> npt.NDArray[np.float32]:
    indices = codes(table, name, column, absent)
    missing = indices == _MISSING
    _check_missing(table, name, column, missing)
    return _with_indicator(indices[:, None] == np.arange(len(column.values)), missing, column)


def _targets(table: Text, schema: Schema) -> npt.NDArray[np.int64] | npt.NDArray[np.float32]:
    name, column = schema.target
    absent = schema.missing_texts(name)
    told = "is a missing target. Fix: leave the record out, or fill it in."
    if column.values is not None:
        indices = codes(table, name, column, absent)
        table.refuse(indices == _MISSING, name, told)
        return indices
    values, missing = _numbers(table, name, absent)
    table.refuse(missing, name, told)
    if column.positive_above is not None:
        return (values > column.positive_above).astype(np.int64)
    low, high = column.bounds
    table.refuse(
        ~((values >= low) & (values <= high)),
        name,
        f"lies outside the declared bounds [{low:g}, {high:g}]. Fix: correct it or widen the bounds.",
    )
    return values.astype(np.float32)


def _numbers(table: Text, name: str, absent: Sequence[str]) -> tuple[_Floats, _Mask]:
    """Return the column as finite numbers, and where it is missing (there the number means nothing)."""
    text = table.frame[name]
    parsed = text.cast(pl.Float64, strict=False)
    spelt = [float(number) for number in map(canonical, absent) if not isinstance(number, str)]
    missing = (text.is_in([*absent]) | parsed.is_in(spelt).fill_null(False)).to_numpy()
    unreadable = parsed.is_null().to_numpy()
    table.refuse(~missing & unreadable, name, "is not a number. Fix: correct it, or list it in missing_values.")
    values = parsed.fill_null(0.0).to_numpy()
    table.refuse(
        ~missing & ~np.isfinite(values),
        name,
        "is not a finite number. Fix: correct it, or list it in missing_values.",
    )
    return np.where(missing, 0.0, values), missing


def codes(table: Text, name: str, column: Category | Target | Owner, absent: Sequence[str]) -> _Ints:
    """Return the (n,) int64 index of each label among the declared ones, or a negative one where it is missing.

    Raises:
        InputError: A label is neither declared nor among `absent`, the texts of a missing value.
    """
    labels = [*(column.values or ())]
    known = label_codes(labels, column.aliases) | {canonical(text): _MISSING for text in absent}
    found = table.frame[name].unique()
    indices = [known.get(canonical(text), _UNKNOWN) for text in found]
    encoded = table.frame[name].replace_strict(found, indices, return_dtype=pl.Int64).to_numpy()
    table.refuse(
        encoded == _UNKNOWN,
        name,
        lambda text: (
            f"is not a declared {column.kind} value.{_checks.did_you_mean(text, labels)} "
            "Fix: correct it, or declare it."
        ),
    )
    return encoded


def _check_missing(table: Text, name: str, column: Numeric | Category, missing: _Mask) -> None:
    if column.missing == "refuse":
        fix = 'Fix: fill it in, leave the record out, or set missing = "indicator".'
        table.refuse(missing, name, f"is a missing value. {fix}")


def _with_indicator(
    block: npt.NDArray[np.float64] | _Mask, missing: _Mask, column: Numeric | Category
) -> npt.NDArray[np.float32]:
    extra = [missing[:, None]] if column.missing == "indicator" else []
    return np.concatenate([block, *extra], axis=1, dtype=np.float32)
