"""Small public data sets by name, to try things out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from importlib import resources
from importlib.resources.abc import Traversable

from sfumato import _checks
from sfumato.data.records import Records
from sfumato.data.schema import Category, Numeric, Schema, Target
from sfumato.data.tables import TableFormat
from sfumato.errors import InputError

# Owner: file and the md5 published for it. Copies in which every "?" became "0" have the same size.
_HEART_FILES = {
    "cleveland": ("processed.cleveland.data", "2d91a8ff69cfd9616aa47b59d6f843db"),
    "hungary": ("processed.hungarian.data", "22e96bee155b5973568101c93b3705f6"),
    "switzerland": ("processed.switzerland.data", "9a87f7577310b3917730d06ba9349e20"),
    "long-beach": ("processed.va.data", "4249d03ca7711e84f4444768c9426170"),
}

# Bounds are what a clinic may meet in an adult (years, mm Hg, mg/dl, beats a minute, mm of ST depression); a
# reading beyond them would be clamped. A blood pressure or a cholesterol of 0 is no reading.
HEART_SCHEMA = Schema(
    columns={
        "age": Numeric(low=20, high=90, clamp=True),
        "sex": Category(values=("0", "1")),
        "cp": Category(values=("1", "2", "3", "4")),
        "trestbps": Numeric(low=60, high=220, clamp=True, missing="indicator", missing_values=("0",)),
        "chol": Numeric(low=80, high=620, clamp=True, missing="indicator", missing_values=("0",)),
        "fbs": Category(values=("0", "1"), missing="indicator"),
        "restecg": Category(values=("0", "1", "2"), missing="indicator"),
        "thalach": Numeric(low=50, high=220, clamp=True, missing="indicator"),
        "exang": Category(values=("0", "1"), missing="indicator"),
        "oldpeak": Numeric(low=-4, high=8, clamp=True, missing="indicator"),
        "slope": Category(values=("1", "2", "3"), missing="indicator"),
        "ca": Category(values=("0", "1", "2", "3"), missing="indicator"),
        "thal": Category(values=("3", "6", "7"), missing="indicator"),
        "num": Target(positive_above=0, classes=("healthy", "disease")),
    }
)


def load(name: str) -> Records:
    """Load a public data set by name: `"heart"` or `"digits"`.

    - `"heart"`: the UCI Heart Disease data of four hospitals, 920 records, 38 features, two classes; the
      owners are the hospitals. Source: https://doi.org/10.24432/C52P4X (CC BY 4.0).
    - `"digits"`: the 8x8 handwritten digits of scikit-learn, 1797 records of shape (1, 8, 8), ten classes.

    Raises:
        InputError: The name is unknown, a packaged file was changed, or scikit-learn is not installed.
    """
    if name not in _SOURCES:
        raise InputError(f'There is no data set "{name}".{_checks.did_you_mean(str(name), _SOURCES)}')
    return _SOURCES[name]()


def _heart_folder() -> Traversable:
    return resources.files("sfumato.data") / "heart"


def _load_heart() -> Records:
    folder = _heart_folder()
    layout = TableFormat(header=False, column_names=tuple(HEART_SCHEMA.columns))
    with ExitStack() as files:
        paths = {}
        for owner, (file, digest) in _HEART_FILES.items():
            paths[owner] = files.enter_context(resources.as_file(folder / file))
            if not paths[owner].is_file() or _md5(paths[owner].read_bytes()) != digest:
                raise InputError(f"The packaged file {file} is missing or was changed. Fix: reinstall sfumato.")
        return Records.from_csv(paths, HEART_SCHEMA, format=layout, name="heart")


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _load_digits() -> Records:
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 (an optional extra)
    except ImportError:
        raise InputError('The data set "digits" comes with scikit-learn. Fix: pip install "sfumato[digits]".') from None
    digits = load_digits()
    # Pixels are declared to lie in 0..16.
    return Records.from_arrays(
        digits.images[:, None] / 8 - 1, digits.target, name="digits", classes=[str(d) for d in range(10)]
    )


_SOURCES: dict[str, Callable[[], Records]] = {"heart": _load_heart, "digits": _load_digits}
