"""A data set by index: features, targets, and who owns each record."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sfumato import _checks
from sfumato.data.images import read_images
from sfumato.errors import InputError

if TYPE_CHECKING:
    from sfumato.data.schema import Schema
    from sfumato.data.tables import EncodedTable, TableFormat, TablePaths

Values: TypeAlias = Tensor | npt.NDArray[Any] | Sequence[Any]
Owners: TypeAlias = Values | tuple[Sequence[str], Values]


@final
@dataclass(frozen=True, eq=False, repr=False)
class Records:
    """An immutable data set. Build one with `from_arrays`, `from_dataset`, `from_csv`, `from_parquet` or `from_idx`.

    Attributes:
        features: (n, ...) float32 (or int64, such as token ids). Do not write into it.
        targets: (n,) int64 classes or float32 numbers. Do not write into it.
        name: What messages and ledgers call the data set.
        feature_names: Names of the columns of (n, features) features, or empty.
        classes: Declared class names in the order of their indices, or None.
        owner_names: Declared owners in their order; empty where records have no owner.
        owner_codes: (n,) int64 index into `owner_names`, or None.

    The number of records is private under add-or-remove-one; `repr` leaves it out and only `len` tells it.
    """

    features: Tensor
    targets: Tensor
    name: str = "records"
    feature_names: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    owner_names: tuple[str, ...] = ()
    owner_codes: Tensor | None = None

    @classmethod
    def from_arrays(
        cls,
        features: Values,
        targets: Values,
        owners: Owners | None = None,
        *,
        name: str = "records",
        feature_names: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
    ) -> Records:
        """Build records from tensors, numpy arrays or nested lists. The values are copied.

        Args:
            features: (n, ...); floating or boolean becomes float32, whole numbers become int64.
            targets: (n,); whole numbers or booleans become int64 classes, floating becomes float32.
            owners: `(names, codes)` with the declared owners and the index of each record's owner; or the
                name of each record's owner, and then the names are taken from the records themselves,
                which is right only where it is no secret who takes part.
            name: What messages and ledgers call the data set.
            feature_names: One name per column; only for (n, features) features.
            classes: Class names in the order of their indices; only for int64 targets.

        Raises:
            InputError: There is no record, lengths differ, a value is NaN or infinite, or a type or a
                class is not one of those above.
        """
        x = as_features(f"{name}: features", _dense(f"{name}: features", features))
        y = as_targets(f"{name}: targets", _dense(f"{name}: targets", targets))
        if x.ndim == 0 or len(x) == 0:
            raise InputError(f"{name}: features hold no record. Fix: pass at least one row.")
        if len(x) != len(y):
            raise InputError(
                f"{name}: features hold {len(x)} records but targets hold {len(y)}. Fix: give each record one target."
            )
        columns = tuple(feature_names or ())
        if columns and (x.ndim != 2 or x.shape[1] != len(columns)):
            raise InputError(
                f"{name}: {len(columns)} feature_names do not fit features of shape (n, "
                f"{', '.join(map(str, x.shape[1:]))}). Fix: give one name per column."
            )
        check_finite(f"{name}: features", x, columns)
        check_finite(f"{name}: targets", y, ())
        if classes is not None:
            check_classes(name, y, classes)
        owner_names, owner_codes = ((), None) if owners is None else _owner_codes(name, owners, len(x))
        declared = None if classes is None else tuple(classes)
        return cls(x, y, name, columns, declared, owner_names, owner_codes)

    @classmethod
    def from_dataset(cls, dataset: Dataset[Any], *, owners: Owners | None = None, name: str = "records") -> Records:
        """Stack the (x, y) pairs of a torch Dataset that has a length.

        Raises:
            InputError: The data set has no length, an item is not an (x, y) pair of tensors or numbers,
                shapes differ, or the values are not what `from_arrays` takes.
        """
        if not hasattr(dataset, "__len__"):
            raise InputError(f"{name}: the data set has no length. Fix: use a map-style Dataset.")
        xs, ys = [], []
        for index in range(len(dataset)):
            try:
                x, y = dataset[index]
                xs.append(torch.as_tensor(x))
                ys.append(torch.as_tensor(y))
            except (TypeError, ValueError, RuntimeError):
                raise InputError(
                    f"{name}: item {index} of the data set is not an (x, y) pair of tensors or numbers. "
                    "Fix: let its transform return tensors."
                ) from None
            if xs[-1].shape != xs[0].shape or ys[-1].shape != ys[0].shape:
                raise InputError(
                    f"{name}: item {index} of the data set has another shape than item 0. "
                    "Fix: crop or pad all items to one shape."
                )
        if not xs:
            raise InputError(f"{name}: the data set holds no record. Fix: pass at least one.")
        return cls.from_arrays(torch.stack(xs), torch.stack(ys), owners, name=name)

    @classmethod
    def from_csv(
        cls,
        path: TablePaths,
        schema: Schema | Mapping[str, object],
        *,
        format: TableFormat | None = None,
        name: str = "records",
    ) -> Records:
        """Read CSV files through a declared schema (see `sfumato.data.tables.read_csv`).

        Raises:
            InputError: A file, row or value is not what the schema declares.
        """
        # Imported here: polars and pydantic take their time, and only tables need them.
        from sfumato.data import schema as schemas  # noqa: PLC0415
        from sfumato.data import tables  # noqa: PLC0415

        declared = schemas.declared(schema)
        return cls._from_table(tables.read_csv(path, declared, format), declared, name)

    @classmethod
    def from_parquet(cls, path: TablePaths, schema: Schema | Mapping[str, object], *, name: str = "records") -> Records:
        """Read Parquet files through a declared schema (see `sfumato.data.tables.read_parquet`).

        Raises:
            InputError: A file, row or value is not what the schema declares.
        """
        from sfumato.data import schema as schemas  # noqa: PLC0415
        from sfumato.data import tables  # noqa: PLC0415

        declared = schemas.declared(schema)
        return cls._from_table(tables.read_parquet(path, declared), declared, name)

    @classmethod
    def from_idx(cls, images: str | Path, labels: str | Path, *, classes: int, name: str = "records") -> Records:
        """Read grey images and their labels from IDX files (see `sfumato.data.images.read_images`).

        Args:
            images: The file of the images; they become features (n, 1, height, width) in [0, 1].
            labels: The file of the labels, 0 .. classes - 1.
            classes: The declared number of classes; they are named by their numbers.
            name: What messages and ledgers call the data set.

        Raises:
            InputError: A file is not what it should be, the two do not fit, or a label is not one of the classes.
        """
        features, targets = read_images(images, labels, classes)
        return cls.from_arrays(features, targets, name=name, classes=[str(number) for number in range(classes)])

    @classmethod
    def _from_table(cls, table: EncodedTable, schema: Schema, name: str) -> Records:
        return cls.from_arrays(
            table.features,
            table.targets,
            table.owners,
            name=name,
            feature_names=schema.feature_names,
            classes=schema.target[1].class_names,
        )

    def digest(self) -> str:
        """Return a SHA-256 over all values in their order. It depends on private values: keep it with the data."""
        digest = hashlib.sha256()
        for tensor in (self.features, self.targets):
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().cpu().numpy().data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        shape = f"({', '.join(['n', *map(str, self.features.shape[1:])])})"
        dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in (self.features, self.targets)]
        return (
            f"Records(name={self.name!r}, features={shape} {dtypes[0]}, targets=(n) {dtypes[1]}, "
            f"classes={self.classes!r}, owners={len(self.owner_names)})"
        )

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of the features (k, ...) and targets (k,) at `indices`; k may be 0.

        Raises:
            InputError: `indices` is not a (k,) tensor of whole numbers that lie within the records.
        """
        index = self._checked(indices)
        return self.features.index_select(0, index), self.targets.index_select(0, index)

    def select(self, indices: Tensor) -> Records:
        """Return the records at `indices`, in that order, with the same declarations.

        Raises:
            InputError: As for `batch`, or `indices` is empty.
        """
        return self._part(indices, self.name, self.owner_names)

    def by_owner(self) -> dict[str, Records]:
        """Return each owner's records, in the declared order, named `name/owner`.

        Raises:
            InputError: The records have no owners, or a declared owner has no record.
        """
        if self.owner_codes is None:
            raise InputError(f"{self.name}: the records have no owners. Fix: pass owners=, or declare an owner column.")
        found: dict[str, Records] = {}
        for code, owner in enumerate(self.owner_names):
            held = (self.owner_codes == code).nonzero().flatten()
            if len(held) == 0:
                raise InputError(
                    f'{self.name}: the declared owner "{owner}" has no records. '
                    "Fix: correct the owner column or the declared owners."
                )
            found[owner] = self._part(held, f"{self.name}/{owner}", (owner,))
        return found

    def split(self, fraction: float, *, seed: int, within_owner: bool = True) -> tuple[Records, Records]:
        """Split at random into two disjoint parts that together hold every record, each in the old order.

        Args:
            fraction: Share of the first part, in (0, 1), read as the decimal number it prints as: of n
                records the first part gets floor(fraction * n), so 0.29 of 100 records is 29.
            seed: Same seed, same split. The global random state is neither read nor changed.
            within_owner: Where records have owners, apply the share to each owner's records apart.

        Raises:
            InputError: fraction or seed is out of range, or one part would be empty.
        """
        share = Fraction(repr(_checks.fraction("fraction", fraction)))
        if _checks.count("seed", seed, minimum=0) >= 2**63:
            raise InputError(f"seed must be below 2**63, not {seed}.")
        generator = torch.Generator().manual_seed(seed)
        groups = [torch.arange(len(self))]
        if within_owner and self.owner_codes is not None:
            codes = self.owner_codes.cpu()
            groups = [(codes == code).nonzero().flatten() for code in range(len(self.owner_names))]
        first = torch.zeros(len(self), dtype=torch.bool)
        for group in groups:
            order = torch.randperm(len(group), generator=generator)
            first[group[order[: math.floor(share * len(group))]]] = True
        if first.all() or not first.any():
            raise InputError(
                f"{self.name}: a fraction of {fraction} leaves one part empty. Fix: choose it nearer to 0.5."
            )
        return self.select(first.nonzero().flatten()), self.select((~first).nonzero().flatten())

    def _checked(self, indices: Tensor) -> Tensor:
        whole = isinstance(indices, Tensor) and indices.dtype in (torch.int64, torch.int32)
        if not whole or indices.ndim != 1:
            raise InputError(f"{self.name}: indices must be a (k,) tensor of whole numbers.")
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise InputError(f"{self.name}: indices must lie within the records; negative ones do not count back.")
        return indices.to(self.features.device)

    def _part(self, indices: Tensor, name: str, owner_names: tuple[str, ...]) -> Records:
        features, targets = self.batch(indices)
        if len(targets) == 0:
            raise InputError(f"{self.name}: nothing is selected. Fix: select at least one record.")
        codes = self.owner_codes
        if codes is not None:
            picked = codes.index_select(0, indices.to(codes.device))
            codes = picked if owner_names == self.owner_names else torch.zeros_like(picked)
        return Records(features, targets, name, self.feature_names, self.classes, owner_names, codes)


def _dense(what: str, values: Values) -> Tensor:
    """Return a copy of `values` as a dense tensor of real numbers."""
    if isinstance(values, Tensor):
        if values.layout != torch.strided or values.is_complex() or values.is_quantized:
            raise InputError(f"{what} must be a dense tensor of real numbers. Fix: convert them first.")
        return values.detach().clone()
    try:
        array = np.array(values)
    except (ValueError, TypeError, RuntimeError):
        raise InputError(f"{what} are ragged. Fix: give every record the same shape.") from None
    match array.dtype.kind:
        case "f":
            return torch.from_numpy(array.astype(np.float32 if array.itemsize <= 4 else np.float64))
        case "b" | "i" | "u":
            return torch.from_numpy(array.astype(array.dtype if array.itemsize == 1 else np.int64))
        case _:
            raise InputError(f"{what} must be numbers, not {array.dtype}. Fix: encode them first.")


def as_features(what: str, tensor: Tensor) -> Tensor:
    """Return features (n, ...) as float32, or int64 where they are whole numbers; `what` begins the message.

    Raises:
        InputError: They look like images of whole numbers that nobody has scaled.
    """
    if tensor.dtype == torch.uint8 and tensor.ndim > 2:
        raise InputError(
            f"{what} look like images of whole numbers. Fix: scale them by their declared range, "
            "for example images / 127.5 - 1 for values from 0 to 255."
        )
    whole = not tensor.is_floating_point() and tensor.dtype != torch.bool
    return tensor.to(torch.int64 if whole else torch.float32)


def as_targets(what: str, tensor: Tensor) -> Tensor:
    """Return targets (n,) as int64, or float32 where they are floating; `what` begins the message.

    Raises:
        InputError: They have another shape.
    """
    if tensor.ndim != 1:
        shape = tuple(tensor.shape)
        raise InputError(f"{what} must have shape (n,), not {shape}. Fix: flatten or squeeze them.")
    return tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64)


def check_finite(what: str, values: Tensor, columns: tuple[str, ...]) -> None:
    """Refuse NaN and infinity in values (n, ...); `columns` may name those of (n, features).

    Raises:
        InputError: A value is not finite; the message gives the place and value of the first.
    """
    bad = ~values.isfinite()
    if bad.any():
        place = np.unravel_index(int(bad.flatten().to(torch.uint8).argmax()), tuple(bad.shape))
        row, *rest = map(int, place)
        column = f', column "{columns[rest[0]]}"' if columns else f", column {rest}" if rest else ""
        raise InputError(
            f"{what}, row {row}{column} (counted from 0): {float(values[place])} is not a finite "
            "32-bit number. Fix: leave the record out or fill it in by a declared value."
        )


def check_classes(name: str, targets: Tensor, classes: Sequence[str]) -> None:
    """Refuse targets (n,) that do not number the declared classes.

    Raises:
        InputError: The targets are floating, or one is not among 0 .. len(classes) - 1.
    """
    if targets.is_floating_point():
        raise InputError(f"{name}: classes are declared but targets are floating. Fix: pass whole numbers.")
    bad = (targets < 0) | (targets >= len(classes))
    if bad.any():
        row = int(bad.to(torch.uint8).argmax())
        raise InputError(
            f"{name}: targets, row {row} (counted from 0): {int(targets[row])} is not one of the "
            f"{len(classes)} declared classes. Fix: number the classes from 0, or declare them all."
        )


def _owner_codes(name: str, owners: Owners, length: int) -> tuple[tuple[str, ...], Tensor]:
    if isinstance(owners, tuple) and len(owners) == 2 and not isinstance(owners[0], str | int | np.generic):
        names = tuple(owners[0])
        codes = _dense(f"{name}: owner codes", owners[1])
    else:
        labels = [owner.item() if isinstance(owner, np.generic | Tensor) else owner for owner in owners]
        if isinstance(owners, str) or not all(isinstance(label, str | int) for label in labels):
            raise InputError(f"{name}: owners must be one name (or whole number) per record.")
        order = {str(label): code for code, label in enumerate(dict.fromkeys(map(str, labels)))}
        names, codes = tuple(order), torch.tensor([order[str(label)] for label in labels], dtype=torch.int64)
    if len(codes) != length:
        raise InputError(f"{name}: {len(codes)} owners are given for {length} records. Fix: give one per record.")
    if len(set(names)) < len(names) or not all(isinstance(owner, str) and owner for owner in names):
        raise InputError(f"{name}: owner names must be texts, each declared once. Fix: rename the owners.")
    if codes.dtype != torch.int64 or codes.ndim != 1 or not 0 <= int(codes.min()) <= int(codes.max()) < len(names):
        raise InputError(f"{name}: owner codes must be a (n,) list of indices into the declared owners.")
    return names, codes
