"""A clip norm that follows a quantile: bounded, paid for in the same release, and on its way to the right norm."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import LOSS, sgd, toy_model, toy_records
from hypothesis import given, settings
from hypothesis import strategies as st

import sfumato as sf
from sfumato.errors import InputError, PlanError
from sfumato.gradients.clipping import UNCLIPPED, Clipping, clip_vector
from sfumato.gradients.per_record import clipped_gradient_sum
from sfumato.gradients.private import PrivateGradient
from sfumato.learning.adaptive_clip import AdaptiveClip
from sfumato.privacy.schedules import Linear


def norms_of(model: torch.nn.Module, records: sf.Records) -> torch.Tensor:
    features, targets = records.batch(torch.arange(len(records)))
    one_by_one = [
        clipped_gradient_sum(model, LOSS, features[i : i + 1], targets[i : i + 1], clipping=Clipping(1e9)).bounded.value
        for i in range(len(records))
    ]
    return torch.tensor([math.sqrt(sum(float(v.square().sum()) for v in one.values())) for one in one_by_one])


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(min_value=0, max_value=30),
    norm=st.floats(min_value=0.05, max_value=3.0),
    counted=st.floats(0.01, 0.5),
)
def test_the_count_is_that_of_the_units_within_the_norm(count: int, norm: float, counted: float) -> None:
    model, records = toy_model(), toy_records()
    features, targets = (part[:count] for part in records.batch(torch.arange(len(records))))
    clipping = Clipping(norm, counted=counted)
    within = int((norms_of(model, records)[:count] <= norm * (1 - 2.0**-11)).sum())
    expected = counted * norm * (1 - 2.0**-11) * (2 * within - count)
    for found in (
        PrivateGradient(model, LOSS, clipping).sum(features, targets),
        clipped_gradient_sum(model, LOSS, features, targets, clipping=clipping),
    ):
        assert float(found.bounded.value[UNCLIPPED]) == pytest.approx(expected, abs=1e-4)
        assert found.bounded.norm_bound == norm * math.hypot(1, counted)


@settings(max_examples=30, deadline=None)
@given(
    scale=st.floats(min_value=0, max_value=1e6),
    norm=st.floats(min_value=1e-3, max_value=1e3),
    counted=st.floats(0, 0.5),
)
def test_one_unit_s_vector_with_its_indicator_is_within_the_bound(scale: float, norm: float, counted: float) -> None:
    bounded, _ = clip_vector({"w": torch.full((7,), scale)}, Clipping(norm, counted=counted))
    length = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in bounded.value.values()))
    assert length <= bounded.norm_bound
    assert (UNCLIPPED in bounded.value) == (counted > 0)


def test_a_record_that_is_not_finite_counts_neither_way() -> None:
    model, records = toy_model(), toy_records()
    features, targets = records.batch(torch.arange(3))
    features[1] = math.nan
    found = PrivateGradient(model, LOSS, Clipping(1e6, counted=0.25)).sum(features, targets)
    assert found.nonfinite == 1
    assert float(found.bounded.value[UNCLIPPED]) == pytest.approx(0.25 * 1e6 * 2, rel=1e-3)


def test_the_share_is_read_back_from_the_count_and_never_leaves_zero_to_one() -> None:
    clipping = Clipping(2.0, counted=0.1)
    factors = torch.tensor([1.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    count = float(clipping.count(factors, torch.zeros(4, dtype=torch.bool)))
    assert clipping.share_within(count, 4) == pytest.approx(0.75)
    assert clipping.share_within(1e9, 4) == 1.0
    assert clipping.share_within(-1e9, 4) == 0.0


def test_the_norm_falls_while_more_are_within_it_than_wanted_as_in_the_paper() -> None:
    policy = AdaptiveClip(quantile=0.5, rate=0.2)
    at = Clipping(1.0, counted=0.1)
    assert policy.next(at, 0.9, 1.0) == pytest.approx(math.exp(-0.2 * 0.4))
    assert policy.next(at, 0.1, 1.0) == pytest.approx(math.exp(0.2 * 0.4))
    assert policy.next(at, 0.5, 1.0) == 1.0


def test_the_indicator_has_the_declared_accuracy() -> None:
    policy, clip, expected, noise = AdaptiveClip(accuracy=0.05), 3.0, 500.0, 2.0
    counted = policy.counted(noise, expected)
    std_of_share = noise * clip * math.hypot(1, counted) / (2 * counted * clip * expected)
    assert std_of_share == pytest.approx(0.05, rel=1e-2)
    assert policy.counted(1e6, expected) == 0.5


def plan_of(**more: object) -> sf.Plan:
    budget = sf.Budget(8.0, 1e-3, **{k: more.pop(k) for k in ("unit",) if k in more})  # type: ignore[arg-type]
    return sf.Plan.calibrate(budget, population=60, batch_size=60, steps=40, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [0.01, 30.0])
def test_training_finds_the_median_norm_from_far_away(first: float) -> None:
    records, model = toy_records(), toy_model()
    plan = plan_of(clip=first, clips=AdaptiveClip(quantile=0.5, rate=0.5))
    clips = []
    sf.train(
        model,
        records,
        plan,
        loss=LOSS,
        optimizer=sgd(model, lr=1e-6),
        on_step=lambda step: clips.append(step.clip_norm),
    )
    median = float(norms_of(toy_model(), records).median())
    assert clips[0] == first
    assert 0.6 * median < clips[-1] < 1.6 * median


def test_the_epsilon_is_that_of_the_same_plan_with_a_fixed_norm() -> None:
    assert plan_of(clips=AdaptiveClip()).spending == plan_of().spending


def test_clients_norms_are_followed_as_well() -> None:
    clients = toy_records(owners=6).by_owner()
    budget = sf.Budget(100.0, 1e-2, unit="client")  # six clients: only with little noise do 30 steps show the way
    plan = sf.Plan.calibrate(budget, population=6, batch_size=6, steps=30, clip=50.0, clips=AdaptiveClip(0.5, rate=0.5))
    model, steps = toy_model(), []
    sf.federate(
        model, clients, plan, algorithm=sf.FedSGD(lambda p: torch.optim.SGD(p, lr=1e-6)), engine=sf.Simulation(),
        loss=LOSS, on_step=steps.append,
    )  # fmt: skip
    assert steps[-1].clip_norm < 25.0


def clip_norms(quantile: float, drop_out: float, rounds: int = 60, **declared: float) -> list[float]:
    """Return the clip norms of rounds in which 100 clients' gradients have the norms 0.01, 0.02, ... 1."""
    one = torch.tensor([[1.0]])
    clients = {f"site-{row}": sf.Records(one * (row + 1) / 100, torch.zeros(1)) for row in range(100)}
    plan = sf.Plan(
        sf.Budget(100.0, 1e-3, unit="client"), sf.FullBatch(), 0.5, 2.0, rounds, 100,
        clips=AdaptiveClip(quantile, rate=0.5, **declared),
    )  # fmt: skip
    steps: list[sf.Step] = []
    sf.federate(
        torch.nn.Linear(1, 1, bias=False), clients, plan, algorithm=sf.FedSGD(lambda p: torch.optim.SGD(p, lr=1e-6)),
        engine=sf.Simulation(drop_out=drop_out, workers=1, way="alone"), loss=lambda outputs, targets: outputs.mean(),
        on_step=steps.append,
    )  # fmt: skip
    return [step.clip_norm for step in steps]


@pytest.mark.parametrize(("quantile", "drop_out"), [(0.8, 0.4), (0.8, 0.0), (0.3, 0.5)])
def test_with_the_declared_share_of_answers_the_norm_is_that_of_the_quantile(quantile: float, drop_out: float) -> None:
    norms = clip_norms(quantile, drop_out, answering=1 - drop_out)[-20:]
    assert sum(norms) / 20 == pytest.approx(quantile, abs=0.08)


@pytest.mark.parametrize(
    ("quantile", "drop_out", "told"),
    [(0.8, 0.4, "0.2 to 0.8"), (0.1, 0.3, "0.15 to 0.85"), (0.9, 0.5, "0.25 to 0.75")],
)
def test_a_quantile_that_no_norm_reaches_is_refused(quantile: float, drop_out: float, told: str) -> None:
    fix = rf"{told} .* quantile {quantile}; declare AdaptiveClip\(answering={1 - drop_out:.3g}\)"
    with pytest.raises(PlanError, match=fix):
        clip_norms(quantile, drop_out, rounds=2)
    assert len(clip_norms(quantile, drop_out, rounds=2, answering=1 - drop_out)) == 2


def test_records_of_lost_clients_count_as_well() -> None:
    plan = plan_of(clips=AdaptiveClip(0.9))
    with pytest.raises(PlanError, match="declare AdaptiveClip"):
        sf.rounds(
            toy_model(), toy_records(owners=6).by_owner(), plan, algorithm=sf.FedSGD(lambda p: torch.optim.SGD(p, lr=0.1)),
            engine=sf.Simulation(drop_out=0.3), loss=LOSS,
        )  # fmt: skip


def test_a_schedule_of_clip_norms_is_followed() -> None:
    steps: list[sf.Step] = []
    model = toy_model()
    plan = plan_of(clip=2.0, clips=Linear(1.0, 0.5))
    sf.train(model, toy_records(), plan, loss=LOSS, optimizer=sgd(model), on_step=steps.append)
    assert [steps[0].clip_norm, steps[-1].clip_norm] == [2.0, 1.0]


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"quantile": 1.5}, {"rate": 0}, {"accuracy": math.nan}, {"answering": 0.0}, {"answering": 1.1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            AdaptiveClip(**wrong)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match='needs clipping="flat"'):
        plan_of(clips=AdaptiveClip(), clipping="normalised")
    with pytest.raises(InputError, match="Only flat clipping"):
        Clipping(1.0, "per-layer", 0.1)
    with pytest.raises(PlanError, match="without noise or clipping to be scheduled"):
        sf.Plan.calibrate(sf.Budget(math.inf), population=10, batch_size=5, steps=2, clips=AdaptiveClip())
