"""A federation's rounds as values and functions: what the server sends, what a client does, how sums become an update.

The clients' records never meet. In a round every client turns its own records into one clipped sum; the sums are added up and
noised (`sfumato.learning.aggregation`), and the server's optimiser takes the released sum for a gradient.

| algorithm | unit "record" | unit "client" |
| --- | --- | --- |
| `FedSGD` | clipped gradients of records, one sum over all clients a round: the same model as pooled DP-SGD | each client's mean gradient, clipped |
| `FedAvg` | each client trains by DP-SGD with its own noise; models are averaged every `local_steps` steps | each client trains plainly for `local_steps` steps; its update is clipped |
"""  # noqa: E501

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from sfumato import _checks
from sfumato.data.records import Records
from sfumato.data.sampling import FullBatch, Shuffled
from sfumato.errors import InputError, PlanError
from sfumato.gradients.clipping import clip_vector
from sfumato.gradients.per_record import ClippedSum, Loss, clipped_gradient_sum
from sfumato.gradients.support import check_model, trainable
from sfumato.learning.aggregation import Aggregation, LocalNoise, ServerNoise, SharedNoise
from sfumato.learning.plan import Plan
from sfumato.learning.procedure import Procedure, batch_on, mean_loss, set_gradients, zero_like
from sfumato.privacy.bounded import Bounded, Released
from sfumato.privacy.budget import Unit
from sfumato.privacy.randomness import RandomSource

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Makes an optimiser for given parameters, for example `functools.partial(torch.optim.SGD, lr=0.1)`."""


class Engine(Protocol):
    """Where the clients of a round run."""

    def run(self, work: Callable[[str], ClippedSum], clients: Sequence[str], step: int) -> dict[str, ClippedSum]:
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
    """

    model: nn.Module
    clients: Mapping[str, Records]
    plan: Plan
    loss: Loss
    engine: Engine
    source: RandomSource
    populations: Mapping[str, int] | None = None

    @property
    def protects_clients(self) -> bool:
        """Whether the unit of the budget is the client."""
        return self.plan.budget.unit is Unit.CLIENT


class Algorithm(ABC):
    """A federated algorithm: a small value that makes the procedure of a federation."""

    @abstractmethod
    def procedure(self, federation: Federation, noise: Aggregation | None) -> Procedure:
        """Return the procedure, with the noise where asked or where the algorithm needs it."""


@final
@dataclass(frozen=True)
class FedSGD(Algorithm):
    """One gradient of each client a round (McMahan et al. 2017).

    Args:
        optimizer: Makes the server's optimiser.
    """

    optimizer: MakeOptimizer

    def procedure(self, federation: Federation, noise: Aggregation | None) -> Procedure:
        """Return the procedure of one gradient a round."""
        return _OneSum(federation, noise, self.optimizer, _gradient_work(federation))


@final
@dataclass(frozen=True)
class FedAvg(Algorithm):
    """Clients train on their own for a while, then their models are averaged (McMahan et al. 2017).

    Args:
        local: Makes a client's optimiser, anew in every round.
        local_steps: Steps of a client between two averages.
        batch_size: Records of a local step for unit "client" and without privacy; None means all of the client's
            records. For unit "record" the plan's sampler draws.
        server: Makes the server's optimiser for the averaged update; the default takes it as it is.

    Raises:
        InputError: a count is below 1.
    """

    local: MakeOptimizer
    local_steps: int = 1
    batch_size: int | None = None
    server: MakeOptimizer = functools.partial(SGD, lr=1.0)

    def __post_init__(self) -> None:
        _checks.count("local_steps", self.local_steps)
        if self.batch_size is not None:
            _checks.count("batch_size", self.batch_size)

    def procedure(self, federation: Federation, noise: Aggregation | None) -> Procedure:
        """Return local DP-SGD for unit "record", and clipped updates otherwise."""
        if federation.plan.is_private and not federation.protects_clients:
            if noise is not None and not isinstance(noise, LocalNoise):
                raise PlanError(
                    "FedAvg that protects records adds noise inside every client (LocalNoise): several local steps "
                    "cannot be bounded for one record afterwards. Use FedSGD for noise at the server, or unit \"client\"."
                )
            return _LocalPrivateSteps(federation, self)
        return _OneSum(federation, noise, self.server, _update_work(federation, self))


Work = Callable[[str, Tensor | None], tuple[dict[str, Tensor], int]]
"""A client's plain work: (client, indices or None for its own choice) to named tensors and the records behind them."""


@final
class _OneSum(Procedure):
    """One bounded sum a round: of clipped record gradients, or of clipped client vectors."""

    def __init__(
        self, federation: Federation, noise: Aggregation | None, server: MakeOptimizer,
        vector: Callable[[str, int], tuple[dict[str, Tensor], int]],
    ) -> None:  # fmt: skip
        _check_federation(federation)
        self._federation, self._vector = federation, vector
        self._names = list(federation.clients)
        self._optimizer = server(trainable(federation.model).values())  # type: ignore[arg-type]
        self.aggregation = noise or ServerNoise()
        plan = federation.plan
        if federation.protects_clients and isinstance(self.aggregation, SharedNoise) and not isinstance(plan.sampler, FullBatch):
            raise PlanError(
                "Noise shared among a sampled cohort would reveal who was drawn; use ServerNoise, or let every client take "
                "part in every round (batch_size equal to the number of clients)."
            )
        self.not_covered = (self.aggregation.trust, *_who_is_protected(federation))
        self._start(None)

    def _start(self, states: dict[str, Any] | None) -> None:
        plan, source = self._federation.plan, self._federation.source
        kept = states or {}
        if self._federation.protects_clients:
            self._cohorts = plan.sampler.start(len(self._names), source, kept.get("cohorts"))
            self._draws = {}
        else:
            self._draws = {
                name: plan.sampler.start(len(records), source, kept.get(name))
                for name, records in self._federation.clients.items()
            }

    def _cohort(self, step: int) -> list[str]:
        if not self._federation.protects_clients:
            return self._names
        return [self._names[index] for index in self._cohorts.batch(step).tolist()]

    def contributions(self, step: int) -> dict[str, ClippedSum]:
        self._current = self._cohort(step)
        if self._federation.protects_clients:
            return self._federation.engine.run(lambda name: self._client_part(name, step), self._current, step)
        # Drawn here, in the clients' order, so that an engine that runs them in another order changes nothing.
        batches = {name: self._draws[name].batch(step) for name in self._current}
        return self._federation.engine.run(lambda name: self._record_part(name, batches[name]), self._current, step)

    def asked(self, step: int) -> int:
        return len(self._current)

    def probe(self) -> Bounded:
        name = self._names[0]
        if self._federation.protects_clients:
            return self._client_part(name, 0).bounded
        return self._record_part(name, torch.zeros(1, dtype=torch.int64)).bounded

    def _record_part(self, name: str, indices: Tensor) -> ClippedSum:
        federation = self._federation
        features, targets = batch_on(federation.model, federation.clients[name], indices)
        return clipped_gradient_sum(
            federation.model, federation.loss, features, targets, clip_norm=federation.plan.clip
        )

    def _client_part(self, name: str, step: int) -> ClippedSum:
        vector, _ = self._vector(name, step)
        bounded, finite = clip_vector(vector, self._federation.plan.clip)
        return ClippedSum(bounded, 0 if finite else 1)

    def apply(self, released: Mapping[str, Released], step: int) -> None:
        model = self._federation.model
        total = functools.reduce(_add, (release.value for release in released.values()))
        self._set_and_step({name: tensor / self._federation.plan.expected_batch for name, tensor in total.items()})
        del model

    def plain(self, step: int) -> None:
        vectors = [self._vector(name, step) for name in self._cohort(step)]
        count = sum(size for _, size in vectors)
        if not count:
            return
        weighted = [{name: tensor * (size / count) for name, tensor in vector.items()} for vector, size in vectors]
        self._set_and_step(functools.reduce(_add, weighted))

    def _set_and_step(self, gradient: Mapping[str, Tensor]) -> None:
        for name, parameter in trainable(self._federation.model).items():
            parameter.grad = gradient[name].to(dtype=parameter.dtype, device=parameter.device)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        draws = {name: draw.state() for name, draw in self._draws.items()}
        if self._federation.protects_clients:
            draws["cohorts"] = self._cohorts.state()
        return {"optimizer": self._optimizer.state_dict(), "draws": draws}

    def restore(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        self._start(state["draws"])
