"""Rounds in which each client is one vector: its gradient or its update, clipped as a whole where clients are protected."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from sfumato.data.participation import MinSeparation, SeparatedDraws
from sfumato.data.records import Records
from sfumato.errors import PlanError
from sfumato.gradients import spare
from sfumato.gradients.clipped import ClippedSum
from sfumato.gradients.clipping import clip_vectors, weighted_sum
from sfumato.gradients.support import running, trainable
from sfumato.learning.aggregation import Aggregation, ServerNoise
from sfumato.learning.federated import (
    Answer,
    ClientAlgorithm,
    Federation,
    Server,
    Task,
    check_federation,
    who_is_protected,
)
from sfumato.learning.groups import ALONE, CHANNELS_LAST, STACKED, Group, Hints, draws_numbers, running_statistics
from sfumato.learning.procedure import Procedure, check_optimizer, optimizer_state, restore_optimizer
from sfumato.learning.weighting import ByRecords, Uniform
from sfumato.privacy.bounded import Bounded, Released, Tensors

_AGREEMENT = 1e-6  # of an update's size: far above float64's rounding, far below what a fault would do


@final
class ClientRounds(Procedure):
    """Each round: draw a cohort, let each client compute its vector, and hand the released or weighted mean to the server.

    With a plan of unit "client" the cohort is drawn by the plan's sampler, also without privacy; otherwise every client takes
    part in every round.
    """

    def __init__(self, federation: Federation, noise: Aggregation | None, algorithm: ClientAlgorithm) -> None:
        check_federation(federation)
        algorithm.check(federation)
        self._federation, self._algorithm = federation, algorithm
        plan, model = federation.plan, federation.model
        optimizer = algorithm.server_optimizer(model)
        check_optimizer(model, optimizer)
        self._server = Server(model, optimizer, algorithm.shared(model))
        self._shapes = algorithm.shapes(model)
        self._first = algorithm.kept(model)
        self._kept: dict[int, Tensors] = {}
        count = len(federation.clients)
        self.aggregation = (noise or ServerNoise()).begin()
        self.aggregation.check_clients(count)
        self.aggregation.check_plan(plan)
        self._weighting = federation.weighting
        if plan.is_private:
            self._check_private()
        self.not_covered = (self.aggregation.trust, *who_is_protected(federation))
        if plan.is_private and federation.quorum:
            self.not_covered += ("Whether a round was void, which depends on how many clients answered.",)
        expected = plan.sampler.rate * count if federation.counts_clients else count
        if federation.quorum > expected:
            raise PlanError(
                f"A quorum of {federation.quorum} is more than the {expected:.4g} clients that a round expects; lower it."
            )
        if federation.available is not None and not (
            federation.counts_clients and isinstance(plan.sampler, MinSeparation)
        ):
            raise PlanError(
                'Only sampling "min-separation" of clients is accounted for those who come as they like; leave `available` '
                "out, or use it."
            )
        self._draws = plan.sampler.start(count, federation.source) if federation.counts_clients else None
        self._asked = self._answered = 0
        self._hints, self._key = Hints(), 0
        ways = [ALONE]
        if any(isinstance(module, nn.Conv2d) for module in model.modules()):
            ways.insert(0, CHANNELS_LAST)
        if not draws_numbers(model):
            ways.insert(0, STACKED)
        self._runner = federation.engine.start(
            Task(
                federation.clients, self._work, tuple(ways), self._agrees,
                sum(value.numel() for value in self._shapes.values()), draws_numbers(model),
            )
        )  # fmt: skip
        self.use_terms(plan.terms(0))

    def _check_private(self) -> None:
        plan = self._federation.plan
        if isinstance(self._weighting, ByRecords):
            self._weighting = Uniform()
        if not self._weighting.is_bounded:
            raise PlanError(
                f"{self._weighting} does not bound how much a client counts, so no noise would do; use Uniform() or UpTo(most)."
            )
        if plan.sampler.amplifies and not self.aggregation.hides_cohort:
            raise PlanError(
                "Noise that the clients add reveals who was drawn, so sampling them may not lower the epsilon; use "
                "ServerNoise, or let every client take part in every round (batch_size equal to the number of clients)."
            )

    @override
    def shapes(self) -> Mapping[str, Tensor]:
        return self._shapes

    @override
    def contributions(self, step: int) -> dict[str, ClippedSum]:
        answer = self._answer(step)
        if answer.parts:
            name_at = self._federation.clients.name_at
            parts = {name_at(number): ClippedSum(part, 0) for number, part in answer.parts.items()}
            first = next(iter(parts))
            return {**parts, first: ClippedSum(parts[first].bounded, answer.nonfinite)}
        if not answer.total:
            return {}
        return {"all": ClippedSum(Bounded(answer.total, self.terms.bounded.bound), answer.nonfinite)}

    def _answer(self, step: int) -> Answer:
        """Return the answers of a cohort as one."""
        cohort = self._cohort(step)
        self._key = int(self._federation.source.words(1))
        self._asked = len(cohort)
        whole = Answer.joined(self._runner.answers(cohort, step))
        self._answered = whole.answered
        self.refused += whole.refused
        if not self.is_void:
            self._kept.update(whole.kept)
        return whole

    def _cohort(self, step: int) -> list[int]:
        if self._draws is None:
            return list(range(len(self._federation.clients)))
        if self._federation.available is None:
            return self._draws.batch(step).tolist()
        assert isinstance(self._draws, SeparatedDraws)
        return self._draws.batch(step, self._federation.available(step)).tolist()

    @property
    @override
    def is_void(self) -> bool:
        return self._answered < self._federation.quorum

    @override
    def void(self) -> None:
        self.aggregation.void()

    def _work(self, clients: Sequence[int], records: Sequence[Records], way: str) -> Answer:
        answer, vectors = self._computed(clients, records, way)
        for value in vectors.values():
            spare.give(value)
        return answer

    def _computed(
        self, clients: Sequence[int], records: Sequence[Records], way: str
    ) -> tuple[Answer, dict[str, Tensor]]:
        private = self._federation.plan.is_private
        with running(self._federation.model, "on a client's records", quote=not private):
            group = Group(self._federation.model, self._federation.loss, clients, records, self._key, way, self._hints)
            work = self._algorithm.client(group, self._server.shared, self._kept_by(clients))
        vectors = {name: work.vectors[name] for name in self._shapes if name in work.vectors}
        wrong = len(vectors) != len(work.vectors) or any(
            name not in vectors or vectors[name].shape != (len(clients), *value.shape)
            for name, value in self._shapes.items()
        )
        if wrong:
            return Answer({}, 0.0, 0, refused=len(clients)), {}
        weights = self._weighting.of(group.sizes).to(next(iter(vectors.values())).device)
        if private:
            return self._bounded(clients, vectors, weights, work.kept), vectors
        broken = torch.zeros(len(clients), dtype=torch.bool, device=weights.device)
        for value in vectors.values():
            # A sum of sizes is read faster than each value; where it is too large for the number type, each value decides.
            doubtful = ~torch.isfinite(torch.linalg.vector_norm(value.flatten(1), 1, dim=1))
            if bool(doubtful.any()):
                broken |= ~torch.isfinite(value.flatten(1)).all(1)
        total = {name: weighted_sum(value, weights, broken) for name, value in vectors.items()}
        count = int(broken.sum())
        weight = float(weights.masked_fill(broken, 0).sum())
        kept = _kept_of(clients, work.kept, broken)
        return Answer(total, weight, len(clients) - count, count, 0, kept), vectors

    def _bounded(
        self, clients: Sequence[int], vectors: dict[str, Tensor], weights: Tensor, kept: Mapping[str, Tensor]
    ) -> Answer:
        clipping = self.terms.bounded
        nobody = torch.zeros(len(clients), dtype=torch.bool)
        if self.aggregation.takes_total:
            bounded, broken = clip_vectors(vectors, clipping, weights)
            kept_by = _kept_of(clients, kept, nobody)
            return Answer(bounded.value, float(weights.sum()), len(clients), broken, 0, kept_by)
        parts, nonfinite = {}, 0
        for row, number in enumerate(clients):
            one = slice(row, row + 1)
            part, broken = clip_vectors({n: value[one] for n, value in vectors.items()}, clipping, weights[one])
            parts[number] = part
            nonfinite += broken
        return Answer({}, 0.0, len(clients), nonfinite, 0, _kept_of(clients, kept, nobody), parts)

    def _agrees(self, clients: Sequence[int], records: Sequence[Records], way: str) -> bool:
        model = copy.deepcopy(self._federation.model).double()
        loss = self._federation.loss
        loss = copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss
        wide = [_double(one) for one in records]
        shared = {name: value.double() for name, value in self._server.shared.items()}
        kept = {name: value.double() for name, value in self._kept_by(clients).items()}
        found = []
        for each in (ALONE, way):
            group = Group(model, loss, clients, wide, self._key, each, Hints())
            found.append(self._algorithm.client(group, shared, kept).vectors)
        apart = sum(float((found[1][name] - value).square().sum()) for name, value in found[0].items())
        size = sum(float(value.square().sum()) for value in found[0].values())
        return apart <= _AGREEMENT**2 * size

    def _kept_by(self, clients: Sequence[int]) -> dict[str, Tensor]:
        of = [self._kept.get(number, self._first) for number in clients]
        return {name: torch.stack([one[name] for one in of]) for name in self._first}

    @override
    def asked(self, step: int) -> int:
        return self._asked

    @override
    def probe(self) -> Bounded:
        number = 0
        kept = self._first
        with running(self._federation.model, "on a client's records", quote=False):
            records = [self._federation.clients.at(number)]
            group = Group(self._federation.model, self._federation.loss, [number], records, self._key, ALONE, Hints())
            stacked = {name: value.unsqueeze(0) for name, value in kept.items()}
            vectors = self._algorithm.client(group, self._server.shared, stacked).vectors
        return clip_vectors(vectors, self.terms.bounded, self._weighting.of(group.sizes))[0]

    @override
    def apply(self, released: Mapping[str, Released], step: int) -> None:
        sums = [release.value for release in released.values()]
        if sums:  # nothing if every client was lost and, with LocalNoise, nobody else adds any
            expected = self.terms.rate * self._federation.plan.population * self._weighting.expected
            mean = {name: torch.stack([one[name] for one in sums]).sum(0) / expected for name in self._shapes}
            self._algorithm.update(self._server, mean, self.terms.rate)

    @override
    def plain(self, step: int) -> None:
        answer = self._answer(step)
        if answer.weight and not self.is_void:
            mean = {name: value / answer.weight for name, value in answer.total.items()}
            self._algorithm.update(self._server, mean, answer.answered / len(self._federation.clients))

    @override
    def personal_model(self, client: str) -> nn.Module:
        model = copy.deepcopy(self._federation.model)
        kept = self._kept.get(self._federation.clients.index_of(client), self._first)
        parameters = {**trainable(model), **running_statistics(model)}
        with torch.no_grad():
            for key, value in self._algorithm.personal(model, kept).items():
                parameters[key].copy_(value)
        return model

    @override
    def skip(self) -> None:
        pass

    @override
    def data_digest(self) -> str:
        return self._federation.clients.identity()

    @override
    def state(self) -> dict[str, Any]:
        return {
            "optimizer": optimizer_state(self._server.optimizer),
            "draws": None if self._draws is None else self._draws.state(),
            "shared": self._server.shared,
            "kept": self._kept,
            "aggregation": self.aggregation.state(),
        }

    @override
    def restore(self, state: dict[str, Any]) -> None:
        restore_optimizer(self._server.optimizer, state["optimizer"])
        federation = self._federation
        if self._draws is not None:
            sampler = federation.plan.sampler
            self._draws = sampler.start(len(federation.clients), federation.source, state["draws"])
        self._server.shared.update(state["shared"])
        self._kept = dict(state["kept"])
        self.aggregation.restore(state["aggregation"])


def _kept_of(clients: Sequence[int], kept: Mapping[str, Tensor], broken: Tensor) -> dict[int, Tensors]:
    if not kept:
        return {}
    return {
        number: {name: value[row].clone() for name, value in kept.items()}
        for row, number in enumerate(clients)
        if not bool(broken[row])
    }


def _double(records: Records) -> Records:
    features, targets = (
        value.double() if value.is_floating_point() else value for value in (records.features, records.targets)
    )
    return dataclasses.replace(records, features=features, targets=targets)
