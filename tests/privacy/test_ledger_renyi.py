"""The ledger over time: Renyi composition, runs that end early and are settled, users' caps, purposes."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import rdp
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import AccountingError, BudgetExhaustedError, InputError, LedgerError
from sfumato.privacy import events, renyi, store
from sfumato.privacy.accounts import Composition
from sfumato.privacy.books import Books, Cost
from sfumato.privacy.budget import Budget, Relation, Unit
from sfumato.privacy.events import RenyiFilterDpEvent
from sfumato.privacy.exact import exact
from sfumato.privacy.ledger import Charge, Ledger

CAP = Budget(2.0, 1e-5)
ORDER = renyi.order_for(2.0, 1e-5)
LIMIT = renyi.cap(ORDER, 2.0, 1e-5)


def steps(noise: float, times: int = 1) -> events.Event:
    return events.repeated(events.gaussian(noise), times)


def charge(ledger: Ledger, event: events.Event, draws: int = 1, **more: Any) -> Charge:
    cost = Cost(0.5, 1e-5, Unit.RECORD, Relation.ADD_OR_REMOVE_ONE)
    arguments: dict[str, Any] = {"purpose": "training", "cost": cost} | more
    return ledger.charge("a", event=events.to_json(event), draws=draws, **arguments)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Ledger:
    opened = Ledger(path)
    opened.grant("a", CAP, composition="renyi")
    return opened


# Grants


def test_a_renyi_grant_fixes_the_order(ledger: Ledger, path: Path) -> None:
    (entry,) = ledger.history()
    assert (entry.composition, entry.renyi_order, entry.rdp, entry.user) == ("renyi", ORDER, 0.0, "")
    balance = Ledger(path).balance("a")
    assert (balance.composition, balance.order) == ("renyi", ORDER)
    assert (balance.spent_epsilon, balance.spent_delta, balance.spent_rdp) == (0.0, 0.0, 0.0)
    assert (balance.remaining_epsilon, balance.remaining_delta, balance.remaining_rdp) == (2.0, 1e-5, LIMIT)


def test_a_later_grant_keeps_the_order_and_moves_the_cap(ledger: Ledger) -> None:
    charge(ledger, RenyiFilterDpEvent(ORDER, LIMIT))
    ledger.grant("a", Budget(4.0, 1e-5))
    assert renyi.order_for(4.0, 1e-5) != ORDER
    assert ledger.balance("a").order == ORDER
    charge(ledger, RenyiFilterDpEvent(ORDER, 1.5))
    ledger.grant("a", Budget(3.0, 1e-5), composition="renyi", order=ORDER)
    assert ledger.balance("a").remaining_rdp == 0.0
    assert ledger.balance("a").spent_epsilon > 3.0
    with pytest.raises(BudgetExhaustedError):
        charge(ledger, RenyiFilterDpEvent(ORDER, 1e-9))


@pytest.mark.parametrize("change", [{"composition": "basic"}, {"order": ORDER + 1}])
def test_composition_and_order_never_change(ledger: Ledger, change: dict[str, Any]) -> None:
    before = ledger.digest
    with pytest.raises(LedgerError, match=f"renyi composition at order {ORDER}, which never changes.*Fix: leave"):
        ledger.grant("a", CAP, **change)
    assert ledger.digest == before


def test_a_basic_data_set_stays_basic() -> None:
    with Ledger.in_memory() as ledger:
        ledger.grant("a", CAP)
        for change in ({"composition": "renyi"}, {"order": 8}):
            with pytest.raises(LedgerError, match="basic composition, which never changes"):
                ledger.grant("a", CAP, **change)
        ledger.grant("a", CAP, composition="basic")
        assert ledger.balance("a").order is None


def test_an_order_can_be_chosen() -> None:
    with Ledger.in_memory() as ledger:
        ledger.grant("a", CAP, composition="renyi", order=6)
        assert ledger.balance("a").remaining_rdp == renyi.cap(6, 2.0, 1e-5) < LIMIT
        with pytest.raises(InputError, match="only belongs to composition"):
            ledger.grant("b", CAP, order=6)
        for order in (0, 1, 513):
            with pytest.raises(InputError, match="order"):
                ledger.grant("b", CAP, composition="renyi", order=order)
        with pytest.raises(InputError, match="order alone costs"):
            ledger.grant("b", CAP, composition="renyi", order=2)
        with pytest.raises(InputError, match="order alone costs"):
            ledger.grant("a", Budget(0.1, 1e-5))
        with pytest.raises(InputError, match='choose "basic" or "renyi"'):
            ledger.grant("b", CAP, composition="rdp")
        with pytest.raises(InputError, match="or basic composition"):
            ledger.grant("b", Budget(1e-4, 1e-9), composition="renyi")
        assert ledger.datasets() == ["a"]


# Charges


def test_divergences_add_up_exactly_until_the_cap(ledger: Ledger) -> None:
    one = renyi.cost(steps(10.0), ORDER)
    fit = int(exact(LIMIT) / exact(one))
    for _ in range(fit):
        charge(ledger, steps(10.0))
    balance = ledger.balance("a")
    assert exact(balance.spent_rdp) == fit * exact(one)
    assert balance.spent_epsilon == renyi.epsilon(ORDER, balance.spent_rdp, 1e-5) <= 2.0
    assert (balance.spent_delta, balance.remaining_delta) == (1e-5, 0.0)
    assert exact(balance.spent_rdp) + exact(balance.remaining_rdp) <= exact(LIMIT)
    before = ledger.history()
    with pytest.raises(BudgetExhaustedError, match=f'Data set "a".*divergence of {one} at order {ORDER}, but only'):
        charge(ledger, steps(10.0))
    assert ledger.history() == before
    charge(ledger, RenyiFilterDpEvent(ORDER, balance.remaining_rdp))
    assert ledger.balance("a").remaining_rdp == 0.0
    assert ledger.balance("a").spent_epsilon == 2.0


def test_many_runs_cost_far_less_than_their_sum() -> None:
    with Ledger.in_memory() as ledger:
        ledger.grant("a", CAP, composition="renyi")
        alone = rdp.RdpAccountant().compose(steps(20.0)).get_epsilon(1e-5)
        runs = int(exact(LIMIT) / exact(renyi.cost(steps(20.0), ORDER)))
        for _ in range(runs):
            charge(ledger, steps(20.0))
        with pytest.raises(BudgetExhaustedError):
            charge(ledger, steps(20.0))
        assert runs * alone > 4 * 2.0
        together = rdp.RdpAccountant().compose(steps(20.0, runs)).get_epsilon(1e-5)
        assert together <= ledger.balance("a").spent_epsilon <= 2.0


def test_the_entry_holds_the_divergence(ledger: Ledger) -> None:
    event = events.repeated(events.poisson_sampled(0.1, events.gaussian(3.0)), 5)
    made = charge(ledger, event, draws=5)
    entry = ledger.history()[-1]
    assert entry.rdp == made.rdp == renyi.cost(event, ORDER)
    assert (entry.renyi_order, entry.epsilon, entry.delta) == (ORDER, 0.5, 1e-5)


@pytest.mark.parametrize(
    ("event", "error", "words"),
    [
        (events.non_private(), BudgetExhaustedError, "divergence of inf"),
        (RenyiFilterDpEvent(ORDER + 1, 0.1), AccountingError, "at the order of the account"),
    ],
)
def test_an_event_that_cannot_be_added_up_is_refused(
    ledger: Ledger, event: events.Event, error: type[Exception], words: str
) -> None:
    before = ledger.digest
    with pytest.raises(error, match=words):
        charge(ledger, event)
    assert ledger.digest == before


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"type": "Gaussian"}', "no"])
def test_a_renyi_charge_needs_an_event(ledger: Ledger, text: str) -> None:
    cost = Cost(0.5, 1e-5, Unit.RECORD, Relation.ADD_OR_REMOVE_ONE)
    with pytest.raises(InputError, match=r"[Ee]vent"):
        ledger.charge("a", purpose="p", event=text, cost=cost, draws=1)


def test_sampling_is_refused_for_replace_one() -> None:
    with Ledger.in_memory() as ledger:
        ledger.grant("a", Budget(2.0, 1e-5, relation=Relation.REPLACE_ONE), composition="renyi")
        cost = Cost(0.5, 1e-5, Unit.RECORD, Relation.REPLACE_ONE)
        charge(ledger, steps(10.0), cost=cost)
        with pytest.raises(AccountingError, match="add-or-remove-one"):
            charge(ledger, events.poisson_sampled(0.1, steps(10.0)), cost=cost)


def test_a_run_that_crashed_stays_spent(ledger: Ledger, path: Path) -> None:
    made = charge(ledger, steps(20.0, 10), draws=10, lease=4)
    made.take()
    spent = ledger.balance("a").spent_rdp
    with Ledger.existing(path) as again:
        resumed = again.resume(made.run, lease=4)
        assert (resumed.position, resumed.rdp) == (4, made.rdp)
        assert again.balance("a").spent_rdp == spent == made.rdp


# Settling


def settled(charge: Charge, event: events.Event) -> None:
    charge.settle(events.to_json(event))


def test_a_run_of_unequal_draws_gives_nothing_back_once_one_was_taken(ledger: Ledger) -> None:
    # Only a filter knows that a run did less than its event says.
    schedule = events.composed([events.gaussian(20.0 + step) for step in range(10)])
    made = charge(ledger, schedule, draws=10)
    spent = ledger.balance("a").spent_rdp
    made.take()
    with pytest.raises(InputError, match="less than the 1 draws"):
        settled(made, events.gaussian(1e6))
    assert ledger.balance("a").spent_rdp == spent


def test_a_run_that_ends_early_gives_the_rest_back(ledger: Ledger, path: Path) -> None:
    other = charge(ledger, steps(30.0))
    made = charge(ledger, steps(20.0, 50), draws=50, lease=8)
    for _ in range(10):
        made.take()
    settled(made, steps(20.0, 10))
    entry = ledger.history()[-1]
    assert (entry.kind, entry.run, entry.upto, entry.draws) == ("settle", made.run, 10, 50)
    assert entry.rdp == renyi.cost(steps(20.0, 10), ORDER)
    assert events.from_json(entry.event) == steps(20.0, 10)
    balance = Ledger(path).balance("a")
    assert balance.spent_rdp == pytest.approx(other.rdp + entry.rdp, rel=1e-15)
    assert exact(balance.spent_rdp) >= exact(other.rdp) + exact(entry.rdp)
    assert made.rdp > 4 * entry.rdp


def test_after_a_settle_nothing_more_is_drawn(ledger: Ledger, path: Path) -> None:
    made = charge(ledger, steps(20.0, 9), draws=9)
    stale = Ledger(path).resume(made.run)
    made.take()
    settled(made, steps(20.0, 1))
    with pytest.raises(LedgerError, match=r"settled\. Fix: charge anew"):
        made.take()
    with pytest.raises(BudgetExhaustedError):
        stale.take()
    with pytest.raises(LedgerError, match=r"settled\. Fix: charge anew"):
        settled(made, steps(20.0, 1))
    with pytest.raises(LedgerError, match="was settled"):
        settled(stale, steps(20.0, 9))
    made.pause()
    with pytest.raises(LedgerError, match=r"was settled: it ended early and has no draws left\. Fix: charge anew"):
        ledger.resume(made.run)
    assert ledger.run_cost(made.run) == made.cost
    assert [entry.kind for entry in ledger.history()] == ["grant", "charge", "settle"]


def test_a_copy_of_a_settled_run_gets_no_further_lease(ledger: Ledger, path: Path) -> None:
    made = charge(ledger, steps(20.0, 20), draws=20, lease=4)
    first = [made.take() for _ in range(2)]
    later = Ledger(path).resume(made.run, lease=4)
    assert later.take() == 4
    settled(later, steps(20.0, 5))  # covers the draws 2 and 3, which are still out
    assert [*first, made.take(), made.take()] == [0, 1, 2, 3]
    with pytest.raises(LedgerError, match="was settled"):
        made.take()
    made.pause()
    assert exact(ledger.balance("a").spent_rdp) == exact(renyi.cost(steps(20.0, 5), ORDER))


def test_a_pause_after_a_settle_elsewhere_gives_nothing_back(ledger: Ledger, path: Path) -> None:
    made = charge(ledger, steps(20.0, 20), draws=20, lease=4)
    made.take()
    settled(Ledger(path).resume(made.run, lease=4), steps(20.0, 4))
    before = ledger.digest
    made.pause()
    assert ledger.digest == before == Ledger(path).verify()


def test_a_run_that_went_on_elsewhere_is_not_settled(ledger: Ledger, path: Path) -> None:
    made = charge(ledger, steps(20.0, 20), draws=20, lease=4)
    made.take()
    later = Ledger(path).resume(made.run, lease=4)
    later.take()
    before = ledger.digest
    with pytest.raises(LedgerError, match="went on elsewhere after draw 4"):
        settled(made, steps(20.0, 1))
    assert ledger.digest == before
    with pytest.raises(LedgerError, match="settled"):
        made.take()
    later.pause()
    again = ledger.resume(made.run)
    assert again.position == 5
    settled(again, steps(20.0, 5))


def test_draws_lost_in_a_crash_are_settled_as_taken(ledger: Ledger, path: Path) -> None:
    made = charge(ledger, steps(20.0, 20), draws=20, lease=4)
    made.take()
    resumed = Ledger(path).resume(made.run, lease=4)
    resumed.take()
    with pytest.raises(InputError, match=r"less than the 5 draws.*also those lost in a crash"):
        settled(resumed, steps(20.0, 4))
    settled(resumed, steps(20.0, 5))


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (steps(20.0, 11), "more than the"),
        (steps(1.0), "more than the"),
        (events.non_private(), "divergence of inf, more than"),
        (steps(20.0, 2), "less than the 3 draws"),
        (steps(20.0, 0), "less than the 3 draws"),
    ],
)
def test_a_settle_that_cannot_be_is_refused_and_the_run_goes_on(
    ledger: Ledger, event: events.Event, words: str
) -> None:
    made = charge(ledger, steps(20.0, 10), draws=10)
    for _ in range(3):
        made.take()
    before = ledger.digest
    with pytest.raises(InputError, match=words):
        settled(made, event)
    with pytest.raises(InputError, match="event"):
        made.settle("not json")
    assert ledger.digest == before
    assert made.take() == 3


def test_a_filter_run_is_settled_for_what_it_did(ledger: Ledger) -> None:
    made = charge(ledger, RenyiFilterDpEvent(ORDER, 0.7), draws=100)
    did = [steps(noise) for noise in (30.0, 25.0, 40.0)]
    for _ in did:
        made.take()
    with pytest.raises(InputError, match="more than 0"):
        settled(made, events.composed([]))
    settled(made, events.composed(did))
    assert ledger.balance("a").spent_rdp == renyi.cost(events.composed(did), ORDER)


def test_a_run_without_a_draw_gives_everything_back(ledger: Ledger) -> None:
    made = charge(ledger, steps(20.0, 10), draws=10)
    settled(made, steps(20.0, 0))
    balance = ledger.balance("a")
    assert (balance.spent_epsilon, balance.spent_delta, balance.remaining_rdp) == (0.0, 0.0, LIMIT)


def test_basic_composition_is_never_settled() -> None:
    with Ledger.in_memory() as ledger:
        ledger.grant("a", CAP)
        made = charge(ledger, steps(20.0, 10), draws=10)
        assert made.rdp is None
        made.take()
        with pytest.raises(LedgerError, match=r"cannot be refunded soundly.*Fix: let it stand"):
            settled(made, steps(20.0, 1))
        assert made.take() == 1


def test_a_paused_run_is_not_settled(ledger: Ledger) -> None:
    made = charge(ledger, steps(20.0, 10), draws=10)
    made.take()
    made.pause()
    with pytest.raises(LedgerError, match="paused"):
        settled(made, steps(20.0, 1))
    settled(ledger.resume(made.run), steps(20.0, 10))


def test_a_settle_that_cannot_be_written_ends_the_run(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    made = charge(ledger, steps(20.0, 10), draws=10)
    made.take()
    with monkeypatch.context() as patch:
        patch.setattr("sfumato.privacy.store._insert", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            settled(made, steps(20.0, 1))
    assert ledger.balance("a").spent_rdp == made.rdp
    with pytest.raises(LedgerError, match="settled"):
        made.take()


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "lease"},
        {"kind": "pause"},
        {"kind": "settle", "rdp": 0.1},
        {"kind": "charge", "run": "0" * 32, "composition": Composition.BASIC, "order": 0},
        {"kind": "charge", "run": "0" * 32, "order": ORDER + 1},
        {"kind": "charge", "run": "0" * 32, "rdp": -0.1},
        {"kind": "grant", "order": ORDER + 1},
        {"kind": "grant", "dataset": "b", "user": "alice"},
    ],
)
def test_a_chained_entry_without_sense_is_refused(ledger: Ledger, path: Path, change: dict[str, Any]) -> None:
    made = charge(ledger, steps(20.0, 10), draws=10)
    made.take()
    settled(made, steps(20.0))
    known = Books("x")
    with closing(sqlite3.connect(path)) as connection:
        store._follow(connection, known)
        usual = {"dataset": "a", "run": made.run, "cost": made.cost, "draws": 10, "upto": 10, "event": "{}"}
        usual |= {"composition": Composition.RENYI, "order": ORDER}
        store._insert(connection, known.next_entry(**(usual | change)))
        connection.commit()
    with pytest.raises(LedgerError, match="entry 4 makes no sense"):
        ledger.balance("a")
    with pytest.raises(LedgerError, match="entry 4 makes no sense"):
        Ledger(path)


# Users and purposes


def test_a_user_cap_and_the_cap_of_the_data_set_both_hold(ledger: Ledger) -> None:
    small = Budget(1.5, 1e-5)
    charge(ledger, steps(20.0), by="alice")  # counts against a cap that comes later
    ledger.grant("a", small, user="alice", by="officer", note="a share")
    assert ledger.users("a") == ["alice"]
    assert ledger.balance("a", "alice").spent_rdp == renyi.cost(steps(20.0), ORDER)
    limit = renyi.cap(ORDER, 1.5, 1e-5)
    rest = ledger.balance("a", "alice").remaining_rdp
    with pytest.raises(BudgetExhaustedError, match='User "alice" of data set "a"'):
        charge(ledger, RenyiFilterDpEvent(ORDER, math.nextafter(rest, 1)), by="alice")
    charge(ledger, RenyiFilterDpEvent(ORDER, rest), by="alice")
    have = ledger.balance("a", "alice")
    assert (have.user, have.cap) == ("alice", small)
    assert limit * (1 - 1e-15) <= have.spent_rdp <= limit
    assert have.remaining_rdp < 1e-16
    assert 1.5 * (1 - 1e-15) <= have.spent_epsilon <= 1.5
    assert ledger.balance("a").user is None
    charge(ledger, RenyiFilterDpEvent(ORDER, ledger.balance("a").remaining_rdp), by="bob")
    ledger.grant("a", Budget(1.9, 1e-5), user="alice")
    with pytest.raises(BudgetExhaustedError, match='Data set "a"'):
        charge(ledger, RenyiFilterDpEvent(ORDER, 0.1), by="alice")
    assert ledger.balance("a").cap == CAP


def test_a_settle_gives_back_to_the_user_too(ledger: Ledger) -> None:
    ledger.grant("a", Budget(1.5, 1e-5), user="alice")
    made = charge(ledger, steps(20.0, 10), draws=10, by="alice")
    made.take()
    settled(made, steps(20.0))
    assert ledger.balance("a", "alice").spent_rdp == renyi.cost(steps(20.0), ORDER)


def test_users_of_a_basic_data_set(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        with pytest.raises(LedgerError, match=r"no budget for data set \"a\""):
            ledger.grant("a", CAP, user="alice")
        ledger.grant("a", CAP)
        ledger.grant("a", Budget(0.5, 1e-5), user="alice")
        with pytest.raises(LedgerError, match="Fix: use the unit and relation"):
            ledger.grant("a", Budget(0.5, 1e-5, unit=Unit.CLIENT), user="alice")
        with pytest.raises(LedgerError, match="never changes"):
            ledger.grant("a", Budget(0.5, 1e-5), user="alice", composition="renyi")
        for name in ("", "two\nlines"):
            with pytest.raises(InputError, match="user"):
                ledger.grant("a", CAP, user=name)
        cost = Cost(0.5, 5e-6, Unit.RECORD, Relation.ADD_OR_REMOVE_ONE)
        charge(ledger, steps(1.0), by="alice", cost=cost)
        with pytest.raises(BudgetExhaustedError, match='User "alice"'):
            charge(ledger, steps(1.0), by="alice", cost=Cost(1e-9, 0.0, Unit.RECORD, Relation.ADD_OR_REMOVE_ONE))
        charge(ledger, steps(1.0), by="bob", cost=cost)
        with pytest.raises(LedgerError, match=r'User "alise" has no cap.*Did you mean "alice"'):
            ledger.balance("a", "alise")
    with Ledger.existing(tmp_path / "l.sqlite") as again:
        have = again.balance("a", "alice")
        assert (have.spent_epsilon, have.remaining_epsilon, have.spent_delta) == (0.5, 0.0, 5e-6)
        assert again.balance("a").spent_epsilon == 1.0


def test_what_was_spent_is_told_by_purpose(ledger: Ledger) -> None:
    charge(ledger, steps(20.0, 4))
    charge(ledger, steps(20.0, 4))
    charge(ledger, steps(30.0), purpose="evaluation")
    training, evaluation = ledger.by_purpose("a")
    assert (training.purpose, training.runs, training.amount) == ("training", 2, renyi.cost(steps(20.0, 8), ORDER))
    assert training.share == pytest.approx(training.amount / LIMIT)
    assert (evaluation.purpose, evaluation.runs) == ("evaluation", 1)
    assert training.amount + evaluation.amount == pytest.approx(ledger.balance("a").spent_rdp)


def test_purposes_of_a_basic_data_set() -> None:
    with Ledger.in_memory() as ledger:
        ledger.grant("a", CAP)
        assert ledger.by_purpose("a") == []
        for purpose, epsilon in (("tuning", 0.1), ("training", 1.0), ("tuning", 0.2)):
            cost = Cost(epsilon, 1e-6, Unit.RECORD, Relation.ADD_OR_REMOVE_ONE)
            charge(ledger, steps(1.0), purpose=purpose, cost=cost)
        assert [(one.purpose, one.runs, one.amount, one.share) for one in ledger.by_purpose("a")] == [
            ("training", 1, 1.0, 0.5), ("tuning", 2, 0.3, 0.15)
        ]  # fmt: skip


# An adversary


def true_epsilon(done: list[events.Event]) -> float:
    """Return what dp-accounting says of everything that was released, at the one order of the account."""
    accountant = rdp.RdpAccountant(orders=[ORDER])
    for event in done:
        accountant.compose(event)
    return float(accountant.get_epsilon(1e-5))


MOVES = st.tuples(
    st.sampled_from(["exactly", "a hair more", "half", "gaussian", "sampled"]),
    st.floats(3.0, 100.0),
    st.integers(1, 60),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from(["alice", "bob"]),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(MOVES, max_size=15))
def test_an_adversary_that_sees_the_balance_never_passes_the_cap(moves: list[Any]) -> None:
    spent: list[tuple[str, events.Event, Fraction]] = []
    share = Budget(1.6, 1e-5)
    with Ledger.in_memory() as ledger:
        ledger.grant("a", CAP, composition="renyi")
        ledger.grant("a", share, user="alice")
        for kind, noise, count, stop, settle, by in moves:
            left = ledger.balance("a").remaining_rdp
            if by == "alice":
                left = min(left, ledger.balance("a", "alice").remaining_rdp)
            # What divergence `left` buys: one Gaussian with this noise, rounded so that it fits or just does not.
            fitting = math.sqrt(ORDER / (2 * left)) * (1 + 1e-12) if left else 1e9
            part, draws = {
                "exactly": (events.gaussian(fitting), 1),
                "a hair more": (events.gaussian(fitting * (1 - 1e-9)), 1),
                "half": (events.gaussian(fitting * math.sqrt(2 * count)), count),
                "gaussian": (events.gaussian(noise), count),
                "sampled": (events.poisson_sampled(0.1, events.gaussian(noise)), count),
            }[kind]
            event = events.repeated(part, draws)
            cost = exact(renyi.cost(event, ORDER))
            allowed = min(
                exact(LIMIT) - sum(each[2] for each in spent),
                exact(renyi.cap(ORDER, 1.6, 1e-5)) - sum(each[2] for each in spent if each[0] == "alice")
                if by == "alice"
                else 10,
            )
            try:
                made = charge(ledger, event, draws=draws, lease=7, by=by)
            except BudgetExhaustedError:
                assert cost > allowed
                continue
            assert cost <= allowed
            taken = max(1, int(stop * draws))
            for _ in range(taken):
                made.take()
            if settle:
                event = events.repeated(part, taken)
                settled(made, event)
            spent.append((by, event, exact(renyi.cost(event, ORDER))))
        balance = ledger.balance("a")
        assert sum(each[2] for each in spent) <= exact(balance.spent_rdp) <= exact(LIMIT)
        assert true_epsilon([each[1] for each in spent]) <= balance.spent_epsilon * (1 + 1e-12) <= 2.0 * (1 + 1e-12)
        assert true_epsilon([each[1] for each in spent if each[0] == "alice"]) <= 1.6 * (1 + 1e-12)
        ledger.verify()
