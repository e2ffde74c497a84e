"""FedSGD: one gradient of each client a round (McMahan et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from sfumato.errors import PlanError
from sfumato.gradients.clipped import ClippedSum
from sfumato.gradients.private import PrivateGradient
from sfumato.gradients.support import running, trainable
from sfumato.learning.aggregation import Aggregation, ServerNoise
from sfumato.learning.blame import naming
from sfumato.learning.client_rounds import ClientRounds
from sfumato.learning.federated import (
    ClientAlgorithm,
    Federation,
    Work,
    check_federation,
    check_for_records,
    made_for,
    start_draws,
    who_is_protected,
)
from sfumato.learning.groups import Group, running_statistics
from sfumato.learning.local_training import MakeOptimizer
from sfumato.learning.procedure import (
    Procedure,
    batch_on,
    mean_loss,
    optimizer_state,
    restore_optimizer,
    take_step,
)
from sfumato.privacy.bounded import Bounded, Released, Tensors


@final
@dataclass(frozen=True)
class FedSGD(ClientAlgorithm):
    """One gradient of each client a round.

    With unit "record" every client clips and sums the gradients of its own records; the sum over all clients is noised
    once: the same model as pooled DP-SGD. With unit "client" each client's mean gradient is clipped as a whole.

    Args:
        optimizer: Makes the server's optimiser.
    """

    optimizer: MakeOptimizer

    def procedure(self, federation: Federation, noise: Aggregation | None) -> Procedure:
        """Return the procedure for the unit of the plan."""
        if federation.counts_clients:
            return ClientRounds(federation, noise, self)
        return _RecordSums(federation, noise, self.optimizer)

    @override
    def check(self, federation: Federation) -> None:
        if running_statistics(federation.model):
            raise PlanError(
                "One gradient of each client moves no running statistics, so batch normalisation would never learn them; use "
                "FedAvg, or torch.nn.GroupNorm in its place."
            )

    @override
    def client(self, group: Group, shared: Tensors, kept: Mapping[str, Tensor]) -> Work:
        return Work(group.gradients())

    @override
    def shapes(self, model: nn.Module) -> dict[str, Tensor]:
        return trainable(model)

    @override
    def server_optimizer(self, model: nn.Module) -> Optimizer:
        return made_for(model, self.optimizer)


def _loss_on(federation: Federation, model: nn.Module, name: str, indices: Tensor) -> Tensor:
    features, targets = batch_on(model, federation.clients[name], indices)
    return mean_loss(federation.loss(model(features), targets))


@final
class _RecordSums(Procedure):
    """One sum of clipped record gradients over all clients a round."""

    def __init__(self, federation: Federation, noise: Aggregation | None, make: MakeOptimizer) -> None:
        check_federation(federation)
        check_for_records(federation)
        self._federation = federation
        self._names = list(federation.clients)
        self._witness: tuple[str, int] | None = None  # a client that answered, and the step
        self._optimizer = made_for(federation.model, make)
        plan = federation.plan
        if plan.is_private:
            self._gradient = PrivateGradient(
                federation.model, federation.loss, plan.terms(0).bounded, compute=federation.compute
            )
        self._draws = start_draws(federation, {})
        self.use_terms(plan.terms(0))
        self.aggregation = (noise or ServerNoise()).begin()
        self.aggregation.check_clients(len(self._names))
        self.aggregation.check_plan(plan)
        self.not_covered = (self.aggregation.trust, *who_is_protected(federation))

    def contributions(self, step: int) -> dict[str, ClippedSum]:
        # Drawn here, in the clients' order, so that an engine that runs them in another order changes nothing.
        batches = {name: self._draws[name].batch(step) for name in self._names}
        answers = self._federation.engine.run(lambda name: self._part(name, batches[name]), self._names, step)
        self._witness = next(((name, step) for name in answers), None)
        return answers

    def _part(self, name: str, indices: Tensor) -> ClippedSum:
        federation = self._federation
        features, targets = batch_on(federation.model, federation.clients[name], indices)
        return self._gradient.sum(features, targets, self.terms.bounded)

    def asked(self, step: int) -> int:
        return len(self._names)

    def probe(self) -> Bounded | None:
        if self._witness is None:
            return None
        name, step = self._witness
        with naming(name, step, "its self-check"):
            return self._part(name, torch.zeros(1, dtype=torch.int64)).bounded

    def apply(self, released: Mapping[str, Released], step: int) -> None:
        # Empty if every client was lost and, with LocalNoise, nobody else adds any.
        sums = (release.value for release in released.values())
        take_step(self._federation.model, self._optimizer, sums, self.terms.rate * self._federation.plan.population)

    def plain(self, step: int) -> None:
        batches = {name: self._draws[name].batch(step) for name in self._names}
        answers = self._federation.engine.run(lambda name: len(batches[name]), self._names, step)
        total = sum(answers.values())
        self._optimizer.zero_grad()
        for name, size in answers.items():
            if size:
                with (
                    naming(name, step, "its part"),
                    running(self._federation.model, "on a client's records", quote=True),
                ):
                    loss = _loss_on(self._federation, self._federation.model, name, batches[name])
                    (loss * (size / total)).backward()
        if total:
            self._optimizer.step()

    def skip(self) -> None:
        pass

    def data_digest(self) -> str:
        return self._federation.clients.identity()

    def state(self) -> dict[str, Any]:
        draws = {name: draw.state() for name, draw in self._draws.items()}
        return {"optimizer": optimizer_state(self._optimizer), "draws": draws}

    def restore(self, state: dict[str, Any]) -> None:
        restore_optimizer(self._optimizer, state["optimizer"])
        self._draws = start_draws(self._federation, state["draws"])
