from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from helpers import LOSS, flat, sgd, toy_model, toy_plan, toy_records
from torch import nn

import sfumato as sf
from sfumato.errors import BudgetExhaustedError, DivergedError, LedgerError, UnsupportedModelError


def test_private_training_learns_and_states_what_it_cost() -> None:
    records, model = toy_records(400), toy_model()
    plan = toy_plan(8.0, 400, 400, 30)
    result = sf.train(model, records, plan, loss=LOSS, optimizer=sgd(model))
    accuracy = float((model(records.features).argmax(1) == records.targets).float().mean())
    assert accuracy > 0.8
    assert result.privacy.epsilon <= 8.0
    assert len(result.steps) == 30
    assert result.steps[-1].epsilon == plan.spending.epsilon
    text = str(result.privacy)
    assert "one record" in text
    assert "adding or removing" in text
    assert "Not covered" in text


def test_too_little_budget_cannot_be_too_accurate() -> None:
    # An accuracy near that of plain training under a tiny epsilon would mean that the noise is missing.
    scores = []
    for seed in range(5):
        records, model = toy_records(60, seed=seed), toy_model(seed=seed)
        sf.train(model, records, toy_plan(0.02, steps=20), loss=LOSS, optimizer=sgd(model))
        scores.append(float((model(records.features).argmax(1) == records.targets).float().mean()))
    assert sum(scores) / 5 < 0.85


def test_infinite_epsilon_is_plain_pytorch_bit_for_bit() -> None:
    records, model = toy_records(), toy_model()
    twin = copy.deepcopy(model)
    plan = sf.Plan.without_privacy(population=60, batch_size=60, steps=7)
    result = sf.train(model, records, plan, loss=LOSS, optimizer=torch.optim.Adam(model.parameters(), lr=0.1))
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.1)
    for _ in range(7):
        optimizer.zero_grad()
        LOSS(twin(records.features), records.targets).backward()
        optimizer.step()
    assert torch.equal(flat(model), flat(twin))
    assert math.isinf(result.privacy.epsilon)
    assert "No privacy is promised" in str(result.privacy)


def test_an_empty_poisson_batch_is_a_noise_only_step() -> None:
    records, model = toy_records(3), toy_model()
    before = flat(model).clone()
    plan = toy_plan(2.0, 900, 1, 5)
    result = sf.train(model, records, plan, loss=LOSS, optimizer=sgd(model))
    assert len(result.steps) == 5
    assert not torch.equal(flat(model), before)


def test_the_model_is_left_as_it_was_apart_from_its_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    keys, attributes = list(model.state_dict()), set(model.__dict__)
    sf.train(model, toy_records(), toy_plan(), loss=LOSS, optimizer=sgd(model))
    assert list(model.state_dict()) == keys
    assert set(model.__dict__) == attributes
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_batchnorm_is_refused_before_anything_is_charged(tmp_path: Path) -> None:
    ledger = sf.Ledger(tmp_path / "ledger.sqlite")
    ledger.grant("toy", sf.Budget(5.0, 1e-2))
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    with pytest.raises(UnsupportedModelError, match=r'"1".*GroupNorm'):
        sf.train(model, toy_records(), toy_plan(), loss=LOSS, optimizer=sgd(model), ledger=ledger)
    assert ledger.balance("toy").spent_epsilon == 0


def test_a_model_that_cannot_run_costs_nothing(tmp_path: Path) -> None:
    ledger = sf.Ledger(tmp_path / "ledger.sqlite")
    ledger.grant("toy", sf.Budget(5.0, 1e-2))
    model = nn.Linear(5, 2)
    with pytest.raises(UnsupportedModelError, match="one record at a time"):
        sf.train(model, toy_records(), toy_plan(), loss=LOSS, optimizer=sgd(model), ledger=ledger)
    assert ledger.balance("toy").spent_epsilon == 0


def test_an_optimizer_that_misses_or_adds_parameters_is_refused() -> None:
    model = toy_model()
    with pytest.raises(UnsupportedModelError, match='"bias"'):
        sf.train(model, toy_records(), toy_plan(), loss=LOSS, optimizer=torch.optim.SGD([model.weight], lr=1.0))
    foreign = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(UnsupportedModelError, match="not the model's"):
        sf.train(model, toy_records(), toy_plan(), loss=LOSS, optimizer=foreign)


def test_the_ledger_is_charged_once_and_refuses_the_second_run(tmp_path: Path) -> None:
    ledger = sf.Ledger(tmp_path / "ledger.sqlite")
    ledger.grant("toy", sf.Budget(3.0, 1e-2))
    plan, model = toy_plan(2.0), toy_model()
    result = sf.train(model, toy_records(), plan, loss=LOSS, optimizer=sgd(model), ledger=ledger)
    assert ledger.balance("toy").spent_epsilon == pytest.approx(plan.spending.epsilon, abs=1e-12)
    assert ledger.history("toy")[-1].run == result.run
    before = flat(model).clone()
    with pytest.raises(BudgetExhaustedError, match="toy"):
        sf.train(model, toy_records(), plan, loss=LOSS, optimizer=sgd(model), ledger=ledger)
    assert torch.equal(flat(model), before)
    with pytest.raises(LedgerError, match="grant"):
        sf.train(model, toy_records(), plan, loss=LOSS, optimizer=sgd(model), ledger=ledger, dataset="unknown")


def test_a_seeded_run_says_that_it_is_a_rehearsal() -> None:
    model = toy_model()
    result = sf.train(model, toy_records(), toy_plan(), loss=LOSS, optimizer=sgd(model), source=sf.SeededSource(3))
    assert "A rehearsal, not a private release" in str(result.privacy)


def test_records_with_nan_gradients_add_nothing_and_are_counted() -> None:
    records, model = toy_records(), toy_model()

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return LOSS(outputs, targets) * torch.where(targets[0] == 1, math.nan, 1.0)

    result = sf.train(model, records, toy_plan(steps=1), loss=loss, optimizer=sgd(model))
    assert result.nonfinite == int((records.targets == 1).sum())
    assert bool(torch.isfinite(flat(model)).all())


def test_a_training_that_diverges_stops_with_the_fix() -> None:
    model = toy_model()
    growing = torch.optim.SGD(model.parameters(), lr=1e8, weight_decay=1.0)
    with pytest.raises(DivergedError, match="lower the learning rate"):
        sf.train(model, toy_records(), toy_plan(), loss=LOSS, optimizer=growing)
