"""Many processes on one ledger, and processes that are killed while they spend."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from sfumato.privacy import renyi, store
from sfumato.privacy.books import Cost
from sfumato.privacy.budget import Budget, Relation, Unit
from sfumato.privacy.exact import exact
from sfumato.privacy.ledger import Ledger

WORKER = Path(__file__).with_name("ledger_worker.py")
SOURCE = Path(store.__file__).parents[1]
DEADLOCK = 300  # seconds after which a test gives up on a process that should long be done
NOISE = 30.0


def worker(command: str, path: Path, *more: object) -> subprocess.Popen[str]:
    line = [sys.executable, str(WORKER), str(SOURCE), command, str(path), *map(str, more)]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


# Eight processes


def test_eight_processes_spend_a_basic_cap_to_the_last_cent(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.grant("a", Budget(2.0, 1e-4))
    answers: list[str] = []
    for process in [worker("drain", path, 40) for _ in range(8)]:
        out, err = process.communicate(timeout=DEADLOCK)
        assert (err, process.returncode) == ("", 0)
        answers += out.splitlines()
    charged = sorted(answer for answer in answers if answer != "refused")
    assert len(charged) == 200
    assert len(answers) == 320
    with Ledger.existing(path) as ledger:
        entries = ledger.history()
        balance = ledger.balance("a")
        ledger.verify()
    assert charged == sorted(f"{entry.run} 0 1" for entry in entries if entry.kind == "charge")
    assert sum(entry.kind == "lease" for entry in entries) == 200
    assert (balance.spent_epsilon, balance.remaining_epsilon) == (2.0, 0.0)


def test_eight_processes_never_pass_a_renyi_cap(path: Path) -> None:
    cap = Budget(4.0, 1e-5)
    with Ledger(path) as ledger:
        ledger.grant("a", cap, composition="renyi")
        order = ledger.balance("a").order
        limit = exact(renyi.cap(order, 4.0, 1e-5))
        ledger.grant("a", Budget(3.6, 1e-5), user="user 0")
    process = worker("drain-renyi", path, order, 25)
    out, err = process.communicate(timeout=DEADLOCK)
    assert (err, process.returncode) == ("", 0)
    answers = out.splitlines()
    assert len(answers) == 200
    assert "refused" in answers
    with Ledger.existing(path) as ledger:
        entries = ledger.history()
        spent, share = ledger.balance("a").spent_rdp, ledger.balance("a", "user 0").spent_rdp
    runs = {entry.run: entry for entry in entries if entry.kind == "charge"}
    assert sorted(answer.split()[0] for answer in answers if answer != "refused") == sorted(runs)
    total, user = Fraction(0), Fraction(0)
    for entry in entries:
        change = exact(entry.rdp) - (exact(runs[entry.run].rdp) if entry.kind == "settle" else 0)
        if entry.kind in ("charge", "settle"):
            total += change
            user += change if runs[entry.run].by == "user 0" else 0
            assert 0 <= total <= limit
            assert user <= exact(renyi.cap(order, 3.6, 1e-5))
    assert (total, user) == (exact(spent), exact(share))
    # What was refused did not fit: less than one charge is left, to everybody or to the user.
    assert limit - total < exact(0.05) + exact(0.03) * 8


# Kill -9


def check_nothing_is_unpaid(path: Path, target: Path, noise: float) -> int:
    """Compare the ledger, read anew, with the releases; return how many there are."""
    lines = target.read_text().splitlines() if target.exists() else []
    released = Counter((run, int(index)) for run, index in map(str.split, lines))
    with Ledger.existing(path) as ledger:
        entries, balance = ledger.history("a"), ledger.balance("a")
    handed_out = {entry.run: entry.upto for entry in entries if entry.kind != "grant"}
    charges = [entry for entry in entries if entry.kind == "charge"]
    assert not released or max(released.values()) == 1
    assert {run for run, _ in released} <= {entry.run for entry in charges}
    assert all(index < handed_out[run] for run, index in released)
    if noise:
        assert balance.order is not None
        one = Fraction(balance.order) / (2 * exact(noise) ** 2)
        assert exact(balance.spent_rdp) >= len(released) * one
    else:
        assert exact(balance.spent_epsilon) == len(charges) * exact(0.001)
    return len(released)


def kill_while_spending(folder: Path, ledgers: int, kills: int, noise: float) -> list[int]:
    """Kill a spender `kills` times on each ledger at random moments, check after each; return how much was released."""
    chance = random.Random(7)
    process = worker("nursery", folder / "unused.sqlite", noise)
    counts = [0] * ledgers
    for number in range(ledgers):
        path, target = folder / f"{number}.sqlite", folder / f"{number}.txt"
        with Ledger(path) as ledger:
            ledger.grant("a", Budget(50.0, 1e-4), composition="renyi" if noise else "basic")
        for _ in range(kills):
            process.stdin.write(json.dumps([str(path), str(target)]) + "\n")
            process.stdin.flush()
            born, name = process.stdout.readline().split()
            assert born == "born"
            for _ in range(chance.randint(0, 3)):
                assert process.stdout.readline() == "released\n", process.stderr.read()
            time.sleep(chance.uniform(0, 0.008))  # so that the kill may fall between any two instructions
            os.kill(int(name), signal.SIGKILL)
            while not (line := process.stdout.readline()).startswith("dead"):
                assert line == "released\n"
            assert line == f"dead {int(signal.SIGKILL)}\n"
            counts[number] = check_nothing_is_unpaid(path, target, noise)
    assert process.communicate(timeout=DEADLOCK) == ("", "")
    return counts


@pytest.mark.parametrize("noise", [0.0, NOISE], ids=["basic", "renyi"])
def test_killed_at_any_moment_nothing_released_is_unpaid(tmp_path: Path, noise: float) -> None:
    (released,) = kill_while_spending(tmp_path, 1, 20, noise)
    assert released >= 10
    with Ledger.existing(tmp_path / "0.sqlite") as ledger:
        ledger.verify()
        assert ledger.balance("a").remaining_epsilon > 0


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, NOISE], ids=["basic", "renyi"])
def test_a_thousand_kills_leave_nothing_unpaid(tmp_path: Path, noise: float) -> None:
    # 500 of each composition. Each ledger is read whole after each kill, so a fresh one takes over from time to time.
    assert sum(kill_while_spending(tmp_path, 25, 20, noise)) >= 500


def test_a_release_before_its_charge_would_be_found(tmp_path: Path) -> None:
    # The check above can fail: a draw that was released and never handed out.
    path, target = tmp_path / "l.sqlite", tmp_path / "l.txt"
    with Ledger(path) as ledger:
        ledger.grant("a", Budget(50.0, 1e-4))
        cost = Cost(0.001, 0.0, Unit.RECORD, Relation.ADD_OR_REMOVE_ONE)
        run = ledger.charge("a", purpose="p", event="{}", cost=cost, draws=8, lease=3).run
    for line, bad in ((f"{run} 2\n", False), (f"{run} 3\n", True), (f"{'f' * 32} 0\n", True), (f"{run} 2\n" * 2, True)):
        target.write_text(line)
        if bad:
            with pytest.raises(AssertionError):
                check_nothing_is_unpaid(path, target, 0.0)
        else:
            assert check_nothing_is_unpaid(path, target, 0.0) == 1
