"""FedAvg: clients train on their own for a while, then their models are averaged (McMahan et al. 2017)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import SGD

from sfumato import _checks
from sfumato.errors import PlanError
from sfumato.gradients.clipped import ClippedSum
from sfumato.gradients.private import PrivateGradient
from sfumato.gradients.support import trainable
from sfumato.gradients.terms.term import Workspace
from sfumato.learning.aggregation import Aggregation, LocalNoise
from sfumato.learning.client_sums import ClientSums, Vector
from sfumato.learning.federated import (
    Algorithm,
    Federation,
    MakeOptimizer,
    check_federation,
    digest_of,
    made_for,
    start_draws,
    who_is_protected,
)
from sfumato.learning.procedure import Procedure, batch_on, mean_loss, optimizer_state, restore_optimizer, take_step
from sfumato.privacy.bounded import Bounded, Released

_AS_IT_IS: MakeOptimizer = functools.partial(SGD, lr=1.0)


@final
@dataclass(frozen=True)
class FedAvg(Algorithm):
    """Clients train on their own for `local_steps`, then their models are averaged.

    With unit "client" (and without privacy) a step of the plan is a round: each client's update is clipped as a whole, and
    the noised sum of updates goes to the server's optimiser. With unit "record" a step of the plan is a local step of
    DP-SGD with the client's own noise; after every `local_steps` of them, and at the end, the models are averaged by the
    declared populations.

    Args:
        local: Makes a client's optimiser, anew in every round.
        local_steps: Steps of a client between two averages.
        batch_size: Records of a plain local step; None means all of the client's. With unit "record" the plan's
            sampler draws instead.
        server: Makes the server's optimiser for the averaged update; the default takes it as it is.

    Raises:
        InputError: a count is below 1.
    """

    local: MakeOptimizer
    local_steps: int = 1
    batch_size: int | None = None
    server: MakeOptimizer = _AS_IT_IS

    def __post_init__(self) -> None:
        _checks.count("local_steps", self.local_steps)
        if self.batch_size is not None:
            _checks.count("batch_size", self.batch_size)

    def procedure(self, federation: Federation, noise: Aggregation | None) -> Procedure:
        """Return the procedure for the unit of the plan."""
        if federation.plan.is_private and not federation.protects_clients:
            if noise is not None and not isinstance(noise, LocalNoise):
                raise PlanError(
                    "FedAvg that protects records adds noise inside every client (LocalNoise): several local steps "
                    'cannot be bounded for one record afterwards. Use FedSGD for other noise, or unit "client".'
                )
            return _LocalPrivateSteps(federation, self)
        made_for(federation.model, self.local)  # refuses an unfit optimiser before anything is charged
        return ClientSums(federation, noise, self.server, functools.partial(_update, federation, self))


def _update(federation: Federation, algorithm: FedAvg, name: str) -> Vector:
    """Train a copy of the model on one client's records; return (start - end), which points like a gradient."""
    start = trainable(federation.model)
    # A fresh copy for each client, so that nothing the model keeps of one (a buffer, an attribute) reaches the next.
    scratch = copy.deepcopy(federation.model)
    optimizer = made_for(scratch, algorithm.local)
    records = federation.clients[name]
    size = min(algorithm.batch_size or len(records), len(records))
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(algorithm.local_steps):
        if len(order) < size:
            order = federation.source.permutation(len(records))
        indices, order = order[:size], order[size:]
        features, targets = batch_on(scratch, records, indices)
        optimizer.zero_grad()
        mean_loss(federation.loss(scratch(features), targets)).backward()
        optimizer.step()
    moved = {key: start[key].detach() - parameter.detach() for key, parameter in trainable(scratch).items()}
    return Vector(moved, len(records))


@final
class _LocalPrivateSteps(Procedure):
    """DP-SGD at every client in lock-step, with averages in between. A record is at one client: parallel composition."""

    def __init__(self, federation: Federation, algorithm: FedAvg) -> None:
        check_federation(federation)
        self._federation, self._algorithm = federation, algorithm
        self._sizes = _declared(federation)
        self._draws = start_draws(federation, {})
        self.use_terms(federation.plan.terms(0))
        self._models = {name: copy.deepcopy(federation.model) for name in federation.clients}
        space = Workspace()  # one for all, because the clients of this process take their steps in turn
        self._gradients = {
            name: PrivateGradient(
                model, federation.loss, federation.plan.terms(0).bounded, compute=federation.compute, space=space
            )
            for name, model in self._models.items()
        }
        self._optimizers = {name: made_for(model, algorithm.local) for name, model in self._models.items()}
        self.aggregation = LocalNoise()
        self.not_covered = (self.aggregation.trust, *who_is_protected(federation))

    def contributions(self, step: int) -> dict[str, ClippedSum]:
        names = list(self._federation.clients)
        batches = {name: self._draws[name].batch(step) for name in names}
        return self._federation.engine.run(lambda name: self._part(name, batches[name]), names, step)

    def _part(self, name: str, indices: Tensor) -> ClippedSum:
        features, targets = batch_on(self._models[name], self._federation.clients[name], indices)
        return self._gradients[name].sum(features, targets, self.terms.bounded)

    def asked(self, step: int) -> int:
        return len(self._federation.clients)

    def probe(self) -> Bounded:
        return self._part(next(iter(self._federation.clients)), torch.zeros(1, dtype=torch.int64)).bounded

    def apply(self, released: Mapping[str, Released], step: int) -> None:
        plan = self._federation.plan
        for name, release in released.items():
            divisor = self.terms.rate * self._sizes[name]
            take_step(self._models[name], self._optimizers[name], [release.value], divisor)
        if (step + 1) % self._algorithm.local_steps == 0 or step + 1 == plan.steps:
            self._average()

    def _average(self) -> None:
        total = sum(self._sizes.values())
        local = [(trainable(self._models[name]), size / total) for name, size in self._sizes.items()]
        with torch.no_grad():
            for key, parameter in trainable(self._federation.model).items():
                parameter.copy_(torch.stack([weights[key] * share for weights, share in local]).sum(0))
        for name, model in self._models.items():
            model.load_state_dict(self._federation.model.state_dict())
            self._optimizers[name] = made_for(model, self._algorithm.local)

    def plain(self, step: int) -> None:
        raise PlanError("Local private steps need a private plan; this is a fault in sfumato.")

    def skip(self) -> None:
        # A boundary may have been among the lost steps; an extra average is post-processing.
        self._average()

    def data_digest(self) -> str:
        return digest_of(self._federation)

    def state(self) -> dict[str, Any]:
        return {
            "draws": {name: draw.state() for name, draw in self._draws.items()},
            "models": {name: model.state_dict() for name, model in self._models.items()},
            "optimizers": {name: optimizer_state(optimizer) for name, optimizer in self._optimizers.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._draws = start_draws(self._federation, state["draws"])
        for name, model in self._models.items():
            model.load_state_dict(state["models"][name])
            restore_optimizer(self._optimizers[name], state["optimizers"][name])


def _declared(federation: Federation) -> dict[str, int]:
    populations = federation.populations
    if populations is None or set(populations) != set(federation.clients):
        raise PlanError(
            "FedAvg that protects records divides each client's sums by its public size: pass populations, a mapping "
            f"of each client ({', '.join(federation.clients)}) to its declared number of records."
        )
    return {name: _checks.count(f'population of "{name}"', populations[name]) for name in federation.clients}
