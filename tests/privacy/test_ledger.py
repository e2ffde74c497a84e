"""The ledger: exact sums, a chain that shows every change, leases, races, crashes and forks."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import pickle
import random
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import BudgetExhaustedError, InputError, LedgerError
from sfumato.privacy import books, store
from sfumato.privacy.books import Cost, Entry
from sfumato.privacy.budget import Budget, Relation, Unit
from sfumato.privacy.ledger import Charge, Ledger

WORKER = Path(__file__).with_name("ledger_worker.py")
SOURCE = Path(store.__file__).parents[1]


def cost(epsilon: float, delta: float = 0.0) -> Cost:
    return Cost(epsilon, delta, Unit.RECORD, Relation.ADD_OR_REMOVE_ONE)


def charge(ledger: Ledger, epsilon: float = 0.1, delta: float = 0.0, draws: int = 1, **more: object) -> Charge:
    return ledger.charge(
        "a", purpose="test", event='{"name": "gaussian"}', cost=cost(epsilon, delta), draws=draws, **more
    )


def worker(command: str, path: Path, *more: object) -> subprocess.Popen[str]:
    line = [sys.executable, str(WORKER), str(SOURCE), command, str(path), *map(str, more)]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a ledger?#%.sqlite"


@pytest.fixture
def ledger(path: Path) -> Ledger:
    opened = Ledger(path)
    opened.grant("a", Budget(1.0, 1e-4))
    return opened


# Costs and sums


@pytest.mark.parametrize("epsilon", [math.nan, math.inf, -0.1, True, "1"])
def test_a_cost_is_finite_and_not_negative(epsilon: float) -> None:
    with pytest.raises(InputError, match="epsilon"):
        cost(epsilon)


@pytest.mark.parametrize("delta", [math.nan, math.inf, -1e-9, 1.0])
def test_a_cost_has_a_delta_below_one(delta: float) -> None:
    with pytest.raises(InputError, match="delta"):
        cost(1.0, delta)


def test_a_cost_knows_its_words() -> None:
    assert Cost(1, 0, "client", "replace-one") == Cost(1.0, 0.0, Unit.CLIENT, Relation.REPLACE_ONE)
    with pytest.raises(InputError, match='choose "record" or "client"'):
        Cost(1.0, 0.0, "records", Relation.REPLACE_ONE)


def test_three_tenths_fit_a_cap_of_three_tenths() -> None:
    assert 0.1 + 0.1 + 0.1 > 0.3
    ledger = Ledger.in_memory()
    ledger.grant("a", Budget(0.3, 3e-5))
    for _ in range(3):
        charge(ledger, 0.1, 1e-5)
    balance = ledger.balance("a")
    assert (balance.spent_epsilon, balance.remaining_epsilon) == (0.3, 0.0)
    assert (balance.spent_delta, balance.remaining_delta) == (3e-5, 0.0)
    with pytest.raises(BudgetExhaustedError):
        charge(ledger, 5e-324)


@pytest.mark.parametrize(("epsilon", "delta"), [(1.0000001, 0.0), (0.1, 1.0001e-4)])
def test_epsilon_and_delta_are_capped_each(ledger: Ledger, epsilon: float, delta: float) -> None:
    before = ledger.history()
    with pytest.raises(BudgetExhaustedError, match=r'Data set "a".*only epsilon 1\.0 and delta 0\.0001 are left'):
        charge(ledger, epsilon, delta)
    assert ledger.history() == before


def exactly(value: float) -> Fraction:
    return Fraction(repr(value))


AMOUNTS = st.one_of(
    st.integers(0, 12).map(lambda tenths: tenths / 10),
    st.floats(0, 2, allow_nan=False),
    st.floats(0, 1e-12),
    st.just(-0.0),
)
DELTAS = AMOUNTS.map(lambda amount: amount / 4)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("grant"), st.sampled_from("ab"), st.floats(1e-3, 3), st.floats(1e-9, 0.9)),
            st.tuples(st.just("charge"), st.sampled_from("ab"), AMOUNTS, DELTAS),
        ),
        max_size=25,
    )
)
def test_a_charge_is_taken_exactly_if_it_fits(steps: list[tuple[str, str, float, float]]) -> None:
    caps: dict[str, tuple[Fraction, Fraction]] = {}
    spent: dict[str, tuple[Fraction, Fraction]] = {}
    with Ledger.in_memory() as ledger:
        for kind, dataset, epsilon, delta in steps:
            amount = (exactly(abs(epsilon)), exactly(abs(delta)))
            if kind == "grant":
                ledger.grant(dataset, Budget(epsilon, delta))
                caps[dataset] = amount
                spent.setdefault(dataset, (Fraction(0), Fraction(0)))
                continue
            after = tuple(map(sum, zip(spent.get(dataset, (0, 0)), amount, strict=True)))
            asked = {"purpose": "p", "event": "{}", "cost": cost(epsilon, delta), "draws": 1}
            if dataset not in caps:
                with pytest.raises(LedgerError, match="sfumato ledger grant"):
                    ledger.charge(dataset, **asked)
            elif after[0] <= caps[dataset][0] and after[1] <= caps[dataset][1]:
                ledger.charge(dataset, **asked)
                spent[dataset] = after
            else:
                with pytest.raises(BudgetExhaustedError):
                    ledger.charge(dataset, **asked)
        ledger.verify()
        assert ledger.datasets() == sorted(caps)
        for dataset, cap in caps.items():
            balance = ledger.balance(dataset)
            for exact, limit, shown, left in (
                (spent[dataset][0], cap[0], balance.spent_epsilon, balance.remaining_epsilon),
                (spent[dataset][1], cap[1], balance.spent_delta, balance.remaining_delta),
            ):
                assert exact <= exactly(shown) <= exact * (1 + Fraction(1, 10**15)) + Fraction(1, 10**320)
                rest = max(limit - exact, Fraction(0))
                assert rest * (1 - Fraction(1, 10**15)) - Fraction(1, 10**320) <= exactly(left) <= rest
            if spent[dataset][0] <= cap[0] and spent[dataset][1] <= cap[1]:
                everything = cost(balance.remaining_epsilon, balance.remaining_delta)
                ledger.charge(dataset, purpose="the rest", event="{}", cost=everything, draws=1)


# Grants and arguments


def test_the_latest_grant_counts(ledger: Ledger) -> None:
    charge(ledger, 0.8)
    ledger.grant("a", Budget(0.5, 1e-4), by="officer", note="too much")
    assert ledger.balance("a").remaining_epsilon == 0.0
    with pytest.raises(BudgetExhaustedError):
        charge(ledger, 0.01)
    ledger.grant("a", Budget(0.9, 1e-4))
    charge(ledger, 0.1)
    grants = [entry for entry in ledger.history("a") if entry.kind == "grant"]
    assert [(entry.epsilon, entry.note) for entry in grants] == [(1.0, ""), (0.5, "too much"), (0.9, "")]
    assert grants[1].by == "officer"


def test_data_sets_have_their_own_caps(ledger: Ledger) -> None:
    ledger.grant("b", Budget(2.0, 1e-4, unit=Unit.CLIENT))
    charge(ledger, 1.0)
    assert ledger.balance("b").remaining_epsilon == 2.0
    assert ledger.datasets() == ["a", "b"]
    assert ledger.has_grant("a")
    assert not ledger.has_grant("c")
    assert [entry.dataset for entry in ledger.history("b")] == ["b"]


@pytest.mark.parametrize(
    ("unit", "relation"), [(Unit.CLIENT, Relation.ADD_OR_REMOVE_ONE), (Unit.RECORD, Relation.REPLACE_ONE)]
)
def test_unit_and_relation_are_those_of_the_grant(ledger: Ledger, unit: Unit, relation: Relation) -> None:
    before = ledger.digest
    with pytest.raises(LedgerError, match="Fix: use the unit and relation"):
        ledger.charge("a", purpose="p", event="{}", cost=Cost(0.1, 0.0, unit, relation), draws=1)
    with pytest.raises(LedgerError, match="Fix: use the unit and relation"):
        ledger.grant("a", Budget(2.0, 1e-4, unit, relation))
    assert ledger.digest == before


def test_a_cap_promises_something(ledger: Ledger) -> None:
    with pytest.raises(InputError, match="finite epsilon"):
        ledger.grant("b", Budget(math.inf))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("purpose", " "),
        ("purpose", "two\nlines"),
        ("by", ""),
        ("note", "\ud800"),
        ("event", "not json"),
        ("event", '"\ud800"'),
        ("draws", 0),
        ("draws", True),
        ("lease", 0),
    ],
)
def test_arguments_are_checked(ledger: Ledger, name: str, value: object) -> None:
    before = ledger.digest
    arguments = {"purpose": "p", "event": "{}", "cost": cost(0.1), "draws": 1, name: value}
    with pytest.raises(InputError, match=name):
        ledger.charge("a", **arguments)
    assert ledger.digest == before


@pytest.mark.parametrize("question", ["balance", "history", "charge"])
def test_an_unknown_data_set_names_the_fix(ledger: Ledger, question: str) -> None:
    arguments = {"purpose": "p", "event": "{}", "cost": cost(0.1), "draws": 1} if question == "charge" else {}
    with pytest.raises(LedgerError, match=r'data set "b".*`sfumato ledger grant`'):
        getattr(ledger, question)("b", **arguments)


def test_an_entry_holds_what_was_said(ledger: Ledger) -> None:
    made = charge(ledger, 0.25, 1e-5, draws=9, lease=4, by="Ada", note="näıve ✓")
    entry = ledger.history()[-1]
    assert (entry.seq, entry.kind, entry.dataset, entry.run) == (2, "charge", "a", made.run)
    assert (entry.epsilon, entry.delta, entry.draws, entry.upto) == (0.25, 1e-5, 9, 4)
    assert (entry.unit, entry.relation) == ("record", "add-or-remove-one")
    assert (entry.purpose, entry.by, entry.note) == ("test", "Ada", "näıve ✓")
    assert json.loads(entry.event) == {"name": "gaussian"}
    assert entry.at.endswith("+00:00")
    assert ledger.history()[0].previous == "0" * 64
    assert entry.digest == ledger.digest == ledger.verify()
    assert ledger.run_cost(made.run) == made.cost == cost(0.25, 1e-5)
    assert len(made.run) == 32
    with pytest.raises(LedgerError, match="no run"):
        ledger.run_cost("0" * 32)


# Leases


def test_draws_are_handed_out_lease_by_lease(ledger: Ledger) -> None:
    made = charge(ledger, draws=5, lease=2)
    uptos = []
    for expected in range(5):
        assert made.position == expected
        assert made.take() == expected
        uptos.append(ledger.history()[-1].upto)
    assert uptos == [2, 2, 4, 4, 5]
    with pytest.raises(BudgetExhaustedError, match="all 5 draws"):
        made.take()
    assert ledger.balance("a").spent_epsilon == 0.1


def test_without_a_lease_all_draws_are_handed_out(ledger: Ledger) -> None:
    made = charge(ledger, draws=3)
    before = ledger.digest
    assert [made.take() for _ in range(3)] == [0, 1, 2]
    assert ledger.digest == before
    assert ledger.resume(made.run).position == 3


def test_after_a_crash_leased_draws_count_as_taken(ledger: Ledger, path: Path) -> None:
    made = charge(ledger, draws=10, lease=4)
    made.take()
    with Ledger.existing(path) as again:
        resumed = again.resume(made.run, lease=3)
        assert (resumed.position, resumed.draws, resumed.dataset) == (4, 10, "a")
        assert again.history()[-1].upto == 7
        assert [resumed.take() for _ in range(6)] == [4, 5, 6, 7, 8, 9]
        spent = again.resume(made.run)
        assert spent.position == spent.draws
        with pytest.raises(BudgetExhaustedError):
            spent.take()


def test_after_a_pause_the_run_goes_on_where_it_stopped(ledger: Ledger, path: Path) -> None:
    made = charge(ledger, draws=10)
    assert [made.take() for _ in range(3)] == [0, 1, 2]
    made.pause()
    made.pause()
    assert [(entry.kind, entry.upto) for entry in ledger.history()[1:]] == [("charge", 10), ("pause", 3)]
    with pytest.raises(LedgerError, match="paused"):
        made.take()
    assert [Ledger(path).resume(made.run).take() for _ in range(1)] == [3]


def test_a_pause_gives_nothing_back_if_later_draws_are_out(ledger: Ledger) -> None:
    first = charge(ledger, draws=10, lease=4)
    second = ledger.resume(first.run, lease=4)
    before = ledger.digest
    first.pause()
    assert ledger.digest == before
    assert second.take() == 4
    second.pause()
    assert ledger.resume(first.run).take() == 5


def test_two_resumes_get_disjoint_draws(ledger: Ledger, path: Path) -> None:
    first = charge(ledger, draws=9, lease=2)
    second = Ledger(path).resume(first.run, lease=3)
    taken = [first.take(), second.take(), first.take(), first.take(), second.take(), first.take()]
    assert taken == [0, 2, 1, 5, 3, 6]
    assert [first.take(), second.take(), first.take()] == [7, 4, 8]
    for each in (first, second):
        with pytest.raises(BudgetExhaustedError):
            each.take()
        assert each.position == 9


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 5) | st.none(),
    st.lists(st.tuples(st.sampled_from("ttttpr"), st.integers(0, 5), st.integers(1, 4) | st.none()), max_size=40),
)
def test_no_draw_is_ever_allowed_twice(draws: int, lease: int | None, steps: list[tuple[str, int, int | None]]) -> None:
    with Ledger.in_memory() as ledger:
        ledger.grant("a", Budget(1.0, 1e-4))
        owners = [charge(ledger, draws=draws, lease=lease)]
        run, taken = owners[0].run, []
        for step, who, size in steps:
            owner = owners[who % len(owners)]
            if step == "t":
                try:
                    taken.append(owner.take())
                except (BudgetExhaustedError, LedgerError):
                    continue
                assert taken[-1] < ledger.history()[-1].upto
            elif step == "p":
                owner.pause()
            else:
                owners.append(ledger.resume(run, lease=size))
        assert len(taken) == len(set(taken))
        assert set(taken) <= set(range(draws))
        assert ledger.history()[-1].upto >= max(taken, default=-1) + 1
        last = ledger.resume(run)
        rest = [last.take() for _ in range(draws - last.position)]
        assert not set(rest) & set(taken)


def test_threads_share_a_charge(ledger: Ledger) -> None:
    made = charge(ledger, draws=60, lease=7)
    taken: list[int] = []

    def work() -> None:
        for _ in range(10):
            taken.append(made.take())

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(60))


def test_a_charge_cannot_be_made_or_copied_by_anybody(ledger: Ledger) -> None:
    made = charge(ledger)
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="two owners"):
            attempt(made)
    with pytest.raises(TypeError, match="two owners"):
        made.__getstate__()
    with pytest.raises(TypeError, match="only made by"):
        Charge(object(), ledger, made.run, None, position=0, limit=1, lease=1)


def test_a_lease_that_cannot_be_written_allows_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    made = charge(ledger, draws=4, lease=1)
    made.take()
    before = ledger.history()
    really_insert = store._insert

    def insert_then_fail(connection: sqlite3.Connection, entry: Entry) -> None:
        really_insert(connection, entry)
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(store, "_insert", insert_then_fail)
        with pytest.raises(LedgerError, match="disk I/O error"):
            made.take()
        with pytest.raises(LedgerError, match="disk I/O error"):
            charge(ledger)
    assert ledger.history() == before
    assert made.take() == 1


def test_a_pause_that_fails_still_ends_the_charge(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    made = charge(ledger, draws=4)

    def fail(connection: sqlite3.Connection, entry: Entry) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(store, "_insert", fail)
        with pytest.raises(LedgerError, match="disk I/O error"):
            made.pause()
    with pytest.raises(LedgerError, match="paused"):
        made.take()
    assert ledger.resume(made.run).position == 4


# The chain


def tamper(path: Path, *statements: str) -> None:
    """Change the file behind the ledger's back, and put its triggers back in place."""
    with closing(sqlite3.connect(path)) as connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(statement)
        for _, sql in triggers:
            connection.execute(sql)
        connection.commit()


def filled(ledger: Ledger) -> Ledger:
    for _ in range(4):
        charge(ledger, 0.1, 1e-6, draws=3, lease=2)
    return ledger


@pytest.mark.parametrize(
    "edit",
    [
        "at = '2020-01-01T00:00:00+00:00'",
        "kind = 'grant'",
        "dataset = 'b'",
        "run = 'f'",
        "epsilon = 0.01",
        "delta = 0.0",
        "unit = 'client'",
        "relation = 'replace-one'",
        "purpose = 'another'",
        "event = '{}'",
        "event = x'00ff'",
        "draws = 4",
        "upto = 1",
        "by = 'nobody'",
        "note = 'new'",
        "composition = 'renyi'",
        "renyi_order = 2",
        "rdp = 0.5",
        "rdp = x'00'",
        "user = 'Ada'",
    ],
)
def test_an_edit_is_found(ledger: Ledger, path: Path, edit: str) -> None:
    filled(ledger)
    assert ledger.verify() == ledger.digest
    tamper(path, f"UPDATE entries SET {edit} WHERE seq = 3")
    with pytest.raises(LedgerError, match="entry 3 was changed"):
        ledger.verify()
    with pytest.raises(LedgerError, match="entry 3 was changed"):
        Ledger(path)


def test_every_field_is_covered_by_an_edit() -> None:
    marks = test_an_edit_is_found.pytestmark[0].args[1]
    edited = {edit.split(" = ")[0] for edit in marks}
    assert edited == set(store._FIELDS) - {"seq", "previous", "digest"}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("DELETE FROM entries WHERE seq = 3", "entry 3 is missing"),
        ("DELETE FROM entries WHERE seq = 1", "entry 1 is missing"),
        ("DELETE FROM entries WHERE seq = 5", "entry 5 is missing"),
        ("DELETE FROM entries WHERE seq >= 3", "entry 3 is missing"),
        ("DELETE FROM entries", "entry 1 is missing"),
        ("UPDATE entries SET seq = -3 WHERE seq = 3", "entry -3 is out of place"),
        ("UPDATE entries SET seq = 9 WHERE seq = 5", "entry 5 is missing"),
        ("UPDATE entries SET previous = digest WHERE seq = 4", "entry 4 was changed"),
        ("UPDATE entries SET digest = previous WHERE seq = 2", "entry 2 was changed"),
        ("DELETE FROM head", "the record of its last entry is missing"),
        ("UPDATE head SET seq = 4", "entry 5 is not the last one"),
        ("UPDATE head SET digest = 'x'", "entry 5 is not the last one"),
    ],
)
def test_a_removed_or_moved_entry_is_found(ledger: Ledger, path: Path, change: str, found: str) -> None:
    filled(ledger)
    tamper(path, change)
    with pytest.raises(LedgerError, match=found):
        ledger.verify()
    with pytest.raises(LedgerError, match=found):
        Ledger(path)


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM entries WHERE seq = 5",
        "UPDATE entries SET epsilon = 0 WHERE seq = 5",
        "DELETE FROM entries WHERE seq >= 4",
    ],
)
def test_nothing_is_paid_on_a_broken_chain(ledger: Ledger, path: Path, change: str) -> None:
    run = charge(filled(ledger), draws=9, lease=1).run
    tamper(path, "DELETE FROM entries WHERE seq = 6", "UPDATE head SET seq = 5, digest = 'x'")
    broken = [lambda: charge(ledger), lambda: ledger.balance("a"), lambda: ledger.resume(run)]
    for attempt in [*broken, lambda: ledger.digest, ledger.history]:
        with pytest.raises(LedgerError, match="was changed by somebody else: entry 6 is missing"):
            attempt()
    tamper(path, change)
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT count(*) FROM entries").fetchone()
    for attempt in broken:
        with pytest.raises(LedgerError, match="was changed by somebody else"):
            attempt()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM entries").fetchone() == rows


def test_an_edit_of_the_last_entry_is_found_by_an_open_ledger(ledger: Ledger, path: Path) -> None:
    filled(ledger)
    tamper(path, "UPDATE entries SET epsilon = 0.05 WHERE seq = 5")
    with pytest.raises(LedgerError, match="entry 5 was changed"):
        charge(ledger)


def test_an_entry_with_a_digest_of_its_own_does_not_fit_the_chain(ledger: Ledger, path: Path) -> None:
    entry = dataclasses.replace(filled(ledger).history()[2], epsilon=0.05)
    tamper(path, f"UPDATE entries SET epsilon = 0.05, digest = '{books._digest(entry)}' WHERE seq = 3")
    for attempt in (ledger.verify, lambda: Ledger(path)):
        with pytest.raises(LedgerError, match="entry 4 does not follow"):
            attempt()


def test_a_cut_tail_with_a_matching_head_is_found_by_a_kept_digest(ledger: Ledger, path: Path) -> None:
    filled(ledger)
    kept = ledger.digest
    early = ledger.history()[2].digest
    tamper(
        path,
        "DELETE FROM entries WHERE seq = 5",
        "UPDATE head SET seq = 4, digest = (SELECT digest FROM entries WHERE seq = 4)",
    )
    with pytest.raises(LedgerError, match="entry 5 is missing"):
        ledger.balance("a")
    fresh = Ledger(path)
    assert fresh.verify(early) == fresh.verify("0" * 64) == fresh.digest
    with pytest.raises(LedgerError, match="no entry with the digest"):
        fresh.verify(kept)


def test_a_rewritten_ledger_is_found_by_a_kept_digest(ledger: Ledger, tmp_path: Path) -> None:
    kept = filled(ledger).digest
    forged = Ledger(tmp_path / "forged.sqlite")
    forged.grant("a", Budget(1.0, 1e-4))
    filled(forged)
    forged.verify()
    with pytest.raises(LedgerError, match="no entry with the digest"):
        forged.verify(kept)


def test_an_older_copy_put_in_place_is_found_by_who_saw_more(ledger: Ledger, path: Path) -> None:
    older = path.read_bytes()
    filled(ledger)
    path.write_bytes(older)
    with pytest.raises(LedgerError, match="entry 5 is missing"):
        charge(ledger)


def test_a_chained_entry_without_sense_is_refused(ledger: Ledger, path: Path) -> None:
    known = books.Books("x")
    with closing(sqlite3.connect(path)) as connection:
        store._follow(connection, known)
        entry = known.next_entry(kind="refund", dataset="a", cost=cost(0.1))
        store._insert(connection, entry)
        connection.commit()
    with pytest.raises(LedgerError, match="entry 2 makes no sense"):
        ledger.balance("a")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET epsilon = 0",
        "DELETE FROM entries WHERE seq = 2",
        "DELETE FROM entries",
        "INSERT OR REPLACE INTO entries SELECT * FROM entries WHERE seq = 2",
        "INSERT INTO entries SELECT 99, at, kind, dataset, run, epsilon, delta, unit, relation, purpose, "
        "event, draws, upto, by, note, previous, digest, composition, renyi_order, rdp, user FROM entries WHERE seq = 2",
    ],
)
def test_the_file_itself_only_appends(ledger: Ledger, path: Path, statement: str) -> None:
    filled(ledger)
    before = ledger.history()
    with (
        closing(sqlite3.connect(path)) as connection,
        pytest.raises(sqlite3.IntegrityError, match="append-only"),
    ):
        connection.execute(statement)
    assert ledger.history() == before


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TRIGGER no_update",
        "CREATE TRIGGER silent BEFORE INSERT ON entries BEGIN SELECT RAISE(IGNORE); END",
        "CREATE TABLE more (x)",
    ],
)
def test_a_changed_schema_is_refused(ledger: Ledger, path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
    with pytest.raises(LedgerError, match="tables or triggers were changed"):
        charge(ledger)
    with pytest.raises(LedgerError, match="tables or triggers were changed"):
        Ledger(path)


def test_two_open_ledgers_see_each_other(ledger: Ledger, path: Path) -> None:
    other = Ledger(path)
    charge(ledger, 0.7)
    with pytest.raises(BudgetExhaustedError):
        charge(other, 0.4)
    charge(other, 0.3)
    assert ledger.balance("a").remaining_epsilon == 0.0
    assert ledger.digest == other.digest == Ledger(path).verify(ledger.digest)


# The file


def test_writes_are_synchronous_and_leave_one_file(ledger: Ledger, path: Path) -> None:
    with closing(ledger._store._connect(create=False)) as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert ledger.path == path
    assert ledger.is_durable


def test_in_memory_has_no_file() -> None:
    with Ledger.in_memory() as ledger:
        assert ledger.path is None
        assert not ledger.is_durable
        ledger.grant("a", Budget(1.0, 1e-4))
        assert charge(ledger, draws=2, lease=1).take() == 0


@pytest.mark.parametrize("durable", [True, False])
def test_a_closed_ledger_refuses(path: Path, durable: bool) -> None:
    with Ledger(path) if durable else Ledger.in_memory() as ledger:
        ledger.grant("a", Budget(1.0, 1e-4))
        made = charge(ledger, draws=2, lease=1)
        made.take()
    for attempt in (lambda: ledger.balance("a"), lambda: charge(ledger), made.take):
        with pytest.raises(LedgerError, match="closed"):
            attempt()


def test_existing_needs_a_ledger(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"no ledger at .*none\.sqlite.*`sfumato ledger grant`"):
        Ledger.existing(tmp_path / "none.sqlite")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty.sqlite").touch()
    with pytest.raises(LedgerError, match=r"empty\.sqlite is empty.*`sfumato ledger grant`"):
        Ledger.existing(tmp_path / "empty.sqlite")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"no folder to lie in. Fix: create .*nowhere first"):
        Ledger(tmp_path / "nowhere" / "l.sqlite")


def test_a_ledger_that_goes_missing_is_not_started_anew(ledger: Ledger, path: Path) -> None:
    path.unlink()
    with pytest.raises(LedgerError, match="is gone"):
        charge(ledger)
    assert not path.exists()


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to be read as one" * 20, b"x"])
def test_a_file_that_is_not_sqlite_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="is not an SQLite file"):
        Ledger(path)
    assert path.read_bytes() == content


def test_a_damaged_ledger_is_refused(ledger: Ledger, path: Path) -> None:
    for _ in range(9):
        charge(ledger)
    content = bytearray(path.read_bytes())
    assert len(content) > 3 * 4096
    content[4096:] = random.Random(0).randbytes(len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="damaged"):
        Ledger(path)
    with pytest.raises(LedgerError, match="damaged"):
        charge(ledger)


def test_a_foreign_sqlite_file_is_refused_and_left_alone(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE entries (seq INTEGER PRIMARY KEY)")
    content = path.read_bytes()
    for opener in (Ledger, Ledger.existing):
        with pytest.raises(LedgerError, match="SQLite file of another program"):
            opener(path)
    assert path.read_bytes() == content


def test_another_format_is_refused(ledger: Ledger, path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 3")
    with pytest.raises(LedgerError, match=r"has format 3, but this sfumato reads up to 2\. Fix: use the sfumato that"):
        Ledger(path)


FIRST_FORMAT = (
    "at", "kind", "dataset", "run", "epsilon", "delta", "unit", "relation", "purpose", "event", "draws", "upto", "by",
    "note", "previous", "seq",
)  # fmt: skip


def write_first_format(path: Path) -> str:
    """Write a ledger as the first format had it, digests included; return the digest of its last entry."""
    common = {"at": "2026-01-01T00:00:00.000000+00:00", "dataset": "a", "unit": "record", "by": "Ada", "note": ""}
    common |= {"relation": "add-or-remove-one"}
    grant = common | {"kind": "grant", "epsilon": 1.0, "delta": 1e-4, "run": "", "purpose": "", "event": ""}
    charge = common | {"kind": "charge", "epsilon": 0.25, "delta": 1e-5, "run": "f" * 32, "purpose": "p", "event": "{}"}
    digest = books.GENESIS
    with closing(sqlite3.connect(path)) as connection:
        for statement in (*store._SCHEMA_1, *store._MARKS, "PRAGMA user_version = 1"):
            connection.execute(statement)
        for seq, entry in enumerate((grant | {"draws": 0, "upto": 0}, charge | {"draws": 5, "upto": 5}), start=1):
            whole = entry | {"seq": seq, "previous": digest}
            assert set(whole) == set(FIRST_FORMAT)
            digest = hashlib.sha256(json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
            row = whole | {"digest": digest}
            names = ", ".join(row)
            connection.execute(f"INSERT INTO entries ({names}) VALUES ({', '.join('?' * len(row))})", [*row.values()])
            connection.execute("UPDATE head SET seq = ?, digest = ?", (seq, digest))
        connection.commit()
    return digest


def test_the_first_format_is_upgraded_and_every_kept_digest_stays_good(path: Path) -> None:
    kept = write_first_format(path)
    with Ledger.existing(path) as ledger:
        assert ledger.verify(kept) == ledger.digest == kept
        balance = ledger.balance("a")
        assert (balance.spent_epsilon, balance.remaining_epsilon, balance.composition) == (0.25, 0.75, "basic")
        charge(ledger, 0.75)
        ledger.grant("b", Budget(1.0, 1e-5), composition="renyi")
    assert Ledger(path).verify(kept) != kept
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (2,)


def test_two_processes_upgrade_one_file(path: Path) -> None:
    write_first_format(path)
    workers = [worker("many", path, 5) for _ in range(3)]
    assert [process.communicate()[1] for process in workers] == [""] * 3
    assert Ledger.existing(path).balance("a").spent_epsilon == 0.4


def test_an_edit_of_the_first_format_is_found(path: Path) -> None:
    write_first_format(path)
    tamper(path, "UPDATE entries SET epsilon = 0.1 WHERE seq = 2")
    with pytest.raises(LedgerError, match="entry 2 was changed"):
        Ledger(path)


def test_a_changed_schema_of_the_first_format_is_refused(path: Path) -> None:
    write_first_format(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER no_update")
    with pytest.raises(LedgerError, match="tables or triggers were changed"):
        Ledger(path)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)


def test_a_locked_ledger_gives_up_with_a_sentence(ledger: Ledger, path: Path) -> None:
    patient = Ledger(path, timeout=0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match=r"locked by another process for longer than 0\.05 s. Fix: wait"):
            charge(patient)
        assert patient.balance("a").spent_epsilon == 0.0
        connection.execute("ROLLBACK")
    charge(patient)


def test_a_file_that_is_busy_while_it_is_opened_is_tried_again(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two processes that create one ledger at once: SQLite does not wait, but refuses one of them at once.
    really_prepare = store.Store._prepare
    refusals = [sqlite3.OperationalError("database is locked") for _ in range(3)]
    for refusal in refusals:
        refusal.sqlite_errorcode = sqlite3.SQLITE_BUSY_RECOVERY

    def prepare(self: store.Store, connection: sqlite3.Connection, *, create: bool) -> None:
        if refusals:
            raise refusals.pop()
        really_prepare(self, connection, create=create)

    monkeypatch.setattr(store.Store, "_prepare", prepare)
    assert Ledger(path).datasets() == ["a"]
    refusals.append(sqlite3.OperationalError("disk I/O error"))
    with pytest.raises(LedgerError, match="disk I/O error"):
        Ledger(path)


def test_a_read_only_ledger_is_refused(ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_connect = sqlite3.connect

    def read_only(address: str, **more: object) -> sqlite3.Connection:
        connection = really_connect(address, **more)
        connection.execute("PRAGMA query_only = 1")
        return connection

    made = charge(ledger, draws=2, lease=1)
    made.take()
    before = ledger.history()
    with monkeypatch.context() as patch:
        patch.setattr(store.sqlite3, "connect", read_only)
        with pytest.raises(LedgerError, match=r"cannot be written .*Fix: make the file"):
            charge(ledger)
        with pytest.raises(LedgerError, match="cannot be written"):
            made.take()
        with pytest.raises(LedgerError, match="cannot be written"):
            Ledger(path.with_name("new.sqlite"))
    assert ledger.history() == before


def test_a_folder_is_not_a_ledger(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot be written"):
        Ledger(tmp_path)


@pytest.mark.parametrize("timeout", [0.0, math.nan, math.inf])
def test_a_timeout_is_finite(path: Path, timeout: float) -> None:
    with pytest.raises(InputError, match="timeout"):
        Ledger(path, timeout=timeout)


# More than one process


def test_two_processes_race_for_the_last_of_the_budget(path: Path) -> None:
    racers = [worker("race", path) for _ in range(2)]  # both create the file, too
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2
    with Ledger.existing(path) as ledger:
        for round_ in range(15):
            dataset = f"round {round_}"
            ledger.grant(dataset, Budget(0.3, 1e-4))
            ledger.charge(dataset, purpose="p", event="{}", cost=cost(0.2), draws=1)
            for racer in racers:
                racer.stdin.write(f"{dataset}\n")
            for racer in racers:
                racer.stdin.flush()
            assert sorted(racer.stdout.readline() for racer in racers) == ["charged\n", "refused\n"]
            assert ledger.balance(dataset).spent_epsilon == 0.3
        ledger.verify()
    for racer in racers:
        assert racer.communicate() == ("", "")
        assert racer.returncode == 0


def test_a_forked_child_has_no_permission(path: Path) -> None:
    out, err = worker("fork", path).communicate()
    assert err == ""
    answers = json.loads(out)
    assert answers["take"].startswith("LedgerError: Run ")
    assert "forked child" in answers["take"]
    assert answers["pause"].startswith("LedgerError: Run ")
    assert answers["memory"].startswith("LedgerError: The in-memory ledger belongs to another process")
    assert answers["pickle"].startswith("TypeError")
    assert answers["file"] == "'a'"
    assert answers["parent"] == "1"
    assert answers["spent"] == 0.2


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are listed on Linux only")
def test_a_fork_waits_until_no_file_is_open(path: Path) -> None:
    assert worker("fork-in-a-transaction", path).communicate() == ("True 0\n", "")


def test_forked_children_and_their_parent_lose_no_charge(path: Path) -> None:
    process = worker("family", path, 15)
    out, err = process.communicate()
    assert (err, process.returncode) == ("", 0)
    with Ledger.existing(path) as ledger:
        runs = sorted(entry.run for entry in ledger.history() if entry.kind == "charge")
        assert runs == sorted(out.split())
        assert len(runs) == 135
        assert ledger.balance("a").spent_epsilon == 1.35
