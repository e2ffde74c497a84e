"""Every way to train a group of clients against a plain loop over one client at a time."""

from __future__ import annotations

import collections
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from helpers import expected_steps
from torch import Tensor, nn
from torch.nn import functional as F

import sfumato as sf
from sfumato.learning import fused_linear, groups
from sfumato.learning.client_rounds import ClientRounds
from sfumato.learning.federated import Federation
from sfumato.learning.group_data import ALONE, CHANNELS_LAST, STACKED, Data
from sfumato.learning.groups import Group, Hints, running_statistics
from sfumato.learning.local_training import LocalTraining, batches_of


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are far too small for two
    yield
    torch.set_num_threads(threads)


SIZES, KEY = (7, 3, 11, 1, 8), 12345
CLIENTS = (3, 17, 4, 900, 1)
WAYS = (STACKED, ALONE, CHANNELS_LAST)
Loss = Callable[[Tensor, Tensor], Tensor]

SGD = functools.partial(torch.optim.SGD, lr=0.2)
OPTIMIZERS = {
    "sgd": SGD,
    "momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.05),
    "adam": functools.partial(torch.optim.Adam, lr=0.05),
}


class Tied(nn.Module):
    """One weight that is used in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.back, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.back.weight = self.into.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.back(torch.tanh(self.into(x))))


class Shared(nn.Module):
    """One layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(torch.tanh(self.again(x))))


class Elsewhere(nn.Module):
    """Weights that are used in a linear layer and outside of it: directly, in a list, as an input, and as a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.three = nn.Linear(6, 6, bias=False)
        self.scale = nn.Parameter(torch.ones(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.one(x)) * (1 + self.one.weight.square().mean())
        x = F.linear(x, self.two.weight * self.scale, self.two.bias)
        x = self.three(x) + F.linear(self.three.weight, self.scale).mean(0)
        return self.head(x) + torch.stack([self.head.weight.mean(1), self.head.bias]).sum(0)


class Later(nn.Module):
    """A layer that is used once in the first call and twice in later ones."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for _ in range(1 if self.calls == 1 else 2):
            x = torch.tanh(self.again(x))
        return self.head(x)


class Unused(nn.Module):
    """A layer without any use, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.frozen, self.head = nn.Linear(6, 2), nn.Linear(6, 6), nn.Linear(6, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.frozen(x)))


class Remembers(nn.Module):
    """Keeps something of what it saw, in an attribute and in a buffer, and lets it into what it says next."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out = self.head(x + self.seen / self.calls)
        with torch.no_grad():
            self.seen.add_(x.detach().mean(0))
        return out


class Sequence(nn.Module):
    """A linear layer over more than one dimension, and one that gets the same input for every client."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.head, self.offset = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        same = self.offset(torch.ones(1, 2, dtype=x.dtype))
        return self.head(torch.tanh(self.each(x.unflatten(1, (2, 3)))).mean(1)) + same


class Recurrent(nn.Module):
    """Weights that torch keeps in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x.unflatten(1, (2, 3)))[0][:, -1])


def _cnn(*norm: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), *norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(8, 3),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "logistic": lambda: nn.Linear(6, 3),
    "mlp": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)),
    "cnn": _cnn,
    "group norm": lambda: _cnn(nn.GroupNorm(2, 4)),
    "layer norm": lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3)),
    "tied": Tied,
    "shared": Shared,
    "elsewhere": Elsewhere,
    "later": Later,
    "unused": Unused,
    "sequence": Sequence,
}

LOSSES: dict[str, Loss] = {
    "mean": F.cross_entropy,
    "module": nn.CrossEntropyLoss(),
    "by record": nn.CrossEntropyLoss(reduction="none"),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "by number": lambda outputs, targets: (outputs - F.one_hot(targets, 3)).square(),
    "partial": functools.partial(F.cross_entropy, label_smoothing=0.2),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name]().double()


def held(sizes: tuple[int, ...] = SIZES, seed: int = 0, features: int = 6) -> list[sf.Records]:
    generator = torch.Generator().manual_seed(seed)
    return [
        sf.Records(
            torch.randn(size, features, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for size in sizes
    ]


def plain_loop(
    model: nn.Module, loss: Loss, training: LocalTraining, records: list[sf.Records], *, clients: tuple[int, ...] = CLIENTS,
    start: Mapping[str, Tensor] | None = None, toward: Mapping[str, Tensor] | None = None,
    push: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Train each client's copy of the model step by step, as anybody would; return the parameters and running statistics."""
    sizes = torch.tensor([len(one) for one in records])
    batches = batches_of(training, sizes, KEY, torch.tensor(clients))
    ends: dict[str, list[Tensor]] = {}
    for row, own in enumerate(records):
        client, own_loss = copy.deepcopy(model), copy.deepcopy(loss)
        parameters = {name: value for name, value in client.named_parameters() if value.requires_grad}
        with torch.no_grad():
            for name, value in (start or {}).items():
                parameters[name].copy_(value[row])
        pulled = toward or start or {}
        anchors = {
            name: pulled[name][row] if name in pulled else value.detach().clone() for name, value in parameters.items()
        }
        optimizer = training.optimizer(list(parameters.values()))
        for step, count in enumerate(batches.count[row].tolist()):
            if not count:
                continue
            index = batches.index[row, step, :count]
            optimizer.zero_grad()
            value = own_loss(client(own.features[index]), own.targets[index]).mean()
            if training.proximal:
                distance = sum((parameters[name] - anchor).square().sum() for name, anchor in anchors.items())
                value = value + training.proximal / 2 * distance
            value.backward()
            for name, one in (push or {}).items():
                gradient = parameters[name].grad
                parameters[name].grad = one[row].clone() if gradient is None else gradient + one[row]
            optimizer.step()
        for name, value in {**parameters, **running_statistics(client)}.items():
            ends.setdefault(name, []).append(value.detach().clone())
    return {name: torch.stack(values) for name, values in ends.items()}


def check(
    model: nn.Module, loss: Loss, training: LocalTraining, way: str, sizes: tuple[int, ...] = SIZES, again: int = 2,
    **more: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Train a group, several times with the same hints, and compare it with the plain loop."""
    before = copy.deepcopy(model.state_dict())
    records, hints = held(sizes), Hints()
    expected = plain_loop(model, loss, training, records, clients=CLIENTS[: len(sizes)], **more)  # type: ignore[arg-type]
    arguments = {"start": {}, **more}
    for _ in range(again):
        group = Group(model, loss, CLIENTS[: len(sizes)], records, KEY, way, hints)
        found = group.train(training, **arguments)  # type: ignore[arg-type]
        assert found.weights.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(found.weights[name], value, rtol=0, atol=1e-9), name
        assert found.steps.tolist() == [expected_steps(training, len(one)) for one in records]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def in_epochs(optimizer: str = "sgd", **more: float) -> LocalTraining:
    return LocalTraining(OPTIMIZERS[optimizer], epochs=2, batch_size=4, **more)  # type: ignore[arg-type]


def in_steps(optimizer: str = "sgd", **more: float) -> LocalTraining:
    return LocalTraining(OPTIMIZERS[optimizer], steps=4, batch_size=4, **more)  # type: ignore[arg-type]


def ways_of(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return each model with each way that is one of its own: without pictures, channels last is nothing else than alone."""
    return [(name, way) for name in names for way in WAYS if way != CHANNELS_LAST or name in ("cnn", "group norm")]


@pytest.mark.parametrize(("name", "way"), ways_of(MODELS))
def test_every_model_is_trained_as_by_a_plain_loop(name: str, way: str) -> None:
    for training in (in_epochs(), in_steps()):
        check(made(name), F.cross_entropy, training, way)


def test_recurrent_layers_are_trained_as_by_a_plain_loop() -> None:
    torch.manual_seed(3)
    check(Recurrent().double(), F.cross_entropy, in_steps(), ALONE)
    check(Recurrent().double(), F.cross_entropy, in_epochs("adam"), ALONE)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize(("name", "way"), ways_of(["mlp", "cnn", "tied", "unused"]))
def test_every_optimiser_takes_the_steps_of_a_plain_loop(name: str, optimizer: str, way: str) -> None:
    for training in (in_epochs(optimizer), in_steps(optimizer)):
        check(made(name), F.cross_entropy, training, way, again=1)


@pytest.mark.parametrize("way", [STACKED, ALONE])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_that_of_a_plain_loop(name: str, way: str) -> None:
    for training in (in_epochs(), in_steps("momentum")):
        check(made("mlp"), LOSSES[name], training, way)


@pytest.mark.parametrize("way", [STACKED, ALONE])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_pull_to_the_start_is_that_of_a_plain_loop(optimizer: str, way: str) -> None:
    check(made("unused"), F.cross_entropy, in_epochs(optimizer, proximal=0.7), way)


@pytest.mark.parametrize("way", [STACKED, ALONE])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_start_pull_and_push_of_each_client_are_its_own(optimizer: str, way: str) -> None:
    model = made("unused")
    generator = torch.Generator().manual_seed(9)

    def others() -> dict[str, Tensor]:
        shapes = {name: value.shape for name, value in model.named_parameters() if value.requires_grad}
        return {
            name: 0.3 * torch.randn(len(SIZES), *shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }

    push = others()
    for training in (in_epochs(optimizer), in_epochs(optimizer, proximal=0.7)):
        check(model, F.cross_entropy, training, way, start=others(), toward=others(), push=push)
    check(model, F.cross_entropy, in_epochs(optimizer, proximal=0.7), way, start=others())
    check(model, F.cross_entropy, in_steps(optimizer), way, push=push)


@pytest.mark.parametrize("way", WAYS)
def test_one_client_and_full_batches_are_those_of_a_plain_loop(way: str) -> None:
    check(made("mlp"), F.cross_entropy, in_epochs(), way, (5,))
    check(made("mlp"), F.cross_entropy, LocalTraining(SGD, steps=3), way)
    check(made("mlp"), F.cross_entropy, LocalTraining(SGD, epochs=3), way)


def test_running_statistics_are_those_of_a_plain_loop() -> None:
    def model() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=0.3), nn.ReLU(), nn.Linear(5, 3)).double()

    even, full = (8, 8, 8), LocalTraining(SGD, steps=4, batch_size=4)
    for way in WAYS:
        check(model(), F.cross_entropy, full, way, even)
        check(model(), F.cross_entropy, LocalTraining(OPTIMIZERS["momentum"], epochs=2, batch_size=4), way, even)
    for way in (ALONE, CHANNELS_LAST):
        check(model(), F.cross_entropy, full, way, (7, 5, 11, 4))


def test_what_a_model_remembers_of_a_client_is_gone_with_it() -> None:
    torch.manual_seed(1)
    check(Remembers().double(), F.cross_entropy, in_steps(), ALONE)


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_is_asked_about_whole_batches(way: str) -> None:
    for loss in _OF_THE_WHOLE_BATCH.values():
        check(made("mlp"), loss, in_epochs(), way)


_OF_THE_WHOLE_BATCH: dict[str, Loss] = {
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)),
    "summed": nn.CrossEntropyLoss(reduction="sum"),
    "of the batch": lambda outputs, targets: F.cross_entropy(outputs, targets) + outputs.mean(0).square().sum(),
}


def rounds_of(model: nn.Module, loss: Loss, training: LocalTraining, clients: list[sf.Records]) -> ClientRounds:
    population = sf.Population.of({f"site-{number}": one for number, one in enumerate(clients)})
    plan = sf.Plan.without_privacy(population=100, batch_size=100, steps=1)
    algorithm = sf.FedAvg(training.optimizer, training.steps, training.batch_size, local_epochs=training.epochs)
    federation = Federation(model, population, plan, loss, sf.Simulation(), sf.SeededSource(1))
    procedure = algorithm.procedure(federation, None)
    assert isinstance(procedure, ClientRounds)
    return procedure


def agrees(model: nn.Module, loss: Loss, training: LocalTraining, sizes: tuple[int, ...], way: str = STACKED) -> bool:
    clients = held(sizes)
    return rounds_of(model, loss, training, clients)._agrees(range(len(clients)), clients, way)


@pytest.mark.parametrize("name", MODELS)
def test_agreement_is_found_where_there_is_one(name: str) -> None:
    assert agrees(made(name), F.cross_entropy, in_epochs(), (7, 3))
    assert agrees(made(name), F.cross_entropy, in_epochs("adam"), (7, 3))


@pytest.mark.parametrize("name", _OF_THE_WHOLE_BATCH)
def test_losses_of_the_whole_batch_agree(name: str) -> None:
    assert agrees(made("mlp"), _OF_THE_WHOLE_BATCH[name], in_epochs(), (7, 3))


def test_a_model_that_mixes_records_is_never_padded() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    for sizes in ((8, 8), (8, 3), (8,)):
        clients = held(sizes)
        procedure = rounds_of(model, F.cross_entropy, in_steps(), clients)
        assert procedure._agrees(range(len(clients)), clients, STACKED)
        assert not procedure._hints.padding
    for hints in (Hints(padding=False), Hints()):
        group = Group(model, F.cross_entropy, CLIENTS[:2], held((8, 3)), KEY, STACKED, hints)
        expected = plain_loop(model, F.cross_entropy, in_steps(), held((8, 3)), clients=CLIENTS[:2])
        found = group.train(in_steps(), {}).weights
        alike = all(torch.allclose(found[name], value, rtol=0, atol=1e-9) for name, value in expected.items())
        assert alike == (not hints.padding)


def test_targets_that_are_to_be_ignored_are_no_matter() -> None:
    model, clients = made("mlp"), held((8, 6))
    for one in clients:
        one.targets[0] = -100
    expected = plain_loop(model, F.cross_entropy, in_epochs(), clients, clients=(0, 1))
    for way in WAYS:
        found = Group(model, F.cross_entropy, (0, 1), clients, KEY, way).train(in_epochs(), {}).weights
        assert all(torch.allclose(found[name], value, rtol=0, atol=1e-9) for name, value in expected.items())


def test_what_a_model_remembers_is_found_by_agreement() -> None:
    torch.manual_seed(1)
    clients = held((8, 3))
    procedure = rounds_of(Remembers().double(), F.cross_entropy, in_steps(), clients)
    try:
        sound = procedure._agrees(range(2), clients, STACKED)
    except Exception:
        sound = False  # torch refuses to keep what belongs to several clients
    assert not sound


@pytest.mark.parametrize("loss", [F.cross_entropy, LOSSES["smoothed"], LOSSES["by number"]])
@pytest.mark.parametrize(("name", "way"), ways_of(["mlp", "cnn", "tied", "unused", "elsewhere"]))
def test_gradients_are_those_of_a_plain_loop(name: str, way: str, loss: Loss) -> None:
    model, records = made(name), held()
    found = Group(model, loss, CLIENTS, records, KEY, way).gradients()
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert found.keys() == parameters.keys()
    for row, own in enumerate(records):
        model.zero_grad()
        loss(model(own.features), own.targets).mean().backward()
        for key, value in parameters.items():
            expected = torch.zeros_like(value) if value.grad is None else value.grad
            assert torch.allclose(found[key][row], expected, rtol=0, atol=1e-9), key


def _no_padding_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Data.batch
    monkeypatch.setattr(Data, "batch", lambda data, step, clients: (*honest(data, step, clients)[:2], None))


def _mean_over_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = groups._Forward._mean

    def mutant(forward: groups._Forward, outputs: Tensor, targets: Tensor) -> Tensor:
        return honest(forward, outputs, targets) * len(targets) / 4

    monkeypatch.setattr(groups._Forward, "_mean", mutant)


def _stopped_clients_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = groups._Descent._optimized

    def mutant(descent: groups._Descent, *given: object) -> None:
        before = [parameter.detach().clone() for parameter in descent._parameters.values()]
        honest(descent, *given)  # type: ignore[arg-type]
        for parameter, old in zip(descent._parameters.values(), before, strict=True):
            active = len(next(iter(given[0].values())))  # type: ignore[attr-defined]
            parameter.detach()[active:] -= 0.1 * (old[active:] - 1)

    monkeypatch.setattr(groups._Descent, "_optimized", mutant)


def _pull_to_the_first_client(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = groups._Pull.on

    def mutant(pull: groups._Pull, name: str, gradient: Tensor, weight: Tensor) -> Tensor:
        anchor = {key: value[:1] if value.dim() > weight.dim() - 1 else value for key, value in pull.anchor.items()}
        return honest(pull._replace(anchor=anchor), name, gradient, weight)

    monkeypatch.setattr(groups._Pull, "on", mutant)


def _push_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups._Pull, "on", lambda pull, name, gradient, weight: gradient)


def _rows_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "argsort", functools.partial(_unsorted, torch.argsort))


def _unsorted(honest: Callable[..., Tensor], values: Tensor, *more: object, **options: object) -> Tensor:
    return honest(values, *more, **options) if options else torch.arange(len(values))


def _updated_before_the_input_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fused_linear._Linear.backward

    def mutant(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        weight = ctx.saved_tensors[1]
        honest(ctx, *gradients)
        return torch.matmul(gradients[0], weight), None, None, None, None

    monkeypatch.setattr(fused_linear._Linear, "backward", staticmethod(mutant))


def _no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fused_linear._Linear.backward

    def mutant(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        bias = ctx.saved_tensors[2]
        before = None if bias is None else bias.clone()
        found = honest(ctx, *gradients)
        if bias is not None:
            bias.copy_(before)
        return found

    monkeypatch.setattr(fused_linear._Linear, "backward", staticmethod(mutant))


class _CountsOnce(collections.Counter[str]):
    def update(self, names: Any = (), /) -> None:  # type: ignore[override]
        self |= collections.Counter(names)


def _used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def mutant(mode: fused_linear.Fusing) -> frozenset[str]:
        return frozenset(name for pair in mode._pairs for name in pair) - mode._elsewhere

    monkeypatch.setattr(fused_linear.Fusing, "fusable", mutant)
    monkeypatch.setattr(fused_linear, "Counter", _CountsOnce)


def _used_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear.Fusing, "_used", lambda mode, values: set())


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], None]]] = {
    "no padding mask": (
        _no_padding_mask, lambda: test_every_model_is_trained_as_by_a_plain_loop("logistic", STACKED)
    ),
    "no padding mask in gradients": (
        _no_padding_mask, lambda: test_gradients_are_those_of_a_plain_loop("mlp", STACKED, F.cross_entropy)
    ),
    "mean over padding": (_mean_over_padding, lambda: test_every_loss_is_that_of_a_plain_loop("by record", STACKED)),
    "stopped clients go on": (
        _stopped_clients_go_on, lambda: test_every_optimiser_takes_the_steps_of_a_plain_loop("mlp", "adam", STACKED)
    ),
    "pull to the first client": (
        _pull_to_the_first_client, lambda: test_start_pull_and_push_of_each_client_are_its_own("adam", STACKED)
    ),
    "push dropped": (_push_dropped, lambda: test_start_pull_and_push_of_each_client_are_its_own("sgd", ALONE)),
    "rows in another order": (
        _rows_of_others, lambda: test_every_model_is_trained_as_by_a_plain_loop("logistic", STACKED)
    ),
    "updated before the input gradient": (
        _updated_before_the_input_gradient, lambda: test_every_model_is_trained_as_by_a_plain_loop("mlp", ALONE)
    ),
    "no bias": (_no_bias, lambda: test_every_model_is_trained_as_by_a_plain_loop("mlp", STACKED)),
    "fused though used twice": (_used_twice, lambda: test_every_model_is_trained_as_by_a_plain_loop("shared", ALONE)),
    "fused though tied": (_used_twice, lambda: test_every_model_is_trained_as_by_a_plain_loop("tied", STACKED)),
    "fused though used elsewhere": (
        _used_elsewhere, lambda: test_every_model_is_trained_as_by_a_plain_loop("elsewhere", ALONE)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_killed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, killer = MUTANTS[name]
    killer()
    mutate(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):  # torch itself notices some weights that moved too early
        killer()
