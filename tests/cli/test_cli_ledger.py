"""`sfumato ledger` over time: Renyi composition, users, purposes, JSON and exports."""

from __future__ import annotations

import csv
import io
import json

import pytest

from sfumato import Budget, Ledger, Relation, Unit
from sfumato.privacy import events, renyi
from sfumato.privacy.books import Cost

CAP = ["--epsilon", "2", "--delta", "1e-5"]
ORDER = renyi.order_for(2.0, 1e-5)
COST = Cost(0.5, 1e-6, Unit.RECORD, Relation.ADD_OR_REMOVE_ONE)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def filled(path):
    """A ledger with a Renyi and a basic data set, three charges, a settle and a user's cap."""
    with Ledger(path) as ledger:
        ledger.grant("heart", Budget(2.0, 1e-5), composition="renyi", note='first, "study"')
        ledger.grant("heart", Budget(1.6, 1e-5), user="alice", by="officer")
        event = events.to_json(events.repeated(events.gaussian(20.0), 10))
        run = ledger.charge("heart", purpose="training", event=event, cost=COST, draws=10, by="alice")
        run.take()
        run.settle(events.to_json(events.gaussian(20.0)))
        ledger.charge("heart", purpose="evaluation", event=event, cost=COST, draws=10, by="bob")
        ledger.grant("lungs", Budget(1.0, 1e-5))
        ledger.charge("lungs", purpose="training", event="{}", cost=COST, draws=1, by="bob")
    return str(path)


def test_a_renyi_grant_says_its_order_and_a_later_one_keeps_it(command, refused, path):
    grant = ["ledger", "grant", str(path), "heart"]
    first = command(*grant, *CAP, "--composition", "renyi")
    assert first.exit_code == 0, first.output
    told = f"Set the cap of heart to (2, 1e-05) per record, add-or-remove-one, Renyi composition at order {ORDER}"
    assert first.stdout == f"{told}.\n"
    more = command(*grant, "--epsilon", "4", "--delta", "1e-5").stdout
    assert more.endswith(f"at order {ORDER} (it was (2, 1e-05) per record, add-or-remove-one).\n")
    assert "never changes" in refused(command(*grant, *CAP, "--composition", "basic"))
    assert "never changes" in refused(command(*grant, *CAP, "--order", str(ORDER + 1)))
    assert 'choose "basic" or "renyi"' in refused(command(*grant, *CAP, "--composition", "rdp"))
    other = command("ledger", "grant", str(path), "lungs", *CAP, "--composition", "renyi", "--order", "7")
    assert "at order 7." in other.stdout


def test_a_user_gets_a_share_of_what_is_granted(command, refused, path):
    share = ["ledger", "grant", str(path), "heart", "--epsilon", "1", "--delta", "1e-5", "--user", "alice"]
    assert "There is no ledger" in refused(command(*share))
    assert not path.exists()
    command("ledger", "grant", str(path), "lungs", *CAP)
    assert 'no budget for data set "heart"' in refused(command(*share))
    command("ledger", "grant", str(path), "heart", *CAP)
    assert command(*share).stdout == "Set the cap of alice on heart to (1, 1e-05) per record, add-or-remove-one.\n"
    again = command(*share).stdout
    assert again.endswith("(it was (1, 1e-05) per record, add-or-remove-one).\n")


def cells(line):
    return [cell.strip() for cell in line.split("│")[1:-1]]


def test_show_has_a_bar_for_each_purpose_and_user(command, filled):
    rows = [cells(line) for line in command("ledger", "show", filled).stdout.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["heart", "evaluation", "training", "user alice", "lungs", "training"]
    assert (rows[0][-2], rows[4][-2]) == (f"renyi, order {ORDER}", "basic")
    assert [row[-1] for row in rows[1:3]] == ["1 run", "1 run"]
    assert rows[1][2].startswith("divergence ")
    assert rows[3][-1] == "(1.6, 1e-05)"
    assert rows[4][2:6] == ["0.5", "0.5", "10⁻⁶", "9 × 10⁻⁶"]
    assert rows[5][2] == "0.5"
    lengths = [len(row[1].rstrip("╺")) for row in rows]
    assert lengths[1] > lengths[2]
    assert "lungs" not in command("ledger", "show", filled, "heart").stdout


def test_show_as_json_is_the_balance(command, filled):
    heart, lungs = json.loads(command("ledger", "show", filled, "--json").stdout)
    with Ledger.existing(filled) as ledger:
        balance = ledger.balance("heart")
    assert heart["spent_epsilon"] == balance.spent_epsilon
    assert (heart["composition"], heart["order"], heart["cap"]["epsilon"]) == ("renyi", ORDER, 2.0)
    assert [one["purpose"] for one in heart["purposes"]] == ["evaluation", "training"]
    assert sum(one["amount"] for one in heart["purposes"]) == pytest.approx(heart["spent_rdp"])
    assert [one["user"] for one in heart["users"]] == ["alice"]
    assert (lungs["composition"], lungs["order"], lungs["users"]) == ("basic", None, [])
    assert lungs["purposes"] == [{"purpose": "training", "runs": 1, "amount": 0.5, "share": 0.5}]


def test_a_bar_is_never_longer_than_full(command, filled):
    command("ledger", "grant", filled, "heart", "--epsilon", "1.25", "--delta", "1e-5")
    shown = command("ledger", "show", filled, "heart")
    assert shown.exit_code == 0
    assert cells(next(line for line in shown.stdout.splitlines() if "heart " in line))[3] == "0"


def test_history_shows_divergences_where_there_are_any(command, filled):
    told = command("ledger", "history", filled, "heart").stdout
    assert "divergence" in told
    assert "grant to alice" in told
    (settle,) = [line for line in told.splitlines() if "settle" in line]
    assert renyi.cost(events.gaussian(20.0), ORDER) == 0.01
    assert " 0.01 " in settle
    assert "divergence" not in command("ledger", "history", filled, "lungs").stdout


def test_history_as_json_and_the_export_hold_every_field(command, filled, tmp_path):
    with Ledger.existing(filled) as ledger:
        entries = [vars(entry) for entry in ledger.history()]
    assert json.loads(command("ledger", "history", filled, "--json").stdout) == entries
    exported = command("ledger", "export", filled).stdout
    assert [json.loads(line) for line in exported.splitlines()] == entries
    table = list(csv.DictReader(io.StringIO(command("ledger", "export", filled, "--format", "csv").stdout)))
    assert [{name: str(value) for name, value in entry.items()} for entry in entries] == table
    out = tmp_path / "heart.csv"
    told = command("ledger", "export", filled, "heart", "--format", "csv", "--out", str(out)).stdout
    assert told == f"Wrote 5 entries to {out}.\n"
    assert len(list(csv.DictReader(io.StringIO(out.read_text())))) == 5


def test_an_export_writes_over_nothing(command, refused, filled, tmp_path):
    with Ledger.existing(filled) as ledger:
        before = ledger.digest
    assert "is there already" in refused(command("ledger", "export", filled, "--out", filled))
    assert "cannot be written" in refused(command("ledger", "export", filled, "--out", str(tmp_path / "no" / "file")))
    assert "choose jsonl or csv" in refused(command("ledger", "export", filled, "--format", "xml"))
    assert "There is no ledger" in refused(command("ledger", "export", str(tmp_path / "none.db")))
    with Ledger.existing(filled) as ledger:
        assert ledger.verify() == before


def test_verify_as_json(command, filled):
    with Ledger.existing(filled) as ledger:
        digest = ledger.digest
    assert json.loads(command("ledger", "verify", filled, "--json").stdout) == {"whole": True, "digest": digest}
