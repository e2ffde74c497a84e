"""A federation's rounds as values and functions: what the server sends, what a client does, how sums become an update.

The clients' records never meet. In a round every client turns its own records into one clipped sum; the sums are added up and
noised (`sfumato.learning.aggregation`), and the server's optimiser takes the released sum for a gradient.

| algorithm | unit "record" | unit "client" |
| --- | --- | --- |
| `FedSGD` | clipped gradients of records, one sum over all clients a round: the same model as pooled DP-SGD | each client's mean gradient, clipped |
| `FedAvg` | each client trains by DP-SGD with its own noise; models are averaged every `local_steps` steps | each client trains plainly for `local_steps` steps; its update is clipped |
"""  # noqa: E501

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, final

from torch import nn
from torch.optim import Optimizer

from sfumato.data.records import Records
from sfumato.data.sampling import Shuffled
from sfumato.errors import InputError, PlanError
from sfumato.gradients.clipped import Loss
from sfumato.gradients.compute import DEFAULT, Compute
from sfumato.gradients.support import check_model
from sfumato.learning.aggregation import Aggregation
from sfumato.learning.plan import Plan
from sfumato.learning.procedure import Procedure, check_optimizer
from sfumato.privacy.budget import Unit
from sfumato.privacy.randomness import RandomSource

Answer = TypeVar("Answer")

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Makes an optimiser for given parameters, for example `functools.partial(torch.optim.SGD, lr=0.1)`."""


class Engine(Protocol):
    """Where the clients of a round run."""

    def run(self, work: Callable[[str], Answer], clients: Sequence[str], step: int) -> dict[str, Answer]:
        """Return what `work` gave for each client that answered; who is missing was lost."""
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
    """

    model: nn.Module
    clients: Mapping[str, Records]
    plan: Plan
    loss: Loss
    engine: Engine
    source: RandomSource
    populations: Mapping[str, int] | None = None
    compute: Compute = DEFAULT

    @property
    def protects_clients(self) -> bool:
        """Whether the unit of the budget is the client."""
        return self.plan.budget.unit is Unit.CLIENT


class Algorithm(ABC):
    """A federated algorithm: a small value that makes the procedure of a federation."""

    @abstractmethod
    def procedure(self, federation: Federation, noise: Aggregation | None) -> Procedure:
        """Return the procedure, with the noise where asked or where the algorithm needs it."""


def check_federation(federation: Federation) -> None:
    """Refuse a federation that cannot keep its plan.

    Raises:
        InputError: there is no client, or a client has no record.
        PlanError: the sampler or the population does not fit the unit.
        UnsupportedModelError: the model mixes records.
    """
    if not federation.clients:
        raise InputError("A federation needs at least one client; pass a mapping of name to Records.")
    for name, records in federation.clients.items():
        if name == "all":
            raise InputError('"all" is what the sum over the clients is called; give the client another name.')
        if not len(records):
            raise InputError(f'Client "{name}" has no records; leave it out of the federation.')
    check_model(federation.model)
    plan = federation.plan
    if isinstance(plan.sampler, Shuffled):
        raise PlanError('Shuffled batches are not defined across clients; use sampling "poisson" or a full batch.')
    if federation.protects_clients and plan.population != len(federation.clients):
        raise PlanError(
            f"The plan is for a population of {plan.population} clients and the federation has {len(federation.clients)}; "
            "make the plan for the clients there are."
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


def digest_of(federation: Federation) -> str:
    """Return a digest of every client's name and records, in order; private."""
    parts = [f"{name} {records.digest()}" for name, records in federation.clients.items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def start_draws(federation: Federation, states: Mapping[str, Any]) -> dict[str, Any]:
    """Return each client's draws over its own records, going on with kept states."""
    return {
        name: federation.plan.sampler.start(len(records), federation.source, states.get(name))
        for name, records in federation.clients.items()
    }
