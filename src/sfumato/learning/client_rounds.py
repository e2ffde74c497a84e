"""Rounds in which each client is one vector: its gradient or its update, clipped as a whole where clients are protected."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from sfumato.data.client_names import kind_of
from sfumato.data.participation import MinSeparation, SeparatedDraws
from sfumato.data.records import Records
from sfumato.errors import DivergedError, InputError, PlanError, UnsupportedModelError
from sfumato.gradients import spare
from sfumato.gradients.clipped import ClippedSum, Loss
from sfumato.gradients.clipping import MAX_UNITS, clip_vectors, weighted_sum
from sfumato.gradients.support import running, trainable
from sfumato.learning.aggregation import Aggregation, ServerNoise
from sfumato.learning.agreement import agrees
from sfumato.learning.blame import naming
from sfumato.learning.federated import (
    Answer,
    ClientAlgorithm,
    Federation,
    Server,
    Task,
    check_federation,
    who_is_protected,
)
from sfumato.learning.first_layer import misfit
from sfumato.learning.group_data import ALONE, CHANNELS_LAST, STACKED
from sfumato.learning.groups import Draws, Group, Hints, draws_numbers, running_statistics
from sfumato.learning.procedure import Procedure, check_optimizer, optimizer_state, restore_optimizer
from sfumato.learning.weighting import BY_RECORDS, Uniform
from sfumato.privacy.bounded import Bounded, Released, Tensors


@final
class ClientRounds(Procedure):
    """Each round: draw a cohort, let each client compute its vector, and hand the released or weighted mean to the server.

    With a plan of unit "client" the cohort is drawn by the plan's sampler, also without privacy; otherwise every client takes
    part in every round.
    """

    def __init__(self, federation: Federation, noise: Aggregation | None, algorithm: ClientAlgorithm) -> None:
        check_federation(federation)
        _check_copied(federation.loss)
        algorithm.check(federation)
        self._federation, self._algorithm = federation, algorithm
        plan, model = federation.plan, federation.model
        optimizer = algorithm.server_optimizer(model)
        check_optimizer(model, optimizer)
        self._server = Server(model, optimizer, algorithm.shared(model))
        self._shapes = algorithm.shapes(model)
        self._resting = running_statistics(model).keys() - self._shapes.keys()
        self._first = algorithm.kept(model)
        self._kept: dict[int, Tensors] = {}
        self._to_keep: Mapping[int, Tensors] = {}  # of the round that is under way
        count = len(federation.clients)
        self.aggregation = (noise or ServerNoise()).begin()
        self.aggregation.check_clients(count)
        self.aggregation.check_plan(plan)
        self._weighting = federation.weighting
        if self._weighting is BY_RECORDS and (plan.is_private or algorithm.counts_alike):  # nobody asked for it
            self._weighting = Uniform()
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
        self._witness: tuple[int, int] | None = None  # a client that answered, and the step
        draws = Draws(found=draws_numbers(model) or None)
        self._hints, self._key, self._step = Hints(draws=draws), 0, 0
        ways = [ALONE]
        if any(isinstance(module, nn.Conv2d) for module in model.modules()):
            ways.insert(0, CHANNELS_LAST)
        if algorithm.is_stackable(model) and not draws.found:
            ways.insert(0, STACKED)
        self._runner = federation.engine.start(
            Task(
                federation.clients, self._work, tuple(ways), self._agrees,
                sum(value.numel() for value in self._shapes.values()), draws,
            )
        )  # fmt: skip
        self.use_terms(plan.terms(0))

    def _check_private(self) -> None:
        plan = self._federation.plan
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
        return self.sums(self._answer(step))

    def sums(self, answer: Answer) -> dict[str, ClippedSum]:
        """Return the bounded sums in an answer, by client where it has parts."""
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
        cohort, key = self.draw(step)
        whole = self.ask(cohort, key, step)
        self.note(len(cohort), whole)
        return whole

    def draw(self, step: int) -> tuple[list[int], int]:
        """Return the clients of step `step`, and the random number that decides the order of their records."""
        cohort = self._cohort(step)
        if self.is_private and len(cohort) > MAX_UNITS:
            raise PlanError(f"A private cohort may hold at most {MAX_UNITS} clients; lower the batch size.")
        return cohort, int(self._federation.source.words(1))

    def ask(self, clients: Sequence[int], key: int, step: int) -> Answer:
        """Return what these clients hand in, those that were not lost."""
        self._key, self._step, self._witness, draws = key, step, None, self._hints.draws
        whole = Answer.joined(self._runner.answers(clients, step))
        if draws.late:  # once in a run: from now on clients are seeded and take turns
            draws.late = False
            whole = Answer.joined(self._runner.answers(clients, step))
        return whole

    def note(self, asked: int, answer: Answer) -> None:
        """Take note of how a round went, and, unless it is void, of what its clients are to keep once it is used."""
        self._asked, self._answered = asked, answer.answered
        self.refused += answer.refused
        self.nonfinite += 0 if self.is_private else answer.nonfinite
        self._to_keep = {} if self.is_void else answer.kept

    def _cohort(self, step: int) -> list[int]:
        if self._draws is None:
            return list(range(len(self._federation.clients)))
        if self._federation.available is None:
            return self._draws.batch(step).tolist()
        assert isinstance(self._draws, SeparatedDraws)
        return self._draws.batch(step, self._come(self._federation.available(step))).tolist()

    def _come(self, available: object) -> Tensor:
        """Return the numbers of the clients that have come, whether numbers or names were told."""
        if isinstance(available, Tensor):
            return available
        if isinstance(available, str) or not isinstance(available, Iterable):
            raise InputError(
                f"available must return the numbers or the names of the clients that came, not {kind_of(available)}."
            )
        return torch.tensor([self._number(client) for client in available], dtype=torch.int64)

    def _number(self, client: object) -> int:
        try:
            if isinstance(client, str):
                return self._federation.clients.index_of(client)
            if not isinstance(client, bool):
                return operator.index(client)  # type: ignore[arg-type]
        except KeyError as error:
            raise InputError(f"available: {error.args[0]}") from None
        except TypeError:
            pass
        raise InputError(f"available must return numbers or names of clients; there is a {kind_of(client)} among them.")

    @property
    @override
    def is_void(self) -> bool:
        return self._answered < self._federation.quorum

    @override
    def void(self) -> None:
        self.aggregation.void()

    def _work(self, clients: Sequence[int], records: Sequence[Records], way: str) -> Answer:
        model = self._federation.model
        try:
            with running(model, "on a client's records", quote=not self.is_private):
                answer, vectors = self._computed(clients, records, way)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{error}{misfit(model, records[0].features)}") from error.__cause__
        for value in vectors.values():
            spare.give(value)
        return answer

    def _computed(
        self, clients: Sequence[int], records: Sequence[Records], way: str
    ) -> tuple[Answer, dict[str, Tensor]]:
        group = Group(self._federation.model, self._federation.loss, clients, records, self._key, way, self._hints)
        work = self._algorithm.client(group, self._server.shared, self._kept_by(clients))
        handed = {name: value for name, value in work.vectors.items() if name not in self._resting}
        vectors = {name: handed[name] for name in self._shapes if name in handed}
        wrong = len(vectors) != len(handed) or any(
            name not in vectors or vectors[name].shape != (len(clients), *value.shape)
            for name, value in self._shapes.items()
        )
        if wrong:
            return Answer({}, 0.0, 0, refused=len(clients)), {}
        weights = self._weighting.of(group.sizes).to(next(iter(vectors.values())).device)
        if self.is_private:
            return self._bounded(clients, vectors, weights, work.kept), vectors
        broken = torch.zeros(len(clients), dtype=torch.bool, device=weights.device)
        for value in vectors.values():
            # A sum of sizes is read faster than each value; where it is too large for the number type, each value decides.
            doubtful = ~torch.isfinite(torch.linalg.vector_norm(value.unsqueeze(-1).flatten(1), 1, dim=1))
            if bool(doubtful.any()):
                broken |= ~torch.isfinite(value.unsqueeze(-1).flatten(1)).all(1)
        total = {name: weighted_sum(value, weights, broken) for name, value in vectors.items()}
        count = int(broken.sum())
        weight = float(weights.masked_fill(broken, 0).sum())
        kept = _kept_of(clients, work.kept, broken)
        return Answer(total, weight, len(clients) - count, count, 0, kept), vectors

    def _bounded(
        self, clients: Sequence[int], vectors: dict[str, Tensor], weights: Tensor, kept: Mapping[str, Tensor]
    ) -> Answer:
        clipping = self.terms.bounded
        self._witness = clients[0], self._step
        kept_by = _kept_of(clients, kept, torch.zeros(len(clients), dtype=torch.bool))
        if self.aggregation.takes_total:
            bounded, broken = clip_vectors(vectors, clipping, weights)
            return Answer(bounded.value, float(weights.sum()), len(clients), broken, 0, kept_by)
        parts, nonfinite = {}, 0
        for row, number in enumerate(clients):
            one = slice(row, row + 1)
            part, broken = clip_vectors({n: value[one] for n, value in vectors.items()}, clipping, weights[one])
            parts[number] = part
            nonfinite += broken
        return Answer({}, 0.0, len(clients), nonfinite, 0, kept_by, parts)

    def _agrees(self, clients: Sequence[int], records: Sequence[Records], way: str) -> bool:
        def compute(group: Group) -> Tensors:
            shared = {name: value.double() for name, value in self._server.shared.items()}
            kept = {name: value.double() for name, value in self._kept_by(group.clients).items()}
            return self._algorithm.client(group, shared, kept).vectors

        federation = self._federation
        group = Group(federation.model, federation.loss, clients, records, self._key, way, self._hints)
        return agrees(group, compute)

    def _kept_by(self, clients: Sequence[int]) -> dict[str, Tensor]:
        of = [self._kept.get(number, self._first) for number in clients]
        return {name: torch.stack([one[name] for one in of]) for name in self._first}

    @override
    def asked(self, step: int) -> int:
        return self._asked

    @override
    def probe(self) -> Bounded | None:
        if self._witness is None:
            return None
        (number, step), federation = self._witness, self._federation
        with (
            naming(federation.clients.name_at(number), step, "its self-check"),
            running(federation.model, "on a client's records", quote=False),
        ):
            records = [federation.clients.at(number)]
            group = Group(federation.model, federation.loss, [number], records, self._key, ALONE, Hints())
            handed = self._algorithm.client(group, self._server.shared, self._kept_by([number])).vectors
        vectors = {name: handed[name] for name in self._shapes}
        return clip_vectors(vectors, self.terms.bounded, self._weighting.of(group.sizes))[0]

    @override
    def apply(self, released: Mapping[str, Released], step: int) -> None:
        self.use(self.released_mean(released), self.terms.rate)

    def released_mean(self, released: Mapping[str, Released]) -> Tensors:
        """Return the mean over the clients that were expected."""
        sums = [release.value for release in released.values()]
        if not sums:  # every client was lost and, with LocalNoise, nobody else adds any noise
            return {}
        expected = self.terms.rate * self._federation.plan.population * self._weighting.expected
        return {name: torch.stack([one[name] for one in sums]).sum(0) / expected for name in self._shapes}

    @override
    def plain(self, step: int) -> None:
        answer = self._answer(step)
        self.refuse_divergence(answer, step)
        self.use(self.plain_mean(answer), self.share(answer))

    def refuse_divergence(self, answer: Answer, step: int) -> None:
        """Refuse a round without privacy in which clients answered and no update was finite.

        Raises:
            DivergedError: so it was.
        """
        if answer.nonfinite and not answer.answered:
            raise DivergedError(
                f"No client's update is finite in round {step + 1}: the training diverged. Fix: lower the learning rate of the "
                "clients, and check that the loss is finite on their records."
            )

    def plain_mean(self, answer: Answer) -> Tensors:
        """Return the weighted mean of an answer; nothing if the round is void or nobody counts."""
        if not answer.weight or self.is_void:
            return {}
        return {name: value / answer.weight for name, value in answer.total.items()}

    def share(self, answer: Answer) -> float:
        """Return the share of all clients that are in an answer."""
        return answer.answered / len(self._federation.clients)

    def use(self, mean: Tensors, share: float) -> None:
        """Let the server use the mean over a share of all clients, which is used up, and the clients keep what is theirs.

        A round that is never used, because too few answered for its noise, leaves both as they were.
        """
        self._kept.update(self._to_keep)
        self._to_keep = {}
        if mean:
            self._algorithm.update(self._server, mean, share)

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

    @property
    def is_private(self) -> bool:
        """Whether the plan promises anything."""
        return self._federation.plan.is_private

    def number_of(self, client: str) -> int:
        """Return the number of the client with this name.

        Raises:
            KeyError: there is no such client.
        """
        return self._federation.clients.index_of(client)

    @property
    def settings(self) -> str:
        """What the clients and the server do, in one line."""
        return f"{self._algorithm!r} {self._weighting!r} quorum {self._federation.quorum}"

    @property
    def kept(self) -> dict[int, Tensors]:
        """What clients keep of their own, by number; private."""
        return self._kept

    @property
    def kept_at_first(self) -> Tensors:
        """What a client keeps before its first round; empty if the algorithm keeps nothing."""
        return self._first

    @property
    def has_personal_models(self) -> bool:
        """Whether a client's model differs from the server's."""
        return bool(self._algorithm.personal(self._federation.model, self._first))

    def server_state(self) -> dict[str, Any]:
        """Return what the server keeps besides the model."""
        return {"optimizer": optimizer_state(self._server.optimizer), "shared": self._server.shared}

    def restore_server(self, state: dict[str, Any]) -> None:
        """Take back what `server_state` returned."""
        restore_optimizer(self._server.optimizer, state["optimizer"])
        for name, value in self._server.shared.items():
            value.copy_(state["shared"][name])

    @override
    def state(self) -> dict[str, Any]:
        return {
            **self.server_state(),
            "draws": None if self._draws is None else self._draws.state(),
            "kept": self._kept,
            "aggregation": self.aggregation.state(),
        }

    @override
    def restore(self, state: dict[str, Any]) -> None:
        self.restore_server(state)
        federation = self._federation
        if self._draws is not None:
            sampler = federation.plan.sampler
            self._draws = sampler.start(len(federation.clients), federation.source, state["draws"])
        # A file is read to the memory of the processor, wherever the model is.
        self._kept = {
            number: {name: value.to(self._first[name]) for name, value in own.items()}
            for number, own in state["kept"].items()
        }
        self.aggregation.restore(state["aggregation"])


def _check_copied(loss: Loss) -> None:
    """Refuse a loss that clients would have to share, so that it could carry something of one to the next."""
    try:
        copy.deepcopy(loss)
    except Exception as error:
        raise InputError(
            f"The loss, of the type {type(loss).__name__}, cannot be copied ({type(error).__name__}), and each client needs "
            "one of its own; pass a function, or an object that copy.deepcopy can copy."
        ) from None


def _kept_of(clients: Sequence[int], kept: Mapping[str, Tensor], broken: Tensor) -> dict[int, Tensors]:
    if not kept:
        return {}
    return {
        number: {name: value[row].clone() for name, value in kept.items()}
        for row, number in enumerate(clients)
        if not bool(broken[row]) and all(bool(torch.isfinite(value[row]).all()) for value in kept.values())
    }
