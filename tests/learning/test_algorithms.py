"""Every federated algorithm on problems whose answer is known: each client has a quadratic loss."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import sfumato as sf
from sfumato.errors import InputError, PlanError
from sfumato.learning.client_rounds import ClientRounds
from sfumato.learning.controlled import Scaffold
from sfumato.learning.federated import Algorithm
from sfumato.learning.training import Training

Array = npt.NDArray[np.float64]

ENGINE = sf.Simulation(workers=1, way="alone")
LR, SIZES, WIDTH = 0.05, (4, 9, 14), 2
SHARES = np.array(SIZES) / sum(SIZES)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sgd(lr: float = LR, **more: float) -> functools.partial[torch.optim.Optimizer]:
    return functools.partial(torch.optim.SGD, lr=lr, **more)


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs.squeeze(1) - targets).square()


def clients(width: int = WIDTH) -> dict[str, sf.Records]:
    """Return clients that differ in how their features lie and in what they would have the weights be."""
    made = {}
    for row, size in enumerate(SIZES):
        generator = torch.Generator().manual_seed(row)
        x = (
            torch.randn(size, width, generator=generator, dtype=torch.float64)
            * torch.tensor([1.0 + row, 3.0 - row])[:width]
        )
        wanted = torch.tensor([3.0 * row - 2, 4.0 - row], dtype=torch.float64)[:width]
        noise = 0.1 * torch.randn(size, generator=generator, dtype=torch.float64)
        made[f"site-{row}"] = sf.Records(x, x @ wanted + noise)
    return made


def problem() -> tuple[list[Array], list[Array]]:
    """Return H and b of each client, whose loss is w H w / 2 - b w + something."""
    held = [(one.features.numpy(), one.targets.numpy()) for one in clients().values()]
    return [x.T @ x / len(x) for x, _ in held], [x.T @ y / len(x) for x, y in held]


HS, BS = problem()
OPTIMUM = np.linalg.solve(
    sum(p * h for p, h in zip(SHARES, HS, strict=True)), sum(p * b for p, b in zip(SHARES, BS, strict=True))
)
ALIKE = np.full(len(SIZES), 1 / len(SIZES))
UNIFORM_OPTIMUM = np.linalg.solve(sum(HS), sum(BS))
START = np.array([0.5, -0.25])
EYE = np.eye(WIDTH)


def mean_of(parts: list[Array], shares: Array = SHARES) -> Array:
    return sum((p * part for p, part in zip(shares, parts, strict=True)), np.zeros_like(parts[0]))


def gone(w: Array, h: Array, b: Array, steps: int = 1, lr: float = LR) -> Array:
    """Return how far a client goes from w, in the direction of a gradient."""
    start = w
    for _ in range(steps):
        w = w - lr * (h @ w - b)
    return start - w


def model() -> nn.Module:
    made = nn.Linear(WIDTH, 1, bias=False).double()
    with torch.no_grad():
        made.weight.copy_(torch.tensor(START)[None])
    return made


def training(
    algorithm: Algorithm, rounds: int, given: dict[str, sf.Records] | None = None, start: nn.Module | None = None,
    plan: sf.Plan | None = None, loss: object = half_square, **more: object,
) -> Training:  # fmt: skip
    plan = plan or sf.Plan.without_privacy(population=27, batch_size=27, steps=rounds)
    return sf.rounds(
        start or model(), given or clients(), plan, algorithm=algorithm, loss=loss,
        **{"engine": ENGINE, "source": sf.SeededSource(3), **more},
    )  # type: ignore[arg-type]  # fmt: skip


def weights_after(algorithm: Algorithm, rounds: int, **more: object) -> Array:
    run = training(algorithm, rounds, **more)  # type: ignore[arg-type]
    for _ in run:
        pass
    return run.model.weight.detach().numpy()[0].copy()  # type: ignore[operator, union-attr]


def close(found: Array, expected: Array, within: float = 1e-9) -> bool:
    return bool(np.abs(found - expected).max() < within)


def test_fedavg_with_one_full_step_is_gradient_descent() -> None:
    w = START
    for _ in range(5):
        w = w - mean_of([gone(w, h, b) for h, b in zip(HS, BS, strict=True)])
    assert close(weights_after(sf.FedAvg(sgd()), 5), w)
    assert close(weights_after(sf.FedSGD(sgd()), 5), w)


def test_fedavg_averages_what_local_steps_reach() -> None:
    w = START
    for _ in range(3):
        w = w - mean_of([gone(w, h, b, 7) for h, b in zip(HS, BS, strict=True)])
    assert close(weights_after(sf.FedAvg(sgd(), local_steps=7), 3), w)
    assert close(weights_after(sf.FedAvg(sgd(), local_epochs=7), 3), w)


def test_weights_of_clients_are_those_that_were_asked_for() -> None:
    for weighting, weights in [
        (None, SIZES),
        (sf.ByRecords(), SIZES),
        (sf.Uniform(), (1, 1, 1)),
        (sf.UpTo(9, expected=0.5), (4, 9, 9)),
    ]:
        shares = np.array(weights) / sum(weights)
        w = START - mean_of([gone(START, h, b, 4) for h, b in zip(HS, BS, strict=True)], shares)
        assert close(weights_after(sf.FedAvg(sgd(), local_steps=4), 1, weighting=weighting), w)


def test_fedprox_reaches_its_proximal_fixed_point() -> None:
    mu = 8.0
    inverse = [np.linalg.inv(h + mu * EYE) for h in HS]
    fixed = np.linalg.solve(EYE - mu * mean_of(inverse), mean_of([one @ b for one, b in zip(inverse, BS, strict=True)]))
    found = weights_after(sf.FedProx(sgd(0.08), mu=mu, local_steps=15), 50)
    assert close(found, fixed, 1e-6)
    assert not close(fixed, OPTIMUM, 1e-2)  # so that a pull of another strength would be seen


def test_one_step_of_fedprox_is_one_of_fedavg() -> None:
    assert close(weights_after(sf.FedProx(sgd(), mu=3.0), 3), weights_after(sf.FedAvg(sgd()), 3))


SERVER = {"server_lr": 0.3, "beta1": 0.8, "beta2": 0.7, "tau": 0.05}


def adaptive(kind: str, rounds: int) -> Array:
    """Reddi et al. 2021, algorithm 2, as it is printed."""
    w, m, v = START, np.zeros(WIDTH), np.full(WIDTH, 0.05**2)
    for _ in range(rounds):
        delta = -mean_of([gone(w, h, b, 3) for h, b in zip(HS, BS, strict=True)])
        m = 0.8 * m + (1 - 0.8) * delta
        if kind == "adagrad":
            v = v + delta**2
        elif kind == "yogi":
            v = v - (1 - 0.7) * delta**2 * np.sign(v - delta**2)
        else:
            v = 0.7 * v + (1 - 0.7) * delta**2
        w = w + 0.3 * m / (np.sqrt(v) + 0.05)
    return w


@pytest.mark.parametrize("kind", ["adam", "yogi", "adagrad"])
def test_adaptive_servers_follow_their_paper(kind: str) -> None:
    make = {"adam": sf.FedAdam, "yogi": sf.FedYogi, "adagrad": sf.FedAdagrad}[kind]
    found = weights_after(make(sgd(), local_steps=3, **SERVER), 4)
    assert close(found, adaptive(kind, 4))
    assert all(not close(found, adaptive(other, 4), 1e-3) for other in ("adam", "yogi", "adagrad") if other != kind)


def test_fedavgm_keeps_a_momentum_at_the_server() -> None:
    w, velocity = START, np.zeros(WIDTH)
    for _ in range(4):
        velocity = 0.6 * velocity + mean_of([gone(w, h, b, 3) for h, b in zip(HS, BS, strict=True)])
        w = w - 0.7 * velocity
    assert close(weights_after(sf.FedAvgM(sgd(), local_steps=3, momentum=0.6, server_lr=0.7), 4), w)


def biased_point(steps: int, lr: float) -> Array:
    """Return where FedAvg with so many local steps ends: not at the optimum."""
    parts = [EYE - np.linalg.matrix_power(EYE - lr * h, steps) for h in HS]
    own = [np.linalg.solve(h, b) for h, b in zip(HS, BS, strict=True)]
    return np.linalg.solve(mean_of(parts), mean_of([a @ w for a, w in zip(parts, own, strict=True)]))


def test_scaffold_reaches_the_optimum_where_fedavg_has_a_known_bias() -> None:
    biased = biased_point(10, LR)
    assert np.linalg.norm(biased - OPTIMUM) > 0.1
    assert close(weights_after(sf.FedAvg(sgd(), local_steps=10), 50), biased, 1e-6)
    found = weights_after(sf.Scaffold(sgd(), local_steps=10), 60)
    assert close(found, UNIFORM_OPTIMUM, 1e-6)
    assert not close(found, OPTIMUM, 1e-2)


def test_scaffold_reaches_the_same_optimum_when_clients_are_absent() -> None:
    engine = sf.Simulation(workers=1, way="alone", drop_out=0.4)
    plan = sf.Plan.without_privacy(population=3, batch_size=2, steps=200, unit="client")
    found = weights_after(sf.Scaffold(sgd(), local_steps=5), 200, plan=plan, engine=engine)
    assert close(found, UNIFORM_OPTIMUM, 1e-6)


@pytest.mark.parametrize("weighting", [sf.ByRecords(), sf.UpTo(9)])
def test_scaffold_refuses_clients_that_count_differently(weighting: object) -> None:
    with pytest.raises(PlanError, match=r"Scaffold needs every client to count the same.*Uniform\(\)"):
        training(sf.Scaffold(sgd()), 1, weighting=weighting)
    next(training(sf.Scaffold(sgd()), 1, weighting=sf.Uniform()))


@pytest.mark.parametrize("unit", ["client", "record"])
def test_scaffold_makes_no_promise_because_noise_would_stay_in_it(unit: str) -> None:
    plan = sf.Plan(sf.Budget(50.0, 1e-3, unit=unit), sf.FullBatch(), 1.0, 2.0, 2, 3 if unit == "client" else 27)
    with pytest.raises(PlanError, match="a private run would drift without end; use FedAvg or FedAdam"):
        training(sf.Scaffold(sgd()), 2, plan=plan)


def test_scaffold_follows_its_paper() -> None:
    w, server = START, np.zeros(WIDTH)
    own = [np.zeros(WIDTH) for _ in SIZES]
    for _ in range(3):
        ends, news = [], []
        for h, b, c in zip(HS, BS, own, strict=True):
            y = w
            for _ in range(4):
                y = y - LR * (h @ y - b - c + server)
            ends.append(y)
            news.append(c - server + (w - y) / (4 * LR))
        server = server + mean_of([new - old for new, old in zip(news, own, strict=True)], ALIKE)
        w, own = mean_of(ends, ALIKE), news
    assert close(weights_after(sf.Scaffold(sgd(), local_steps=4), 3), w)


def test_scaffolds_server_keeps_the_mean_of_the_clients_controls() -> None:
    given = {f"site-{row}": one for row, one in enumerate([*clients().values()] * 3)}
    plan = sf.Plan.without_privacy(population=9, batch_size=4, steps=12, unit="client")
    run = training(sf.Scaffold(sgd(), local_steps=3), 12, given, plan=plan)
    for _ in run:
        rounds = run._procedure
        assert isinstance(rounds, ClientRounds)
        name = ".control weight"
        total = sum(kept[name] for kept in rounds._kept.values())
        assert torch.allclose(rounds._server.shared[name], torch.as_tensor(total) / 9, rtol=0, atol=1e-9)
    assert len(rounds._kept) > 4


def test_fednova_reaches_the_optimum_where_unequal_steps_pull_fedavg_away() -> None:
    wanted, sizes, lr = np.array([0.0, 1.0, 10.0]), np.array([2, 8, 24]), 0.03
    given = {
        f"site-{row}": sf.Records(torch.ones(size, 1, dtype=torch.float64), torch.full((size,), y, dtype=torch.float64))
        for row, (size, y) in enumerate(zip(sizes, wanted, strict=True))
    }
    shares, steps = sizes / sizes.sum(), sizes / 2
    optimum, part = shares @ wanted, shares * (1 - (1 - lr) ** steps)
    biased, corrected = part @ wanted / part.sum(), (part / steps) @ wanted / (part / steps).sum()
    start = nn.Linear(1, 1, bias=False).double()
    found = []
    for algorithm in (
        sf.FedAvg(sgd(lr), local_epochs=1, batch_size=2),
        sf.FedNova(sgd(lr), local_epochs=1, batch_size=2),
    ):
        found.append(weights_after(algorithm, 60, given=given, start=copy.deepcopy(start)))
    assert close(found[0], np.array([biased]), 1e-5)
    assert close(found[1], np.array([corrected]), 1e-5)
    assert abs(corrected - optimum) < 0.2 * abs(biased - optimum)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("declared", [None, 2.5])
def test_fednova_divides_by_how_far_steps_with_momentum_go(momentum: float, declared: float | None) -> None:
    sizes, slopes = np.array([2, 6, 10]), np.array([1.0, -2.0, 5.0])
    given = {
        f"site-{row}": sf.Records(torch.ones(size, 1, dtype=torch.float64), torch.full((size,), y, dtype=torch.float64))
        for row, (size, y) in enumerate(zip(sizes, slopes, strict=True))
    }
    reach = []  # of a client whose gradient is 1 all the time, in steps of the learning rate
    for size in sizes:
        place = velocity = 0.0
        for _ in range(size // 2 * 3):
            velocity = momentum * velocity + 1
            place += velocity
        reach.append(place)
    shares = sizes / sizes.sum()
    effective = declared or shares @ np.array(reach)
    start = nn.Linear(1, 1, bias=False).double()
    began = float(start.weight.detach())
    found = weights_after(
        sf.FedNova(sgd(0.1, momentum=momentum), local_epochs=3, batch_size=2, effective_steps=declared), 2,
        given=given, start=start, loss=lambda outputs, targets: outputs.squeeze(1) * targets,
    )  # fmt: skip
    # Its normaliser travels as float32.
    assert found[0] == pytest.approx(began - 2 * 0.1 * effective * (shares @ slopes), rel=1e-6)


def test_dittos_own_models_solve_their_problem_and_its_server_is_fedavgs() -> None:
    pull = 2.0
    run = training(sf.Ditto(sgd(), pull=pull, local_steps=2), 150)
    for _ in run:
        pass
    result = run.result()
    shared = result.model.weight.detach().numpy()[0]
    assert close(shared, weights_after(sf.FedAvg(sgd(), local_steps=2), 150), 1e-12)
    for row, (h, b) in enumerate(zip(HS, BS, strict=True)):
        own = result.personal_model(f"site-{row}").weight.detach().numpy()[0]
        assert close(own, np.linalg.solve(h + pull * EYE, b + pull * shared), 1e-6)
        assert not close(own, shared, 1e-2)
    with pytest.raises(KeyError):
        result.personal_model("site-9")


def test_ditto_pulls_to_the_servers_model_of_the_round() -> None:
    run = training(sf.Ditto(sgd(), pull=2.0, local_steps=3), 2)
    shared, own = START, START
    for _ in run:
        sent = shared
        shared = shared - mean_of([gone(sent, h, b, 3) for h, b in zip(HS, BS, strict=True)])
        for _ in range(3):
            own = own - LR * (HS[0] @ own - BS[0] + 2.0 * (own - sent))
        assert close(run.personal_model("site-0").weight.detach().numpy()[0], own)


def with_offset() -> nn.Module:
    made = nn.Linear(WIDTH, 1).double()
    nn.init.zeros_(made.bias)
    return made


def shifted() -> dict[str, sf.Records]:
    return {
        name: sf.Records(one.features, one.features.sum(1) + 5 * row + 0.1 * one.targets)
        for row, (name, one) in enumerate(clients().items())
    }


def test_personal_layers_and_the_common_ones_solve_the_joint_problem() -> None:
    given = shifted()
    run = training(sf.FedPer(sgd(0.1), ("bias",)), 500, given, with_offset())
    for _ in run:
        pass
    result = run.result()
    owner = np.repeat(np.arange(3), SIZES)
    design = np.hstack([np.vstack([one.features.numpy() for one in given.values()]), np.eye(3)[owner]])
    solved = np.linalg.lstsq(design, np.concatenate([one.targets.numpy() for one in given.values()]), rcond=None)[0]
    assert close(result.model.weight.detach().numpy()[0], solved[:WIDTH], 1e-6)
    for row in range(3):
        own = result.personal_model(f"site-{row}")
        assert close(own.bias.detach().numpy(), solved[WIDTH + row : WIDTH + row + 1], 1e-6)
        assert torch.equal(own.weight, result.model.weight)


@pytest.mark.parametrize("private", [False, True])
def test_personal_layers_stay_with_the_client(private: bool) -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(WIDTH, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    before = copy.deepcopy(start.state_dict())
    plan = None
    if private:
        plan = sf.Plan(sf.Budget(50.0, 1e-3, unit="client"), sf.FullBatch(), 1.0, 2.0, 4, 3)
    run = training(sf.FedPer(sgd(), ("1", "2"), local_steps=2), 4, start=start, plan=plan)
    released = run._procedure.shapes()
    assert released is not None
    assert set(released) == {"0.weight", "0.bias"}
    for _ in run:
        pass
    after = run.model.state_dict()
    personal = [name for name in before if not name.startswith("0.")]
    assert all(torch.equal(after[name], before[name]) for name in personal)
    assert not torch.equal(after["0.weight"], before["0.weight"])
    own = [run.personal_model(f"site-{row}").state_dict() for row in range(3)]
    for name in ("2.weight", "2.bias", "1.running_mean", "1.running_var"):
        assert not torch.equal(own[0][name], own[1][name])
        assert not torch.equal(own[0][name], before[name])
    assert all(torch.equal(one["0.weight"], after["0.weight"]) for one in own)


def test_a_client_that_never_took_part_has_the_model_that_all_began_with() -> None:
    plan = sf.Plan.without_privacy(population=3, batch_size=3, steps=2, unit="client")
    run = sf.rounds(
        with_offset(), shifted(), plan, algorithm=sf.FedPer(sgd(), ("bias",)), loss=half_square,
        engine=sf.Simulation(workers=1, drop_out=lambda step, name: name == "site-2"),
    )  # fmt: skip
    for _ in run:
        pass
    assert not bool(run.personal_model("site-2").bias.any())
    assert bool(run.personal_model("site-1").bias.any())


def record_plan() -> sf.Plan:
    return sf.Plan(sf.Budget(50.0, 1e-3), sf.FullBatch(), 1.0, 2.0, 2, 27)


LOCAL = sgd()


@pytest.mark.parametrize(
    "algorithm",
    [
        sf.FedProx(LOCAL), sf.FedAvgM(LOCAL), sf.FedAdam(LOCAL), sf.FedYogi(LOCAL), sf.FedAdagrad(LOCAL),
        sf.FedNova(LOCAL), sf.Ditto(LOCAL), sf.FedPer(LOCAL, ("weight",)),
    ],
)  # fmt: skip
def test_one_record_cannot_be_bounded_after_local_steps(algorithm: Algorithm) -> None:
    with pytest.raises(PlanError, match=f"{type(algorithm).__name__} cannot bound one record"):
        training(algorithm, 2, plan=record_plan())


def test_what_an_algorithm_cannot_do_is_refused() -> None:
    momentum = sgd(momentum=0.9)
    for make, message in [
        (lambda: sf.Scaffold(momentum), "plain SGD"),
        (lambda: sf.Scaffold(sgd(0.0)), "SGD"),
        (lambda: sf.Scaffold(functools.partial(torch.optim.Adam, lr=0.1)), "plain SGD"),
        (lambda: sf.FedNova(sgd(weight_decay=0.1)), "weight decay"),
        (lambda: sf.FedNova(functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)), "nesterov"),
        (lambda: sf.FedNova(functools.partial(torch.optim.Adam, lr=0.1)), "SGD"),
        (lambda: sf.FedNova(LOCAL, effective_steps=0.0), "effective_steps"),
        (lambda: sf.FedProx(LOCAL, mu=0.0), "mu"),
        (lambda: sf.FedProx(LOCAL, mu=math.nan), "mu"),
        (lambda: sf.FedAvgM(LOCAL, momentum=1.0), "momentum"),
        (lambda: sf.FedAvgM(LOCAL, server_lr=0.0), "server_lr"),
        (lambda: sf.FedAdam(LOCAL, beta1=1.0), "beta1"),
        (lambda: sf.FedAdam(LOCAL, server_lr=-1.0), "lr"),
        (lambda: sf.FedYogi(LOCAL, tau=0.0), "tau"),
        (lambda: sf.Ditto(LOCAL, pull=0.0), "pull"),
        (lambda: sf.FedPer(LOCAL, ()), "tuple of names"),
        (lambda: sf.FedPer(LOCAL, "head"), "tuple of names"),  # type: ignore[arg-type]
        (lambda: sf.FedAvg(LOCAL, local_steps=2, local_epochs=2), "only one of them"),
        (lambda: sf.FedAvg(LOCAL, local_steps=0), "local_steps"),
    ]:
        with pytest.raises(InputError, match=message):
            make()
    with pytest.raises(InputError, match=r'no trained layer "bais".*"bias"'):
        training(sf.FedPer(LOCAL, ("bais",)), 1, start=with_offset())
    with pytest.raises(InputError, match="Every layer is personal"):
        training(sf.FedPer(LOCAL, ("weight", "bias")), 1, start=with_offset())
    plan = sf.Plan(sf.Budget(50.0, 1e-3, unit="client"), sf.FullBatch(), 1.0, 2.0, 2, 3)
    with pytest.raises(PlanError, match="declare effective_steps"):
        training(sf.FedNova(LOCAL), 2, plan=plan)


def test_a_learning_rate_may_be_a_whole_number() -> None:
    assert Scaffold(functools.partial(torch.optim.SGD, lr=1)).training.plain_rate() == 1.0
