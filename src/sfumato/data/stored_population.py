"""Populations over arrays that are sorted by client, in memory or memory-mapped, and the folders that hold such arrays."""

from __future__ import annotations

import array
import hashlib
import json
import math
import mmap
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from sfumato.data.client_names import ClientNames, Listed, Numbered
from sfumato.data.population import Alike, Population, check_client, check_mapping, digest_of, stamp_of
from sfumato.data.records import Records, as_features, as_targets, check_classes, check_finite
from sfumato.errors import InputError

_Array: TypeAlias = npt.NDArray[Any]


@final
class StoredPopulation(Population):
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
        as_features("features", _tensor("features", self._features[:0]))
        y = as_targets("targets", _tensor("targets", self._targets[:0]))
        if classes is not None:
            check_classes("targets", y, classes)

    @classmethod
    def over(
        cls,
        features: _Array | Tensor,
        targets: _Array | Tensor,
        offsets: _Array | Tensor | Sequence[int],
        *,
        names: Sequence[str] | None,
        name: str,
        classes: Sequence[str] | None,
        feature_names: Sequence[str],
    ) -> StoredPopulation:
        """Return the population over arrays that fit together, as `Population.from_arrays` says.

        Raises:
            InputError: the arrays do not fit or a client has no record.
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
        return cls(chosen, x, y, cuts, declared, tuple(feature_names))

    @override
    def _made(self, index: int) -> Records:
        name = self._names.at(index)
        held = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        x = as_features(f"{name}: features", _tensor("features", self._features[held]))
        y = as_targets(f"{name}: targets", _tensor("targets", self._targets[held]))
        for what, values in (("features", x), ("targets", y)):
            # A sum is finite only if every value is, and is much faster than looking at each.
            if values.is_floating_point() and not math.isfinite(values.sum().item()):
                check_finite(f"{name}: {what}", values, self._feature_names if what == "features" else ())
        if self._classes is not None:
            check_classes(name, y, self._classes)
        return Records(x, y, name, self._feature_names, self._classes)

    @override
    def identity(self) -> str:
        declared = json.dumps([self._classes, self._feature_names])
        return digest_of(["arrays", self._names.text(), declared, *map(_fingerprint, self._arrays)])


def read_folder(path: str | Path) -> StoredPopulation:
    """Return the population in a folder, as `Population.from_folder` says.

    Raises:
        InputError: a file is missing or is not what it should be.
    """
    folder = Path(path)
    x, y, cuts = (_mapped(folder / f"{part}.npy") for part in ("features", "targets", "offsets"))
    names, name, classes, columns = _declarations(folder)
    try:
        return StoredPopulation.over(x, y, cuts, names=names, name=name, classes=classes, feature_names=columns)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def write_folder(clients: Mapping[str, Records], path: str | Path) -> None:
    """Write clients into a new folder, as `Population.write_folder` says.

    Raises:
        InputError: the folder is there already or cannot be made, or the clients cannot be written as one.
    """
    target = Path(path)
    check_mapping(clients)
    if target.exists():
        raise InputError(f"{target} is there already; choose another folder, or remove it.")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        _or_refuse(target, temporary.mkdir)
        _write(clients, temporary)
        _or_refuse(target, lambda: temporary.rename(target))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    alike, offsets = Alike(), array.array("q", [0])
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
        return f"{stamp_of(Path(values.filename))} {values.offset} {form}"
    return f"{hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()} {form}"
