"""Rounds of clients: what one client can do to a sum, who is drawn, and what is done about those who fail."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from helpers import LOSS, flat
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typing_extensions import override

import sfumato as sf
from sfumato.errors import DivergedError, InputError, LostClientsError, PlanError
from sfumato.learning import training as loop
from sfumato.learning.client_rounds import ClientRounds
from sfumato.learning.federated import Algorithm, ClientAlgorithm, Federation, Work, made_for
from sfumato.learning.groups import Group
from sfumato.learning.procedure import Procedure
from sfumato.learning.training import Training
from sfumato.privacy import mechanisms
from sfumato.privacy.bounded import Tensors
from sfumato.privacy.randomness import RandomSource

ENGINE = sf.Simulation(workers=1, way="alone")
LOCAL = functools.partial(torch.optim.SGD, lr=0.1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def private(population: int, steps: int = 4, rate: float = 1.0, clip: float = 1.0, kind: str = "flat") -> sf.Plan:
    sampler = sf.FullBatch() if rate == 1 else sf.Poisson(rate)
    return sf.Plan(sf.Budget(500.0, 1e-3, unit="client"), sampler, clip, 1.0, steps, population, kind)


def plain(population: int, steps: int = 4, cohort: int | None = None) -> sf.Plan:
    return sf.Plan.without_privacy(
        population=population, batch_size=cohort or population, steps=steps, unit="client"
    )  # fmt: skip


def small_clients(count: int, seed: int = 0, scale: float = 1.0) -> dict[str, sf.Records]:
    """Return clients with 1, 2, 3, ... records."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"site-{row}": sf.Records(
            scale * torch.randn(row + 1, 3, generator=generator), torch.randint(0, 2, (row + 1,), generator=generator)
        )
        for row in range(count)
    }


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))


def run(
    algorithm: Algorithm, plan: sf.Plan, clients: Mapping[str, sf.Records], model: nn.Module | None = None,
    engine: sf.Simulation = ENGINE, **more: object,
) -> Training:  # fmt: skip
    model = small_model() if model is None else model
    return sf.rounds(
        model, clients, plan, algorithm=algorithm, engine=engine, **{"loss": LOSS, "source": sf.SeededSource(5), **more}
    )  # type: ignore[arg-type]  # fmt: skip


def lost(*names: str, steps: tuple[int, ...] | None = None, way: str = "alone") -> sf.Simulation:
    return sf.Simulation(
        workers=1, way=way, drop_out=lambda step, name: name in names and (steps is None or step in steps)
    )  # fmt: skip


ALGORITHMS: dict[str, Algorithm] = {
    "FedAvg": sf.FedAvg(LOCAL, local_steps=3, batch_size=2),
    "FedSGD": sf.FedSGD(LOCAL),
    "FedProx": sf.FedProx(LOCAL, mu=1.0, local_steps=3, batch_size=2),
    "FedAvgM": sf.FedAvgM(LOCAL, local_steps=3, batch_size=2),
    "FedAdam": sf.FedAdam(LOCAL, local_steps=3, batch_size=2),
    "FedYogi": sf.FedYogi(LOCAL, local_epochs=1, batch_size=2),
    "FedAdagrad": sf.FedAdagrad(LOCAL, local_epochs=1, batch_size=2),
    "FedNova": sf.FedNova(LOCAL, local_epochs=1, batch_size=2, effective_steps=3.0),
    "Ditto": sf.Ditto(LOCAL, local_steps=3, batch_size=2),
    "FedPer": sf.FedPer(LOCAL, ("2",), local_steps=3, batch_size=2),
}
SCAFFOLD = sf.Scaffold(LOCAL, local_epochs=1, batch_size=2)  # it makes no promise
PLAIN = {**ALGORITHMS, "Scaffold": SCAFFOLD}


def rounds_of(
    algorithm: Algorithm, plan: sf.Plan, clients: Mapping[str, sf.Records], engine: sf.Simulation, **more: object
) -> Procedure:
    population = sf.Population.of(clients)
    federation = Federation(small_model(), population, plan, LOSS, engine, sf.SeededSource(5), **more)  # type: ignore[arg-type]
    return algorithm.procedure(federation, None)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(2, 5), st.integers(0, 4), st.sampled_from([1e-3, 1.0, 1e3, 1e30]),
    st.sampled_from([sf.Uniform(), sf.UpTo(2), sf.UpTo(4, expected=0.5)]),
    st.sampled_from(["flat", "per-layer", "normalised"]), st.sampled_from(["alone", "stacked"]), st.integers(0, 9),
)  # fmt: skip
@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_client_moves_the_sum_by_at_most_the_bound(
    name: str, count: int, which: int, scale: float, weighting: object, kind: str, way: str, seed: int
) -> None:
    clients = small_clients(count, seed)
    removed = f"site-{which % count}"
    own = clients[removed]
    clients[removed] = sf.Records(own.features * scale, own.targets)
    plan, sums = private(count, 4, 1.0, 0.5, kind), []
    for names in ((), (removed,)):
        engine = lost(*names, steps=(1,), way=way)
        procedure = rounds_of(ALGORITHMS[name], plan, clients, engine, weighting=weighting)
        procedure.contributions(0)  # so that what clients keep from their last round matters
        sums.append(procedure.contributions(1)["all"].bounded)
    moved = sum(float((sums[0].value[name] - value).square().sum()) for name, value in sums[1].value.items())
    assert all(one.norm_bound == 0.5 for one in sums)
    assert math.sqrt(moved) <= 0.5
    assert math.isfinite(moved)


def test_the_bound_is_reached_so_that_a_tighter_one_would_be_seen() -> None:
    clients, sums = small_clients(3, scale=1e3), []
    for names in ((), ("site-2",)):
        procedure = rounds_of(
            ALGORITHMS["FedAvg"], private(3, 4, 1.0, 1e-3), clients, lost(*names), weighting=sf.UpTo(3)
        )
        sums.append(procedure.contributions(0)["all"].bounded.value)
    moved = sum(float((sums[0][name] - value).square().sum()) for name, value in sums[1].items())
    assert math.sqrt(moved) == pytest.approx(1e-3, rel=1e-3)


def test_an_unbounded_weight_is_refused_where_clients_are_protected() -> None:
    with pytest.raises(PlanError, match=r"does not bound.*UpTo"):
        run(ALGORITHMS["FedAvg"], private(3), small_clients(3), weighting=sf.ByRecords())


def cohorts(plan: sf.Plan, rounds: int) -> list[list[int]]:
    clients = small_clients(1)["site-0"]
    procedure = rounds_of(
        ALGORITHMS["FedAvg"], plan, {f"site-{row}": clients for row in range(plan.population)}, ENGINE
    )
    assert isinstance(procedure, ClientRounds)
    return [procedure._cohort(step) for step in range(rounds)]


@pytest.mark.parametrize("promise", ["private", "plain"])
def test_cohorts_are_poisson_draws_at_the_plans_rate(promise: str) -> None:
    count, rate, rounds = 50, 0.2, 600
    plan = private(count, 3, rate) if promise == "private" else plain(count, 3, 10)
    drawn = torch.zeros(rounds, count)
    for step, cohort in enumerate(cohorts(plan, rounds)):
        drawn[step, cohort] = 1
    # 30,000 coins of 0.2: their mean has a standard deviation of 0.0023; two thirds of the rate is 29 of them away.
    assert abs(float(drawn.mean()) - rate) < 0.0145
    # Of a client alone 0.0163; 50 clients are looked at.
    assert float((drawn.mean(0) - rate).abs().max()) < 0.1
    # Independent coins: the size of a cohort varies by 8, to within 0.058 of it; of a fixed size it would not vary.
    assert abs(float(drawn.sum(1).var()) / (count * rate * (1 - rate)) - 1) < 0.4


def test_a_run_asks_those_that_are_drawn() -> None:
    asked: list[set[str]] = [set() for _ in range(12)]
    engine = sf.Simulation(workers=1, way="alone", drop_out=lambda step, name: bool(asked[step].add(name)))
    training = run(ALGORITHMS["FedAvg"], plain(20, 12, 5), small_clients(20), engine=engine)
    for _ in training:
        pass
    expected = cohorts(plain(20, 12, 5), 1)[0]
    assert asked[0] == {f"site-{number}" for number in expected}
    assert len({len(names) for names in asked}) > 2


def with_broken(count: int = 4) -> dict[str, sf.Records]:
    """Return clients of which "site-1" has no numbers, so that its update is not finite."""
    clients = small_clients(count)
    clients["site-1"] = sf.Records(torch.full((2, 3), math.nan), torch.tensor([0, 1]))
    return clients


@pytest.mark.parametrize("way", ["alone", "stacked"])
@pytest.mark.parametrize("name", ["FedAvg", "FedSGD", "Scaffold", "Ditto"])
def test_an_update_that_is_not_finite_is_left_out_and_counted(name: str, way: str) -> None:
    training = run(PLAIN[name], plain(4, 3), with_broken(), engine=sf.Simulation(workers=1, way=way))
    for _ in training:
        assert bool(torch.isfinite(flat(training.model)).all())
    assert training.result().nonfinite == 3
    assert not torch.equal(flat(training.model), flat(small_model()))


def test_the_average_is_over_those_whose_updates_are_finite() -> None:
    broken, sound = with_broken(), with_broken()
    del sound["site-1"]
    algorithm, models = sf.FedAvg(LOCAL, local_steps=3), []
    for clients in (broken, sound):
        training = run(algorithm, plain(len(clients), 1), clients)
        for _ in training:
            pass
        models.append(flat(training.model))
    assert torch.equal(*models)


@pytest.mark.parametrize("noise", [sf.ServerNoise(), sf.SharedNoise()])
def test_a_private_sum_has_no_part_of_an_update_that_is_not_finite(noise: object) -> None:
    training = run(ALGORITHMS["FedAvg"], private(4), with_broken(), noise=noise)
    for _ in training:
        assert bool(torch.isfinite(flat(training.model)).all())
    assert training.result().nonfinite == 4


@pytest.mark.parametrize("name", ["FedAvg", "FedSGD", "Scaffold"])
def test_a_round_without_a_finite_update_ends_a_plain_run_and_no_private_one(name: str) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return LOSS(outputs, targets, reduction="none") * math.nan

    training = run(PLAIN[name], plain(3, 3), small_clients(3), loss=loss)
    with pytest.raises(DivergedError, match=r"is finite in round 1: .* Fix: lower the learning rate"):
        next(training)
    assert torch.equal(flat(training.model), flat(small_model()))
    if name not in ALGORITHMS:
        return
    training = run(ALGORITHMS[name], private(3, 3), small_clients(3), loss=loss)
    assert len(list(training)) == 3
    assert training.result().nonfinite == 9


def test_a_round_in_which_nobody_answers_has_not_diverged() -> None:
    training = run(ALGORITHMS["FedAvg"], plain(3, 3), small_clients(3), engine=lost("site-0", "site-1", "site-2"))
    assert len(list(training)) == 3


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("Scaffold", plain(3, 3)),
        *((name, plan) for name in ("Ditto", "FedPer") for plan in (private(3, 3), plain(3, 3))),
    ],
)
def test_what_a_client_keeps_is_never_broken_by_one_bad_round(name: str, plan: sf.Plan) -> None:
    bad = [True]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = LOSS(outputs, targets, reduction="none")
        return losses * math.nan if bad[0] else losses

    training = run(PLAIN[name], plan, small_clients(3), loss=loss)
    with contextlib.nullcontext() if plan.is_private else pytest.raises(DivergedError):
        next(training)
    bad[0] = False
    before = training.result().nonfinite
    assert before == 3
    for _ in training:
        pass
    assert training.result().nonfinite == before
    for client in small_clients(3):
        assert bool(torch.isfinite(flat(training.personal_model(client))).all())


class _Forged(ClientAlgorithm):
    """Hands in zeros moved by one, from one client under a wrong name or in a wrong shape."""

    def __init__(self, forge: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        self._forge = forge

    @override
    def client(self, group: Group, shared: Tensors, kept: Mapping[str, Tensor]) -> Work:
        vectors = {name: value.clone() for name, value in group.sent().items()}
        honest = {name: torch.full_like(value, float(group.clients[0])) for name, value in vectors.items()}
        return Work(self._forge(honest) if 1 in group.clients else honest)

    @override
    def server_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return made_for(model, functools.partial(torch.optim.SGD, lr=1.0))

    @override
    def procedure(self, federation: Federation, noise: object) -> Procedure:
        return ClientRounds(federation, noise, self)  # type: ignore[arg-type]


FORGERIES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "another shape": lambda honest: {**honest, "weight": honest["weight"].mT},
    "a shape that would broadcast": lambda honest: {**honest, "weight": honest["weight"][..., :1]},
    "one for many": lambda honest: {**honest, "weight": honest["weight"].expand(2, *honest["weight"].shape[1:])},
    "a name too few": lambda honest: {"weight": honest["weight"]},
    "a name too many": lambda honest: {**honest, "more": honest["weight"]},
    "another name": lambda honest: {"weight": honest["weight"], "bais": honest["bias"]},
    "nothing": lambda honest: {},
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_an_update_of_wrong_names_or_shapes_is_refused_and_counted(forgery: str) -> None:
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model.state_dict())
    training = run(_Forged(FORGERIES[forgery]), plain(4, 2), small_clients(4), model, weighting=sf.Uniform())
    next(training)
    for name, value in model.state_dict().items():
        assert torch.allclose(value, before[name] - (0 + 2 + 3) / 3, atol=1e-6)
    next(training)
    assert training.result().refused == 2


def test_a_refused_update_is_in_no_private_sum() -> None:
    procedure = _Forged(FORGERIES["another shape"]).procedure(
        Federation(nn.Linear(3, 2), sf.Population.of(small_clients(4)), private(4), LOSS, ENGINE, sf.SeededSource(1)),
        None,
    )
    total = procedure.contributions(0)["all"].bounded.value
    # Clients 2 and 3 are clipped to norm 1, client 0 hands in zeros.
    norm = math.sqrt(sum(float(value.square().sum()) for value in total.values()))
    assert norm == pytest.approx(2.0, rel=1e-3)
    assert procedure.refused == 1


def test_if_every_update_is_refused_nothing_is_learnt() -> None:
    model, own = nn.Linear(3, 2), small_clients(1)["site-0"]
    before, clients = flat(model).clone(), {"a": own, "b": own}
    training = run(_Forged(lambda honest: {}), plain(2, 1), clients, model, lost("a"))
    next(training)
    assert torch.equal(flat(model), before)
    assert training.result().refused == 1
    next(run(_Forged(lambda honest: {}), private(2), clients, model, lost("a")))
    assert not torch.equal(flat(model), before)  # noise alone


def test_those_that_answer_are_averaged_by_their_weights_when_others_are_lost() -> None:
    clients, gone = small_clients(10), ("site-1", "site-5", "site-8")
    algorithm, start = sf.FedAvg(LOCAL, local_steps=2), flat(small_model())
    for weighting, weight in [
        (sf.ByRecords(), lambda size: size),
        (sf.Uniform(), lambda size: 1.0),
        (sf.UpTo(4), lambda size: min(size, 4)),
    ]:
        moved, total = torch.zeros_like(start, dtype=torch.float64), 0.0
        for name, own in clients.items():
            if name in gone:
                continue
            alone = run(algorithm, plain(1, 1), {name: own})
            next(alone)
            moved += weight(len(own)) * (start - flat(alone.model)).double()
            total += weight(len(own))
        training = run(algorithm, plain(10, 1), clients, engine=lost(*gone), weighting=weighting)
        next(training)
        assert torch.allclose(flat(training.model).double(), start.double() - moved / total, rtol=0, atol=1e-6)


class _NoGradient(nn.Module):
    """A model whose gradient is zero, so that where it goes is the noise."""

    def __init__(self, size: int = 4000) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight.sum() * 0 + x.sum(1) * 0).unsqueeze(1).expand(-1, 2)


def noise_of(noise: object, gone: tuple[str, ...], rate: float = 1.0) -> float:
    """Return the variance of one round's noise, relative to what the plan says."""
    plan, model = private(10, 1, rate, 3.0), _NoGradient()
    next(run(sf.FedAvg(LOCAL), plan, small_clients(10), model, lost(*gone), noise=noise, source=sf.SecureSource()))
    return float((flat(model).double() * 10 * rate / 3.0).square().mean())


def is_whole(variance: float) -> bool:
    # Of 4,000 squared normals the mean is within 0.15 of 1 but for one time in 1e10.
    return abs(variance - 1) < 0.15


GONE = ("site-1", "site-5", "site-8")


@pytest.mark.parametrize("noise", [sf.ServerNoise(), sf.SharedNoise(tolerate=3)])
def test_losing_three_of_ten_leaves_the_whole_noise(noise: object) -> None:
    assert is_whole(noise_of(noise, GONE))


def test_noise_of_the_server_does_not_depend_on_who_answers() -> None:
    assert is_whole(noise_of(sf.ServerNoise(), ()))
    assert is_whole(noise_of(sf.ServerNoise(), tuple(small_clients(10))))
    assert is_whole(noise_of(sf.ServerNoise(), GONE, rate=0.5))


@pytest.mark.parametrize("factor", [2 / 3, 3 / 2])
@pytest.mark.parametrize("noise", [sf.ServerNoise(), sf.SharedNoise(tolerate=3)])
def test_noise_of_another_scale_is_told_apart(noise: object, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = RandomSource.add_normal
    monkeypatch.setattr(RandomSource, "add_normal", lambda source, total, std: honest(source, total, std * factor))
    monkeypatch.setattr(loop, "check_noised", lambda *_: None)
    assert not is_whole(noise_of(noise, GONE))


def test_shares_sized_for_everybody_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = mechanisms.SharedGaussian.share

    def mutant(shared: mechanisms.SharedGaussian, *given: object) -> mechanisms.NoisyShare:
        needed, shared._needed = shared._needed, shared._clients
        share = honest(shared, *given)  # type: ignore[arg-type]
        shared._needed = needed
        return share

    monkeypatch.setattr(mechanisms.SharedGaussian, "share", mutant)
    monkeypatch.setattr(loop, "check_noised", lambda *_: None)
    assert not is_whole(noise_of(sf.SharedNoise(tolerate=3), GONE))


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("Scaffold", plain(5, 6)),
        *((name, plan) for name in ("FedAvg", "FedAdam", "Ditto") for plan in (private(5, 6), plain(5, 6))),
    ],
)
def test_below_the_quorum_nothing_is_released_and_the_run_goes_on(
    plan: sf.Plan, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[int] = []
    honest = mechanisms.gaussian
    monkeypatch.setattr(mechanisms, "gaussian", lambda *a, **k: released.append(1) or honest(*a, **k))  # type: ignore[func-returns-value]
    few = {0: 4, 1: 3, 2: 2, 3: 0, 4: 3, 5: 2}  # how many answer
    engine = sf.Simulation(
        workers=1, way="alone", drop_out=lambda step, client: int(client.removeprefix("site-")) >= few[step]
    )
    training = run(PLAIN[name], plan, small_clients(5), engine=engine, quorum=3)
    procedure = training._procedure
    assert isinstance(procedure, ClientRounds)
    for round_, answered in few.items():
        before, kept = flat(training.model).clone(), copy.deepcopy(procedure._kept)
        step = next(training)
        assert step.index == round_ + 1
        assert torch.equal(flat(training.model), before) == (answered < 3)
        if answered < 3:
            assert kept.keys() == procedure._kept.keys()
            assert all(
                torch.equal(value, kept[row][key]) for row, own in procedure._kept.items() for key, value in own.items()
            )
    with pytest.raises(StopIteration):
        next(training)
    result = training.result()
    assert result.void == 3
    assert len(result.steps) == 6
    assert len(released) == (3 if plan.is_private else 0)
    if plan.is_private:
        assert training._charge is not None
        assert training._charge.position == 6
        assert result.privacy.epsilon == pytest.approx(plan.spending.epsilon)
        assert any("void" in sentence for sentence in result.privacy.not_covered)


@pytest.mark.parametrize("name", ["Ditto", "FedPer"])
def test_a_round_that_lost_its_noise_leaves_what_clients_keep_as_it_was(name: str) -> None:
    training = run(
        ALGORITHMS[name], private(5), small_clients(5), noise=sf.SharedNoise(1),
        engine=lost("site-0", "site-1", "site-2", steps=(1,)),
    )  # fmt: skip
    next(training)
    procedure = training._procedure
    assert isinstance(procedure, ClientRounds)
    before = copy.deepcopy(procedure._kept)
    assert len(before) == 5
    with pytest.raises(LostClientsError):
        next(training)
    assert all(
        torch.equal(value, before[row][key]) for row, own in procedure._kept.items() for key, value in own.items()
    )
    next(training)
    assert not torch.equal(procedure._kept[3]["2.weight"], before[3]["2.weight"])


def test_what_clients_keep_goes_back_to_where_the_model_is() -> None:
    procedure = rounds_of(ALGORITHMS["Ditto"], plain(2), small_clients(2), ENGINE)
    assert isinstance(procedure, ClientRounds)
    procedure.plain(0)
    state = procedure.state()
    procedure._first = {name: value.to("meta") for name, value in procedure._first.items()}
    procedure.restore(state)
    assert {value.device.type for own in procedure._kept.values() for value in own.values()} == {"meta"}
    assert len(procedure._kept) == 2


class _Counts:
    """A loss that remembers how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return LOSS(outputs, targets) * (1 + 0.5 * (self.calls % 3))


class _Uncopied(_Counts):
    def __deepcopy__(self, memory: object) -> _Uncopied:
        raise TypeError("a secret 1234")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loss_remembers_nothing_of_one_client_for_the_next(workers: int) -> None:
    found = []
    for clients in (list(range(9)), list(reversed(range(9)))):
        engine = sf.Simulation(workers=workers, way="alone")
        training = run(sf.FedAvg(LOCAL, local_steps=2), plain(9), small_clients(9), engine=engine, loss=_Counts())
        procedure = training._procedure
        assert isinstance(procedure, ClientRounds)
        found.append(torch.cat([value.flatten() for value in procedure.ask(clients, 7, 0).total.values()]))
    assert torch.allclose(*found, rtol=0, atol=1e-5)


def test_a_loss_that_cannot_be_copied_is_refused() -> None:
    with pytest.raises(InputError, match=r"type _Uncopied, cannot be copied \(TypeError\)") as caught:
        run(ALGORITHMS["FedAvg"], plain(3), small_clients(3), loss=_Uncopied())
    assert "1234" not in str(caught.value)


def test_a_run_may_begin_with_void_rounds() -> None:
    engine = sf.Simulation(workers=1, way="alone", drop_out=lambda step, client: step < 2)
    training = run(ALGORITHMS["FedAvg"], private(4), small_clients(4), engine=engine, quorum=1)
    before = flat(training.model).clone()
    next(training)
    next(training)
    assert torch.equal(flat(training.model), before)
    next(training)
    assert not torch.equal(flat(training.model), before)
    assert training.result().void == 2


def test_a_quorum_that_no_round_would_reach_is_refused() -> None:
    with pytest.raises(PlanError, match="quorum of 5"):
        run(ALGORITHMS["FedAvg"], private(4), small_clients(4), quorum=5)


def test_refused_and_broken_answers_do_not_help_a_quorum_without_privacy() -> None:
    model = nn.Linear(3, 2)
    before = flat(model).clone()
    training = run(_Forged(FORGERIES["nothing"]), plain(3, 1), small_clients(3), model, quorum=3)
    next(training)
    assert training.result().void == 1
    broken = run(ALGORITHMS["FedAvg"], plain(4, 1), with_broken(), nn.Linear(3, 2), quorum=4)
    next(broken)
    assert broken.result().void == 1
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize(
    "algorithm",
    [
        sf.Scaffold(LOCAL, local_steps=3), sf.FedAdam(LOCAL, local_steps=3), sf.FedYogi(LOCAL), sf.FedAvgM(LOCAL),
        sf.Ditto(LOCAL, local_steps=2), sf.FedPer(LOCAL, ("2",), local_steps=2),
    ],
)  # fmt: skip
def test_a_resumed_run_is_the_one_that_was_never_interrupted(algorithm: Algorithm, tmp_path: Path) -> None:
    clients = {f"site-{row}": small_clients(8, row)["site-7"] for row in range(3)}

    def begun(model: nn.Module, checkpoint: sf.Checkpoint | None = None) -> Training:
        return run(algorithm, plain(3, 6), clients, model, checkpoint=checkpoint)

    whole = begun(small_model())
    for _ in whole:
        pass
    path = tmp_path / "run.pt"
    first = begun(small_model(), sf.Checkpoint(path))
    for _ in range(3):
        next(first)
    first.pause()
    resumed = begun(small_model(1), sf.Checkpoint(path, resume=True))
    assert [step.index for step in resumed] == [4, 5, 6]
    assert torch.allclose(flat(resumed.model), flat(whole.model), rtol=0, atol=1e-6)
    for name in clients:
        own = resumed.personal_model(name), whole.personal_model(name)
        assert torch.allclose(*map(flat, own), rtol=0, atol=1e-6)
    # What is kept matters: without it the rest of the run is another one.
    if isinstance(algorithm, (sf.Scaffold, sf.FedAdam)):
        fresh = begun(copy.deepcopy(_after(begun, 3)))
        for _ in range(3):
            next(fresh)
        assert not torch.allclose(flat(fresh.model), flat(whole.model), rtol=0, atol=1e-4)


def _after(begun: Callable[[nn.Module], Training], rounds: int) -> nn.Module:
    training = begun(small_model())
    for _ in range(rounds):
        next(training)
    return training.model


class _Scaled(nn.Module):
    """A model with a parameter that is one number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 2), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("Scaffold", plain(4)),
        *((name, plan) for name in ("FedAvg", "FedSGD", "FedNova") for plan in (private(4), plain(4))),
    ],
)
def test_a_parameter_may_be_a_single_number(name: str, plan: sf.Plan) -> None:
    model = _Scaled()
    for _ in run(PLAIN[name], plan, small_clients(4), model, engine=sf.Simulation(workers=1)):
        pass
    assert float(model.scale.detach()) != 1.0


def test_running_statistics_are_averaged_and_never_negative() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(3, 3), norm, nn.Linear(3, 2))
    clients = {f"site-{row}": small_clients(6, row)["site-5"] for row in range(3)}
    next(run(sf.FedAvg(LOCAL), plain(3, 1), clients, model))
    torch.manual_seed(0)
    expected = []
    start = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    for own in clients.values():
        client = copy.deepcopy(start)
        client(own.features)
        expected.append(client[1].running_var)
    assert torch.allclose(norm.running_var, torch.stack(expected).mean(0), atol=1e-6)  # type: ignore[arg-type]
    assert int(norm.num_batches_tracked) == 0  # type: ignore[arg-type]
    noisy = sf.Plan(sf.Budget(5.0, 1e-3, unit="client"), sf.FullBatch(), 30.0, 5.0, 3, 3)
    for _ in run(sf.FedAvg(LOCAL), noisy, clients, model):
        assert bool((norm.running_var >= 0).all())  # type: ignore[operator]
