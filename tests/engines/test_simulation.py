"""The engine on this machine: whatever way it runs clients, the result is the same; and it tells who failed."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
import threading
import traceback
import tracemalloc
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import LOSS, flat
from torch import Tensor, nn
from torch.nn import functional as F

import sfumato as sf
from sfumato.data.client_names import Numbered
from sfumato.data.population import Population
from sfumato.engines import choosing, simulation
from sfumato.errors import InputError, UnsupportedModelError
from sfumato.learning import client_rounds
from sfumato.learning.client_rounds import ClientRounds
from sfumato.learning.training import Training

LOCAL = functools.partial(torch.optim.SGD, lr=0.1)
FEDAVG = sf.FedAvg(LOCAL, local_epochs=1, batch_size=4)
FEDSGD = sf.FedSGD(LOCAL)


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
@pytest.mark.parametrize(
    ("algorithm", "promise"),
    [
        (FEDAVG, "plain"), (FEDAVG, "private"), (FEDSGD, "plain"), (FEDSGD, "private"),
        (sf.Scaffold(LOCAL, local_steps=2, batch_size=4), "plain"),
    ],
    ids=["FedAvg", "FedAvg, private", "FedSGD", "FedSGD, private", "Scaffold"],
)  # fmt: skip
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


class _Drops(nn.Module):
    """The same as `mlp(nn.Dropout(0.5))`, with the dropout in the forward where no module tells of it."""

    def __init__(self, where: str = "everywhere") -> None:
        super().__init__()
        inner = mlp(nn.Dropout(0.5))
        self.one, self.two, self.where = inner[0], inner[3], where

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        if self.where == "everywhere" or (self.where == "some" and len(x) == 3):
            x = F.dropout(x, 0.5, self.training)
        return self.two(x)


DROPPING = {
    **ENGINES,
    "2 workers as they like": sf.Simulation(workers=2),
    "4 workers": sf.Simulation(workers=4, way="alone"),
}


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("promise", ["plain", "private"])
@pytest.mark.parametrize("name", DROPPING)
def test_what_a_forward_draws_depends_on_the_seed_and_the_client_only(name: str, promise: str, threads: int) -> None:
    torch.set_num_threads(threads)
    plan = private() if promise == "private" else plain()
    module = after(sf.Simulation(debug=True), plan, model=mlp(nn.Dropout(0.5)))
    model = _Drops()
    torch.manual_seed(threads)
    state = torch.get_rng_state()
    found = after(DROPPING[name], plan, model=model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(found, module, rtol=0, atol=1e-6)
    assert torch.get_num_threads() == threads


def drawn_by_the_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return LOSS(F.dropout(outputs, 0.5), targets)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_loss_draws_depends_on_the_seed_and_the_client_only(workers: int) -> None:
    found = []
    for engine in (sf.Simulation(workers=workers), sf.Simulation(debug=True)):
        torch.manual_seed(len(found))
        found.append(after(engine, plain(), loss=drawn_by_the_loss))
    assert torch.allclose(*found, rtol=0, atol=1e-6)
    assert not torch.allclose(found[0], expected("plain", FEDAVG), atol=1e-4)


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("first", [0, 1])
def test_a_forward_that_draws_for_some_clients_is_done_again_in_turns(name: str, first: int) -> None:
    """Batches of three records first come with client 4 or so, when others already work beside it."""
    asked: list[tuple[int, str]] = []

    def nobody(step: int, client: str) -> bool:
        asked.append((step, client))
        return step == 0 and int(client.removeprefix("site-")) >= 4 * first > 0

    found = []
    for engine in (DROPPING[name], sf.Simulation(debug=True)):
        torch.manual_seed(len(found))
        with_lost = dataclasses.replace(engine, drop_out=nobody)
        found.append(after(with_lost, plain(), model=_Drops("some")))
    assert torch.allclose(*found, rtol=0, atol=1e-6)
    never = after(sf.Simulation(debug=True, drop_out=nobody), plain(), model=_Drops("nowhere"))
    assert not torch.allclose(found[0], never, atol=1e-4)


def test_a_model_that_draws_nothing_is_not_seeded_and_takes_no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    forked: list[object] = []
    honest = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda **more: (forked.append(more), honest(**more))[1])
    training = run(sf.Simulation(workers=2, way="alone"), plain(), _Drops("nowhere"))
    del forked[:]
    next(training)
    procedure = training._procedure
    assert isinstance(procedure, ClientRounds)
    assert len(forked) == 1  # the first client, to see whether it draws
    assert procedure._runner._chooser.choice.workers == 2


@pytest.mark.parametrize("drops", [True, False])
def test_a_factory_that_draws_from_the_same_stream_is_not_taken_for_the_model(drops: bool) -> None:
    def make(number: int) -> sf.Records:
        torch.manual_seed(number)
        size = 1 + number % 5
        return sf.Records(torch.randn(size, 5), torch.randint(0, 3, (size,)))

    population = sf.Population.from_factory(40, make)
    found, chosen = [], []
    for engine in (sf.Simulation(workers=2, way="alone"), sf.Simulation(debug=True)):
        training = run(engine, plain(40), _Drops("everywhere" if drops else "nowhere"), population)
        for _ in training:
            pass
        found.append(flat(training.model))
        chosen.append(training._procedure._runner._chooser.choice.workers)
    assert torch.allclose(*found, rtol=0, atol=1e-6)
    assert chosen == [1 if drops else 2, 1]


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("name", DROPPING)
def test_a_factory_that_draws_hides_no_client_that_draws_late(name: str) -> None:
    def make(number: int) -> sf.Records:
        torch.manual_seed(number)
        size = 1 + (number * 7) % 11  # three records first come with client 4
        return sf.Records(torch.randn(size, 5), torch.randint(0, 3, (size,)))

    population, found = sf.Population.from_factory(40, make), []
    for engine in (DROPPING[name], sf.Simulation(debug=True)):
        torch.manual_seed(len(found))
        found.append(after(engine, plain(40), model=_Drops("some"), population=population))
    assert torch.allclose(*found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_compute_in_the_surroundings_of_the_caller(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, str, torch.dtype]] = []
    honest = ClientRounds._work

    def watched(rounds: ClientRounds, *given: object) -> object:
        in_worker = threading.current_thread() is not threading.main_thread()
        seen.append((in_worker, str(torch.get_default_device()), torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype))
        return honest(rounds, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(ClientRounds, "_work", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("cpu:0"):
        after(sf.Simulation(workers=workers, way="alone"), plain())
    assert {found[1:] for found in seen} == {("cpu:0", torch.bfloat16)}
    assert any(found[0] for found in seen) == (workers > 1)
    del seen[:]
    after(sf.Simulation(workers=workers, way="alone"), plain())
    assert {found[1:] for found in seen} == {("cpu", torch.float32)}


def test_torch_is_tried_with_one_thread_and_with_all_where_one_group_works_at_a_time() -> None:
    torch.set_num_threads(2)
    seen: set[choosing.Choice] = set()
    honest = simulation.Crew._submit

    def watched(crew: simulation.Crew, choice: choosing.Choice, *more: object) -> object:
        seen.add(choice)
        job = honest(crew, choice, *more)  # type: ignore[arg-type]
        assert torch.get_num_threads() == 2
        return job

    inside: set[int] = set()
    work = ClientRounds._work

    def counted_work(rounds: ClientRounds, *more: object) -> object:
        if threading.current_thread() is threading.main_thread():
            inside.add(torch.get_num_threads())
        return work(rounds, *more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation.Crew, "_submit", watched)
        patch.setattr(simulation.os, "cpu_count", lambda: 2)
        patch.setattr(choosing, "_MOST_STACKED", 3)
        patch.setattr(ClientRounds, "_work", counted_work)
        found = after(sf.Simulation(), plain(steps=12))
    assert {(one.workers, one.threads) for one in seen} == {(1, 1), (1, 2), (2, 1)}
    assert inside == {1, 2}
    assert torch.allclose(found, after(sf.Simulation(debug=True), plain(steps=12)), rtol=0, atol=1e-6)
    assert torch.get_num_threads() == 2


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


ERRORS = {"raises": InputError("The file is damaged."), "fails": ValueError("a secret 1234"), "misses": KeyError(1234)}


@pytest.mark.parametrize("wrong", ["kind", "shape", *ERRORS])
@pytest.mark.parametrize("debug", [True, False])
def test_an_error_while_a_client_is_made_names_client_and_step(wrong: str, debug: bool) -> None:
    def make(number: int) -> sf.Records:
        if number != 3:
            return held(number)
        if wrong in ERRORS:
            raise ERRORS[wrong]
        records = held(number)
        return sf.Records(records.features[:, :2], records.targets) if wrong == "shape" else None  # type: ignore[return-value]

    engine = sf.Simulation(debug=debug, drop_out=lambda step, name: step == 0)
    with pytest.raises(InputError, match=r'^Client "client-3", step 2, making its records: ') as caught:
        after(engine, plain(6), population=sf.Population.from_factory(6, make))
    assert "1234" not in "".join(traceback.format_exception(caught.value))
    if wrong in ("fails", "misses"):
        assert f"raised {type(ERRORS[wrong]).__name__}" in str(caught.value)


@pytest.mark.parametrize("debug", [True, False])
@pytest.mark.parametrize("plan", [plain(6), private(6)])
def test_a_population_of_ones_own_that_fails_names_client_and_step(debug: bool, plan: sf.Plan) -> None:
    class Own(Population):
        def _made(self, index: int) -> sf.Records:
            if index == 4:
                raise OSError("a secret 1234")
            return held(index)

        def identity(self) -> str:
            return "own"

    own = Own(Numbered("client", 6), "by hand")
    with pytest.raises(
        InputError, match=r'^Client "client-4", step \d, making its records: it raised OSError'
    ) as caught:
        after(sf.Simulation(debug=debug), plan, population=own)
    assert "1234" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("asked", ["drop_out", "delay"])
@pytest.mark.parametrize("debug", [True, False])
def test_who_is_lost_names_client_and_step_where_it_cannot_be_told(asked: str, debug: bool) -> None:
    def fails(step: int, name: str) -> float:
        if (step, name) == (1, "site-2"):
            raise KeyError(name)
        return 0.0

    more = {"drop_out": fails} if asked == "drop_out" else {"delay": fails, "deadline": 1.0}
    with pytest.raises(InputError, match=rf'^Client "site-2", step 2, {asked}: it raised KeyError'):
        after(sf.Simulation(debug=debug, **more), plain(5), population=clients(5))  # type: ignore[arg-type]


def test_a_number_is_the_chance_to_be_lost() -> None:
    engine = sf.Simulation(drop_out=0.1)
    lost = sum(engine.loses(step, f"site-{number}") for step in range(100) for number in range(100))
    assert abs(lost - 1000) < 6 * 30  # six standard deviations
    assert not any(sf.Simulation(drop_out=0.0).loses(step, "site-1") for step in range(1000))
    assert [engine.loses(step, "a") for step in range(50)] == [
        sf.Simulation(drop_out=0.1).loses(step, "a") for step in range(50)
    ]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"drop_out": 1.0}, r"drop_out must lie in \[0, 1\)"),
        ({"drop_out": float("nan")}, r"drop_out must lie in \[0, 1\)"),
        ({"drop_out": True}, r"drop_out must lie in \[0, 1\)"),
        ({"drop_out": "often"}, "a function of .step, client., not str"),
        ({"drop_out": bool}, "a function of .step, client., not the class bool"),
        ({"drop_out": lambda name: True}, r"drop_out is called with \(step, client\), which it cannot take"),
        ({"drop_out": lambda: True}, "drop_out is called with"),
        ({"delay": 3.0, "deadline": 1.0}, "delay must be a function of .step, client., not float"),
        ({"delay": lambda step: 3.0, "deadline": 1.0}, "delay is called with"),
    ],
)
def test_what_cannot_say_who_is_lost_is_refused(more: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        sf.Simulation(**more)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_that_drops_nothing_may_be_stacked(rate: float) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.dropout = mlp(), nn.Dropout(rate)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.dropout(x))  # type: ignore[no-any-return]

    for model in (mlp(nn.Dropout(rate)), Named()):
        if rate:
            with pytest.raises(InputError, match="draws random numbers"):
                after(sf.Simulation(way="stacked"), plain(), model=model)
        else:
            alone, stacked = (
                after(sf.Simulation(way=way), plain(), model=copy.deepcopy(model)) for way in ("alone", "stacked")
            )
            assert torch.allclose(alone, stacked, atol=1e-6)


def test_a_part_of_records_that_fails_names_client_and_step() -> None:
    def work(name: str) -> int:
        if name == "site-2":
            raise RuntimeError("a secret 1234")
        return 1

    with pytest.raises(InputError, match=r'^Client "site-2", step 5, its part: it raised RuntimeError') as caught:
        sf.Simulation().run(work, ["site-1", "site-2"], 4)
    assert "1234" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("plan", [plain(6), private(6)])
@pytest.mark.parametrize("debug", [True, False])
def test_what_fails_beside_the_model_names_client_and_step(
    plan: sf.Plan, debug: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("1234")

    monkeypatch.setattr(client_rounds, "clip_vectors" if plan.is_private else "weighted_sum", fails)
    with pytest.raises(UnsupportedModelError, match=r'^Client "site-\d", step 1: .*It raised MemoryError') as caught:
        after(sf.Simulation(debug=debug), plan, population=clients(6))
    assert ("1234" in str(caught.value)) == (not plan.is_private)


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
        # The first client works alone, which tells whether the model draws random numbers.
        if not met and threading.current_thread() is not threading.main_thread():
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
