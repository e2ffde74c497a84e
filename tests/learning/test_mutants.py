"""Mutants of privacy code: each is put in place of the real thing, and must be caught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import LOSS, flat, sgd, toy_model, toy_plan, toy_records
from torch import Tensor, nn

import sfumato as sf
from sfumato.data import sampling
from sfumato.errors import PlanError, SelfCheckError
from sfumato.gradients import clipping
from sfumato.learning import aggregation, central, procedure
from sfumato.privacy import events
from sfumato.privacy.bounded import Bounded, Released
from sfumato.privacy.randomness import RandomSource


def run(plan: sf.Plan, model: nn.Module | None = None, records: sf.Records | None = None) -> nn.Module:
    model = model or nn.Linear(4, 200)
    sf.train(model, records or toy_records(), plan, loss=LOSS, optimizer=sgd(model))
    return model


def test_the_unmutated_code_passes() -> None:
    run(toy_plan(steps=2))


def test_mutant_noise_off_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RandomSource, "add_normal", lambda source, total, std: None)
    with pytest.raises(SelfCheckError, match="without noise"):
        run(toy_plan(steps=2))


@pytest.mark.parametrize("factor", [2 / 3, 3 / 2])
def test_mutant_wrong_noise_scale_is_caught(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    honest = RandomSource.add_normal
    monkeypatch.setattr(RandomSource, "add_normal", lambda source, total, std: honest(source, total, std * factor))
    with pytest.raises(SelfCheckError, match="times the variance"):
        run(toy_plan(steps=2))


def test_mutant_clip_off_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_clipping(squared: Tensor, clip_norm: float) -> tuple[Tensor, Tensor]:
        return torch.ones_like(squared), torch.zeros_like(squared, dtype=torch.bool)

    monkeypatch.setattr(clipping, "clip_factors", no_clipping)
    with pytest.raises(SelfCheckError, match="above the clip norm"):
        run(toy_plan(steps=2, clip=0.01))


def loss_falls() -> bool:
    """Train with next to no noise on easy records and tell whether the loss fell."""
    records, model = toy_records(), toy_model()
    before = float(LOSS(model(records.features), records.targets).detach())
    sf.train(model, records, toy_plan(20.0, steps=20), loss=LOSS, optimizer=sgd(model))
    return float(LOSS(model(records.features), records.targets).detach()) < before - 0.05


def test_mutant_wrong_sign_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loss_falls()
    honest = procedure.set_gradients
    monkeypatch.setattr(procedure, "set_gradients", lambda model, total, divisor: honest(model, total, -divisor))
    assert not loss_falls()


def noise_of_updates(records: sf.Records) -> Tensor:
    """Return the steps' pure noise, relative to what the plan says, when no record has a gradient."""
    model = nn.Linear(4, 300)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    plan = toy_plan(2.0, 60, 6, 12)

    def no_gradient(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum() * 0

    seen = []
    training = sf.steps(model, records, plan, loss=no_gradient, optimizer=sgd(model, lr=1.0))
    before = flat(model)
    for _ in training:
        after = flat(model)
        seen.append(float((after - before).square().mean().sqrt()) * plan.expected_batch / plan.noise_multiplier)
        before = after
    return torch.tensor(seen)


def is_one_scale(ratios: Tensor) -> bool:
    """Tell whether every step had the accounted noise: 1500 coordinates put each ratio within 0.1 of 1."""
    return bool(((ratios - 1).abs() < 0.1).all())


def test_mutant_noise_on_the_mean_of_the_actual_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_one_scale(noise_of_updates(toy_records()))
    sizes: list[int] = []
    honest_batch, honest_set = central.batch_on, procedure.set_gradients

    def spy(model: nn.Module, records: sf.Records, indices: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(indices))
        return honest_batch(model, records, indices)

    monkeypatch.setattr(central, "batch_on", spy)
    monkeypatch.setattr(
        procedure, "set_gradients", lambda model, total, divisor: honest_set(model, total, max(1, sizes[-1]))
    )
    assert not is_one_scale(noise_of_updates(toy_records()))


def draws_are_what_the_event_says(sampler: sampling.Sampler, records: int = 400, steps: int = 60) -> bool:
    """Tell whether batch sizes vary as independent coin flips do, where the event claims Poisson sampling."""
    if not events.is_sampled(sampler.event(1.0, 1)):
        return True
    draws = sampler.start(records, sf.SeededSource(5))
    sizes = torch.tensor([float(len(draws.batch(step))) for step in range(steps)])
    expected = records * sampler.rate * (1 - sampler.rate)
    return bool(0.5 * expected < sizes.var() < 2 * expected)


def test_mutant_shuffled_loader_accounted_as_poisson_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert draws_are_what_the_event_says(sampling.Poisson(0.1))
    assert draws_are_what_the_event_says(sampling.Shuffled(40, 400))
    monkeypatch.setattr(
        sampling.Shuffled, "event", lambda self, noise, steps: sampling.Poisson(self.rate).event(noise, steps)
    )
    assert not draws_are_what_the_event_says(sampling.Shuffled(40, 400))


def test_mutant_plan_with_less_noise_than_its_budget_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from sfumato.privacy import calibration

    honest = calibration.calibrate

    def too_little(event_of: object, budget: sf.Budget) -> calibration.Calibration:
        found = honest(event_of, budget)  # type: ignore[arg-type]
        return calibration.Calibration(found.noise_multiplier * 0.9, found.spending)

    monkeypatch.setattr(calibration, "calibrate", too_little)
    with pytest.raises(PlanError, match="more than the budget"):
        toy_plan()


@pytest.mark.parametrize("factor", [2 / 3, 0.01])
def test_mutant_place_of_noise_that_adds_too_little_is_caught(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    honest = aggregation.mechanisms.gaussian

    def thin(bounded: Bounded, multiplier: float, **rest: Any) -> Released:
        return honest(bounded, multiplier * factor, **rest)

    monkeypatch.setattr(aggregation.mechanisms, "gaussian", thin)
    with pytest.raises(SelfCheckError, match="the plan pays for"):
        run(toy_plan(steps=2))
