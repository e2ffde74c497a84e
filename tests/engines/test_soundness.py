from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from helpers import LOSS, flat
from torch import Tensor, nn

import sfumato as sf
from sfumato.engines import choosing
from sfumato.errors import InputError
from sfumato.learning.local_training import MakeOptimizer

LOCAL = functools.partial(torch.optim.SGD, lr=0.1)
Loss = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(choosing, "_MOST_STACKED", 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def population(sizes: list[int]) -> sf.Population:
    generator = torch.Generator().manual_seed(1)
    return sf.Population.of(
        {
            f"site-{row}": sf.Records(
                torch.randn(size, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator)
            )
            for row, size in enumerate(sizes)
        }
    )


def after(engine: sf.Simulation, sizes: list[int], model: nn.Module, loss: Loss, **more: object) -> Tensor:
    arguments: dict[str, object] = {"local": LOCAL, "local_epochs": 1, "batch_size": 4, **more}
    plan = sf.Plan.without_privacy(population=len(sizes), batch_size=len(sizes), steps=3, unit="client")
    sf.federate(
        model, population(sizes), plan, algorithm=sf.FedAvg(**arguments), engine=engine, loss=loss,  # type: ignore[arg-type]
        source=sf.SeededSource(3),
    )  # fmt: skip
    return flat(model)


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def bare() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 5.0]))
LATER = [8] * 9 + [6, 3, 7, 2, 8]  # the first clients are alike, so nothing is padded while ways are tried


@pytest.mark.parametrize(("make", "loss"), [(normalised, LOSS), (bare, WEIGHTED)])
def test_padding_that_comes_later_is_found_out_in_time(make: Callable[[], nn.Module], loss: Loss) -> None:
    found = [
        after(engine, LATER, make(), loss)
        for engine in (sf.Simulation(workers=1, way="stacked"), sf.Simulation(debug=True))
    ]
    assert torch.allclose(*found, rtol=0, atol=1e-6)


def test_a_first_round_of_one_client_proves_nothing() -> None:
    sizes = [8, 3, 7, 2, 5]
    found = []
    for way in ({"way": "stacked"}, {"debug": True}):
        engine = sf.Simulation(workers=1, drop_out=lambda step, name: step == 0 and name != "site-0", **way)  # type: ignore[arg-type]
        found.append(after(engine, sizes, bare(), WEIGHTED))
    assert torch.allclose(*found, rtol=0, atol=1e-6)


class _Mixed(nn.Module):
    """Takes the mean of the batch off each record, or of each word's vector."""

    def __init__(self, words: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Embedding(9, 6) if words else nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = torch.tanh(hidden.mean(1) if hidden.dim() == 3 else hidden)
        return self.head(hidden - 0.5 * hidden.mean(0, keepdim=True))  # type: ignore[no-any-return]


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("alike", [1, 5])
def test_clients_of_equal_records_prove_nothing(alike: int, words: bool) -> None:
    """In the first round only clients that hold one record, or one record again and again, take part."""
    generator = torch.Generator().manual_seed(1)

    def held(row: int) -> sf.Records:
        size = 1 + 7 * row % 11
        features = torch.randint(0, 9, (size, 4), generator=generator)
        features = features if words else features + torch.randn(size, 4, generator=generator)
        if row < 5:
            features, size = features[:1].expand(alike, 4), alike
        return sf.Records(features, torch.randint(0, 3, (size,), generator=generator))

    given, found = sf.Population.of({f"site-{row}": held(row) for row in range(14)}), []
    plan = sf.Plan.without_privacy(population=14, batch_size=14, steps=3, unit="client")
    for way in ({"way": "stacked"}, {"debug": True}):
        engine = sf.Simulation(
            workers=1, drop_out=lambda step, name: (int(name.removeprefix("site-")) < 5) != (step == 0), **way  # type: ignore[arg-type]
        )  # fmt: skip
        model = _Mixed(words)
        sf.federate(
            model, given, plan, algorithm=sf.FedAvg(functools.partial(torch.optim.SGD, lr=0.5), local_steps=2),
            engine=engine, loss=LOSS, source=sf.SeededSource(3),
        )  # fmt: skip
        found.append(flat(model))
    assert torch.allclose(*found, rtol=0, atol=1e-5)


class _AsOne(torch.optim.SGD):
    """Takes steps of a fixed length, which stacked clients would have in common."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.05)
        super().step()


@pytest.mark.parametrize("first", [0, 3])
def test_an_optimiser_that_looks_at_all_weights_is_found_out(first: int) -> None:
    found = []
    for way in ({}, {"debug": True}):
        engine = sf.Simulation(workers=1, drop_out=lambda step, name: step == 0 and int(name[-1]) > first, **way)  # type: ignore[arg-type]
        found.append(after(engine, [8] * 6, bare(), LOSS, local=functools.partial(_AsOne, lr=0.5)))
    assert torch.allclose(*found, rtol=0, atol=1e-6)
    with pytest.raises(sf.SfumatoError, match="optimiser"):
        after(sf.Simulation(way="stacked"), [8] * 6, bare(), LOSS, local=functools.partial(_AsOne, lr=0.5))


def decayed_by_shape(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Decays matrices alone, as is the custom; stacked, an offset is a matrix too."""
    held = list(parameters)
    groups = [
        {"params": [one for one in held if one.dim() > 1], "weight_decay": 0.5},
        {"params": [one for one in held if one.dim() <= 1]},
    ]
    return torch.optim.SGD([group for group in groups if group["params"]], lr=0.1)


def paced_by_shape(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [one], "lr": 0.5 if one.dim() > 1 else 0.1} for one in parameters], lr=0.1)


@pytest.mark.parametrize("make", [decayed_by_shape, paced_by_shape])
@pytest.mark.parametrize("engine", [sf.Simulation(), sf.Simulation(debug=True)])
def test_an_optimiser_that_looks_at_shapes_does_what_it_does_alone(make: MakeOptimizer, engine: sf.Simulation) -> None:
    def started() -> nn.Linear:
        model = nn.Linear(4, 3)
        nn.init.ones_(model.weight)
        nn.init.zeros_(model.bias)  # in the first step nothing of it decays
        return model

    sizes, total, whole = [8] * 6, torch.zeros(15), started()
    for _ in range(3):
        total.zero_()
        for one in population(sizes).values():
            client = started()
            client.load_state_dict(whole.state_dict())
            LOSS(client(one.features), one.targets).backward()
            make(client.parameters()).step()
            total += flat(client).detach() / len(sizes)
        torch.nn.utils.vector_to_parameters(total.clone(), whole.parameters())
    found = after(engine, sizes, started(), LOSS, local=make, local_epochs=None, local_steps=1, batch_size=None)
    assert torch.allclose(found, total, rtol=0, atol=1e-6)
    with pytest.raises(sf.SfumatoError, match="optimiser"):
        after(sf.Simulation(way="stacked"), sizes, started(), LOSS, local=make)


@pytest.mark.parametrize(("kind", "more"), [(sf.Scaffold, {}), (sf.FedNova, {"local_epochs": 1})])
def test_algorithms_that_know_their_steps_refuse_settings_that_differ(kind: type, more: dict[str, int]) -> None:
    def uneven(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [one], "weight_decay": 0.1 * (one.dim() > 1)} for one in parameters], lr=0.1)

    plan = sf.Plan.without_privacy(population=2, batch_size=2, steps=1, unit="client")
    with pytest.raises(InputError, match="weight decay"):
        sf.rounds(bare(), population([4, 4]), plan, algorithm=kind(uneven, **more), engine=sf.Simulation(), loss=LOSS)


def test_without_padding_a_normalised_model_may_be_stacked() -> None:
    found = [
        after(engine, [8] * 7, normalised(), LOSS)
        for engine in (sf.Simulation(workers=1, way="stacked"), sf.Simulation(debug=True))
    ]
    assert torch.allclose(*found, rtol=0, atol=1e-6)
