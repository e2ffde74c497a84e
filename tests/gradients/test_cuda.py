"""The fast path on a GPU: the sums of the oracle there and of the CPU here, whatever torch may do with float32."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from gradient_checks import DOUBLE, SINGLE, Case, First, check_agreement, flat, normals, tokens, with_values
from torch import Tensor, nn
from torch.nn import functional as F

import sfumato as sf
from sfumato.gradients import strategies
from sfumato.gradients.clipped import ClippedSum
from sfumato.gradients.clipping import KINDS, Clipping
from sfumato.gradients.explain import explain
from sfumato.gradients.terms.held import Held
from sfumato.privacy.bounded import Bounded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU that torch can use")

GPU = torch.device("cuda")
CLASSES, WIDTH, STEPS = 3, 8, 6


@pytest.fixture(autouse=True)
def _full_precision_of_the_model() -> Iterator[None]:
    """The models' own kernels are compared with those of the CPU, so they may not round to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Text(nn.Module):
    """Tokens through a table, a recurrent layer and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, WIDTH)
        self.reader = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.look = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.reader(self.table(x))
        y = y + self.look(y, y, y)[0]
        return self.head(self.norm(y)).mean(1)


class Scaled(nn.Module):
    """A parameter whose operation has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def head() -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(STEPS * WIDTH, CLASSES)]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), *head()),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, STEPS)), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.Flatten(), nn.Linear(24, CLASSES),
    ),
    "embedding": lambda: nn.Sequential(nn.Embedding(7, WIDTH), *head()),
    "attention": lambda: nn.Sequential(First(nn.MultiheadAttention(WIDTH, 2, batch_first=True), 3), *head()),
    "lstm": lambda: nn.Sequential(
        First(nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, bidirectional=True)), nn.Linear(2 * WIDTH, WIDTH), *head()
    ),
    "gru": lambda: nn.Sequential(First(nn.GRU(WIDTH, WIDTH, batch_first=True)), *head()),
    "norms": lambda: nn.Sequential(nn.GroupNorm(2, STEPS), nn.LayerNorm(WIDTH), nn.InstanceNorm1d(STEPS, affine=True), *head()),
    "no rule": lambda: nn.Sequential(Scaled(), nn.PReLU(), *head()),
    "text": Text,
}  # fmt: skip


def case_of(model: str, dtype: torch.dtype, count: int = 12) -> Case:
    """Return a case on the CPU."""
    made = with_values(MODELS[model](), 1, dtype)
    reads = model in ("embedding", "text")
    features = tokens(2, 7, count, STEPS) if reads else normals(2, count, STEPS, WIDTH).to(dtype)
    return Case(made, features, torch.arange(count) % CLASSES, F.cross_entropy)


def on_gpu(case: Case) -> Case:
    return Case(copy.deepcopy(case.model).to(GPU), case.features.to(GPU), case.targets.to(GPU), case.loss)


def on_cpu(result: ClippedSum) -> ClippedSum:
    assert all(tensor.device.type == GPU.type for tensor in result.bounded.value.values())
    value = {name: tensor.cpu() for name, tensor in result.bounded.value.items()}
    return ClippedSum(Bounded(value, result.bounded.norm_bound), result.nonfinite)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-10 if dtype is DOUBLE else 2e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=["float32", "float64"])
@pytest.mark.parametrize("model", MODELS)
def test_the_sum_on_the_gpu_is_that_of_the_cpu(model: str, dtype: torch.dtype, kind: str) -> None:
    case, clipping = case_of(model, dtype), Clipping(0.5, kind)
    found = on_cpu(on_gpu(case).fast(clipping))
    check_agreement(found, case.fast(clipping), tolerance(dtype))
    check_agreement(found, case.loop(clipping), tolerance(dtype))


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=["float32", "float64"])
@pytest.mark.parametrize("model", [name for name in MODELS if name not in ("lstm", "gru", "text")])
def test_the_sum_on_the_gpu_is_that_of_the_oracle_there(model: str, dtype: torch.dtype) -> None:
    """Recurrent layers are left out: the kernels that torch has for them on a GPU have no batched form."""
    case = on_gpu(case_of(model, dtype))
    check_agreement(
        on_cpu(case.fast(Clipping(0.5))), on_cpu(case.reference(Clipping(0.5))), tolerance(dtype)
    )  # fmt: skip


@pytest.mark.parametrize("megabytes", [1e-6, 0.02, 1000])
@pytest.mark.parametrize("model", MODELS)
def test_the_microbatch_changes_nothing_but_rounding(model: str, megabytes: float) -> None:
    case = case_of(model, DOUBLE, 21)
    found = on_gpu(case).fast(Clipping(0.5), compute=sf.Compute(memory_mb=megabytes))
    check_agreement(on_cpu(found), case.loop(Clipping(0.5)), 1e-10)


STRATEGIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "linear": (lambda: nn.Linear(20, 10, bias=False), (5, 20), ["per record", "ghost norm", "in blocks"]),
    "one position": (lambda: nn.Linear(20, 10, bias=False), (20,), ["outer product"]),
    "convolution": (
        lambda: nn.Conv2d(8, 16, 3, bias=False), (8, 5, 5),
        [
            "per record, grouped", "per record, patches", "per record, patches, channels last", "in blocks, grouped",
            "in blocks, patches", "in blocks, patches, channels last", "ghost norm",
        ],
    ),
}  # fmt: skip
FORCED = [(layer, strategy) for layer, (_, _, names) in STRATEGIES.items() for strategy in names]


def forced(monkeypatch: pytest.MonkeyPatch, layer: str, strategy: str, count: int, dtype: torch.dtype) -> Case:
    monkeypatch.setattr(strategies.Choices, "name", lambda self, term, room, timed: strategy)
    make, shape, _ = STRATEGIES[layer]
    features, targets = normals(3, count, *shape).to(dtype), torch.arange(count, dtype=dtype)
    return Case(with_values(make(), 1, dtype), features, targets, sized)


def sized(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.float().square().flatten(1).sum(1) * (1 + targets.float())).mean()


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=["float32", "float64"])
@pytest.mark.parametrize(("layer", "strategy"), FORCED)
def test_every_strategy_gives_the_same_sum(
    monkeypatch: pytest.MonkeyPatch, layer: str, strategy: str, dtype: torch.dtype
) -> None:
    case = forced(monkeypatch, layer, strategy, 9, dtype)
    check_agreement(on_cpu(on_gpu(case).fast(Clipping(0.5))), case.loop(Clipping(0.5)), 2e-4)


@pytest.mark.parametrize("allowed", [False, True], ids=["float32", "TF32"])
@pytest.mark.parametrize("ambient", [False, True], ids=["plain", "autocast around"])
@pytest.mark.parametrize(("layer", "strategy"), FORCED)
def test_one_record_is_within_the_clip_norm_whatever_torch_may_do_with_float32(
    monkeypatch: pytest.MonkeyPatch, layer: str, strategy: str, ambient: bool, allowed: bool
) -> None:
    """TF32 keeps 10 bits, fewer than the margin of the clip norm: norms and sums may not be taken in it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    case = on_gpu(forced(monkeypatch, layer, strategy, 16, SINGLE))
    # Each number lies just where it is rounded up by most.
    case.features.copy_(torch.full_like(case.features, 1 + 2.0**-11 + 2.0**-20) * case.features.sign())
    for record in range(16):
        alone = replace(case, features=case.features[record : record + 1], targets=case.targets[record : record + 1])
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=ambient):
            total = alone.fast(Clipping(1e-3))
        assert 0.99e-3 < float(flat(total).norm()) <= 1e-3
    assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert torch.backends.cudnn.allow_tf32 is allowed


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("benchmark", [False, True])
def test_what_cudnn_was_told_holds_while_norms_are_taken(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool, benchmark: bool
) -> None:
    cudnn = torch.backends.cudnn
    seen: list[tuple[bool, bool, int | None]] = []
    honest = Held.__init__

    def spy(self: Held, *arguments: Any) -> None:
        seen.append((cudnn.benchmark, cudnn.deterministic, cudnn.benchmark_limit))
        honest(self, *arguments)

    monkeypatch.setattr(Held, "__init__", spy)
    with cudnn.flags(enabled=True, benchmark=benchmark, deterministic=deterministic, allow_tf32=True):
        told = (benchmark, deterministic, cudnn.benchmark_limit)
        on_gpu(case_of("convolution", SINGLE)).fast(Clipping(0.5))
        assert (cudnn.benchmark, cudnn.deterministic, cudnn.benchmark_limit) == told
        assert cudnn.allow_tf32
    assert set(seen) == {told}


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_records_add_zero_and_are_counted(broken: float) -> None:
    case = on_gpu(case_of("convolution", SINGLE))
    case.features[[1, 4]] = broken
    kept = torch.tensor([0, 2, 3, *range(5, 12)], device=GPU)
    whole, rest = case.fast(Clipping(0.5)), replace(case, features=case.features[kept], targets=case.targets[kept])
    assert whole.nonfinite == 2
    assert torch.allclose(flat(whole), flat(rest.fast(Clipping(0.5))), rtol=1e-4, atol=1e-5)


def test_an_empty_batch_adds_zero() -> None:
    result = on_gpu(case_of("text", SINGLE, 0)).fast(Clipping(0.5))
    assert all(tensor.device.type == "cuda" and not tensor.any() for tensor in result.bounded.value.values())


@pytest.mark.parametrize("model", MODELS)
def test_autocast_stays_near_and_within_the_clip_norm(model: str) -> None:
    case = on_gpu(case_of(model, SINGLE))
    plain, mixed = (
        flat(case.fast(Clipping(0.5), compute=compute)) for compute in (sf.Compute(), sf.Compute(autocast=True))
    )
    assert float((mixed - plain).norm()) <= 0.1 * float(plain.norm())
    alone = replace(case, features=case.features[:1], targets=case.targets[:1])
    assert float(flat(alone.fast(Clipping(1e-4), compute=sf.Compute(autocast=True))).norm()) <= 1e-4


def network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, STEPS)), nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(96, CLASSES)
    ).to(device)  # fmt: skip


def records() -> sf.Records:
    features = normals(1, 60, STEPS, WIDTH).float()
    owners = (["a", "b", "c"], [index % 3 for index in range(60)])
    return sf.Records.from_arrays(features, torch.arange(60) % CLASSES, owners)


@functools.cache
def plan(kind: str) -> sf.Plan:
    return sf.Plan(sf.Budget(4.0, 1e-3), sf.Poisson(0.5), 1.0, 3.0, 4, 60, kind)


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "make", [functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), functools.partial(torch.optim.Adam, lr=0.01)]
)
def test_training_with_the_same_noise_gives_the_model_of_the_cpu(
    make: Callable[..., torch.optim.Optimizer], kind: str
) -> None:
    models = []
    for device in (GPU, torch.device("cpu")):
        model = network(device)
        result = sf.train(
            model, records(), plan(kind), loss=F.cross_entropy, optimizer=make(model.parameters()),
            source=sf.SeededSource(4), augment=lambda record: torch.stack([record, record.flip(0)]),
            compute=sf.Compute(memory_mb=0.1),
        )  # fmt: skip
        assert len(result.steps) == 4
        assert all(parameter.device.type == device.type for parameter in model.parameters())
        models.append(parameters(model))
    assert torch.allclose(*models, rtol=0, atol=2e-3)
    assert float((models[0] - parameters(network(GPU))).abs().max()) > 0.02


@pytest.mark.parametrize("unit", ["record", "client"])
@pytest.mark.parametrize("algorithm", [sf.FedSGD, sf.FedAvg])
def test_federations_train_on_the_gpu(algorithm: Callable[..., object], unit: str) -> None:
    model, count = network(GPU), 60 if unit == "record" else 3
    before = parameters(model)
    made = sf.Plan(sf.Budget(4.0, 1e-3, unit=unit), sf.FullBatch(), 1.0, 4.0, 2, count)  # type: ignore[arg-type]
    sf.federate(
        model, records().by_owner(), made, algorithm=algorithm(functools.partial(torch.optim.SGD, lr=0.1)),  # type: ignore[arg-type]
        engine=sf.Simulation(), loss=F.cross_entropy, populations={"a": 20, "b": 20, "c": 20},
    )  # fmt: skip
    assert not torch.equal(parameters(model), before)
    assert bool(torch.isfinite(parameters(model)).all())


def test_an_infinite_epsilon_is_plain_pytorch_bit_for_bit() -> None:
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        model, twin, held = network(GPU), network(GPU), records()
        free = sf.Plan.without_privacy(population=60, batch_size=60, steps=4)
        sf.train(model, held, free, loss=F.cross_entropy, optimizer=torch.optim.Adam(model.parameters()))
        made = torch.optim.Adam(twin.parameters())
        for _ in range(4):
            made.zero_grad()
            F.cross_entropy(twin(held.features.to(GPU)), held.targets.to(GPU)).backward()
            made.step()
        assert torch.equal(parameters(model), parameters(twin))


@pytest.mark.parametrize("model", MODELS)
def test_explain_tells_of_a_model_on_the_gpu(model: str) -> None:
    case = on_gpu(case_of(model, SINGLE))
    made = explain(case.model, (case.features, case.targets), loss=F.cross_entropy)
    assert made.refused == ()
    assert made.memory_mb > 0
    assert all(0 <= row.share <= 1 for row in made.rows)
