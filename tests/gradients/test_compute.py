"""Speed knobs: bad ones are refused, every way to train passes them on, and none changes the model beyond rounding."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, final

import pytest
import torch
from helpers import LOSS, flat, sgd, toy_plan, toy_records
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sfumato as sf
from sfumato.errors import InputError
from sfumato.gradients.clipping import KINDS, Clipping
from sfumato.gradients.private import PrivateGradient

LOCAL = functools.partial(torch.optim.SGD, lr=0.1)
ALONE = sf.Compute(memory_mb=1e-6)
"""One record at a time."""


@pytest.mark.parametrize("memory_mb", [0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, "64", True, [64]])
def test_a_limit_that_is_no_positive_number_is_refused(memory_mb: Any) -> None:
    with pytest.raises(InputError, match=r"^memory_mb must be a finite number above 0, not .*\.$"):
        sf.Compute(memory_mb=memory_mb)


@pytest.mark.parametrize("memory_mb", [None, 1, 0.5, 1e-9, 1e6])
def test_a_limit_that_is_a_positive_number_or_none_is_taken(memory_mb: Any) -> None:
    assert sf.Compute(memory_mb=memory_mb).memory_mb == memory_mb


@pytest.mark.parametrize("autocast", [1, 0, "yes", "", None, torch.bfloat16, [True]])
def test_autocast_is_true_or_false(autocast: Any) -> None:
    with pytest.raises(InputError, match=r"^autocast must be True or False, not .*\.$"):
        sf.Compute(autocast=autocast)


@final
class Counting(nn.Module):
    """Counts how often it is run, and in which precision."""

    def __init__(self, calls: list[torch.dtype]) -> None:
        super().__init__()
        self.layer, self._calls = nn.Linear(4, 2), calls

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        self._calls.append(out.dtype)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Counting:
        copied = Counting(self._calls)
        copied.load_state_dict(self.state_dict())
        return copied


def trained(way: str, model: nn.Module, compute: sf.Compute | None) -> None:
    records, more = toy_records(), {"compute": compute} if compute is not None else {}
    populations = dict.fromkeys(records.owner_names, 20)
    private = toy_plan(steps=1)
    if way == "train":
        sf.train(model, records, private, loss=LOSS, optimizer=sgd(model), **more)  # type: ignore[arg-type]
    elif way == "steps":
        list(sf.steps(model, records, private, loss=LOSS, optimizer=sgd(model), **more))  # type: ignore[arg-type]
    else:
        algorithm = sf.FedAvg(LOCAL) if "FedAvg" in way else sf.FedSGD(LOCAL)
        run: Callable[..., Any] = sf.federate if "federate" in way else lambda *a, **k: list(sf.rounds(*a, **k))
        run(
            model, records.by_owner(), private, algorithm=algorithm, engine=sf.Simulation(), loss=LOSS,
            populations=populations, **more,
        )  # fmt: skip


WAYS = ["train", "steps", "federate FedSGD", "rounds FedSGD", "federate FedAvg", "rounds FedAvg"]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_passes_the_limit_on(way: str) -> None:
    """The model is run once for each microbatch; the first takes up to eight records."""
    calls: dict[str, list[torch.dtype]] = {"default": [], "alone": []}
    trained(way, Counting(calls["default"]), None)
    trained(way, Counting(calls["alone"]), ALONE)
    assert len(calls["alone"]) >= 60 - 3 * 8
    assert len(calls["default"]) <= 3 * 3 + 1


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_passes_autocast_on(way: str) -> None:
    calls: list[torch.dtype] = []
    trained(way, Counting(calls), sf.Compute(autocast=True))
    assert set(calls) == {torch.bfloat16}
    assert not torch.is_autocast_enabled("cpu")


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(6, 2)
    )


@functools.cache
def private_plan(kind: str) -> sf.Plan:
    # Made by hand, which is quicker than finding the least noise.
    return sf.Plan(sf.Budget(4.0, 1e-3), sf.Poisson(0.5), 1.0, 2.0, 3, 60, kind)


def model_of(compute: sf.Compute, kind: str, augment: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    model = network()
    sf.train(
        model, toy_records(), private_plan(kind), loss=LOSS, optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        source=sf.SeededSource(5), compute=compute, augment=augment,
    )  # fmt: skip
    return flat(model)


@functools.cache
def usual(kind: str) -> Tensor:
    return model_of(sf.Compute(), kind)


@settings(max_examples=15, deadline=None)
@given(megabytes=st.floats(-7, 3), kind=st.sampled_from(KINDS))
def test_any_limit_gives_the_same_model_to_rounding(megabytes: float, kind: str) -> None:
    assert torch.allclose(model_of(sf.Compute(memory_mb=10**megabytes), kind), usual(kind), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_that_are_compared_would_differ_with_other_noise(kind: str) -> None:
    """Without this, models that hardly move would agree whatever the limit does."""
    model = network()
    before = flat(model).clone()
    sf.train(
        model, toy_records(), private_plan(kind), loss=LOSS, optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        source=sf.SeededSource(6),
    )  # fmt: skip
    assert float((usual(kind) - before).abs().max()) > 0.01
    assert float((usual(kind) - flat(model)).abs().max()) > 0.005


def two_views(record: Tensor) -> Tensor:
    return torch.stack([record, -record])


def test_any_limit_gives_the_same_model_with_views() -> None:
    models = [model_of(compute, "flat", two_views) for compute in (sf.Compute(), ALONE, sf.Compute(memory_mb=0.01))]
    assert torch.allclose(models[0], models[1], rtol=0, atol=1e-5)
    assert torch.allclose(models[0], models[2], rtol=0, atol=1e-5)
    assert float((models[0] - usual("flat")).abs().max()) > 1e-3


@pytest.mark.parametrize("algorithm", [sf.FedSGD(LOCAL), sf.FedAvg(LOCAL, local_steps=2)])
def test_any_limit_gives_the_same_federated_model(algorithm: Any) -> None:
    models = []
    for compute in (sf.Compute(), ALONE):
        model, records = network(), toy_records()
        sf.federate(
            model, records.by_owner(), private_plan("flat"), algorithm=algorithm, engine=sf.Simulation(), loss=LOSS,
            populations=dict.fromkeys(records.owner_names, 20), source=sf.SeededSource(2), compute=compute,
        )  # fmt: skip
        models.append(flat(model))
    assert torch.allclose(*models, rtol=0, atol=1e-5)


def test_the_limit_is_no_part_of_the_plan() -> None:
    """A speed knob must not be able to keep a checkpoint from going on."""
    training = [
        sf.steps(model, toy_records(), toy_plan(), loss=LOSS, optimizer=sgd(model), compute=compute)
        for model in [network()]
        for compute in (sf.Compute(), ALONE)
    ]
    assert training[0]._fingerprint() == training[1]._fingerprint()


@settings(max_examples=10, deadline=None)
@given(precision=st.sampled_from(["highest", "high", "medium"]), ambient=st.booleans(), kind=st.sampled_from(KINDS))
def test_what_torch_is_told_around_the_training_moves_no_record_above_the_clip_norm(
    precision: str, ambient: bool, kind: str
) -> None:
    """A training inside of somebody's `torch.autocast` measures and sums in full precision all the same."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for shape, layer in (
            ((1, 6), nn.Linear(6, 5)), ((3, 64, 6), nn.Linear(6, 5)), ((3, 3, 60), nn.Linear(60, 50)),
            ((3, 3, 9), nn.Conv1d(3, 4, 3, bias=False)),
        ):  # fmt: skip
            for seed in range(5):
                features = torch.randn(1, *shape[1:], generator=torch.Generator().manual_seed(seed))
                gradient = PrivateGradient(layer, lambda out, _: out.float().square().sum(), Clipping(1e-3, kind))
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=ambient):
                    total = gradient.sum(features, torch.zeros(1)).bounded.value.values()
                assert math.sqrt(sum(float(tensor.double().square().sum()) for tensor in total)) <= 1e-3
    finally:
        torch.set_float32_matmul_precision(before)


def one_sum() -> float:
    """Return the norm of the part of one record whose gradient is far above the clip norm of 1e-3."""
    gradient = PrivateGradient(nn.Linear(6, 5), lambda out, _: out.square().sum(), Clipping(1e-3))
    total = gradient.sum(torch.ones(1, 3, 6), torch.zeros(1)).bounded.value.values()
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in total))


@pytest.fixture
def torch_as_it_was() -> Iterator[None]:
    """Put back how torch was told to compute; it warns or fails if older and newer switches were both used."""
    backends = torch.backends
    places = [
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    ]
    before = [place.fp32_precision for place in [backends, *places]]
    yield
    for place, precision in zip([backends, *places], before, strict=True):
        place.fp32_precision = precision


NEWER = pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="this torch has only the older switches"
)
PRECISIONS = [
    ("", "tf32"), ("", "ieee"), ("cuda.matmul", "tf32"), ("cudnn.conv", "ieee"), ("mkldnn.matmul", "bf16"),
    ("mkldnn.conv", "bf16"),
]  # fmt: skip


@NEWER
@pytest.mark.usefixtures("torch_as_it_was")
@pytest.mark.parametrize(("backend", "precision"), PRECISIONS)
def test_the_newer_switches_of_torch_are_kept_and_change_nothing(backend: str, precision: str) -> None:
    place = functools.reduce(getattr, backend.split("."), torch.backends) if backend else torch.backends
    place.fp32_precision = precision
    assert 0.99e-3 < one_sum() <= 1e-3
    assert place.fp32_precision == precision


@NEWER
@pytest.mark.usefixtures("torch_as_it_was")
def test_the_older_switches_of_torch_may_be_set_between_two_sums() -> None:
    for allowed in (True, False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        assert 0.99e-3 < one_sum() <= 1e-3
        assert torch.backends.cuda.matmul.allow_tf32 is allowed


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1),
    "momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": functools.partial(torch.optim.Adam, lr=0.01),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01),
}


@pytest.mark.parametrize("compute", [sf.Compute(), ALONE], ids=["default", "alone"])
@pytest.mark.parametrize("batch_size", [60, 20])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", [mlp, cnn])
def test_an_infinite_epsilon_is_plain_pytorch_bit_for_bit(
    make: Callable[[], nn.Module], optimizer: str, batch_size: int, compute: sf.Compute
) -> None:
    records, made = toy_records(), OPTIMIZERS[optimizer]
    torch.manual_seed(1)
    model = make()
    torch.manual_seed(1)
    twin = make()
    plan = sf.Plan.without_privacy(population=60, batch_size=batch_size, steps=6, sampling="shuffled")
    sf.train(
        model, records, plan, loss=LOSS, optimizer=made(model.parameters()), source=sf.SeededSource(9), compute=compute
    )
    stepper, draws = made(twin.parameters()), plan.sampler.start(60, sf.SeededSource(9))
    for step in range(6):
        batch = draws.batch(step)
        stepper.zero_grad()
        LOSS(twin(records.features[batch]), records.targets[batch]).backward()
        stepper.step()
    assert [torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)] == [True] * 4
