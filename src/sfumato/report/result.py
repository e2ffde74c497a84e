"""What a set of runs gave and what it cost, as data: the model of `result.json`, read and written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    StringConstraints,
    field_validator,
    model_serializer,
    model_validator,
)

from sfumato import _checks
from sfumato._files import replace_file
from sfumato.data.schema import validated
from sfumato.errors import InputError
from sfumato.privacy.budget import Relation, Unit

PRIVATE = "-private"
Mode = Literal["alone", "pooled", "pooled-private", "federated", "federated-private", "central", "central-private"]


def _utc(text: str) -> str:
    moment = datetime.fromisoformat(text)
    if moment.utcoffset() != timedelta(0):
        raise ValueError(f"{text} is not in UTC; write it like 2026-01-31T12:00:00+00:00")
    return text


# No control, surrogate or text-direction characters: a name must look in the page like what it is.
Name = Annotated[
    str,
    StringConstraints(
        min_length=1,
        max_length=200,
        pattern=r"^[^\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]+$",
    ),
]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)]
Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0)]
Share = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1)]
Count = Annotated[int, Field(strict=True, ge=1)]
Index = Annotated[int, Field(strict=True, ge=0)]
Moment = Annotated[str, AfterValidator(_utc)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_serializer(mode="wrap")
    def _leave_out_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {k: v for k, v in handler(self).items() if v is not None or fields[k].is_required()}


class Score(_Model):
    """One metric of one run over its seeds; every number is a share between 0 and 1.

    `seeds` says how many seeds were run, `values` gives the result of each, `per_owner` the mean per owner.
    """

    mean: Share
    sd: NonNegative
    seeds: Count
    per_owner: dict[Name, Share] = Field(default_factory=dict)
    values: tuple[Share, ...] | None = None

    @model_validator(mode="after")
    def _one_value_per_seed(self) -> Self:
        if self.values is not None and len(self.values) != self.seeds:
            raise ValueError(f"values has {len(self.values)} numbers for {self.seeds} seeds; give one number per seed")
        return self


class Metrics(_Model):
    """The metrics of a run; empty when nothing was measured."""

    accuracy: Score | None = None


class Sampling(_Model):
    """How batches were drawn: the kind (for example `"poisson"`) and the rate per step."""

    kind: Name
    rate: Share | None


class Accountants(_Model):
    """Epsilon by two accountants; `rdp` is None where that accountant has no bound for the event."""

    pld: NonNegative
    rdp: NonNegative | None

    @property
    def agree(self) -> bool:
        """Whether the looser second opinion lies, as it must, not below the claim."""
        return self.rdp is None or self.rdp >= self.pld


class Privacy(_Model):
    """What one private run promises and how that was reached.

    `event` is the accounting event tree as a JSON object; `not_covered` are sentences about what the promise
    leaves out. The claimed epsilon may not lie below what the PLD accountant proved.
    """

    epsilon: NonNegative
    delta: Share
    unit: Unit
    relation: Relation
    noise_multiplier: NonNegative | None
    clip_norm: Positive | None
    sampling: Sampling | None
    steps: Index
    accountants: Accountants
    event: dict[str, JsonValue]
    not_covered: tuple[str, ...]

    @model_validator(mode="after")
    def _claim_is_proved(self) -> Self:
        if self.epsilon < self.accountants.pld:
            raise ValueError(
                f"epsilon {self.epsilon!r} is below the {self.accountants.pld!r} that the PLD accountant "
                "proved; claim at least that"
            )
        return self


class Run(_Model):
    """One arm: its name, how it trained, how long (seconds), how good, and what it promises (or None)."""

    name: Name
    mode: Mode
    seconds: NonNegative
    metrics: Metrics
    privacy: Privacy | None

    @model_validator(mode="after")
    def _mode_tells_the_truth(self) -> Self:
        if self.mode.endswith(PRIVATE) and self.privacy is None:
            raise ValueError(f'mode "{self.mode}" needs a privacy statement; give one or change the mode')
        if self.privacy is not None and not self.mode.endswith(PRIVATE) and self.mode != "alone":
            raise ValueError(
                f'mode "{self.mode}" promises nothing but a privacy statement is given; '
                f'choose mode "{self.mode}{PRIVATE}"'
            )
        return self


class DatasetInfo(_Model):
    """Public facts about the data: the size of an owner is what was declared, or None if it is not public."""

    name: Name
    owners: dict[Name, Index | None] = Field(default_factory=dict)
    description: str | None = None


class LedgerEntry(_Model):
    """One row of the ledger; only a grant and a charge carry an epsilon and a delta that count."""

    seq: Index
    at: Moment
    kind: Literal["grant", "charge", "lease", "pause"]
    dataset: Name
    run: str
    epsilon: NonNegative
    delta: Share
    purpose: str
    by: str


class LedgerTotal(_Model):
    """What a data set has spent in all, and the cap of its latest grant (None if there is no grant)."""

    dataset: Name
    epsilon: NonNegative
    delta: NonNegative
    epsilon_cap: NonNegative | None
    delta_cap: Share | None


class LedgerExtract(_Model):
    """The ledger's rows when the report was made; `path` is the file name, `digest` the chain's head."""

    path: Name
    digest: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    entries: tuple[LedgerEntry, ...]

    @field_validator("path")
    @classmethod
    def _file_name_alone(cls, path: str) -> str:
        if "/" in path or "\\" in path:
            raise ValueError(f"{path!r} names a folder; give the file name alone")
        return path

    def totals(self) -> list[LedgerTotal]:
        """Return the exact sums of all charges (basic composition), one per data set, by name."""
        return [self._total(dataset) for dataset in sorted({entry.dataset for entry in self.entries})]

    def _total(self, dataset: str) -> LedgerTotal:
        rows = [entry for entry in self.entries if entry.dataset == dataset]
        charges = [entry for entry in rows if entry.kind == "charge"]
        grant = next((entry for entry in reversed(rows) if entry.kind == "grant"), None)
        return LedgerTotal(
            dataset=dataset,
            epsilon=exact_sum((entry.epsilon, 1) for entry in charges),
            delta=exact_sum((entry.delta, 1) for entry in charges),
            epsilon_cap=grant.epsilon if grant else None,
            delta_cap=grant.delta if grant else None,
        )


class Curves(_Model):
    """What is plotted over time: for each run name the points (step, epsilon spent so far)."""

    epsilon_over_steps: dict[Name, tuple[tuple[Index, NonNegative], ...]] = Field(default_factory=dict)


class Result(_Model):
    """Everything a report is made of: the runs, and optionally the data set, the ledger and the curves."""

    runs: Annotated[tuple[Run, ...], Field(min_length=1)]
    title: Name | None = None
    created: Moment | None = None
    version: Name | None = None
    machine: Name | None = None
    dataset: DatasetInfo | None = None
    ledger: LedgerExtract | None = None
    curves: Curves | None = None

    @model_validator(mode="after")
    def _names_are_clear(self) -> Self:
        names = [run.name for run in self.runs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f'two runs are called "{twice[0]}"; give every run its own name')
        for name in self.curves.epsilon_over_steps if self.curves else ():
            if name not in names:
                raise ValueError(f'curves name "{name}", which is no run.{_checks.did_you_mean(name, names)}')
        return self

    @property
    def private_runs(self) -> list[Run]:
        """The runs that promise something."""
        return [run for run in self.runs if run.privacy is not None]

    @property
    def owners(self) -> list[str]:
        """Every owner that is declared or measured, declared ones first."""
        names = dict.fromkeys(self.dataset.owners if self.dataset else ())
        for run in self.runs:
            names.update(dict.fromkeys(run.metrics.accuracy.per_owner if run.metrics.accuracy else ()))
        return list(names)

    def counterpart(self, run: Run) -> Run | None:
        """Return the one run that trained like `run` without privacy; None if there is none, or several."""
        plain = [r for r in self.runs if r.privacy is None and r.mode == run.mode.removesuffix(PRIVATE)]
        return plain[0] if len(plain) == 1 and run.privacy is not None else None


def exact_sum(terms: Iterable[tuple[float, int]]) -> float:
    """Return the sum of number times count, as the decimal text reads: three times 0.1 is 0.3, not more."""
    return float(sum((Decimal(repr(float(number))) * count for number, count in terms), Decimal(0)))


def read_result(path: str | Path) -> Result:
    """Read `result.json`.

    Raises:
        InputError: the file is missing, unreadable, not JSON, or has a wrong, missing or unknown key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the path of a result.json.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; give the path of a result.json.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path and rights.") from None
    try:
        mapping = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); write it again with `write_result`.") from None
    if not isinstance(mapping, Mapping):
        raise InputError(f'{path} holds no JSON object; a result starts with {{"runs": [...]}}.')
    return validated(Result, mapping, str(path))


def write_result(result: Result, path: str | Path) -> Path:
    """Write `result.json` so that a reader sees the old file or the whole new one; return its path.

    Raises:
        InputError: the folder is missing or cannot be written, or an event holds NaN or infinity.
    """
    path = Path(path)
    try:
        text = json.dumps(result.model_dump(), indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise InputError(f"{path} was not written: an event holds NaN or infinity; give finite numbers.") from None
    return write_text_atomically(path, text + "\n")


def write_text_atomically(path: Path, text: str) -> Path:
    """Write `text` beside `path`, sync it, and rename it into place; return `path`.

    Raises:
        InputError: the folder is missing or the file cannot be written.
    """
    try:
        replace_file(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); choose a folder that exists and is writable."
        ) from None
    return path


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number")
