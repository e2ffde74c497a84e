"""What a set of runs gave and what it cost, as data: the model of `result.json`, read and written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from fractions import Fraction
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
from sfumato.privacy import renyi
from sfumato.privacy.budget import Relation, Unit
from sfumato.privacy.exact import exact, rounded_up
from sfumato.privacy.meaning import FALSE_POSITIVE_RATES, SHOWN_RATE, Basis

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
    """Epsilon by two accountants; None where one of them has no bound for the event."""

    pld: NonNegative | None
    rdp: NonNegative | None

    @property
    def agree(self) -> bool:
        """Whether the looser second opinion lies, as it must, not below the claim."""
        return self.rdp is None or self.pld is None or self.rdp >= self.pld


class Risk(_Model):
    """What a promise means for an attack on one unit, as `Meaning.to_dict` writes it; every number is an upper bound.

    `success` holds (false positive rate, largest true positive rate), `curve` (false positive rate, least false negative
    rate); `basis` says whether they follow from the privacy loss distribution or from epsilon and delta alone.
    """

    advantage: Share
    guess: Share
    certainty: Share
    success: tuple[tuple[Share, Share], ...]
    curve: Annotated[tuple[tuple[Share, Share], ...], Field(min_length=2)]
    basis: Basis

    @model_validator(mode="after")
    def _no_worse_than_guessing(self) -> Self:
        if tuple(rate for rate, _ in self.success) != FALSE_POSITIVE_RATES:
            raise ValueError(f"success must be given at the false positive rates {FALSE_POSITIVE_RATES}")
        # One part in a thousand million for rounding: attacks that guess meet these bounds exactly.
        if min(self.guess, self.certainty) < 0.5 or any(found < rate * (1 - 1e-9) for rate, found in self.success):
            raise ValueError("a bound on attacks lies below what guessing reaches; give what `meaning` says")
        rates = [rate for rate, _ in self.curve]
        if rates != sorted(rates) or any(rate + missed > 1 + 1e-9 for rate, missed in self.curve):
            raise ValueError("the curve must go from left to right, below that of guessing; give what `meaning` says")
        return self

    @property
    def shown(self) -> float:
        """The largest true positive rate at 1 % false positives."""
        return dict(self.success)[SHOWN_RATE]


class Privacy(_Model):
    """What one private run promises and how that was reached.

    `event` is the accounting event tree as a JSON object; `not_covered` are sentences about what the promise
    leaves out. The claimed epsilon may not lie below what the PLD accountant proved, or where it has no bound, the RDP one.
    `risk` is what the promise means for an attack; None in a result that was written without it.
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
    risk: Risk | None = None

    @model_validator(mode="after")
    def _claim_is_proved(self) -> Self:
        name, proved = ("RDP", self.accountants.rdp) if self.accountants.pld is None else ("PLD", self.accountants.pld)
        if proved is None:
            raise ValueError("accountants prove nothing; give what one of them says")
        if self.epsilon < proved:
            raise ValueError(
                f"epsilon {self.epsilon!r} is below the {proved!r} that the {name} accountant proved; claim at least that"
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
    """One row of the ledger; only a grant and a charge carry an epsilon and a delta that count.

    Under Renyi composition a charge and a settle carry a divergence `rdp` at one order, which is what adds up. A grant with a
    `user` caps only that user's share.
    """

    seq: Index
    at: Moment
    kind: Literal["grant", "charge", "lease", "pause", "settle"]
    dataset: Name
    run: str
    epsilon: NonNegative
    delta: Share
    purpose: str
    by: str
    renyi_order: Index | None = None
    rdp: NonNegative | None = None
    user: str | None = None


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
        """Return what all charges cost together, one total per data set, by name.

        Under basic composition these are their exact sums; under Renyi composition, what the sum of the divergences keeps at
        the delta of the cap.
        """
        return [self._total(dataset) for dataset in sorted({entry.dataset for entry in self.entries})]

    def _total(self, dataset: str) -> LedgerTotal:
        rows = [entry for entry in self.entries if entry.dataset == dataset]
        charges = [entry for entry in rows if entry.kind == "charge"]
        grant = next((entry for entry in reversed(rows) if entry.kind == "grant" and not entry.user), None)
        epsilon = exact_sum((entry.epsilon, 1) for entry in charges)
        delta = exact_sum((entry.delta, 1) for entry in charges)
        if grant is not None and grant.renyi_order:
            # The last word on each run is what it cost.
            divergences = {entry.run: entry.rdp or 0.0 for entry in rows if entry.kind in ("charge", "settle")}
            spent = rounded_up(sum(map(exact, divergences.values()), Fraction(0)))
            epsilon = renyi.epsilon(grant.renyi_order, spent, grant.delta)
            delta = grant.delta if spent else 0.0
        return LedgerTotal(
            dataset=dataset,
            epsilon=epsilon,
            delta=delta,
            epsilon_cap=grant.epsilon if grant else None,
            delta_cap=grant.delta if grant else None,
        )


class Curves(_Model):
    """What is plotted over time, for each run name, as points of a step and a number.

    The number is the epsilon spent so far, the noise multiplier of the step, or the share of the budget that is left after it.
    """

    epsilon_over_steps: dict[Name, tuple[tuple[Index, NonNegative], ...]] = Field(default_factory=dict)
    noise_over_steps: dict[Name, tuple[tuple[Index, NonNegative], ...]] = Field(default_factory=dict)
    left_over_steps: dict[Name, tuple[tuple[Index, Share], ...]] = Field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Every run that has a curve, once."""
        return list({**self.epsilon_over_steps, **self.noise_over_steps, **self.left_over_steps})


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
        for name in self.curves.names if self.curves else ():
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
