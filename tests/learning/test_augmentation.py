"""Several views of each record: their mean is clipped once, no record sees another, and what cannot be right is refused."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LOSS, flat, sgd, toy_records
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sfumato as sf
from sfumato.errors import InputError
from sfumato.gradients.clipping import KINDS, Clipping
from sfumato.gradients.per_record import clipped_gradient_sum
from sfumato.learning.augmentation import views_of
from sfumato.learning.central import Central

SHIFTS = torch.tensor([[1.0, 0, 0, 0], [0, -2, 0, 0], [0, 0, 0.5, 3]])


def shifted(record: Tensor) -> Tensor:
    """Return three views."""
    return record + SHIFTS


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


@functools.cache
def plan(kind: str = "flat", clip: float = 1.0, steps: int = 4) -> sf.Plan:
    # Made by hand, which is quicker than finding the least noise.
    return sf.Plan(sf.Budget(2.0, 1e-3), sf.FullBatch(), clip, 4.0, steps, 60, kind)


def central(
    augment: Callable[[Tensor], Tensor] | None, kind: str = "flat", clip: float = 1.0, records: sf.Records | None = None
) -> Central:
    model = network()
    return Central(
        model, records or toy_records(), plan(kind, clip), LOSS, sgd(model), sf.SeededSource(0), sf.Compute(), augment
    )


def vector(procedure: Central, indices: Tensor) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in procedure.sum(indices).bounded.value.values()])


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 6), views=st.integers(1, 4), shape=st.lists(st.integers(1, 3), max_size=3))
def test_every_record_gets_its_own_views(count: int, views: int, shape: list[int]) -> None:
    features = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    kept = features.clone()
    found = views_of(features, lambda record: torch.stack([record * (view + 1) for view in range(views)]))
    assert found.shape == (count, views, *shape)
    for record in range(count):
        for view in range(views):
            assert torch.equal(found[record, view], kept[record] * (view + 1))
    assert torch.equal(features, kept)


def test_views_may_have_another_shape_than_the_record() -> None:
    images = torch.arange(2 * 3 * 6 * 6).view(2, 3, 6, 6)
    crops = views_of(images, lambda image: torch.stack([image[:, :4, :4], image[:, 2:, 2:]]))
    assert crops.shape == (2, 2, 3, 4, 4)
    assert torch.equal(crops[1, 1], images[1, :, 2:, 2:])


def test_an_augmentation_is_given_one_record_and_cannot_reach_another() -> None:
    features, seen = torch.arange(12.0).view(3, 4), []

    def augment(record: Tensor) -> Tensor:
        assert record.shape == (4,)
        assert record.untyped_storage().nbytes() == 4 * 4  # nothing lies behind it
        assert record._base is None
        seen.append(record.tolist())
        return record[None]

    views_of(features, augment)
    assert seen == features.tolist()


def test_an_augmentation_in_place_changes_no_record() -> None:
    records, model = toy_records(), network()
    kept = records.features.clone()
    sf.train(
        model, records, plan(), loss=LOSS, optimizer=sgd(model), augment=lambda record: record.mul_(0).unsqueeze(0)
    )
    assert torch.equal(records.features, kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [0.05, 100.0])
def test_a_step_sums_the_clipped_gradients_of_the_mean_over_views(kind: str, clip: float) -> None:
    """A loop over records: the loss is the mean over the record's views, and what is clipped is its gradient."""
    records, model = toy_records(), network()
    clipped = Clipping(clip, kind)
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for feature, target in zip(records.features, records.targets, strict=True):
        loss = torch.stack([LOSS(model((feature + shift)[None]), target[None]) for shift in SHIFTS]).mean()
        gradients = dict(
            zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True)
        )
        factors, _ = clipped.factors({n: g.double().square().sum().view(1) for n, g in gradients.items()}, gradients)
        total += torch.cat([(factors[name] * gradient.double().flatten()) for name, gradient in gradients.items()])
    assert torch.allclose(vector(central(shifted, kind, clip), torch.arange(60)), total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_sums_what_the_oracle_sums(kind: str) -> None:
    records = toy_records()
    views = torch.stack([shifted(record) for record in records.features])
    right = clipped_gradient_sum(network(), LOSS, views, records.targets, clipping=Clipping(0.1, kind), views=True)
    expected = torch.cat([tensor.flatten() for tensor in right.bounded.value.values()])
    assert torch.allclose(vector(central(shifted, kind, 0.1), torch.arange(60)), expected, rtol=1e-4, atol=1e-6)


def test_it_is_the_record_that_is_clipped_and_not_each_view() -> None:
    """Views whose gradients take back one another leave nothing, though each alone is far above the clip norm."""
    records = sf.Records.from_arrays(torch.ones(60, 4), torch.zeros(60))

    def signed(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum(1)

    model = nn.Linear(4, 1, bias=False)
    procedure = Central(
        model, records, plan(), signed, sgd(model), sf.SeededSource(0), sf.Compute(),
        lambda record: torch.stack([record * 100, record * -100]),
    )  # fmt: skip
    assert float(vector(procedure, torch.arange(60)).norm()) == 0


@settings(max_examples=15, deadline=None)
@given(kind=st.sampled_from(KINDS), clip=st.sampled_from([1e-3, 1.0]), record=st.integers(0, 59), size=st.floats(0, 18))
def test_one_record_with_all_its_views_moves_the_sum_by_at_most_the_clip_norm(
    kind: str, clip: float, record: int, size: float
) -> None:
    usual = toy_records()
    features = usual.features.clone()
    features[record] *= 10**size
    procedure = central(shifted, kind, clip, sf.Records.from_arrays(features, usual.targets))
    everybody = torch.arange(60)
    moved = vector(procedure, everybody) - vector(procedure, everybody[everybody != record])
    assert float(moved.norm()) <= clip


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_records_that_hold_their_views_with_the_mean_loss(kind: str) -> None:
    """The same noise, since the source is seeded; the other training knows nothing of augmentation."""
    records, model, twin = toy_records(), network(), network()
    held = sf.Records.from_arrays(torch.stack([shifted(record) for record in records.features]), records.targets)

    def mean_over_views(outputs: Tensor, targets: Tensor) -> Tensor:
        return LOSS(outputs.flatten(0, 1), targets.repeat_interleave(outputs.shape[1]))

    made = functools.partial(torch.optim.SGD, lr=0.3, momentum=0.9)
    sf.train(
        model, records, plan(kind), loss=LOSS, optimizer=made(model.parameters()), source=sf.SeededSource(3),
        augment=shifted,
    )  # fmt: skip
    sf.train(twin, held, plan(kind), loss=mean_over_views, optimizer=made(twin.parameters()), source=sf.SeededSource(3))
    assert torch.allclose(flat(model), flat(twin), rtol=0, atol=1e-5)
    without = network()
    sf.train(without, records, plan(kind), loss=LOSS, optimizer=made(without.parameters()), source=sf.SeededSource(3))
    assert float((flat(model) - flat(without)).abs().max()) > 1e-3


def test_one_view_that_is_the_record_is_training_without_augmentation() -> None:
    models = []
    for augment in (None, lambda record: record.unsqueeze(0)):
        model = network()
        sf.train(
            model, toy_records(), plan(), loss=LOSS, optimizer=sgd(model), source=sf.SeededSource(1), augment=augment
        )
        models.append(flat(model))
    assert torch.allclose(*models, rtol=0, atol=1e-6)


def test_a_loss_for_each_view_is_averaged_too() -> None:
    sums = []
    for loss in (LOSS, functools.partial(LOSS, reduction="none")):
        model = network()
        procedure = Central(
            model, toy_records(), plan(), loss, sgd(model), sf.SeededSource(0), sf.Compute(), shifted
        )  # fmt: skip
        sums.append(vector(procedure, torch.arange(60)))
    assert torch.allclose(*sums, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "optimizer", [functools.partial(torch.optim.SGD, lr=0.3), functools.partial(torch.optim.Adam, lr=0.1)]
)
def test_an_infinite_epsilon_is_plain_pytorch_on_all_views(optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    records, model, twin = toy_records(), network(), network()
    free = sf.Plan.without_privacy(population=60, batch_size=60, steps=5)
    sf.train(model, records, free, loss=LOSS, optimizer=optimizer(model.parameters()), augment=shifted)
    features = torch.stack([shifted(record) for record in records.features]).flatten(0, 1)
    targets = records.targets.repeat_interleave(3)
    made = optimizer(twin.parameters())
    for _ in range(5):
        made.zero_grad()
        LOSS(twin(features), targets).backward()
        made.step()
    assert torch.equal(flat(model), flat(twin))


def test_random_views_are_drawn_anew_in_every_step() -> None:
    drawn: list[Tensor] = []

    def random(record: Tensor) -> Tensor:
        drawn.append(record + torch.randn(2, 4))
        return drawn[-1]

    model = network()
    training = sf.steps(model, toy_records(), plan(steps=2), loss=LOSS, optimizer=sgd(model), augment=random)
    next(training)
    first = len(drawn)
    next(training)
    assert first >= 60
    assert len(drawn) == first + 60
    assert not torch.equal(drawn[0], drawn[first])


@pytest.mark.parametrize("private", [True, False])
def test_an_empty_poisson_batch_is_a_step_like_any_other(private: bool) -> None:
    calls: list[int] = []

    def augment(record: Tensor) -> Tensor:
        calls.append(1)
        return shifted(record)

    records, model = toy_records(3), network()
    before = flat(model).clone()
    made = sf.Plan.without_privacy(population=900, batch_size=1, steps=3)
    if private:
        made = sf.Plan(sf.Budget(2.0, 1e-3), made.sampler, 1.0, 2.0, 3, 900)
    result = sf.train(model, records, made, loss=LOSS, optimizer=sgd(model), augment=augment, source=sf.SeededSource(0))
    assert len(result.steps) == 3
    assert bool(torch.isfinite(flat(model)).all())
    # The self-check of the first private step looks at one record.
    assert len(calls) == (1 if private else 0)
    assert torch.equal(flat(model), before) is not private


def test_the_views_of_an_empty_batch_are_none() -> None:
    assert views_of(torch.zeros(0, 3, 5), shifted).shape[0] == 0
    assert float(vector(central(shifted), torch.empty(0, dtype=torch.int64)).norm()) == 0


SECRET = 31337.0


def raising(record: Tensor) -> Tensor:
    raise ValueError(f"cannot crop {record.tolist()}")


def by_record(record: Tensor) -> Tensor:
    return record.expand(1 + int(record[0] > 0), -1)


def widths(record: Tensor) -> Tensor:
    return record[None, : 3 + int(record[0] > 0)]


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "raising": raising,
    "no views' dimension": lambda record: record,
    "one dimension too many": lambda record: record[None, None],
    "a number": lambda record: record.sum(),
    "no view": lambda record: record.new_zeros(0, 4),
    "nothing": lambda record: None,
    "a list": lambda record: [record, record],
    "a float": lambda record: float(record[0]),
    "another number for some": by_record,
    "another shape for some": widths,
    "an assertion": lambda record: (_ for _ in ()).throw(AssertionError(record)),
}


@pytest.mark.parametrize("epsilon", [2.0, math.inf])
@pytest.mark.parametrize("case", WRONG)
def test_an_augmentation_that_is_wrong_is_refused_in_one_line_without_values(
    case: str, epsilon: float, tmp_path: Path
) -> None:
    usual = toy_records()
    features = usual.features.clone()
    features[1] = SECRET
    records, model = sf.Records.from_arrays(features, usual.targets, name="toy"), network()
    made = plan() if epsilon < math.inf else sf.Plan.without_privacy(population=60, batch_size=60, steps=4)
    before = flat(model).clone()
    with sf.Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.grant("toy", sf.Budget(5.0, 1e-2))
        with pytest.raises(InputError, match=r"^augment .*views.*\.$") as refusal:
            sf.train(model, records, made, loss=LOSS, optimizer=sgd(model), augment=WRONG[case], ledger=ledger)
        assert ledger.balance("toy").spent_epsilon == 0
    message = str(refusal.value)
    assert "\n" not in message
    assert "31337" not in message
    assert refusal.value.__cause__ is None
    assert refusal.value.__suppress_context__ or refusal.value.__context__ is None
    assert torch.equal(flat(model), before)


def test_stopping_inside_an_augmentation_stops_the_training() -> None:
    def stopped(record: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model = network()
    with pytest.raises(KeyboardInterrupt):
        sf.train(model, toy_records(), plan(), loss=LOSS, optimizer=sgd(model), augment=stopped)


def test_a_view_that_is_not_finite_leaves_its_record_out() -> None:
    def broken(record: Tensor) -> Tensor:
        return torch.stack([record, record / (record[0] > 0)])

    records, model = toy_records(), network()
    result = sf.train(model, records, plan(steps=1), loss=LOSS, optimizer=sgd(model), augment=broken)
    assert result.nonfinite == int((records.features[:, 0] <= 0).sum())
    assert 0 < result.nonfinite < 60
    assert bool(torch.isfinite(flat(model)).all())


def test_views_cost_what_the_record_costs() -> None:
    spent = []
    for augment in (None, shifted):
        model = network()
        result = sf.train(model, toy_records(), plan(), loss=LOSS, optimizer=sgd(model), augment=augment)
        spent.append(result.privacy.epsilon)
    assert spent[0] == spent[1]
