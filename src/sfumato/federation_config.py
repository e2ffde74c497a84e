"""The federation of a training configuration: which knobs its algorithm has, who the clients are, and what these stand for.

The kinds of values that every section is made of stand here too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Final, Literal, Self, final

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    model_validator,
)
from torch.optim import SGD

from sfumato import _checks
from sfumato.data import partitions
from sfumato.data.population import Population
from sfumato.data.records import Records
from sfumato.engines.dropping import DropOut, word
from sfumato.learning.aggregation import Aggregation, LocalNoise, ServerNoise, SharedNoise
from sfumato.learning.controlled import FedNova, Scaffold
from sfumato.learning.correlated import CorrelatedNoise
from sfumato.learning.fedavg import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi
from sfumato.learning.federated import Algorithm
from sfumato.learning.fedsgd import FedSGD
from sfumato.learning.local_training import MakeOptimizer
from sfumato.learning.personal import Ditto, FedPer
from sfumato.learning.stopping import FirstOf, Plateau, Rounds, Score, Stop, Target
from sfumato.learning.weighting import ByRecords, Uniform, UpTo, Weighting

_WITH_ZERO: Final = {"momentum", "server_momentum", "beta1", "beta2"}
_WITH_ONE: Final = {"target", "expected"}


def _positive(value: float, info: ValidationInfo) -> float:
    return _checks.positive(str(info.field_name), value, allow_inf=info.field_name == "epsilon")


def _share(value: float, info: ValidationInfo) -> float:
    name = str(info.field_name)
    return _checks.fraction(name, value, allow_zero=name in _WITH_ZERO, allow_one=name in _WITH_ONE)


def _not_negative(value: float, info: ValidationInfo) -> float:
    return _checks.non_negative(str(info.field_name), value)


def _at_least_one(value: int, info: ValidationInfo) -> int:
    return _checks.count(str(info.field_name), value)


def _at_least_two(value: int, info: ValidationInfo) -> int:
    return _checks.count(str(info.field_name), value, minimum=2)


def _at_least_zero(value: int, info: ValidationInfo) -> int:
    return _checks.count(str(info.field_name), value, minimum=0)


def _column(value: object) -> object:
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError(f"column must be the name of a feature, or its number from 0, not {value!r}.")


Number = Annotated[float, Field(strict=True)]
Positive = Annotated[Number, AfterValidator(_positive)]
NotNegative = Annotated[Number, AfterValidator(_not_negative)]
Share = Annotated[Number, AfterValidator(_share)]
Whole = Annotated[int, Field(strict=True)]
Count = Annotated[Whole, AfterValidator(_at_least_one)]
ClassCount = Annotated[Whole, AfterValidator(_at_least_two)]
CountOrZero = Annotated[Whole, AfterValidator(_at_least_zero)]
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """A table of a configuration: every key is known, and nothing changes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def refuse(given: Mapping[str, object], needed: str) -> None:
    """Refuse each of the given keys that has a value, because it goes with something else.

    Raises:
        ValueError: a key has a value.
    """
    for key, value in given.items():
        if value is not None:
            raise ValueError(f"{key} goes with {needed} only; remove it.")


_LOCAL: Final = {"local_steps": "local_steps", "local_epochs": "local_epochs", "local_batch_size": "batch_size"}
_MOMENTS: Final = {"server_lr": "server_lr", "beta1": "beta1", "tau": "tau"}
# What an algorithm is and, besides the local ones, which keys of [training] it takes as which of its arguments.
_ALGORITHMS: Final[dict[str, tuple[Callable[..., Algorithm], dict[str, str]]]] = {
    "fedavg": (FedAvg, {"server_lr": "server"}),
    "fedprox": (FedProx, {"server_lr": "server", "mu": "mu"}),
    "fedavgm": (FedAvgM, {"server_lr": "server_lr", "server_momentum": "momentum"}),
    "fedadam": (FedAdam, _MOMENTS | {"beta2": "beta2"}),
    "fedyogi": (FedYogi, _MOMENTS | {"beta2": "beta2"}),
    "fedadagrad": (FedAdagrad, _MOMENTS),
    "scaffold": (Scaffold, {"server_lr": "server"}),
    "fednova": (FedNova, {"server_lr": "server", "effective_steps": "effective_steps"}),
    "ditto": (Ditto, {"server_lr": "server", "pull": "pull"}),
    "fedper": (FedPer, {"server_lr": "server", "personal_layers": "personal_layers"}),
}
_OWN_KEYS: Final = tuple(dict.fromkeys(key for _, keys in _ALGORITHMS.values() for key in keys))


class UpToSection(Section):
    """`weighting = { most = 50 }`: a client counts by its records, up to so many."""

    most: Count
    expected: Share = 1.0


class FederatedTraining(Section):
    """The part of `[training]` that only a federation has."""

    algorithm: (
        Literal[
            "fedsgd", "fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold", "fednova",
            "ditto", "fedper",
        ]
        | None
    ) = None  # fmt: skip
    noise: Literal["server", "shared", "local", "correlated"] | None = None
    tolerate: CountOrZero | None = None
    bands: Count | None = None
    local_steps: Count | None = None
    local_epochs: Count | None = None
    local_batch_size: Count | None = None
    mu: Positive | None = None
    server_lr: Positive | None = None
    server_momentum: Share | None = None
    beta1: Share | None = None
    beta2: Share | None = None
    tau: Positive | None = None
    pull: Positive | None = None
    personal_layers: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    effective_steps: Positive | None = None
    # Told apart by what was written, so that a refusal speaks of that alone.
    weighting: (
        Annotated[
            Annotated[Literal["uniform", "records"], Tag("word")] | Annotated[UpToSection, Tag("table")],
            Discriminator(lambda value: "table" if isinstance(value, (dict, UpToSection)) else "word"),
        ]
        | None
    ) = None
    quorum: CountOrZero | None = None
    workers: Count | None = None

    def check_federated(self) -> None:
        """Refuse knobs that the algorithm does not have.

        Raises:
            ValueError: names the knob and the fix.
        """
        if self.algorithm is None:
            known = ", ".join(f'"{name}"' for name in _ALGORITHMS)
            raise ValueError(f'a federated training needs an algorithm; add algorithm = "fedsgd", {known}.')
        taken = set()
        if self.algorithm == "fedsgd":
            refuse({key: getattr(self, key) for key in _LOCAL}, 'algorithm = "fedavg" and its relatives')
        else:
            taken = set(_ALGORITHMS[self.algorithm][1])
        for key in _OWN_KEYS:
            if key not in taken:
                having = [f'"{name}"' for name, (_, keys) in _ALGORITHMS.items() if key in keys]
                refuse({key: getattr(self, key)}, f"algorithm = {_either(having)}")
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError("local_steps and local_epochs are both given; remove one of them.")
        if self.algorithm == "fedper" and self.personal_layers is None:
            raise ValueError(
                'algorithm = "fedper" needs the layers that stay with the client; add personal_layers = ["..."].'
            )
        if self.algorithm == "scaffold" and self.weighting not in (None, "uniform"):
            raise ValueError('"scaffold" needs every client to count the same; remove weighting.')
        if self.noise != "shared":
            refuse({"tolerate": self.tolerate}, 'noise = "shared"')
        if self.noise != "correlated":
            refuse({"bands": self.bands}, 'noise = "correlated"')

    def check_curator(self) -> None:
        """Refuse what one curator has no use for.

        Raises:
            ValueError: names the knob and the fix.
        """
        refuse({key: getattr(self, key) for key in FederatedTraining.model_fields}, 'mode = "federated"')

    def check_unit(self, *, private: bool, clients: bool) -> None:
        """Refuse what would do nothing, or could not be bounded, under the promise.

        Args:
            private: Whether anything is promised.
            clients: Whether the unit is the client.

        Raises:
            ValueError: names the knob and the fix.
        """
        if private and self.algorithm == "scaffold":
            raise ValueError(
                '[training] algorithm = "scaffold" keeps the noise of every round in its control variates, so that a private '
                'run would drift without end; choose "fedavg" or "fedadam".'
            )
        if private and self.weighting == "records":
            raise ValueError(
                '[training] weighting = "records" does not bound how much a client counts; choose "uniform" or '
                "{ most = 50 } with a number of your own."
            )
        if not clients and (private or self.algorithm == "fedsgd"):
            per_client = {"weighting": self.weighting, "quorum": self.quorum}
            refuse({f"[training] {key}": value for key, value in per_client.items()}, '[privacy] unit = "client"')

    def make_algorithm(self, local: MakeOptimizer) -> Algorithm:
        """Return the algorithm.

        Args:
            local: Makes a client's optimiser, or with "fedsgd" the server's.

        Raises:
            InputError: a number is out of range, or the algorithm needs another optimiser.
        """
        if self.algorithm is None or self.algorithm == "fedsgd":
            return FedSGD(optimizer=local)
        kind, own = _ALGORITHMS[self.algorithm]
        given: dict[str, Any] = {"local": local}
        for key, name in (_LOCAL | own).items():
            value = getattr(self, key)
            if value is not None:
                given[name] = partial(SGD, lr=value) if name == "server" else value
        return kind(**given)

    def make_noise(self, separation: int | None = None) -> Aggregation | None:
        """Return where the noise is added; None for the algorithm's own way.

        Args:
            separation: Of the plan's sampler, as many bands as correlated noise has unless said otherwise.
        """
        match self.noise:
            case "server":
                return ServerNoise()
            case "shared":
                return SharedNoise(tolerate=self.tolerate or 0)
            case "local":
                return LocalNoise()
            case "correlated":
                return CorrelatedNoise(self.bands or separation or 1)
        return None

    def make_weighting(self) -> Weighting | None:
        """Return how much a client counts; None for what is usual."""
        match self.weighting:
            case UpToSection() as wanted:
                return UpTo(wanted.most, wanted.expected)
            case "uniform":
                return Uniform()
            case "records":
                return ByRecords()
        return None


class StopSection(Section):
    """`stop = { target = 0.95 }`: ends the run before its plan does, by the accuracy on the test part or after some rounds."""

    target: Share | None = None
    plateau: Count | None = None
    by: NotNegative | None = None
    every: Count | None = None
    rounds: Count | None = None

    @property
    def looks(self) -> bool:
        """Whether it looks at an accuracy."""
        return self.target is not None or self.plateau is not None

    @model_validator(mode="after")
    def _has_a_rule(self) -> Self:
        if not self.looks and self.rounds is None:
            raise ValueError(
                "the rule is missing; add target = 0.95 (an accuracy), plateau = 5 (looks without a rise) or rounds = 50."
            )
        if self.plateau is None:
            refuse({"by": self.by}, "plateau")
        if not self.looks:
            refuse({"every": self.every}, "target or plateau")
        return self


# The key that a partition needs besides the number of clients.
_NEEDED: Final = {
    "dirichlet": "alpha", "quantity": "alpha", "shards": "per_client", "by-feature": "column", "feature-noise": "scale",
}  # fmt: skip
_DEALT: Final[dict[str, Callable[[Records, int, Any, int], Population]]] = {
    "dirichlet": partitions.dirichlet, "quantity": partitions.quantity, "shards": partitions.shards,
    "feature-noise": partitions.feature_noise,
}  # fmt: skip


class FederationSection(Section):
    """`[federation]`: who the clients are, which of them are lost, and when to stop."""

    by: Literal["owner"] | None = None
    partition: Literal["iid", "dirichlet", "shards", "quantity", "by-feature", "feature-noise"] | None = None
    clients: Count | None = None
    alpha: Positive | None = None
    per_client: Count | None = None
    column: Annotated[str | int, BeforeValidator(_column)] | None = None
    scale: NotNegative | None = None
    seed: Seed = 0
    drop_out: Share | None = None
    delay: Positive | None = None
    deadline: Positive | None = None
    stop: StopSection | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.delay is None) != (self.deadline is None):
            missing, given = ("delay", "deadline") if self.delay is None else ("deadline", "delay")
            raise ValueError(f"{missing} is missing, which goes with {given}; add it, in seconds.")
        dealt = {key: getattr(self, key) for key in ("clients", *_NEEDED.values())}
        if self.partition is None:
            refuse(dealt, "partition")
            return self
        if self.by is not None:
            raise ValueError("by and partition are both given; remove one of them.")
        for key in ("clients", _NEEDED.get(self.partition)):
            if key is not None and dealt.pop(key) is None:
                raise ValueError(f'{key} is missing, which goes with partition = "{self.partition}"; add it.')
        dealt.pop("clients", None)
        for key, value in dealt.items():
            having = [f'"{name}"' for name, other in _NEEDED.items() if other == key]
            refuse({key: value}, f"partition = {_either(having)}")
        return self

    def population(self, records: Records) -> Population:
        """Return the clients: the owners of the records, or parts dealt out of them.

        Raises:
            InputError: the records have no owners, an owner has no record, or they cannot be dealt out like this.
        """
        clients, seed, value = self.clients or 0, self.seed, getattr(self, _NEEDED.get(self.partition or "", "clients"))
        match self.partition:
            case "iid":
                return partitions.iid(records, clients, seed)
            case "by-feature":
                return partitions.by_feature(records, clients, value)
            case None:
                return Population.of(records.by_owner())
        return _DEALT[self.partition](records, clients, value, seed)

    def make_drop_out(self) -> DropOut | None:
        """Return what loses clients, if anything does."""
        return None if self.drop_out is None else DropOut(self.drop_out, self.seed)

    def make_delay(self) -> Delay | None:
        """Return what makes clients late, if anything does."""
        return None if self.delay is None else Delay(self.delay, self.seed)

    def make_stop(self, score: Score) -> Stop | None:
        """Return the stopping rule, if there is one.

        Args:
            score: The accuracy on the test part.
        """
        wanted, rules = self.stop, list[Stop]()
        if wanted is None:
            return None
        if wanted.target is not None:
            rules.append(Target(score, wanted.target, wanted.every or 1))
        if wanted.plateau is not None:
            rules.append(Plateau(score, wanted.plateau, wanted.by or 0.0, wanted.every or 1))
        if wanted.rounds is not None:
            rules.append(Rounds(wanted.rounds))
        return rules[0] if len(rules) == 1 else FirstOf(tuple(rules))


@final
@dataclass(frozen=True)
class Delay:
    """Seconds until a client would answer, exponentially distributed around a mean: called with (step, client).

    As with `DropOut` they follow from the seed alone, and they are independent of who drops out.
    """

    mean: float
    seed: int = 0

    def __call__(self, step: int, client: str) -> float:
        """Return the seconds."""
        return -self.mean * math.log((word(f"delay {self.seed} {step} {client}") + 1) / 2**64)


@final
class RollCall:
    """Notes who was asked and who answered, at the moment when an engine asks whether a client is lost.

    Args:
        drop_out: What loses clients; None if nothing does.
        delay: What makes clients late; None if nothing does.
        deadline: Seconds after which a client is lost.

    Attributes:
        asked: Steps in which each client was asked, by name. Private, as who takes part is.
        answered: Steps in which it answered.
    """

    def __init__(self, drop_out: DropOut | None, delay: Delay | None = None, deadline: float | None = None) -> None:
        self._drop_out, self._delay, self._deadline = drop_out, delay, deadline
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self._last: dict[str, int] = {}

    @property
    def share(self) -> float:
        """The chance to be lost, but for delays."""
        return 0.0 if self._drop_out is None else self._drop_out.share

    def __call__(self, step: int, client: str) -> bool:
        """Whether this client is lost in this step."""
        lost = self._drop_out is not None and self._drop_out(step, client)
        if not lost and self._delay is not None and self._deadline is not None:
            lost = self._delay(step, client) > self._deadline
        if self._last.get(client) != step:  # an engine may do a step once more
            self.asked[client] += 1
            self.answered[client] += not lost
            self._last[client] = step
        return lost


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
