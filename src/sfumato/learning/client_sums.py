"""Sums in which each client is one vector: its gradient or its update, clipped as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor
from typing_extensions import override

from sfumato.data.sampling import FullBatch
from sfumato.errors import PlanError
from sfumato.gradients.clipped import ClippedSum
from sfumato.gradients.clipping import clip_vector
from sfumato.gradients.support import running
from sfumato.learning.aggregation import Aggregation, ServerNoise
from sfumato.learning.federated import (
    Federation,
    MakeOptimizer,
    check_federation,
    digest_of,
    made_for,
    who_is_protected,
)
from sfumato.learning.procedure import Procedure, optimizer_state, restore_optimizer, take_step
from sfumato.privacy.bounded import Bounded, Released


@final
@dataclass(frozen=True)
class Vector:
    """What one client computed, before clipping: in the direction of a gradient, by parameter name.

    Attributes:
        value: Named tensors.
        weight: Records behind it; used only without privacy.
    """

    value: dict[str, Tensor]
    weight: int


@final
class ClientSums(Procedure):
    """Each round: draw a cohort, clip each client's vector, and hand the noised sum over the expected cohort to the server.

    Without privacy every client takes part and its vector is weighted by its number of records.
    """

    def __init__(
        self,
        federation: Federation,
        noise: Aggregation | None,
        make: MakeOptimizer,
        work: Callable[[str], Vector],
    ) -> None:
        check_federation(federation)
        self._federation, self._work = federation, work
        self._names = list(federation.clients)
        self._optimizer = made_for(federation.model, make)
        self.aggregation = noise or ServerNoise()
        self.aggregation.check_clients(len(self._names))
        if federation.plan.is_private and not (
            self.aggregation.hides_cohort or isinstance(federation.plan.sampler, FullBatch)
        ):
            raise PlanError(
                "Noise that the clients add reveals who was drawn, so sampling them may not lower the epsilon; use "
                "ServerNoise, or let every client take part in every round (batch_size equal to the number of clients)."
            )
        self.not_covered = (self.aggregation.trust, *who_is_protected(federation))
        self._draws = federation.plan.sampler.start(len(self._names), federation.source)
        self._asked = 0
        self.use_terms(federation.plan.terms(0))

    @override
    def contributions(self, step: int) -> dict[str, ClippedSum]:
        cohort = [self._names[index] for index in self._draws.batch(step).tolist()]
        self._asked = len(cohort)
        return self._federation.engine.run(self._part, cohort, step)

    def _part(self, name: str) -> ClippedSum:
        with running(self._federation.model, "on a client's records", quote=False):
            vector = self._work(name)
        bounded, finite = clip_vector(vector.value, self.terms.bounded)
        return ClippedSum(bounded, 0 if finite else 1)

    @override
    def asked(self, step: int) -> int:
        return self._asked

    @override
    def probe(self) -> Bounded:
        return self._part(self._names[0]).bounded

    @override
    def apply(self, released: Mapping[str, Released], step: int) -> None:
        # Empty if every client was lost and, with LocalNoise, nobody else adds any.
        sums = (release.value for release in released.values())
        take_step(self._federation.model, self._optimizer, sums, self.terms.rate * self._federation.plan.population)

    @override
    def plain(self, step: int) -> None:
        answers = self._federation.engine.run(self._plain_work, self._names, step)
        weight = sum(answer.weight for answer in answers.values())
        if weight:
            weighted = (
                {name: tensor * answer.weight for name, tensor in answer.value.items()} for answer in answers.values()
            )
            take_step(self._federation.model, self._optimizer, weighted, weight)

    def _plain_work(self, name: str) -> Vector:
        with running(self._federation.model, "on a client's records", quote=True):
            return self._work(name)

    @override
    def skip(self) -> None:
        pass

    @override
    def data_digest(self) -> str:
        return digest_of(self._federation)

    @override
    def state(self) -> dict[str, Any]:
        return {"optimizer": optimizer_state(self._optimizer), "draws": self._draws.state()}

    @override
    def restore(self, state: dict[str, Any]) -> None:
        restore_optimizer(self._optimizer, state["optimizer"])
        self._draws = self._federation.plan.sampler.start(len(self._names), self._federation.source, state["draws"])
