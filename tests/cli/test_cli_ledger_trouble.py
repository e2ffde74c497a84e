"""A ledger that cannot be used: one line, exit code 2, nothing charged and nothing half-written."""

from __future__ import annotations

import sqlite3
import subprocess
import sys

import pytest

from sfumato import Budget, Ledger
from sfumato.privacy import store

HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.readline()
"""
CAP = ["--epsilon", "4", "--delta", "1e-3"]


@pytest.fixture
def shared(study):
    """The path of a ledger that can pay for the study, and that the study names."""
    path = study.folder / "shared.db"
    with Ledger(path) as ledger:
        ledger.grant("clinics", Budget(3.0, 1e-3))
    study.config["ledger"] = {"path": "shared.db", "dataset": "clinics"}
    return path


def entries(path):
    with Ledger.existing(path) as ledger:
        return [entry.kind for entry in ledger.history()]


def test_a_ledger_that_another_process_holds_is_refused(study, shared, command, refused, monkeypatch):
    monkeypatch.setitem(Ledger.existing.__func__.__kwdefaults__, "timeout", 0.2)
    monkeypatch.setitem(Ledger.__init__.__kwdefaults__, "timeout", 0.2)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(shared)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        try:
            assert "is locked by another process" in refused(study.train())
            assert "is locked by another process" in refused(command("ledger", "grant", str(shared), "clinics", *CAP))
            assert command("ledger", "show", str(shared)).exit_code == 0
        finally:
            holder.communicate("\n")
    assert not study.out.exists()
    assert entries(shared) == ["grant"]
    assert study.train().exit_code == 0


def test_a_read_only_ledger_is_refused(study, shared, command, refused, monkeypatch):
    really_connect = sqlite3.connect

    # What a file without the right to write does; the rights themselves would not stop the superuser.
    def read_only(address, **more):
        connection = really_connect(address, **more)
        connection.execute("PRAGMA query_only = 1")
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(store.sqlite3, "connect", read_only)
        assert "cannot be written" in refused(study.train())
        assert "cannot be written" in refused(command("ledger", "grant", str(shared), "clinics", *CAP))
    assert not study.out.exists()
    assert entries(shared) == ["grant"]


@pytest.mark.parametrize("damage", ["another file", "cut short", "empty"])
def test_a_corrupt_ledger_is_refused(study, shared, command, refused, damage):
    whole = shared.read_bytes()
    shared.write_bytes(
        {"another file": b"not a ledger" * 100, "cut short": whole[: len(whole) // 2], "empty": b""}[damage]
    )
    damaged = shared.read_bytes()
    for beside in shared.parent.glob("shared.db-*"):
        beside.unlink()
    assert "shared.db" in refused(study.train())
    for verb in ("show", "history", "verify"):
        assert "shared.db" in refused(command("ledger", verb, str(shared)))
    assert not study.out.exists()
    assert shared.read_bytes() == damaged


def test_a_folder_that_cannot_be_made_is_refused(study, refused):
    (study.folder / "file").write_text("in the way")
    study.out = study.folder / "file" / "out"
    assert "choose another folder with --out" in refused(study.train())
