"""FedAvg that protects records: DP-SGD at every client, with averages of their models in between."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from typing_extensions import override

from sfumato import _checks
from sfumato.errors import PlanError
from sfumato.gradients.clipped import ClippedSum
from sfumato.gradients.private import PrivateGradient
from sfumato.gradients.support import trainable
from sfumato.gradients.terms.term import Workspace
from sfumato.learning.aggregation import LocalNoise
from sfumato.learning.blame import naming
from sfumato.learning.federated import (
    Federation,
    check_federation,
    check_for_records,
    made_for,
    start_draws,
    who_is_protected,
)
from sfumato.learning.local_training import MakeOptimizer
from sfumato.learning.procedure import Procedure, batch_on, optimizer_state, restore_optimizer, take_step
from sfumato.privacy.bounded import Bounded, Released

_SHOWN = 5  # names of clients in a message


@final
class LocalPrivateSteps(Procedure):
    """DP-SGD at every client in lock-step, with averages in between. A record is at one client: parallel composition."""

    def __init__(self, federation: Federation, local: MakeOptimizer, local_steps: int) -> None:
        check_federation(federation)
        check_for_records(federation)
        self._federation, self._local, self._local_steps = federation, local, local_steps
        self._sizes = _declared(federation)
        self._witness: tuple[str, int] | None = None  # a client that answered, and the step
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
        self._optimizers = {name: made_for(model, local) for name, model in self._models.items()}
        self.aggregation = LocalNoise()
        self.not_covered = (self.aggregation.trust, *who_is_protected(federation))

    @override
    def contributions(self, step: int) -> dict[str, ClippedSum]:
        names = list(self._federation.clients)
        batches = {name: self._draws[name].batch(step) for name in names}
        answers = self._federation.engine.run(lambda name: self._part(name, batches[name]), names, step)
        self._witness = next(((name, step) for name in answers), None)
        return answers

    def _part(self, name: str, indices: Tensor) -> ClippedSum:
        features, targets = batch_on(self._models[name], self._federation.clients[name], indices)
        return self._gradients[name].sum(features, targets, self.terms.bounded)

    @override
    def asked(self, step: int) -> int:
        return len(self._federation.clients)

    @override
    def probe(self) -> Bounded | None:
        if self._witness is None:
            return None
        name, step = self._witness
        with naming(name, step, "its self-check"):
            return self._part(name, torch.zeros(1, dtype=torch.int64)).bounded

    @override
    def apply(self, released: Mapping[str, Released], step: int) -> None:
        plan = self._federation.plan
        for name, release in released.items():
            divisor = self.terms.rate * self._sizes[name]
            take_step(self._models[name], self._optimizers[name], [release.value], divisor)
        if (step + 1) % self._local_steps == 0 or step + 1 == plan.steps:
            self._average()

    def _average(self) -> None:
        total = sum(self._sizes.values())
        local = [(trainable(self._models[name]), size / total) for name, size in self._sizes.items()]
        with torch.no_grad():
            for key, parameter in trainable(self._federation.model).items():
                parameter.copy_(torch.stack([weights[key] * share for weights, share in local]).sum(0))
        for name, model in self._models.items():
            model.load_state_dict(self._federation.model.state_dict())
            self._optimizers[name] = made_for(model, self._local)

    @override
    def plain(self, step: int) -> None:
        raise PlanError("Local private steps need a private plan; this is a fault in sfumato.")

    @override
    def skip(self) -> None:
        # A boundary may have been among the lost steps; an extra average is post-processing.
        self._average()

    @override
    def data_digest(self) -> str:
        return self._federation.clients.identity()

    @override
    def state(self) -> dict[str, Any]:
        return {
            "draws": {name: draw.state() for name, draw in self._draws.items()},
            "models": {name: model.state_dict() for name, model in self._models.items()},
            "optimizers": {name: optimizer_state(optimizer) for name, optimizer in self._optimizers.items()},
        }

    @override
    def restore(self, state: dict[str, Any]) -> None:
        self._draws = start_draws(self._federation, state["draws"])
        for name, model in self._models.items():
            model.load_state_dict(state["models"][name])
            restore_optimizer(self._optimizers[name], state["optimizers"][name])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _declared(federation: Federation) -> dict[str, int]:
    populations = federation.populations
    if populations is None or set(populations) != set(federation.clients):
        raise PlanError(
            "FedAvg that protects records divides each client's sums by its public size: pass populations, a mapping "
            f"of each client ({_some(list(federation.clients))}) to its declared number of records."
        )
    return {name: _checks.count(f'population of "{name}"', populations[name]) for name in federation.clients}
