"""A training run as a TOML file: what may be written in it, and the records, plan and model that it stands for."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    ValidationInfo,
    field_validator,
    model_validator,
)
from torch import nn
from torch.optim import Optimizer

from sfumato import _checks
from sfumato.data.population import Population
from sfumato.data.records import Records
from sfumato.data.schema import Column, Label, Schema, validated
from sfumato.data.sources import load
from sfumato.data.tables import TableFormat
from sfumato.errors import AccountingError, InputError
from sfumato.federation_config import (
    ClassCount,
    Count,
    CountOrZero,
    FederatedTraining,
    FederationSection,
    Number,
    Positive,
    Section,
    Seed,
    Share,
    refuse,
)
from sfumato.gradients.clipping import check_kind
from sfumato.gradients.compute import Compute
from sfumato.learning import models
from sfumato.learning.plan import Plan
from sfumato.learning.shapes import clips_of, noise_of, rates_of
from sfumato.privacy.budget import Budget, Unit

_APART = "min-separation"
_VARIABLE = re.compile(r"\$\{(\w+)\}")


Paths = str | list[str] | dict[str, str]
Epsilon = Annotated[Positive, BeforeValidator(lambda value: float("inf") if value == "inf" else value)]


class DataSection(Section):
    """`[data]`: a packaged data set, CSV or Parquet files with declared columns, or IDX files of images and labels."""

    builtin: str | None = None
    path: Paths | None = None
    images: str | None = None
    labels: str | None = None
    classes: ClassCount | None = None
    test_images: str | None = None
    test_labels: str | None = None
    separator: str = ","
    header: bool = True
    column_names: tuple[str, ...] | None = None
    skip_lines: CountOrZero = 0
    test_path: Paths | None = None
    test_skip_lines: CountOrZero | None = None
    test_fraction: Share = 0.34
    split_seed: Seed = 0
    columns: dict[str, Column] = Field(default_factory=dict)
    missing_values: tuple[Label, ...] = ("", "?")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.builtin, self.path, self.images)) != 1:
            raise ValueError("give either builtin, path or images, and only one of them.")
        if self.images is None:
            needless = ("labels", "classes", "test_images", "test_labels")
            refuse({key: getattr(self, key) for key in needless}, "images")
        if self.builtin is not None and (self.columns or self.test_path is not None):
            raise ValueError("a builtin data set has its own columns and test part; remove columns and test_path.")
        if self.images is not None:
            self._check_images()
        if self.path is not None and not self.columns:
            raise ValueError("the columns of the files are not declared; add a [data.columns.NAME] for each.")
        self.layout(self.skip_lines)
        return self

    def _check_images(self) -> None:
        if self.columns or self.test_path is not None:
            raise ValueError(
                "images have no columns, and their test part is test_images; remove columns and test_path."
            )
        for key in ("labels", "classes"):
            if getattr(self, key) is None:
                raise ValueError(f"{key} is missing, which goes with images; add it.")
        if (self.test_images is None) != (self.test_labels is None):
            raise ValueError("test_images and test_labels go together; give both of them, or neither.")

    def layout(self, skip_lines: int) -> TableFormat:
        """Return the layout of a CSV file of which `skip_lines` are left out at the top."""
        return TableFormat(self.separator, self.header, self.column_names, skip_lines)


class PrivacySection(Section):
    """`[privacy]`: the promise and everything that it depends on."""

    epsilon: Epsilon
    population: Count
    delta: Number | None = Field(default=None, validate_default=True)
    unit: str = "record"
    relation: str = "add-or-remove-one"
    populations: dict[str, Count] | None = None
    batch_size: Count
    steps: Count | None = None
    epochs: Positive | None = None
    clip: Positive = 1.0
    clipping: Annotated[str, AfterValidator(check_kind)] = "flat"
    sampling: str = "poisson"
    max_batch: Count | None = None
    separation: Count | None = None
    participations: Count | None = None
    noise: dict[str, Any] | None = None
    clips: dict[str, Any] | None = None
    rates: dict[str, Any] | None = None
    order: Count | None = None

    @field_validator("delta")
    @classmethod
    def _promised(cls, delta: float | None, info: ValidationInfo) -> float:
        promises_nothing = math.isinf(info.data.get("epsilon", math.inf))
        if delta is not None:
            return _checks.fraction("delta", delta, allow_zero=promises_nothing)
        if not promises_nothing:
            raise ValueError(
                "the key is missing; add it, well below one over the population, "
                f"for example delta = {0.1 / info.data.get('population', 10_000):.0e}."
            )
        return 0.0

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is None and self.epochs is None:
            raise ValueError("neither steps nor epochs is given; add one of them.")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both given; remove one of them.")
        return self

    @model_validator(mode="after")
    def _kept_apart(self) -> Self:
        if self.sampling != _APART:
            apart = {"separation": self.separation, "participations": self.participations}
            refuse(apart, f'sampling = "{_APART}"')
        elif self.separation is None:
            raise ValueError(
                f'separation is missing, which goes with sampling = "{_APART}"; add it: the fewest steps from one time that a '
                "client takes part to its next."
            )
        elif self.unit != Unit.CLIENT:
            raise ValueError(f'sampling = "{_APART}" keeps clients apart; choose unit = "client", or another sampling.')
        return self


class ModelSection(Section):
    """`[model]`: a built-in kind, or a function that makes one."""

    kind: Literal["logistic", "mlp", "cnn", "tanh-cnn"] | None = None
    hidden: tuple[Count, ...] | None = None
    factory: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.kind is None) == (self.factory is None):
            raise ValueError("give either kind or factory, and only one of them.")
        if self.factory is not None and self.hidden is not None:
            raise ValueError("hidden goes with kind only; remove it.")
        return self


class TrainingSection(FederatedTraining):
    """`[training]`: who trains, and how. `seed` sets the first weights only, never the noise."""

    mode: Literal["central", "federated"]
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: Positive
    momentum: Share = 0.0
    seed: Seed = 0
    memory_mb: Positive | None = None
    autocast: StrictBool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.mode == "central":
            self.check_curator()
        else:
            self.check_federated()
        if self.optimizer == "adam" and self.momentum:
            raise ValueError('momentum goes with optimizer = "sgd" only; remove it.')
        return self


class LedgerSection(Section):
    """`[ledger]`: an existing ledger and the data set in it that pays."""

    path: str
    dataset: str


class CheckpointSection(Section):
    """`[checkpoint]`: save every so many steps, so that a stopped run can go on."""

    every: Count = 50


class Config(Section):
    """A whole file."""

    data: DataSection
    privacy: PrivacySection
    model: ModelSection
    training: TrainingSection
    federation: FederationSection | None = None
    ledger: LedgerSection | None = None
    checkpoint: CheckpointSection | None = None

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        clients = self.privacy.unit == Unit.CLIENT
        if self.training.mode == "central":
            if clients:
                raise ValueError(
                    '[training] mode = "central" protects records; for [privacy] unit = "client" choose mode = "federated".'
                )
            refuse({"[federation]": self.federation}, '[training] mode = "federated"')
            return self
        self._check_correlated()
        self.training.check_unit(private=math.isfinite(self.privacy.epsilon), clients=clients)
        stop = self.federation.stop if self.federation else None
        if self.training.algorithm == "fedper" and stop is not None and stop.looks:
            raise ValueError(
                "[federation] stop looks at the shared model, whose personal layers nobody trains; remove it, or choose rounds."
            )
        return self

    def _check_correlated(self) -> None:
        """Refuse noise that takes back noise of earlier rounds where that is not accounted for."""
        if self.training.noise != "correlated":
            return
        correlated, separation = '[training] noise = "correlated"', self.privacy.separation
        if separation is None:
            raise ValueError(
                f'{correlated} needs clients that keep apart; add [privacy] sampling = "{_APART}" with a separation.'
            )
        if (self.training.bands or 0) > separation:
            raise ValueError(
                f"[training] bands is {self.training.bands}, more than the [privacy] separation of {separation}; lower it, or "
                "leave it out."
            )
        for key in ("noise", "clips"):
            if getattr(self.privacy, key) is not None:
                raise ValueError(
                    f"[privacy] {key} changes over the rounds, which {correlated} does not allow; remove it."
                )


class Experiment:
    """A configuration and the place it was read from, ready to be turned into the parts of a run.

    Args:
        path: The TOML file; paths in it are relative to its folder.

    Raises:
        InputError: the file cannot be read, is not TOML, or has a wrong, missing or unknown key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = validated(Config, _read(path), str(path))
        self.name = path.stem

    @property
    def dataset(self) -> str:
        """What the ledger calls the data set."""
        ledger = self.config.ledger
        return ledger.dataset if ledger else self.config.data.builtin or self.name

    @property
    def ledger_path(self) -> Path | None:
        """The ledger that pays, or None if the run brings its own."""
        return self._resolve(self.config.ledger.path) if self.config.ledger else None

    @contextlib.contextmanager
    def blamed(self, section: str) -> Iterator[None]:
        """Put the file and the section in front of every refusal from within."""
        try:
            yield
        except (InputError, AccountingError) as error:
            raise type(error)(f"{self.path}: {section} {error}") from error

    def plan(self) -> Plan:
        """Return the calibrated plan.

        Raises:
            InputError: a number is out of range, or no noise keeps the budget.
        """
        wanted = self.config.privacy
        with self.blamed("[privacy]"):
            # The words are checked by Budget, whose message suggests the right one.
            budget = Budget(wanted.epsilon, wanted.delta or 0.0, wanted.unit, wanted.relation)  # type: ignore[arg-type]
            return Plan.calibrate(
                budget,
                population=wanted.population,
                batch_size=wanted.batch_size,
                steps=wanted.steps,
                epochs=wanted.epochs,
                clip=wanted.clip,
                clipping=wanted.clipping,
                sampling=wanted.sampling,
                max_batch=wanted.max_batch,
                separation=wanted.separation,
                participations=wanted.participations,
                noise=noise_of(wanted.noise),
                clips=clips_of(wanted.clips),
                rates=rates_of(wanted.rates),
                order=wanted.order,
            )

    def records(self) -> tuple[Records, Records]:
        """Return the training part and the test part.

        Raises:
            InputError: a file, row or value is not what is declared, or a variable in a path is not set.
        """
        data = self.config.data
        if data.path is not None:
            whole = self._table(data.path, data.skip_lines)
            if data.test_path is not None:
                lines = data.skip_lines if data.test_skip_lines is None else data.test_skip_lines
                return whole, self._table(data.test_path, lines)
        elif data.images is not None:
            whole = self._images(data.images, data.labels)
            if data.test_images is not None:
                return whole, self._images(data.test_images, data.test_labels)
        else:
            with self.blamed("[data]"):
                whole = load(data.builtin or "")
        with self.blamed("[data] test_fraction:"):
            test, training = whole.split(data.test_fraction, seed=data.split_seed)
        return training, test

    def clients(self, records: Records) -> Population:
        """Return the clients of the federation, who hold `records`.

        Raises:
            InputError: the records have no owners, or cannot be dealt out as declared.
        """
        wanted = self.config.federation
        with self.blamed("[federation]" if wanted and wanted.partition else "[data]"):
            return (wanted or FederationSection()).population(records)

    def model(self, records: Records) -> nn.Module:
        """Return the untrained model for `records`, whose first weights follow the declared seed alone.

        Raises:
            InputError: the model does not fit the records, or the factory cannot be used.
        """
        shape = tuple(records.features.shape[1:])
        outputs = len(records.classes) if records.classes else 1
        wanted = self.config.model
        with torch.random.fork_rng():
            torch.manual_seed(self.config.training.seed)
            if wanted.kind is not None:
                with self.blamed("[model]"):
                    return models.build(wanted.kind, shape, outputs, wanted.hidden)
            return self._from_factory(wanted.factory or "", shape, outputs)

    def optimizer(self) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
        """Return what makes the optimiser for given parameters."""
        wanted = self.config.training
        if wanted.optimizer == "adam":
            return functools.partial(torch.optim.Adam, lr=wanted.learning_rate)
        return functools.partial(torch.optim.SGD, lr=wanted.learning_rate, momentum=wanted.momentum)

    def compute(self) -> Compute:
        """Return the speed knobs."""
        wanted = self.config.training
        return Compute(memory_mb=wanted.memory_mb, autocast=wanted.autocast)

    def _table(self, paths: Paths, skip_lines: int) -> Records:
        data = self.config.data
        raw = {"columns": data.columns, "missing_values": data.missing_values}
        schema = validated(Schema, raw, f"{self.path}: [data]")
        found: Path | list[Path] | dict[str, Path]
        match paths:
            case str():
                found = self._resolve(paths)
            case list():
                found = [self._resolve(path) for path in paths]
            case dict():
                found = {owner: self._resolve(path) for owner, path in paths.items()}
        listed = [found] if isinstance(found, Path) else found.values() if isinstance(found, dict) else found
        if listed and all(path.suffix == ".parquet" for path in listed):
            return Records.from_parquet(found, schema, name=self.dataset)
        return Records.from_csv(found, schema, format=data.layout(skip_lines), name=self.dataset)

    def _images(self, images: str, labels: str | None) -> Records:
        found = self._resolve(images), self._resolve(labels or "")
        return Records.from_idx(*found, classes=self.config.data.classes or 0, name=self.dataset)

    def _resolve(self, text: str) -> Path:
        def value(match: re.Match[str]) -> str:
            if not os.environ.get(match[1]):
                raise InputError(
                    f'{self.path}: the path "{text}" uses ${{{match[1]}}}, which is not set; '
                    f"set {match[1]} in the environment to the folder that holds the data."
                )
            return os.environ[match[1]]

        return self.path.parent / _VARIABLE.sub(value, text)

    def _from_factory(self, spec: str, shape: tuple[int, ...], outputs: int) -> nn.Module:
        module, function = spec.split(":")
        where = f'{self.path}: the model factory "{spec}"'
        folder = str(self.path.parent.resolve())
        # The factory usually stands beside the configuration.
        sys.path.insert(0, folder)
        try:
            model = getattr(importlib.import_module(module), function)(shape, outputs)
        except Exception as error:
            raise InputError(
                f"{where} failed ({type(error).__name__}: {error}); "
                "give module:function, a function that takes (input_shape, outputs)."
            ) from error
        finally:
            sys.path.remove(folder)
        if not isinstance(model, nn.Module):
            raise InputError(f"{where} returned {type(model).__name__}; return a torch.nn.Module.")
        return model


def _read(path: Path) -> Mapping[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the path of a configuration in TOML.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path and rights.") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid TOML ({error}); correct that line.") from None
