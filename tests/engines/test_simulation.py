"""The engine on this machine: whatever way it runs clients, the result is the same; and it tells who failed."""

from __future__ import annotations

import functools
import random
import threading
import tracemalloc
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import LOSS, flat
from torch import Tensor, nn

import sfumato as sf
from sfumato.engines import choosing, simulation
from sfumato.errors import InputError, UnsupportedModelError
from sfumato.learning.client_rounds import ClientRounds
from sfumato.learning.training import Training

LOCAL = functools.partial(torch.optim.SGD, lr=0.1)
FEDAVG = sf.FedAvg(LOCAL, local_epochs=1, batch_size=4)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mlp(*more: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), *more, nn.Linear(8, 3))


def held(number: int) -> sf.Records:
    generator = torch.Generator().manual_seed(number)
    size = 1 + (number * 7) % 11
    return sf.Records(torch.randn(size, 5, generator=generator), torch.randint(0, 3, (size,), generator=generator))


def clients(count: int = 23) -> sf.Population:
    return sf.Population.of({f"site-{number}": held(number) for number in range(count)})


def plain(population: int = 23, steps: int = 3, cohort: int | None = None) -> sf.Plan:
    return sf.Plan.without_privacy(population=population, batch_size=cohort or population, steps=steps, unit="client")


def private(population: int = 23, steps: int = 3) -> sf.Plan:
    return sf.Plan(sf.Budget(500.0, 1e-3, unit="client"), sf.Poisson(0.7), 1.0, 1.0, steps, population)


def run(
    engine: sf.Simulation, plan: sf.Plan, model: nn.Module | None = None, population: sf.Population | None = None,
    algorithm: object = FEDAVG, **more: object,
) -> Training:  # fmt: skip
    return sf.rounds(
        model or mlp(), population or clients(), plan, algorithm=algorithm, engine=engine,
        **{"loss": LOSS, "source": sf.SeededSource(5), **more},
    )  # type: ignore[arg-type]  # fmt: skip


def after(engine: sf.Simulation, plan: sf.Plan, **more: object) -> Tensor:
    training = run(engine, plan, **more)  # type: ignore[arg-type]
    for _ in training:
        pass
    return flat(training.model)


ENGINES = {
    "alone, 1 worker": sf.Simulation(workers=1, way="alone"),
    "alone, 2 workers": sf.Simulation(workers=2, way="alone"),
    "stacked, 1 worker": sf.Simulation(workers=1, way="stacked"),
    "stacked, 2 workers": sf.Simulation(workers=2, way="stacked"),
    "as it likes": sf.Simulation(),
    "debug": sf.Simulation(debug=True),
}


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_MOST_STACKED", 3)


@functools.cache
def expected(promise: str, algorithm: object) -> Tensor:
    return after(sf.Simulation(debug=True), private() if promise == "private" else plain(), algorithm=algorithm)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("promise", ["plain", "private"])
@pytest.mark.parametrize(
    "algorithm",
    [FEDAVG, sf.FedSGD(LOCAL), sf.Scaffold(LOCAL, local_steps=2, batch_size=4)],
    ids=["FedAvg", "FedSGD", "Scaffold"],
)
@pytest.mark.parametrize("name", ENGINES)
def test_no_way_to_run_clients_changes_the_result(name: str, algorithm: object, promise: str) -> None:
    found = after(ENGINES[name], private() if promise == "private" else plain(), algorithm=algorithm)
    assert float((found - expected(promise, algorithm)).abs().max()) < 1e-6
    assert float((found - flat(mlp())).abs().max()) > 1e-3


@pytest.mark.parametrize("most", [2, 5, 256])
@pytest.mark.parametrize("workers", [1, 2])
def test_no_size_of_chunks_changes_the_result(most: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_MOST_STACKED", most)
    sizes: list[int] = []
    honest = ClientRounds._work

    def watched(rounds: ClientRounds, numbers: list[int], *more: object) -> object:
        sizes.append(len(numbers))
        return honest(rounds, numbers, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(ClientRounds, "_work", watched)
    found = after(sf.Simulation(workers=workers, way="stacked"), plain())
    assert float((found - expected("plain", FEDAVG)).abs().max()) < 1e-6
    assert 1 < max(sizes) <= most
    assert sum(sizes) == 3 * 23


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("name", ENGINES)
def test_no_order_of_clients_changes_their_sum(name: str) -> None:
    totals = []
    for seed in range(3):
        numbers = list(range(23))
        random.Random(seed).shuffle(numbers)
        procedure = run(ENGINES[name], plain())._procedure
        assert isinstance(procedure, ClientRounds)
        answer = procedure.ask(numbers, 77, 0)
        assert answer.answered == 23
        totals.append(answer.total)
    for total in totals[1:]:
        assert all(torch.allclose(value, totals[0][key], rtol=0, atol=1e-5) for key, value in total.items())


def test_other_seeds_give_other_results() -> None:
    found = [after(sf.Simulation(workers=1), plain(), source=sf.SeededSource(seed)) for seed in (1, 2)]
    assert not torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize("workers", [1, 2, None])
@pytest.mark.parametrize("debug", [False, True])
def test_what_a_model_draws_depends_on_the_seed_and_the_client_only(workers: int | None, debug: bool) -> None:
    torch.manual_seed(99)
    first = after(sf.Simulation(workers=1, way="alone"), plain(), model=mlp(nn.Dropout(0.5)))
    torch.manual_seed(5 if workers is None else workers)
    state = torch.get_rng_state()
    model = mlp(nn.Dropout(0.5))
    torch.set_rng_state(state)
    again = after(sf.Simulation(workers=workers, debug=debug), plain(), model=model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(first, again, rtol=0, atol=1e-6)
    assert not torch.allclose(first, expected("plain", FEDAVG), atol=1e-4)


def test_what_a_model_draws_differs_by_client_and_round() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.drop = nn.Parameter(torch.zeros(64)), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.shift * self.drop(torch.ones(64)) + x.sum() * 0

    same = sf.Population.of({f"site-{number}": held(1) for number in range(8)})
    procedure = run(sf.Simulation(workers=1), plain(8), Noise(), same, loss=lambda out, target: out.sum())._procedure
    assert isinstance(procedure, ClientRounds)
    drawn = {
        tuple(procedure.ask([number], key << 40, 0).total["shift"].tolist()) for number in range(8) for key in range(8)
    }
    assert len(drawn) == 64


def test_late_and_lost_clients_are_not_in_the_round() -> None:
    seen: set[tuple[int, str]] = set()

    def delay(step: int, name: str) -> float:
        seen.add((step, name))
        return 3.0 if name == "site-2" else 2.0 if name == "site-3" else 0.0

    engine = sf.Simulation(
        workers=1, way="alone", delay=delay, deadline=2.0, drop_out=lambda step, name: name == "site-0"
    )
    procedure = run(engine, plain(5), population=clients(5))._procedure
    assert isinstance(procedure, ClientRounds)
    answer = procedure.ask(range(5), 77, 4)
    assert answer.answered == 3
    assert seen == {(4, f"site-{number}") for number in (1, 2, 3, 4)}
    others = run(sf.Simulation(workers=1, way="alone"), plain(5), population=clients(5))._procedure
    assert isinstance(others, ClientRounds)
    assert answer.weight == sum(len(held(number)) for number in (1, 3, 4))
    total = others.ask([1, 3, 4], 77, 4).total
    assert all(torch.allclose(value, total[key], rtol=0, atol=1e-9) for key, value in answer.total.items())


def test_a_round_without_any_answer_changes_nothing() -> None:
    found = after(sf.Simulation(drop_out=lambda step, name: True), plain(5), population=clients(5))
    assert torch.equal(found, flat(mlp()))


class _Picky(nn.Module):
    """Refuses the records of one client."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 4 or bool((x == 1234).any()):
            raise ValueError("a secret 1234")
        return self.inner(x)


def with_one_refused(count: int = 9) -> sf.Population:
    made = {f"site-{number}": held(number) for number in range(count)}
    made["site-6"] = sf.Records(torch.full((3, 5), 1234.0), torch.tensor([0, 1, 2]))
    return sf.Population.of(made)


@pytest.mark.parametrize(
    "engine",
    [sf.Simulation(), sf.Simulation(workers=2), sf.Simulation(workers=1, way="alone"), sf.Simulation(debug=True)],
)
@pytest.mark.parametrize("plan", [plain(9), private(9)])
def test_an_error_names_client_and_step(engine: sf.Simulation, plan: sf.Plan) -> None:
    training = run(engine, plan, _Picky(), with_one_refused())
    with pytest.raises(UnsupportedModelError, match=r'^Client "site-6", step [123]: _Picky') as caught:
        for _ in training:
            pass
    assert ("1234" in str(caught.value)) == (not plan.is_private)


@pytest.mark.parametrize("wrong", ["kind", "shape", "raises"])
@pytest.mark.parametrize("debug", [True, False])
def test_an_error_while_a_client_is_made_names_client_and_step(wrong: str, debug: bool) -> None:
    def make(number: int) -> sf.Records:
        if number != 3:
            return held(number)
        if wrong == "raises":
            raise InputError("The file is damaged.")
        records = held(number)
        return sf.Records(records.features[:, :2], records.targets) if wrong == "shape" else None  # type: ignore[return-value]

    engine = sf.Simulation(debug=debug, drop_out=lambda step, name: step == 0)
    with pytest.raises(InputError, match=r'^Client "client-3", step 2, making its records: '):
        after(engine, plain(6), population=sf.Population.from_factory(6, make))


def test_what_does_not_go_together_is_refused() -> None:
    for arguments, message in [
        ({"delay": lambda step, name: 0.0}, "delay and deadline go together"),
        ({"deadline": 1.0}, "delay and deadline go together"),
        ({"delay": lambda step, name: 0.0, "deadline": 0.0}, "deadline"),
        ({"delay": lambda step, name: 0.0, "deadline": float("nan")}, "deadline"),
        ({"workers": 0}, "workers"),
        ({"workers": 1.5}, "workers"),
        ({"way": "stcked"}, 'no way "stcked".*"stacked"'),
    ]:
        with pytest.raises(InputError, match=message):
            sf.Simulation(**arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r'cannot run its clients "stacked".*random numbers'):
        run(sf.Simulation(way="stacked"), plain(), mlp(nn.Dropout(0.5)))


def counted(count: int) -> tuple[sf.Population, list[int]]:
    made: list[int] = []

    def make(number: int) -> sf.Records:
        made.append(number)
        return held(number)

    return sf.Population.from_factory(count, make), made


@pytest.mark.parametrize(
    "engine", [sf.Simulation(), sf.Simulation(workers=2, way="stacked"), sf.Simulation(debug=True)]
)
def test_only_those_that_are_drawn_are_made(engine: sf.Simulation) -> None:
    population, made = counted(100_000)
    training = run(engine, plain(100_000, 4, 50), population=population)
    procedure = training._procedure
    assert isinstance(procedure, ClientRounds)
    answered = 0
    for _ in training:
        answered += procedure._answered
        assert len(made) == answered
    # Four Poisson cohorts of 50: 200 with a standard deviation of 14.
    assert 110 < len(made) < 290


def test_those_that_are_lost_are_not_made() -> None:
    population, made = counted(1000)
    engine = sf.Simulation(workers=1, drop_out=lambda step, name: int(name.removeprefix("client-")) % 2 == 0)
    after(engine, plain(1000, 3, 30), population=population)
    assert made
    assert all(number % 2 == 1 for number in made)


def memory_of_a_round(count: int) -> int:
    population, _ = counted(count)
    training = run(sf.Simulation(workers=1, way="alone"), plain(count, 6, 20), population=population)
    next(training)
    tracemalloc.start()
    try:
        for _ in training:
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_memory_of_a_round_does_not_grow_with_the_population() -> None:
    small, large = memory_of_a_round(2_000), memory_of_a_round(1_000_000)
    # One list of a million clients would take 8 MB; a byte for each in turn takes 1 MB, and what that decides another.
    assert large < small + 4 * 2**20


def test_clients_are_made_when_their_chunk_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_MOST_STACKED", 4)
    population, made = counted(600)
    ahead: list[int] = []
    done = [0]
    honest = ClientRounds._work

    def watched(rounds: ClientRounds, numbers: list[int], *more: object) -> object:
        ahead.append(len(made) - done[0])
        done[0] += len(numbers)
        return honest(rounds, numbers, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(ClientRounds, "_work", watched)
    after(sf.Simulation(workers=1, way="stacked"), plain(600, 1), population=population)
    assert len(made) == 600
    assert max(ahead) <= 4 * simulation._SORTED


def test_two_workers_work_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = threading.Barrier(2, timeout=30)
    honest = ClientRounds._work
    met: list[bool] = []

    def watched(rounds: ClientRounds, numbers: list[int], *more: object) -> object:
        if not met:
            meeting.wait()
            met.append(True)
        return honest(rounds, numbers, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(ClientRounds, "_work", watched)
    after(sf.Simulation(workers=2, way="alone"), plain(8, 1), population=clients(8))
    assert met


def test_a_way_that_cannot_run_a_model_is_left_alone() -> None:
    class Decides(nn.Module):
        """Decides on a value, which cannot be done for several clients at once."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if float(x.sum()) > 0 else 2 * self.inner(x)

    found = [after(engine, plain(), model=Decides()) for engine in (sf.Simulation(), sf.Simulation(debug=True))]
    assert torch.allclose(*found, rtol=0, atol=1e-6)


def run_all(loss: Callable[[Tensor, Tensor], Tensor], engine: sf.Simulation, population: sf.Population) -> Tensor:
    return after(engine, plain(len(population)), population=population, loss=loss)


def test_a_loss_that_padding_would_change_is_computed_as_one_by_one() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 5.0]))
    found = [run_all(loss, engine, clients()) for engine in (sf.Simulation(), sf.Simulation(debug=True))]
    assert torch.allclose(*found, rtol=0, atol=1e-6)
