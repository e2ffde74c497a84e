"""What the user declares about a table: columns, bounds, labels. Public facts, never learnt from records."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from sfumato import _checks
from sfumato.errors import InputError

_M = TypeVar("_M", bound=BaseModel)


def _as_label(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value.strip() if isinstance(value, str) else value


Label = Annotated[str, BeforeValidator(_as_label)]
Bound = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Missing = Literal["refuse", "indicator"]


def canonical(text: str) -> str | Decimal:
    """Return the finite number that `text` spells, else `text`: `1`, `1.0` and `1e0` are one label."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text
    return number if number.is_finite() and "_" not in text else text


def label_codes(values: Sequence[str], aliases: Mapping[str, str]) -> dict[str | Decimal, int]:
    """Return the index in `values` of every canonical label and alias."""
    codes = {canonical(value): index for index, value in enumerate(values)}
    return codes | {canonical(alias): codes[canonical(value)] for alias, value in aliases.items()}


class _Declared(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Numeric(_Declared):
    """A number, scaled to [-1, 1] by its declared bounds: `(x - middle) / (half the range)`.

    Args:
        low: The value that becomes -1, in the column's own unit.
        high: The value that becomes 1, in the column's own unit.
        clamp: Move a value outside the bounds to the nearest bound; otherwise it is an error.
        missing: `"refuse"` (an error), or `"indicator"`: 0.0, and 1.0 in an extra feature `name=missing`.
        missing_values: What also counts as missing here, beside the table's own list. Compared as text and,
            where it spells a number, as a number: `"0"` also meets `0.0`.
    """

    kind: Literal["numeric"] = "numeric"
    low: Bound
    high: Bound
    clamp: bool = False
    missing: Missing = "refuse"
    missing_values: tuple[Label, ...] = ()

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_bounds(self.low, self.high)
        return self

    def feature_names(self, name: str) -> tuple[str, ...]:
        """Return the names of the features that column `name` becomes."""
        return (name, *_indicator(name, self.missing))


class Category(_Declared):
    """One of the declared labels, as one 0/1 feature per label, in the declared order.

    Args:
        values: The labels. `1`, `1.0` and `"1"` are the same label.
        aliases: Other spellings, each mapped to the declared label that it stands for.
        missing: `"refuse"` (an error), or `"indicator"`: all 0.0, and 1.0 in an extra feature
            `name=missing`.
        missing_values: What also counts as missing here, beside the table's own list.
    """

    kind: Literal["category"] = "category"
    values: tuple[Label, ...] = Field(min_length=1)
    aliases: dict[Label, Label] = Field(default_factory=dict)
    missing: Missing = "refuse"
    missing_values: tuple[Label, ...] = ()

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        _check_labels(self.values, self.aliases)
        return self

    def feature_names(self, name: str) -> tuple[str, ...]:
        """Return the names of the features that column `name` becomes."""
        return (*(f"{name}={value}" for value in self.values), *_indicator(name, self.missing))


class Target(_Declared):
    """What is to be learnt. Exactly one of three forms; a missing target is always an error.

    Args:
        values: Class labels in the order of their indices (at least two); the target is int64.
        aliases: Other spellings of those labels.
        positive_above: Two classes: 1 for a number above this, else 0; the target is int64.
        classes: Names of those two classes, the lower one first.
        low: Regression: the least value allowed. The target is float32 and not scaled.
        high: Regression: the greatest value allowed.
    """

    kind: Literal["target"] = "target"
    values: Annotated[tuple[Label, ...], Field(min_length=2)] | None = None
    aliases: dict[Label, Label] = Field(default_factory=dict)
    positive_above: Bound | None = None
    classes: tuple[Label, Label] | None = None
    low: Bound | None = None
    high: Bound | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        bounded = self.low is not None or self.high is not None
        if [self.values is not None, self.positive_above is not None, bounded].count(True) != 1:
            raise ValueError("a target takes exactly one of values, positive_above, or low with high.")
        if self.classes is not None and self.positive_above is None:
            raise ValueError("classes goes with positive_above only; values name their classes themselves.")
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError("the two classes have the same name; choose two names.")
        if self.aliases and self.values is None:
            raise ValueError("aliases go with values only; remove them.")
        if bounded and (self.low is None or self.high is None):
            raise ValueError("low and high go together; give both.")
        if self.low is not None and self.high is not None:
            _check_bounds(self.low, self.high)
        if self.values is not None:
            _check_labels(self.values, self.aliases)
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest value of a regression target; infinite for classes."""
        low = -math.inf if self.low is None else self.low
        return low, math.inf if self.high is None else self.high

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The class names in the order of their indices, or None for regression."""
        if self.positive_above is None:
            return self.values
        return self.classes or (f"at most {self.positive_above:g}", f"above {self.positive_above:g}")


class Owner(_Declared):
    """Who holds the record (a hospital, a person). All owners are declared: who takes part is never inferred.

    Args:
        values: The owners, in the order in which they are listed everywhere else.
        aliases: Other spellings of them.
    """

    kind: Literal["owner"] = "owner"
    values: tuple[Label, ...] = Field(min_length=1)
    aliases: dict[Label, Label] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        _check_labels(self.values, self.aliases)
        return self


class Ignore(_Declared):
    """A column that the file may have and that is not read."""

    kind: Literal["ignore"] = "ignore"


Column = Annotated[Numeric | Category | Target | Owner | Ignore, Field(discriminator="kind")]


class Schema(_Declared):
    """A declared table: what each column means, and what counts as missing everywhere.

    Args:
        columns: Column name to declaration. Exactly one target, at most one owner, at least one feature.
        missing_values: Texts that mean missing in every column.

    Raises:
        pydantic.ValidationError: The declaration contradicts itself. `validated` turns it into an InputError.
    """

    columns: dict[str, Column]
    missing_values: tuple[Label, ...] = ("", "?")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        targets = [name for name, column in self.columns.items() if isinstance(column, Target)]
        owners = [name for name, column in self.columns.items() if isinstance(column, Owner)]
        if len(targets) != 1:
            raise ValueError(f'exactly one column must have kind = "target", not {_listed(targets)}.')
        if len(owners) > 1:
            raise ValueError(f'at most one column may have kind = "owner", not {_listed(owners)}.')
        names = self.feature_names
        if not names:
            raise ValueError("no column is a feature; declare one as numeric or category.")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f'two features would be called "{twice[0]}"; rename a column or a label.')
        for name, column in self.columns.items():
            self._check_missing(name, column)
        return self

    def _check_missing(self, name: str, column: Column) -> None:
        if isinstance(column, Numeric | Ignore):
            return
        absent = {canonical(text) for text in self.missing_texts(name)}
        for label in (*(column.values or ()), *column.aliases):
            if canonical(label) in absent:
                raise ValueError(
                    f'column "{name}" declares the label {label!r}, which missing_values also lists; '
                    "remove it from one of the two."
                )

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the encoded features, in order: one per number, label and missing indicator."""
        return tuple(
            feature
            for name, column in self.columns.items()
            if isinstance(column, Numeric | Category)
            for feature in column.feature_names(name)
        )

    @property
    def target(self) -> tuple[str, Target]:
        """Name and declaration of the target column."""
        return next((name, column) for name, column in self.columns.items() if isinstance(column, Target))

    @property
    def owner(self) -> tuple[str, Owner] | None:
        """Name and declaration of the owner column, or None."""
        found = ((name, column) for name, column in self.columns.items() if isinstance(column, Owner))
        return next(found, None)

    def missing_texts(self, name: str) -> tuple[str, ...]:
        """Every text that means missing in column `name`."""
        column = self.columns[name]
        own = column.missing_values if isinstance(column, Numeric | Category) else ()
        return (*self.missing_values, *own)


def declared(schema: Schema | Mapping[str, object]) -> Schema:
    """Return `schema` as a Schema; a mapping (such as a parsed TOML table) is validated.

    Raises:
        InputError: The mapping is not a consistent declaration.
    """
    return schema if isinstance(schema, Schema) else validated(Schema, schema, "schema")


def validated(model: type[_M], mapping: Mapping[str, object], source: str) -> _M:
    """Build a pydantic model from a mapping, such as a parsed TOML file.

    Args:
        model: The model to build.
        mapping: Keys and values as read.
        source: What the error message calls the mapping, for example the file name.

    Raises:
        InputError: One sentence on the first problem, with its key path; misspelt keys come first.
    """
    if not isinstance(mapping, Mapping):
        raise InputError(f"{source} must be a table of keys and values, not {type(mapping).__name__}.")
    try:
        return model.model_validate(dict(mapping))
    except ValidationError as failure:
        # A misspelt key also makes the right one "missing"; naming the misspelling is the better help.
        first = min(failure.errors(), key=lambda error: error["type"] != "extra_forbidden")
        raise InputError(_sentence(model, first, source)) from None


def _sentence(model: type[BaseModel], error: ErrorDetails, source: str) -> str:
    path, keys, arms = _locate(model, error)
    where = f'{source}: key "{path}"' if path else source
    context = error.get("ctx", {})
    field = str(context.get("discriminator", "")).strip("'")
    match error["type"]:
        case "extra_forbidden":
            told = f" is unknown.{_checks.did_you_mean(str(error['loc'][-1]), keys, every=True)}"
        case "missing":
            told = " is missing. Fix: add it."
        case "union_tag_not_found":
            told = f" has no {field}; choose {field} = one of {', '.join(_tags(arms))}."
        case "union_tag_invalid":
            hint = _checks.did_you_mean(str(context["tag"]), _tags(arms))
            told = f' has the unknown {field} "{context["tag"]}".{hint}'
        case "value_error":
            told = f": {context['error']}"
        case "literal_error":
            told = f" has the unknown value {_shown(error)}.{_checks.did_you_mean(str(error['input']), _words(arms))}"
        case "model_type" | "dict_type":
            told = f" must be a table of keys and values, not {_shown(error)}."
        case _:
            told = f": {error['msg'][0].lower()}{error['msg'][1:]}, not {_shown(error)}."
    return where + told


def _shown(error: ErrorDetails) -> str:
    text = repr(error["input"])
    return text if len(text) <= 60 else f"{text[:57]}..."


def _locate(model: type[BaseModel], error: ErrorDetails) -> tuple[str, list[str], list[Any]]:
    """Return the key path as the user wrote it, the keys allowed there, and the types allowed there.

    Pydantic's own path also names the arm of a union that it tried; nobody wrote that, so it is left out.
    """
    arms: list[Any] = [model]
    path, keys = "", [*model.model_fields]
    for depth, step in enumerate(error["loc"], start=1):
        plain = [arm for arm in arms if len(arms) > 1 and _plain_tag(arm) == step]
        if plain:
            arms = plain
            continue
        models = [arm for arm in arms if isinstance(arm, type) and issubclass(arm, BaseModel)]
        tried = [arm for arm in models if len(models) > 1 and step in (*_tags([arm]), arm.__name__)]
        inner = next((get_args(arm) for arm in arms if get_origin(arm) in (dict, list, tuple)), None)
        if tried:
            arms, keys = tried, [*tried[0].model_fields]
            continue
        if models and step in models[0].model_fields:
            arms = _arms(models[0].model_fields[str(step)].annotation)
        elif inner:
            arms = _arms(inner[0] if isinstance(step, int) else inner[-1])
        elif error["type"] != "extra_forbidden" or depth < len(error["loc"]):
            continue
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
        here = [arm for arm in arms if isinstance(arm, type) and issubclass(arm, BaseModel)]
        if depth < len(error["loc"]) and here:
            keys = [*here[0].model_fields]
    return path, keys, arms


def _arms(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _arms(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [arm for part in get_args(annotation) for arm in _arms(part)]
    return [annotation]


def _plain_tag(arm: Any) -> str:
    """Return what pydantic calls an arm such as str or list[str] in the path of an error."""
    return str(arm).replace(" ", "") if get_origin(arm) else getattr(arm, "__name__", "")


def _tags(arms: list[Any]) -> list[str]:
    return [
        str(tag)
        for arm in arms
        if isinstance(arm, type) and issubclass(arm, BaseModel)
        for field in arm.model_fields.values()
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
        for tag in get_args(field.annotation)
    ]


def _words(arms: list[Any]) -> list[str]:
    return [str(word) for arm in arms if get_origin(arm) is Literal for word in get_args(arm)]


def _indicator(name: str, missing: Missing) -> tuple[str, ...]:
    return (f"{name}=missing",) if missing == "indicator" else ()


def _check_bounds(low: float, high: float) -> None:
    # Halved first, so that neither the widest bounds overflow nor the narrowest divide by zero.
    if not high / 2 - low / 2 > 0:
        raise ValueError(f"low must be below high, not {low:g} and {high:g}; swap or widen them.")


def _check_labels(values: Sequence[str], aliases: Mapping[str, str]) -> None:
    seen: dict[str | Decimal, str] = {}
    for label in (*values, *aliases):
        key = canonical(label)
        if key in seen:
            raise ValueError(f"the labels {seen[key]!r} and {label!r} are the same; keep one of them.")
        seen[key] = label
    for alias, value in aliases.items():
        if canonical(value) not in map(canonical, values):
            hint = _checks.did_you_mean(value, values)
            raise ValueError(f"the alias {alias!r} stands for {value!r}, which is not declared.{hint}")


def _listed(names: Sequence[str]) -> str:
    return " and ".join(f'"{name}"' for name in names) or "none"
