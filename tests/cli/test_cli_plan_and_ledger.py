"""`sfumato plan` and `sfumato ledger`."""

from __future__ import annotations

import json
import re
import sqlite3

import pytest

from sfumato import Budget, Ledger, Relation, Unit
from sfumato.privacy.books import Cost

PLAN = ["plan", "--epsilon", "2", "--delta", "1e-5", "--population", "1000", "--batch-size", "100"]
CAP = ["--epsilon", "2", "--delta", "1e-5"]


def test_plan_prints_json_that_keeps_the_budget(command):
    answer = command(*PLAN, "--steps", "20", "--json")
    assert answer.exit_code == 0, answer.output
    plan = json.loads(answer.stdout)
    assert set(plan) == {"noise_multiplier", "epsilon", "accountants", "seconds"}
    assert set(plan["accountants"]) == {"pld", "rdp"}
    assert 1.9 < plan["epsilon"] <= 2
    assert plan["epsilon"] == plan["accountants"]["pld"] <= plan["accountants"]["rdp"]
    assert plan["noise_multiplier"] > 0


def test_epochs_stand_for_steps_and_sampling_matters(command):
    by_steps = json.loads(command(*PLAN, "--steps", "20", "--json").stdout)
    by_epochs = json.loads(command(*PLAN, "--epochs", "2", "--json").stdout)
    shuffled = json.loads(command(*PLAN, "--steps", "20", "--sampling", "shuffled", "--json").stdout)
    assert by_steps["noise_multiplier"] == by_epochs["noise_multiplier"]
    assert shuffled["noise_multiplier"] > by_steps["noise_multiplier"]


def test_plan_knows_units_that_keep_apart(command):
    apart = ["--steps", "32", "--sampling", "min-separation", "--unit", "client", "--json"]
    noise = {
        words: json.loads(command(*PLAN, *apart, *words).stdout)["noise_multiplier"]
        for words in (("--separation", "2"), ("--separation", "8"), ("--separation", "2", "--participations", "4"))
    }
    sixteen, four, capped = noise.values()
    assert sixteen == pytest.approx(2 * four, rel=1e-3)  # times at most: the noise grows with their root
    assert capped == four
    refused = command(*PLAN, *apart)
    assert refused.exit_code == 2
    assert "separation has to be given" in refused.stderr


def test_plan_for_people_lists_the_steps(command):
    told = command(*PLAN, "--steps", "16").stdout
    assert "Noise multiplier" in told
    assert "PLD" in told
    assert "RDP" in told
    assert [line for line in told.splitlines() if "16" in line.split()[1:2]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--epsilon", "0"], "epsilon"),
        (["--epsilon", "nan"], "epsilon"),
        (["--epsilon", "inf"], "finite"),
        (["--delta", "0.01"], "1/1000"),
        (["--delta", "nan"], "delta"),
        (["--sampling", "poison"], "poisson"),
        (["--unit", "recrd"], 'choose "record" or "client"'),
        (["--batch-size", "1001"], "batch_size"),
        (["--epochs", "1"], "only one"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_line(command, refused, change, words):
    assert words in refused(command(*PLAN, "--steps", "20", *change))


def test_grant_show_history_and_verify_agree(command, tmp_path):
    path = str(tmp_path / "ledger.sqlite")
    granted = command("ledger", "grant", path, "heart", *CAP, "--by", "ada", "--note", "first study")
    assert granted.exit_code == 0, granted.output
    assert granted.stdout == "Set the cap of heart to (2, 1e-05) per record, add-or-remove-one.\n"
    command("ledger", "grant", path, "lungs", "--epsilon", "5", "--delta", "1e-6", "--unit", "client")
    shown = command("ledger", "show", path).stdout
    assert "heart" in shown
    assert "lungs" in shown
    assert "(5, 1e-06) per client" in shown
    assert "lungs" not in command("ledger", "show", path, "heart").stdout
    told = command("ledger", "history", path, "heart").stdout
    assert "ada" in told
    assert "first study" in told
    assert "lungs" not in told
    (line,) = [line for line in told.splitlines() if "ada" in line]
    assert re.search(r" \d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line.replace("│", " ")), line
    digest = command("ledger", "verify", path).stdout.split()[-1]
    assert len(digest) == 64
    assert command("ledger", "verify", path, "--digest", digest).exit_code == 0


def test_a_second_grant_tells_what_the_cap_was(command, tmp_path):
    path = str(tmp_path / "ledger.sqlite")
    command("ledger", "grant", path, "oncology", *CAP)
    told = command("ledger", "grant", path, "oncology", "--epsilon", "4", "--delta", "1e-5").stdout
    assert told == (
        "Set the cap of oncology to (4, 1e-05) per record, add-or-remove-one "
        "(it was (2, 1e-05) per record, add-or-remove-one).\n"
    )


def test_what_is_spent_is_rounded_up_and_what_is_left_down(command, tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.grant("heart", Budget(2.0, 1e-2))
        cost = Cost(1.000012, 1.00001e-3, Unit.RECORD, Relation.ADD_OR_REMOVE_ONE)
        ledger.charge("heart", purpose="one", event="{}", cost=cost, draws=1)
    shown = command("ledger", "show", str(path)).stdout
    for text in ("1.001", "0.9999", "0.001001", "0.008999"):
        assert f" {text} " in shown
    charged = [line for line in command("ledger", "history", str(path)).stdout.splitlines() if "charge" in line]
    assert " 1.001 " in charged[0]
    assert " 0.001001 " in charged[0]


def test_no_printed_cost_of_a_plan_is_below_the_exact_one(command):
    exact = json.loads(command(*PLAN, "--steps", "20", "--json").stdout)
    told = command(*PLAN, "--steps", "20").stdout
    numbers = re.search(r"Epsilon: (\S+) by PLD \(the claim\), (\S+) by RDP", told)
    pld, rdp = map(float, numbers.groups())
    assert exact["accountants"]["pld"] <= pld <= exact["accountants"]["pld"] * 1.001
    assert exact["accountants"]["rdp"] <= rdp <= exact["accountants"]["rdp"] * 1.001
    last = float(told.splitlines()[-2].split("│")[2])
    assert exact["epsilon"] <= last <= exact["epsilon"] * 1.001


def test_tables_are_as_wide_as_columns_says(command, tmp_path, monkeypatch):
    path = str(tmp_path / "ledger.sqlite")
    command("ledger", "grant", path, "heart", *CAP, "--note", "first study")
    monkeypatch.delenv("COLUMNS", raising=False)
    assert max(map(len, command("ledger", "history", path).stdout.splitlines())) > 80
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, command("ledger", "history", path).stdout.splitlines())) == 60


def test_verify_refuses_a_foreign_digest_and_a_changed_entry(command, refused, tmp_path):
    path = tmp_path / "ledger.sqlite"
    command("ledger", "grant", str(path), "heart", *CAP)
    assert "digest" in refused(command("ledger", "verify", str(path), "--digest", "0" * 63 + "1"))
    with sqlite3.connect(path) as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute("UPDATE entries SET epsilon = 9 WHERE seq = 1")
    connection.close()
    refused(command("ledger", "verify", str(path)))


def test_a_refused_grant_leaves_no_file(command, refused, tmp_path):
    path = tmp_path / "ledger.sqlite"
    for epsilon in ("0", "nan", "inf"):
        refused(command("ledger", "grant", str(path), "heart", "--epsilon", epsilon, "--delta", "1e-5"))
    assert not path.exists()


@pytest.mark.parametrize("verb", ["show", "history", "verify"])
def test_a_missing_ledger_is_not_made(command, refused, tmp_path, verb):
    assert "There is no ledger" in refused(command("ledger", verb, str(tmp_path / "none.db")))
    assert not (tmp_path / "none.db").exists()
