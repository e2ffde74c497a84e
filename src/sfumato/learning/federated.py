"""A federation's rounds as values and functions: what the server sends, what a client does, how sums become an update.

The clients' records never meet. In a round every client turns its own records into one clipped sum; the sums are added up and
noised (`sfumato.learning.aggregation`), and the server uses the released sum. This goes on until the plan ends or a
stopping rule holds.

| unit of the plan | what is clipped | algorithms |
| --- | --- | --- |
| "client", or no privacy | each client's update, as a whole | all |
| "record" | the gradient of each record | `FedSGD` (one sum over all clients a round), `FedAvg` (DP-SGD at every client) |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, final

from torch import Tensor, nn
from torch.optim import Optimizer

from sfumato.data.participation import MinSeparation
from sfumato.data.population import Population
from sfumato.data.records import Records
from sfumato.data.sampling import Shuffled
from sfumato.errors import PlanError
from sfumato.gradients import spare
from sfumato.gradients.clipped import Loss
from sfumato.gradients.compute import DEFAULT, Compute
from sfumato.gradients.support import check_model, trainable
from sfumato.learning.adaptive_clip import AdaptiveClip
from sfumato.learning.aggregation import Aggregation
from sfumato.learning.groups import Draws, Group, moving_statistics, running_statistics
from sfumato.learning.local_training import MakeOptimizer
from sfumato.learning.plan import Plan
from sfumato.learning.procedure import Procedure, check_optimizer
from sfumato.learning.weighting import BY_RECORDS, Weighting
from sfumato.privacy.bounded import Bounded, Tensors
from sfumato.privacy.budget import Unit
from sfumato.privacy.randomness import RandomSource

Result = TypeVar("Result")

Available = Callable[[int], Tensor | Iterable[int] | Iterable[str]]
"""Called with a step, from 0; tells the numbers, (any,) int64 or a list, or the names of the clients that have come to it."""


@final
@dataclass(frozen=True)
class Answer:
    """What some clients of a round hand in together.

    Attributes:
        total: The weighted, and where privacy is promised clipped, sum of their vectors, by name, float64.
        weight: The sum of their weights.
        answered: How many clients are in the sum.
        nonfinite: How many were left out because a value was NaN or infinite.
        refused: How many were left out because names or shapes were not those of the round.
        kept: What each client keeps for its next round, by its number.
        parts: Each client's own bounded vector, by its number, where the noise needs them apart.
    """

    total: Tensors
    weight: float
    answered: int
    nonfinite: int = 0
    refused: int = 0
    kept: Mapping[int, Tensors] = field(default_factory=dict)
    parts: Mapping[int, Bounded] | None = None

    @classmethod
    def joined(cls, answers: Iterable[Answer]) -> Answer:
        """Return several answers as one, adding up as they come; uses their totals up."""
        total: dict[str, Tensor] = {}
        parts: dict[int, Bounded] | None = None
        kept: dict[int, Tensors] = {}
        weight, answered, nonfinite, refused = 0.0, 0, 0, 0
        for answer in answers:
            for name, value in answer.total.items():
                if name not in total:
                    total[name] = value
                else:
                    total[name].add_(value)
                    spare.give(value)
            if answer.parts is not None:
                parts = {**(parts or {}), **answer.parts}
            kept |= answer.kept
            weight += answer.weight
            answered += answer.answered
            nonfinite += answer.nonfinite
            refused += answer.refused
        return cls(total, weight, answered, nonfinite, refused, kept, parts)


@final
@dataclass(frozen=True)
class Task:
    """The clients' part of a run, for an engine.

    Attributes:
        population: All clients; those of a round are made by the engine.
        work: Trains clients, given their numbers, their records and one of the ways.
        ways: In which the work can be done, the surest last; they differ in speed and rounding only.
        agrees: Whether a way gives for these clients what the last one gives, computed in float64.
        size: Numbers in one client's vector.
        draws: Whether clients draw from one stream of random numbers, so that they must take their turns. Until it is known,
            a client must work while no other does; work with each client alone finds it out.
    """

    population: Population
    work: Callable[[Sequence[int], Sequence[Records], str], Answer]
    ways: tuple[str, ...]
    agrees: Callable[[Sequence[int], Sequence[Records], str], bool]
    size: int
    draws: Draws = field(default_factory=Draws)


class Runner(Protocol):
    """An engine at work on one run."""

    def answers(self, clients: Sequence[int], step: int) -> Iterator[Answer]:
        """Yield answers that together are those of all clients that were not lost."""
        ...


class Engine(Protocol):
    """Where the clients of a round run.

    An engine may have an attribute `answering`: the share of the clients asked that answer, None where it is not known.
    """

    def run(self, work: Callable[[str], Result], clients: Sequence[str], step: int) -> dict[str, Result]:
        """Return what `work` gave for each client that answered; who is missing was lost."""
        ...

    def start(self, task: Task) -> Runner:
        """Return what runs the rounds of one run."""
        ...


@final
@dataclass(frozen=True)
class Federation:
    """All that a round needs to know.

    Attributes:
        model: The server's model.
        clients: Name to records; the records stay with the client.
        plan: The plan; for unit "client" its population is the number of clients.
        loss: As for `sfumato.train`.
        engine: Where clients run.
        source: Randomness for sampling and noise.
        populations: Declared, public number of records of each client, where an algorithm needs it.
        compute: Speed knobs.
        weighting: How much a client counts.
        quorum: Fewer answers than this make a round void.
        available: Tells which clients have come to a step; None for all.
    """

    model: nn.Module
    clients: Population
    plan: Plan
    loss: Loss
    engine: Engine
    source: RandomSource
    populations: Mapping[str, int] | None = None
    compute: Compute = DEFAULT
    weighting: Weighting = BY_RECORDS
    quorum: int = 0
    available: Available | None = None

    @property
    def counts_clients(self) -> bool:
        """Whether the plan's population are the clients: a round's cohort is drawn from them."""
        return self.plan.budget.unit is Unit.CLIENT

    @property
    def protects_clients(self) -> bool:
        """Whether the unit of a promise is the client."""
        return self.plan.is_private and self.counts_clients


class Algorithm(ABC):
    """A federated algorithm: a small value that makes the procedure of a federation."""

    @abstractmethod
    def procedure(self, federation: Federation, noise: Aggregation | None) -> Procedure:
        """Return the procedure, with the noise where asked or where the algorithm needs it."""


@final
@dataclass(frozen=True)
class Server:
    """The server's side of a run.

    Attributes:
        model: Changed in place.
        optimizer: Over the model's trainable parameters.
        shared: What the server keeps and sends besides the model, by name.
    """

    model: nn.Module
    optimizer: Optimizer
    shared: dict[str, Tensor]

    def descend(self, mean: Tensors) -> None:
        """Let the optimiser take `mean` for a gradient, and move the running statistics by it."""
        for name, parameter in trainable(self.model).items():
            if name in mean:  # personal layers are not
                parameter.grad = mean[name].to(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, value in running_statistics(self.model).items():
            if name in mean:
                value.sub_(mean[name].to(value.dtype))
                if name.rpartition(".")[2] == "running_var":
                    value.clamp_(min=0)  # noise may take a variance below 0


@final
@dataclass(frozen=True)
class Work:
    """What the clients of a group computed.

    Attributes:
        vectors: What each hands in, in the direction of a gradient, by name, (clients, ...).
        kept: What each keeps for its next round, by name, (clients, ...).
    """

    vectors: dict[str, Tensor]
    kept: dict[str, Tensor] = field(default_factory=dict)


class ClientAlgorithm(Algorithm):
    """An algorithm whose clients each hand in one vector: pure functions of what was sent, kept and held.

    `client` runs at the clients, for a group of them at once; `update` at the server.

    Attributes:
        counts_alike: Whether every client counts the same where nobody asked for a weighting, also without privacy.
    """

    counts_alike: bool = False

    def is_stackable(self, model: nn.Module) -> bool:
        """Return whether clients that are stacked along a new dimension do what each does alone."""
        return True

    def shared(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what the server sends besides the model, as it is before the first round."""
        return {}

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what a client keeps before its first round."""
        return {}

    def shapes(self, model: nn.Module) -> dict[str, Tensor]:
        """Return tensors with the names and shapes of what a client hands in; asked once, when the rounds are made.

        The running statistics of modules in eval mode are not among them: nobody moves them, so they are to carry no noise.
        """
        return {**trainable(model), **moving_statistics(model)}

    @abstractmethod
    def client(self, group: Group, shared: Tensors, kept: Mapping[str, Tensor]) -> Work:
        """Do the clients' part of a round.

        Args:
            group: The clients, with their records and what they can do.
            shared: What the server sent besides the model.
            kept: What each kept from its last round, by name, (clients, ...).
        """

    @abstractmethod
    def server_optimizer(self, model: nn.Module) -> Optimizer:
        """Return the server's optimiser."""

    def update(self, server: Server, mean: Tensors, share: float) -> None:
        """Use the weighted mean of the vectors.

        Args:
            server: Changed in place.
            mean: By name, uses up.
            share: Of all clients that are in the mean.
        """
        server.descend(mean)

    def personal(self, model: nn.Module, kept: Tensors) -> dict[str, Tensor]:
        """Return the parameters of one client's own model, by name; empty if it is the server's."""
        return {}

    def check(self, federation: Federation) -> None:
        """Refuse a federation that this algorithm cannot serve.

        Raises:
            PlanError: names the reason and the fix.
        """


def check_federation(federation: Federation) -> None:
    """Refuse a federation that cannot keep its plan.

    Raises:
        PlanError: the sampler or the population does not fit the unit, or too few clients answer for an adaptive clip norm.
        UnsupportedModelError: the model mixes records where they are protected one by one.
    """
    plan = federation.plan
    answering = getattr(federation.engine, "answering", None)
    if isinstance(plan.clips, AdaptiveClip) and answering is not None:
        plan.clips.check_reached(answering)
    check_model(federation.model, mixing=not plan.is_private or federation.protects_clients)
    if isinstance(plan.sampler, (Shuffled, MinSeparation)) and not federation.counts_clients:
        kind = "Shuffled batches" if isinstance(plan.sampler, Shuffled) else "Steps that records keep apart"
        raise PlanError(f'{kind} are not defined across clients; use sampling "poisson" or a full batch.')
    if federation.counts_clients and plan.population != len(federation.clients):
        raise PlanError(
            f"The plan is for a population of {plan.population} clients and the federation has {len(federation.clients)}; "
            "make the plan for the clients there are."
        )


def check_for_records(federation: Federation) -> None:
    """Refuse what only rounds of clients know, in a federation whose plan counts records.

    Raises:
        PlanError: names it.
    """
    if federation.quorum or federation.weighting is not BY_RECORDS or federation.available is not None:
        raise PlanError(
            "quorum, weighting and available belong to rounds of clients; with this algorithm give the plan the unit "
            '"client", or leave them out.'
        )


def who_is_protected(federation: Federation) -> tuple[str, ...]:
    """Return the sentences about the unit that belong to the statement."""
    who = "Which clients take part, and when they answer."
    if federation.protects_clients:
        return (who,)
    return (
        who,
        "A person with records at several clients, or with several records, is protected for each record alone.",
    )


def made_for(model: nn.Module, make: MakeOptimizer) -> Optimizer:
    """Return a checked optimiser over the trainable parameters of `model`."""
    optimizer = make([parameter for parameter in model.parameters() if parameter.requires_grad])
    check_optimizer(model, optimizer)
    return optimizer


def start_draws(federation: Federation, states: Mapping[str, Any]) -> dict[str, Any]:
    """Return each client's draws over its own records, going on with kept states."""
    return {
        name: federation.plan.sampler.start(len(records), federation.source, states.get(name))
        for name, records in federation.clients.items()
    }
