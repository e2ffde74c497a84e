"""What an event costs: golden numbers, two accountants that must agree, and what is refused."""

from __future__ import annotations

import json
import math

import dp_accounting
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import AccountingError, InputError
from sfumato.privacy import accounting, events
from sfumato.privacy.accounting import spending
from sfumato.privacy.budget import Relation

few = settings(max_examples=8, deadline=None)
fewer = settings(max_examples=4, deadline=None)


def training(rate: float, noise_multiplier: float, steps: int) -> events.Event:
    return events.repeated(events.poisson_sampled(rate, events.gaussian(noise_multiplier)), steps)


PLANS = st.builds(
    training,
    st.floats(min_value=1e-3, max_value=1.0),
    st.floats(min_value=0.8, max_value=8.0),
    st.integers(min_value=1, max_value=300),
)


@few
@given(event=PLANS, delta=st.sampled_from([1e-4, 1e-5, 1e-8]))
def test_the_claim_is_the_tight_figure_and_never_above_the_renyi_bound(event: events.Event, delta: float) -> None:
    spent = spending(event, delta)
    assert 0 <= spent.pld <= spent.rdp
    assert spent.epsilon == spent.pld
    assert spent.delta == delta


def test_golden_numbers_of_the_mnist_example() -> None:
    spent = spending(training(256 / 60000, 1.1, 14040), 1e-5)
    assert spent.pld == pytest.approx(2.380, abs=1e-3)
    assert spent.rdp == pytest.approx(2.594, abs=1e-3)


def test_one_gaussian_agrees_with_its_closed_form() -> None:
    # Balle and Wang 2018, theorem 8: the delta of a Gaussian of std sigma and sensitivity 1.
    def normal_cdf(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    sigma = 3.0
    epsilon = spending(events.gaussian(sigma), 1e-5).epsilon
    delta = normal_cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * normal_cdf(-0.5 / sigma - epsilon * sigma)
    assert 0.99e-5 < delta <= 1e-5


@fewer
@given(event=PLANS)
def test_epsilon_recomputed_by_dp_accounting_alone_from_json_is_equal(event: events.Event) -> None:
    def rebuilt(node: dict[str, object]) -> dp_accounting.DpEvent:
        fields = {k: rebuilt(v) if isinstance(v, dict) else v for k, v in node.items() if k != "type"}
        return getattr(dp_accounting, str(node["type"]))(**fields)

    alone = rebuilt(json.loads(events.to_json(event)))
    spent = spending(event, 1e-5)
    assert spent.rdp == rdp.RdpAccountant().compose(alone).get_epsilon(1e-5)
    coarse, fine = (pld.PLDAccountant(value_discretization_interval=width) for width in (1e-4, 1e-5))
    # The finer grid is slow, and only counts where the coarse one was refused.
    assert spent.pld == coarse.compose(alone).get_epsilon(1e-5) or spent.pld == fine.compose(alone).get_epsilon(1e-5)


@fewer
@given(
    noise=st.floats(min_value=0.8, max_value=4.0),
    rate=st.floats(min_value=0.01, max_value=0.5),
    steps=st.integers(min_value=1, max_value=50),
)
def test_more_steps_and_less_noise_never_cost_less(noise: float, rate: float, steps: int) -> None:
    base = spending(training(rate, noise, steps), 1e-5).epsilon
    assert spending(training(rate, noise, 2 * steps), 1e-5).epsilon > base
    assert spending(training(rate, noise / 1.5, steps), 1e-5).epsilon > base


# The rows of the table in the docstring of `spending`.


def test_a_non_private_part_makes_epsilon_infinite() -> None:
    event = events.composed([events.gaussian(10.0), events.non_private()])
    spent = spending(event, 1e-5)
    assert spent.epsilon == spent.pld == spent.rdp == math.inf


def test_no_steps_cost_nothing() -> None:
    assert spending(training(0.1, 1.0, 0), 1e-5).epsilon == 0
    assert spending(events.repeated(events.gaussian(1.0), 0), 1e-5).epsilon == 0


@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: events.composed([events.gaussian(1.0), e])])
def test_replace_one_with_sampling_is_refused(wrap: object) -> None:
    event = wrap(training(0.1, 1.0, 10))  # type: ignore[operator]
    with pytest.raises(AccountingError, match="only accounted for add-or-remove-one"):
        spending(event, 1e-5, Relation.REPLACE_ONE)


def test_replace_one_without_sampling_costs_the_same() -> None:
    event = events.repeated(events.gaussian(4.0), 10)
    assert spending(event, 1e-5, Relation.REPLACE_ONE) == spending(event, 1e-5)


@pytest.mark.parametrize("delta", [9e-13, 1e-300])
def test_a_delta_below_the_smallest_is_refused(delta: float) -> None:
    with pytest.raises(AccountingError, match="choose a larger delta"):
        spending(events.gaussian(1.0), delta)


def test_the_smallest_delta_is_accepted() -> None:
    assert 0 < spending(events.gaussian(5.0), 1e-12).epsilon < math.inf


class _Fake(dp_accounting.PrivacyAccountant):
    """Answers with the figures that a test puts on its list."""

    answers: tuple[float, ...] = ()

    def __init__(self, value_discretization_interval: float = 0.0) -> None:
        super().__init__(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
        self._finest = value_discretization_interval <= 1e-5

    def _maybe_compose(self, event: dp_accounting.DpEvent, count: int, do_compose: bool) -> None:
        return None

    def get_epsilon(self, target_delta: float) -> float:
        return self.answers[1] if self._finest else self.answers[0]


def test_renyi_below_pld_on_both_grids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Fake, "answers", (90.0, 80.0))
    monkeypatch.setattr(accounting.pld, "PLDAccountant", _Fake)
    with pytest.raises(AccountingError, match="contradict each other: PLD says epsilon 80"):
        spending(events.gaussian(1.234), 1e-5)


def test_renyi_below_pld_on_the_coarse_grid_is_tried_on_the_finer_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_Fake, "answers", (90.0, 0.5))
    monkeypatch.setattr(accounting.pld, "PLDAccountant", _Fake)
    assert spending(events.gaussian(1.2345), 1e-5).epsilon == 0.5


@pytest.mark.parametrize("answer", [math.nan, -1.0])
def test_an_accountant_that_returns_nonsense_is_not_believed(monkeypatch: pytest.MonkeyPatch, answer: float) -> None:
    monkeypatch.setattr(_Fake, "answers", (answer, answer))
    monkeypatch.setattr(accounting.pld, "PLDAccountant", _Fake)
    with pytest.raises(AccountingError, match="nothing is claimed"):
        spending(events.gaussian(1.23456), 1e-5)


@pytest.mark.parametrize("delta", [0, 1, -1e-5, math.nan, math.inf])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    with pytest.raises(InputError, match="delta"):
        spending(events.gaussian(1.0), delta)


def test_an_event_that_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be written"):
        spending(dp_accounting.SampledWithoutReplacementDpEvent(100, 10, events.gaussian(1.0)), 1e-5)


def test_an_event_that_one_accountant_has_no_bound_for_is_refused() -> None:
    nested = events.poisson_sampled(0.1, events.poisson_sampled(0.1, events.composed([events.gaussian(1.0)])))
    with pytest.raises(AccountingError, match="no proven bound"):
        spending(nested, 1e-5)
