"""Correlated noise: the matrix it stands for, how far a client moves it, what it does to sums over rounds, and its mutants."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import flat as parameters
from helpers import toy_records
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sfumato as sf
from sfumato.data.participation import MinSeparation
from sfumato.data.sampling import FullBatch, Poisson, Sampler, Shuffled
from sfumato.errors import (
    BudgetExhaustedError,
    CheckpointError,
    InputError,
    LedgerError,
    PlanError,
    SelfCheckError,
    SfumatoError,
)
from sfumato.learning import correlated
from sfumato.learning.adaptive_clip import AdaptiveClip
from sfumato.learning.aggregation import Noise, ServerNoise
from sfumato.learning.correlated import CorrelatedNoise, CorrelatedRun
from sfumato.learning.plan import Plan
from sfumato.learning.selfcheck import check_noised, check_scale
from sfumato.learning.training import Training
from sfumato.privacy import events, mechanisms
from sfumato.privacy.accounts import Cost
from sfumato.privacy.bounded import RELEASE, Bounded, Released
from sfumato.privacy.budget import Budget, Relation, Unit
from sfumato.privacy.ledger import Charge, Ledger
from sfumato.privacy.mechanisms import noise_std
from sfumato.privacy.randomness import RandomSource, SecureSource, SeededSource
from sfumato.privacy.schedules import Linear

ADD = Relation.ADD_OR_REMOVE_ONE
few = settings(max_examples=30, deadline=None)


def paid(draws: int, ledger: Ledger | None = None, lease: int | None = None) -> Charge:
    ledger = ledger or Ledger.in_memory()
    ledger.grant("a", Budget(1.0, 1e-5))
    event = events.to_json(events.repeated(events.gaussian(1.0), draws))
    cost = Cost(1.0, 1e-5, Unit.RECORD, ADD)
    return ledger.charge("a", purpose="test", event=event, cost=cost, draws=draws, lease=lease)


def noise(charge: Any, source: RandomSource | None = None, multiplier: float = 2.0, relation: Relation = ADD) -> Noise:
    return Noise(multiplier, relation, charge, source or SecureSource())


def zero(size: int = 6, bound: float = 1.0) -> Bounded:
    wide = torch.zeros((), dtype=torch.float64)
    return Bounded({"w": wide.expand(size // 2, 2), "b": wide.expand(size - size // 2 * 2)}, bound)


def sums(value: float | Tensor, size: int = 6, bound: float = 1.0) -> Bounded:
    flat = torch.full((size,), value, dtype=torch.float64) if isinstance(value, float) else value
    return Bounded({"w": flat[: size // 2 * 2].view(-1, 2), "b": flat[size // 2 * 2 :]}, bound)


def flat(value: Bounded | Released) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in value.value.values()])


def matrix(bands: int, rounds: Sequence[int]) -> np.ndarray:
    """Return what the rows of these rounds are made with: C without the rows and columns of other rounds."""
    coefficients = CorrelatedNoise(bands).coefficients
    lags = np.subtract.outer(rounds, rounds)
    return np.where((lags >= 0) & (lags < bands), np.array(coefficients)[np.clip(lags, 0, bands - 1)], 0.0)


# The coefficients.


@pytest.mark.parametrize("bands", [1, 2, 5, 40])
def test_the_coefficients_are_those_of_the_square_root_of_prefix_sums(bands: int) -> None:
    exact = [Fraction(math.comb(2 * i, i), 4**i) for i in range(bands)]  # (-1)^i binom(-1/2, i)
    assert CorrelatedNoise(bands).coefficients == pytest.approx([float(one) for one in exact], rel=1e-14)
    whole = matrix(bands, range(bands))
    assert whole @ whole == pytest.approx(np.tril(np.ones((bands, bands))), abs=1e-12)
    assert CorrelatedNoise(bands).norm == pytest.approx(np.linalg.norm(whole[:, 0]), rel=1e-14)


@pytest.mark.parametrize("bands", [2, 3, 5, 16, 64, 300])
def test_the_noise_of_a_round_stays_below_what_rounding_was_allowed_for(bands: int) -> None:
    assert np.abs(np.linalg.inv(matrix(bands, range(2 * bands)))).sum(1).max() < 2.2


@settings(max_examples=150, deadline=None)
@given(bands=st.integers(2, 40), gaps=st.lists(st.integers(1, 9), min_size=1, max_size=60))
def test_so_it_does_whichever_rounds_are_void(bands: int, gaps: list[int]) -> None:
    rounds = np.cumsum(gaps).tolist()
    assert np.abs(np.linalg.inv(matrix(bands, rounds))).sum(1).max() < 2.2


# How far a client moves the rows: what was released is held fixed, as in an adaptive analysis, and every way to take part and
# every sign is tried.


class Fixed:
    """A stand-in for the mechanism: it writes down what it is given and releases the same numbers in every world."""

    def __init__(self, patch: pytest.MonkeyPatch, size: int = 1) -> None:
        self.given: list[tuple[float, float]] = []
        self._answers = SeededSource(3).normal(400 * size).view(-1, size)
        patch.setattr(correlated.mechanisms, "gaussian", self.release)

    def release(self, bounded: Bounded, multiplier: float, *, charge: Any, **_: object) -> Released:
        self.given.append((float(flat(bounded)), noise_std(bounded, multiplier, ADD)))
        draw, charge.position = charge.position, charge.position + 1
        return Released(sums(self._answers[draw], 1).value, self.given[-1][1], 1.0, draw, RELEASE)


def rows(
    patch: pytest.MonkeyPatch, run: CorrelatedRun, moved: Sequence[float], void: Sequence[int], told: bool
) -> list[tuple[float, float]]:
    """Return what was noised in each round, and the noise's std, when one client adds `moved` beside the others."""
    fixed, charge = Fixed(patch), SimpleNamespace(position=0)
    for step, own in enumerate(moved):
        if step in void:
            if told:
                run.void()
            else:
                charge.position += 1  # a draw that is gone
            continue
        total = sums(0.7 * step + own, 1)
        run.combine({"all": total}, zero=zero(1), asked=1, noise=noise(charge))
    return fixed.given


def loss(
    separation: int, most: int, *, bands: int, steps: int = 7, void: Sequence[int] = (), told: bool = True,
    begin: Callable[[int], CorrelatedRun] = lambda bands: CorrelatedNoise(bands).begin(),
) -> float:  # fmt: skip
    """Return the worst sum of squared moves over the std, in units of one Gaussian sum's: how often it has to be paid."""
    worst = 0.0
    with pytest.MonkeyPatch.context() as patch:
        before = rows(patch, begin(bands), [0.0] * steps, void, told)
        for size in range(1, most + 1):
            for taken in itertools.combinations(range(steps), size):
                if any(later - earlier < separation for earlier, later in itertools.pairwise(taken)):
                    continue
                for signs in itertools.product((-1.0, 1.0), repeat=size):
                    own = [0.0] * steps
                    for step, sign in zip(taken, signs, strict=True):
                        own[step] = sign
                    after = rows(patch, begin(bands), own, void, told)
                    squares = (((a - b) / std) ** 2 for (a, std), (b, _) in zip(after, before, strict=True))
                    worst = max(worst, math.fsum(squares))
    return worst * 2.0**2  # the noise multiplier is 2


@pytest.mark.parametrize(("bands", "separation", "most"), [(1, 1, 3), (2, 2, 3), (3, 3, 2), (2, 3, 2), (4, 4, 1)])
def test_no_client_moves_the_rows_by_more_than_its_participations_pay_for(
    bands: int, separation: int, most: int
) -> None:
    counted = int(MinSeparation(1, 99, separation, most).event(2.0, 7).count)
    assert counted == most
    assert counted * 0.999 < loss(separation, most, bands=bands) <= counted


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("void", [(1,), (3,), (0, 2, 3), (1, 2, 3, 4)])
def test_void_and_lost_rounds_move_nothing_together(void: tuple[int, ...], told: bool) -> None:
    assert loss(3, 3, bands=3, void=void, told=told) <= 3


def test_mutant_void_rounds_that_are_not_counted_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CorrelatedRun, "void", lambda run, rounds=1: None)
    assert loss(3, 3, bands=3, void=(1,)) > 3.05


def test_mutant_lost_draws_that_are_not_counted_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CorrelatedRun, "_round_of", lambda run, noise: run._round)
    assert loss(3, 3, bands=3, void=(1,), told=False) > 3.05


def test_mutant_without_the_norm_of_the_coefficients_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CorrelatedNoise, "norm", 1.0)
    assert loss(3, 2, bands=3) > 2.5


def test_mutant_whose_norm_forgets_a_band_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        CorrelatedNoise, "norm", property(lambda kind: math.hypot(*CorrelatedNoise(kind.bands - 1).coefficients))
    )
    assert loss(3, 2, bands=3) > 2.1


def test_mutant_with_a_band_more_than_the_separation_is_caught() -> None:
    assert loss(3, 2, bands=4) > 2.1
    with pytest.raises(PlanError, match="at least 4 rounds apart, not 3"):
        CorrelatedNoise(4).check_sampler(MinSeparation(1, 99, 3, 2))


# The noise.


def simulate(
    bands: int, rounds: int, size: int, *, void: Sequence[int] = (), value: float = 0.0, relation: Relation = ADD
) -> tuple[np.ndarray, float]:
    """Return the noise in each released sum, shape (rounds that released, size), and the std that was stated."""
    run, charge, source = CorrelatedNoise(bands).begin(), paid(rounds), SecureSource()
    found, std = [], 0.0
    for step in range(rounds):
        if step in void:
            run.void()
            charge.take()
            continue
        given = sums(value * (step + 1.0), size)
        released = run.combine({"all": given}, zero=zero(size), asked=1, noise=noise(charge, source, 2.0, relation))
        found.append((flat(released["all"]) - flat(given)).numpy())
        std = released["all"].noise_std
    return np.stack(found), std


def is_white(draws: np.ndarray, std: float) -> bool:
    """Tell whether the rows could be independent draws of N(0, std**2): every mean, variance and covariance.

    Each is within 6.5 standard errors: of a few dozen, one true set in about 1e8 is not.
    """
    size = draws.shape[1]
    scaled = draws / std
    products = scaled @ scaled.T / size
    errors = np.abs(products - np.eye(len(draws))) / np.sqrt((1 + np.eye(len(draws))) / size)
    return bool(errors.max() < 6.5 and np.abs(scaled.mean(1)).max() < 6.5 / math.sqrt(size))


@pytest.mark.parametrize("void", [(), (2,), (0, 3, 4)])
@pytest.mark.parametrize("bands", [1, 2, 4, 7, 9])
def test_the_noise_is_that_of_the_matrix_at_the_accounted_scale_and_no_other(bands: int, void: tuple[int, ...]) -> None:
    found, std = simulate(bands, 8, 20_000, void=void, value=3.0)
    rounds = [step for step in range(8) if step not in void]
    assert std == pytest.approx(2.0 * CorrelatedNoise(bands).norm, rel=1e-4)
    white = matrix(bands, rounds) @ found
    assert is_white(white, std)
    for wrong in (2 / 3, 3 / 2):
        assert not is_white(white, wrong * std)
    if 1 < bands < 8:  # with 8 bands or more, 8 rounds have one matrix
        assert not is_white(matrix(bands - 1, rounds) @ found, std)
    assert np.abs(found.mean(1)).max() < 7 * 1.2 * std / math.sqrt(20_000)


def test_mutant_that_forgets_the_past_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CorrelatedRun, "_add_earlier", lambda run, total, current: None)
    found, std = simulate(4, 6, 20_000)
    assert not is_white(matrix(4, range(6)) @ found, std)
    assert is_white(found, std)


def test_mutant_that_forgets_what_was_released_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    # Earlier sums without the releases taken off: the later ones are no longer unbiased.
    monkeypatch.setattr(correlated, "_flat", lambda sums: flat(sums).double() * isinstance(sums, Bounded))
    found, std = simulate(4, 6, 20_000, value=3.0)
    assert np.abs(found.mean(1)).max() > 1.0 > 7 * 1.2 * std / math.sqrt(20_000)


def test_the_noise_is_scaled_for_replace_one() -> None:
    found, std = simulate(3, 4, 20_000, relation=Relation.REPLACE_ONE)
    assert std == pytest.approx(4.0 * CorrelatedNoise(3).norm, rel=1e-4)
    assert is_white(matrix(3, range(4)) @ found, std)
    assert not is_white(matrix(3, range(4)) @ found, std / 2)


def summed_error(bands: int, rounds: int = 100, size: int = 2000) -> float:
    """Return the mean squared error of the sums over the first 1, 2, ... rounds."""
    found, _ = simulate(bands, rounds, size)
    return float(np.square(np.cumsum(found, 0)).mean())


def test_the_summed_noise_is_far_below_that_of_independent_noise_at_the_same_cost() -> None:
    sampler = MinSeparation(5, 80, 16, 7)
    for bands in (1, 16):
        CorrelatedNoise(bands).check_sampler(sampler)  # the same event for both
    independent, together = summed_error(1), summed_error(16)
    prefixes, own = np.tril(np.ones((100, 100))), 2.0 * CorrelatedNoise(16).norm
    expected = np.square(own * prefixes @ np.linalg.inv(matrix(16, range(100)))).sum() / 100
    assert 0.8 < together / expected < 1.25
    assert 0.8 < independent / (4.0 * 50.5) < 1.25
    assert together < 0.25 * independent


def test_one_band_is_the_noise_of_the_server() -> None:
    run, one, other = CorrelatedNoise(1).begin(), paid(3), paid(3)
    sources = SeededSource(4), SeededSource(4)
    for step in range(3):
        parts = {"a": sums(1.0 + step), "b": sums(-0.5)}
        ours = run.combine(parts, zero=zero(), asked=2, noise=noise(one, sources[0]))["all"]
        theirs = ServerNoise().combine(parts, zero=zero(), asked=2, noise=noise(other, sources[1]))["all"]
        assert ours.noise_std == theirs.noise_std
        assert ours.grid == theirs.grid
        assert torch.equal(flat(ours), flat(theirs))


def test_the_first_round_of_a_run_remembers_no_other_run() -> None:
    kind = CorrelatedNoise(5)
    for _ in range(2):
        charge = paid(1)
        released = kind.begin().combine({}, zero=zero(), asked=0, noise=noise(charge, SeededSource(4)))["all"]
        plain = mechanisms.gaussian(kind.bound(zero(), 2.0), 2.0, relation=ADD, charge=paid(1), source=SeededSource(4))
        assert torch.equal(flat(released), flat(plain))


# The bound of a release.


@few
@given(
    bands=st.integers(1, 400), size=st.integers(1, 10**8), multiplier=st.floats(0.01, 100), bound=st.floats(1e-6, 1e6)
)
def test_the_bound_covers_the_norm_and_a_rounding_for_each_row(
    bands: int, size: int, multiplier: float, bound: float
) -> None:
    empty = Bounded({"w": torch.empty(size, device="meta")}, bound)
    kind = CorrelatedNoise(bands)
    whole = kind.bound(empty, multiplier)
    rounding = mechanisms.grid_of(whole.norm_bound) * math.sqrt(size)
    assert whole.norm_bound + rounding >= bound * kind.norm + math.sqrt(bands) * rounding
    assert whole.norm_bound <= bound * kind.norm * 1.05
    assert whole.size == size


def test_a_usual_bound_is_next_to_the_norm() -> None:
    empty = Bounded({"w": torch.empty(10**6, device="meta")}, 1.0)
    assert CorrelatedNoise(16).bound(empty, 1.0).norm_bound == pytest.approx(CorrelatedNoise(16).norm, rel=1e-3)
    assert CorrelatedNoise(1).bound(empty, 1.0) is empty


def test_noise_that_float64_cannot_carry_is_refused() -> None:
    empty = Bounded({"w": torch.empty(2**28, device="meta")}, 1.0)
    with pytest.raises(InputError, match="noise_multiplier 1e\\+06 with 300 bands is too large"):
        CorrelatedNoise(300).bound(empty, 1e6)


# What may be combined.


def plan_of(sampler: Sampler, **more: Any) -> Plan:
    return Plan(Budget(90.0, 1e-5, Unit.CLIENT), sampler, 1.0, 2.0, 6, 99, **more)


@pytest.mark.parametrize("sampler", [FullBatch(), Poisson(0.1), Shuffled(9, 99)])
@pytest.mark.parametrize("bands", [1, 3])
def test_other_samplers_are_refused(sampler: Sampler, bands: int) -> None:
    with pytest.raises(PlanError, match="use the sampler MinSeparation, or ServerNoise"):
        CorrelatedNoise(bands).check_sampler(sampler)
    for aggregation in (CorrelatedNoise(bands), CorrelatedNoise(bands).begin()):
        with pytest.raises(PlanError, match="use the sampler MinSeparation, or ServerNoise"):
            aggregation.check_plan(plan_of(sampler))


def test_a_separation_of_at_least_the_bands_is_served() -> None:
    for separation in (3, 4):
        CorrelatedNoise(3).check_sampler(MinSeparation(1, 99, separation, 2))
        for aggregation in (CorrelatedNoise(3), CorrelatedNoise(3).begin()):
            aggregation.check_plan(plan_of(MinSeparation(1, 99, separation, 2)))
            aggregation.check_clients(1)


@pytest.mark.parametrize("change", [{"noise": Linear(2, 1)}, {"clips": Linear(1, 0.5)}, {"clips": AdaptiveClip()}])
def test_a_plan_whose_noise_or_clip_norm_changes_is_refused(change: dict[str, Any]) -> None:
    for aggregation in (CorrelatedNoise(3), CorrelatedNoise(3).begin()):
        with pytest.raises(PlanError, match="one clip norm and one noise multiplier"):
            aggregation.check_plan(plan_of(MinSeparation(1, 99, 3, 2), **change))


@pytest.mark.parametrize("bands", [0, -1, 1.5, math.nan, True])
def test_bands_must_be_a_count(bands: object) -> None:
    with pytest.raises(InputError, match="bands"):
        CorrelatedNoise(bands)  # type: ignore[arg-type]


def test_what_has_no_memory_does_not_combine() -> None:
    charge = paid(1)
    with pytest.raises(SfumatoError, match="begin"):
        CorrelatedNoise(2).combine({}, zero=zero(), asked=0, noise=noise(charge))
    assert charge.position == 0


@pytest.mark.parametrize(
    ("bound", "multiplier", "relation"), [(2.0, 2.0, ADD), (1.0, 2.5, ADD), (1.0, 2.0, Relation.REPLACE_ONE)]
)
def test_terms_that_change_are_refused_before_the_charge(bound: float, multiplier: float, relation: Relation) -> None:
    run, charge = CorrelatedNoise(2).begin(), paid(3)
    run.combine({}, zero=zero(), asked=0, noise=noise(charge))
    run = resumed(run, 2)
    with pytest.raises(PlanError, match="one clip norm, one noise multiplier"):
        run.combine({}, zero=zero(bound=bound), asked=0, noise=noise(charge, None, multiplier, relation))
    assert charge.position == 1
    run.combine({}, zero=zero(), asked=0, noise=noise(charge))


def test_a_part_with_a_larger_bound_or_another_size_is_refused_before_the_charge() -> None:
    run, charge = CorrelatedNoise(2).begin(), paid(3)
    run.combine({}, zero=zero(), asked=0, noise=noise(charge))
    for parts in ({"a": sums(1.0, bound=1.5)}, {"a": sums(1.0, bound=1.5), "b": sums(1.0)}):
        with pytest.raises(SfumatoError, match="clip to the latter"):
            run.combine(parts, zero=zero(), asked=1, noise=noise(charge))
    with pytest.raises(SfumatoError, match="have 7 numbers, those before 6"):
        run.combine({"a": sums(1.0, 7)}, zero=zero(7), asked=1, noise=noise(charge))
    assert charge.position == 1


def test_a_round_that_failed_can_be_tried_again() -> None:
    run, charge, source = CorrelatedNoise(3).begin(), paid(2), SeededSource(1)
    run.combine({"a": sums(1.0)}, zero=zero(), asked=1, noise=noise(charge, source))
    before = run.state()
    with pytest.raises(SelfCheckError, match="not finite"):
        run.combine({"a": sums(math.nan)}, zero=zero(), asked=1, noise=noise(charge, source))
    assert charge.position == 1
    assert str(run.state()) == str(before)
    run.combine({"a": sums(1.0)}, zero=zero(), asked=1, noise=noise(charge, source))
    with pytest.raises(BudgetExhaustedError):
        run.combine({"a": sums(1.0)}, zero=zero(), asked=1, noise=noise(charge, source))


def test_sums_of_any_number_of_clients_and_float_type_are_added_up_and_left_as_they_were() -> None:
    size, charge, run = 6, paid(3), CorrelatedNoise(2).begin()
    narrow = Bounded({name: tensor.float() for name, tensor in sums(3.0).value.items()}, 1.0)
    for parts, total in (({}, 0.0), ({"a": narrow}, 3.0), ({"a": sums(3.0), "b": sums(4.0)}, 7.0)):
        found = run.summed(parts, zero=zero(size), noise=noise(charge))["all"]
        earlier = sum(0.5 * kept for _, kept in run.state()["noises"])
        assert torch.allclose(flat(found), total + earlier + torch.zeros(size, dtype=torch.float64))
        assert {name: tensor.shape for name, tensor in found.value.items()} == {
            name: tensor.shape for name, tensor in zero(size).value.items()
        }
        run.combine(parts, zero=zero(size), asked=2, noise=noise(charge))
    assert bool((flat(narrow) == 3).all())


# The self-check of a run.


def test_the_self_check_passes_on_any_round_with_what_was_noised() -> None:
    size = 4000
    run, charge = CorrelatedNoise(3).begin(), paid(4)
    for step in range(4):
        parts = {"a": sums(float(step), size)}
        summed = run.summed(parts, zero=zero(size), noise=noise(charge))
        released = run.combine(parts, zero=zero(size), asked=1, noise=noise(charge))
        asked = noise_std(run.bound(zero(size), 2.0), 2.0, ADD)
        check_scale(released, summed, asked)
        with pytest.raises(SelfCheckError, match="the plan pays for"):
            check_scale(released, summed, asked * 1.001)
        check_noised(["w", "b"], summed, released, zero(size))
        if step:
            with pytest.raises(SelfCheckError, match="times the variance"):
                check_noised(["w", "b"], parts, released, zero(size))


# Going on.


def resumed(run: CorrelatedRun, bands: int) -> CorrelatedRun:
    file = io.BytesIO()
    torch.save(run.state(), file)
    file.seek(0)
    other = CorrelatedNoise(bands).begin()
    other.restore(torch.load(file, weights_only=True))
    return other


@few
@given(bands=st.integers(1, 5), stop=st.integers(0, 6), void=st.sets(st.integers(0, 8)))
def test_a_resumed_run_goes_on_as_it_would_have(bands: int, stop: int, void: set[int]) -> None:
    runs, charges = [CorrelatedNoise(bands).begin()], [paid(9), paid(9)]
    source: Sequence[RandomSource] = [SeededSource(1)]
    for step in range(9):
        if step == stop:
            runs.append(resumed(runs[0], bands))
            source = [SeededSource(2), SeededSource(2)]
            while charges[1].position < charges[0].position:
                charges[1].take()
        found = []
        for run, charge, stream in zip(runs, charges, source, strict=False):
            if step in void:
                run.void()
                charge.take()
                continue
            parts = {"a": sums(float(step))}
            found.append(flat(run.combine(parts, zero=zero(), asked=1, noise=noise(charge, stream))["all"]))
        assert all(torch.equal(found[0], other) for other in found[1:])
        assert len(runs[0].state()["noises"]) <= bands - 1


def test_a_state_is_a_copy() -> None:
    run, charge = CorrelatedNoise(2).begin(), paid(2)
    run.combine({}, zero=zero(), asked=0, noise=noise(charge))
    state = run.state()
    other = CorrelatedNoise(2).begin()
    other.restore(state)
    before = state["noises"][0][1].clone()
    run.combine({}, zero=zero(), asked=0, noise=noise(charge))
    assert torch.equal(state["noises"][0][1], before)
    state["noises"][0][1].zero_()
    assert bool(other.state()["noises"][0][1].any())


def test_draws_that_are_gone_count_as_rounds_told_or_not() -> None:
    found = []
    for told in (True, False):
        run, charge, source = CorrelatedNoise(4).begin(), paid(4), SeededSource(8)
        run.combine({}, zero=zero(), asked=0, noise=noise(charge, source))
        charge.take()
        charge.take()
        if told:
            run.void(2)
        found.append(flat(run.combine({}, zero=zero(), asked=0, noise=noise(charge, source))["all"]))
    assert torch.equal(*found)


def test_another_process_on_the_same_run_stops_it(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    charge, run = paid(9, ledger, lease=1), CorrelatedNoise(2).begin()
    run.combine({}, zero=zero(), asked=0, noise=noise(charge))
    ledger.resume(charge.run, lease=1).take()
    before = run.state()
    with pytest.raises(LedgerError, match="Another process"):
        run.combine({}, zero=zero(), asked=0, noise=noise(charge))
    assert str(run.state()) == str(before)


# What it says, and what it keeps to itself.


def test_a_run_is_called_by_its_public_numbers_and_cannot_be_copied() -> None:
    kind = CorrelatedNoise(2)
    run = kind.begin()
    run.combine({"a": sums(5.0)}, zero=zero(), asked=1, noise=noise(paid(1)))
    assert repr(run) == repr(kind) == "CorrelatedNoise(bands=2)"
    assert run.trust == kind.trust
    assert "trusted" in run.trust
    assert not run.hides_cohort
    assert not kind.hides_cohort
    for away in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="private"):
            away(run)


# From the plan to the model.


def federated(model: torch.nn.Module, noise: object, steps: int = 8, **more: Any) -> Training:
    """Return rounds of 3 of 12 clients, at least 4 rounds apart, whose gradients are all zero."""
    budget = sf.Budget(20.0, 1e-3, unit=Unit.CLIENT)
    plan = sf.Plan.calibrate(
        budget, population=12, batch_size=3, steps=steps, sampling="min-separation", separation=4, clip=0.5
    )
    return sf.rounds(
        model, toy_records(owners=12).by_owner(), plan, algorithm=sf.FedSGD(functools.partial(torch.optim.SGD, lr=1.0)),
        loss=lambda outputs, targets: outputs.sum() * 0, noise=noise, **{"engine": sf.Simulation(), **more},
    )  # fmt: skip


@pytest.mark.parametrize("bands", [1, 4])
def test_a_federation_is_trained_with_the_noise_of_the_matrix(bands: int) -> None:
    model = torch.nn.Linear(4, 4000)
    training = federated(model, CorrelatedNoise(bands))
    models = [parameters(model).double()]
    for _ in training:
        models.append(parameters(model).double())
    found = -3 * torch.stack(models).diff(dim=0).numpy()  # the mean over the 3 clients expected, taken for a gradient
    std = 0.5 * training.plan.noise_multiplier * CorrelatedNoise(bands).norm
    white = matrix(bands, range(8)) @ found
    assert is_white(white, std)
    for wrong in (2 / 3, 3 / 2):
        assert not is_white(white, wrong * std)
    assert CorrelatedNoise.trust in training.result().privacy.not_covered


def test_a_federation_whose_clients_do_not_keep_apart_is_refused() -> None:
    with pytest.raises(PlanError, match="at least 5 rounds apart, not 4"):
        federated(torch.nn.Linear(4, 2), CorrelatedNoise(5))


@pytest.mark.parametrize("comes", [False, True])
def test_after_a_crash_lost_cohorts_are_drawn_again_or_the_run_is_over(comes: bool, tmp_path: Path) -> None:
    def start(resume: bool) -> Training:
        ledger = sf.Ledger(tmp_path / "ledger.sqlite")
        if not resume:
            ledger.grant("federation", sf.Budget(20.0, 1e-3, unit=Unit.CLIENT))
        kept = sf.Checkpoint(tmp_path / "run.pt", every=2, resume=resume)
        available = (lambda step: torch.arange(12)) if comes else None
        return federated(
            torch.nn.Linear(4, 20), CorrelatedNoise(4), ledger=ledger, checkpoint=kept, available=available
        )

    training = start(resume=False)
    for _ in range(3):
        next(training)
    del training  # as after a crash: the last save is at step 2, steps 3 and 4 are leased
    resumed = start(resume=True)
    if comes:
        with pytest.raises(CheckpointError, match="Before step 5, 2 steps were lost"):
            next(resumed)
    else:
        assert [step.index for step in resumed] == [5, 6, 7, 8]
        assert resumed.result().lost == 2


@pytest.mark.parametrize("told", ["numbers", "names", "array"])
def test_who_has_come_may_be_told_in_numbers_or_names(told: str) -> None:
    asked: list[set[str]] = []

    def come(step: int) -> object:
        numbers = [(3 * step + place) % 12 for place in range(3)]
        if told == "array":
            return np.array(numbers)
        return [f"site-{number}" for number in numbers] if told == "names" else numbers

    def drop_out(step: int, name: str) -> bool:
        asked[step].add(name)
        return False

    asked = [set() for _ in range(4)]
    training = federated(
        torch.nn.Linear(4, 2), CorrelatedNoise(4), steps=4, available=come, engine=sf.Simulation(drop_out=drop_out)
    )
    assert len(list(training)) == 4
    assert asked == [{f"site-{(3 * step + place) % 12}" for place in range(3)} for step in range(4)]


@pytest.mark.parametrize(
    ("come", "said"),
    [
        (4711, "the numbers or the names of the clients that came, not int"),
        ("site-3", "the numbers or the names of the clients that came, not str"),
        ([True, False], "there is a bool among them"),
        ([1.5], "there is a float among them"),
        (["ward-3"], 'No client is called "ward-3"'),
        ([12], "holds an index that no client has"),
    ],
)
def test_who_has_come_has_to_be_clients(come: object, said: str) -> None:
    training = federated(torch.nn.Linear(4, 2), CorrelatedNoise(4), available=lambda step: come)
    with pytest.raises(InputError, match=said):
        next(training)


def test_void_rounds_leave_the_noise_of_the_others_right() -> None:
    model = torch.nn.Linear(4, 4000)
    come = {2: torch.empty(0, dtype=torch.int64), 5: torch.empty(0, dtype=torch.int64)}
    training = federated(model, CorrelatedNoise(4), quorum=1, available=lambda step: come.get(step, torch.arange(12)))
    models = [parameters(model).double()]
    for _ in training:
        models.append(parameters(model).double())
    found = -3 * torch.stack(models).diff(dim=0).numpy()
    rounds = [0, 1, 3, 4, 6, 7]
    assert not found[[2, 5]].any()
    assert training.result().void == 2
    std = 0.5 * training.plan.noise_multiplier * CorrelatedNoise(4).norm
    assert is_white(matrix(4, rounds) @ found[rounds], std)
    assert not is_white(matrix(4, range(6)) @ found[rounds], std)
