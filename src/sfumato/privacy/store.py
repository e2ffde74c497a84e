"""One SQLite file under the books: its tables and marks, connecting, transactions, forks, and errors as sentences."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import final

from sfumato import _checks
from sfumato.errors import LedgerError
from sfumato.privacy.books import GENESIS, RESTORE, Books, Entry

_LOWEST = -(2**63)  # of all row numbers: the whole chain is read from here, so that no row can hide
_VERSION = 2
_APPLICATION = int.from_bytes(b"sfum")
_FIELDS = tuple(field.name for field in dataclasses.fields(Entry))

_ENTRIES = (
    "CREATE TABLE entries (seq INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, kind TEXT NOT NULL, "
    "dataset TEXT NOT NULL, run TEXT NOT NULL, epsilon REAL NOT NULL, delta REAL NOT NULL, "
    "unit TEXT NOT NULL, relation TEXT NOT NULL, purpose TEXT NOT NULL, event TEXT NOT NULL, "
    "draws INTEGER NOT NULL, upto INTEGER NOT NULL, by TEXT NOT NULL, note TEXT NOT NULL, "
    "previous TEXT NOT NULL, digest TEXT NOT NULL)"
)
_SINCE_VERSION_2 = (
    "composition TEXT NOT NULL DEFAULT 'basic'",
    "renyi_order INTEGER NOT NULL DEFAULT 0",
    "rdp REAL NOT NULL DEFAULT 0",
    "user TEXT NOT NULL DEFAULT ''",
)
_AROUND_ENTRIES = (
    "CREATE TABLE head (only INTEGER PRIMARY KEY CHECK (only = 1), seq INTEGER NOT NULL, digest TEXT NOT NULL)",
    "CREATE TRIGGER no_update BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER no_delete BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    # INSERT OR REPLACE deletes without asking no_delete.
    "CREATE TRIGGER no_replace BEFORE INSERT ON entries WHEN NEW.seq IS NOT (SELECT seq + 1 FROM head) "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
)
# Written as SQLite writes it when columns are added to a table: an upgraded file reads like a new one.
_SCHEMA = (", ".join([_ENTRIES[:-1], *_SINCE_VERSION_2]) + ")", *_AROUND_ENTRIES)
_SCHEMA_1 = (_ENTRIES, *_AROUND_ENTRIES)
_UPGRADE = (
    *(f"ALTER TABLE entries ADD COLUMN {column}" for column in _SINCE_VERSION_2),
    f"PRAGMA user_version = {_VERSION}",
)
_MARKS = (
    f"INSERT INTO head VALUES (1, 0, '{GENESIS}')",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
)
_READ_SCHEMA = "SELECT sql FROM sqlite_master WHERE name NOT LIKE 'sqlite~_%' ESCAPE '~'"

# One transaction at a time in this process. A fork waits for it, so that no child inherits an open file:
# there SQLite would count on locks which only the parent holds, and could lose what the child writes.
_ONE_AT_A_TIME = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_ONE_AT_A_TIME.acquire,
        after_in_parent=_ONE_AT_A_TIME.release,
        after_in_child=_ONE_AT_A_TIME.release,
    )


@final
class Store:
    """The entries of one ledger on disk, or in memory if `path` is None, and the books that follow them.

    Args:
        path: The file; its folder must exist.
        timeout: Seconds to wait for another process that is writing.
        create: Whether to make the file if it is missing or empty.

    Raises:
        InputError: the timeout is out of range.
        LedgerError: the file is missing, locked, read-only, damaged, changed, or no ledger.
    """

    def __init__(self, path: Path | None, timeout: float, *, create: bool) -> None:
        self._timeout = _checks.positive("timeout", timeout)
        self.path = None if path is None else path.absolute()
        self.where = "The in-memory ledger" if path is None else f"The ledger {path}"
        self._closed = False
        self._pid = os.getpid()
        self._memory: sqlite3.Connection | None = None
        self.books = Books(self.where)
        if self.path is not None and not self.path.parent.is_dir():
            raise LedgerError(f"{self.where} has no folder to lie in. Fix: create {self.path.parent} first.")
        with _ONE_AT_A_TIME, self._sentences():
            if self.path is None:
                self._memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
                weakref.finalize(self, self._memory.close)
                self._prepare(self._memory, create=True)
            else:
                self._connect(create=create).close()
        with self.transaction():  # reads, and so verifies, every entry
            pass

    def close(self) -> None:
        """Refuse all further work."""
        self._closed = True
        if self._memory is not None:
            self._memory.close()

    @contextmanager
    def transaction(
        self, *, write: bool = False, verify: Books | None = None
    ) -> Iterator[tuple[sqlite3.Connection, list[Entry]]]:
        """Read what others wrote, let the caller decide, then commit the entries it has put on the list.

        The whole chain is read into `verify` first, if it is given, so that the first bad entry is named.

        Raises:
            LedgerError: the ledger is closed, belongs to another process, was changed, or SQLite refuses.
        """
        self._refuse_unusable()
        pending: list[Entry] = []
        with _ONE_AT_A_TIME, self._sentences(), self._connection() as connection:
            try:
                connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                if verify is not None:
                    _follow(connection, verify)
                _follow(connection, self.books)
                yield connection, pending
                for entry in pending:
                    _insert(connection, entry)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            for entry in pending:
                self.books.add(entry)

    def _refuse_unusable(self) -> None:
        if self._closed:
            raise LedgerError(f"{self.where} is closed. Fix: open it again.")
        if self.path is None and os.getpid() != self._pid:
            raise LedgerError(
                f"{self.where} belongs to another process, which would not see what is charged here. "
                "Fix: use a ledger file."
            )

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        if self._memory is not None:
            yield self._memory
        else:
            with closing(self._connect(create=False)) as connection:
                yield connection

    def _connect(self, *, create: bool) -> sqlite3.Connection:
        assert self.path is not None
        if not (create or self.path.exists()):
            raise LedgerError(f"{self.where} is gone. Fix: put it back, so that nothing spent is forgotten.")
        # SQLite takes a file below its smallest page for an empty one, and would write over it.
        if self.path.exists() and 0 < self.path.stat().st_size < 512:
            raise LedgerError(f"{self.where} is not an SQLite file. Fix: name another file.")
        address = f"{self.path.as_uri()}?mode={'rwc' if create else 'rw'}"
        deadline = time.monotonic() + self._timeout
        while True:
            connection = sqlite3.connect(address, uri=True, isolation_level=None, timeout=self._timeout)
            try:
                self._prepare(connection, create=create)
                return connection
            except BaseException as error:
                connection.close()
                # While another process creates the file or leaves WAL, SQLite gives up without waiting.
                if not (_is_busy(error) and time.monotonic() < deadline):
                    raise
                time.sleep(0.01)

    def _prepare(self, connection: sqlite3.Connection, *, create: bool) -> None:
        """Make sure that this is a ledger before anything of it is changed; create it if it is empty."""
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN")
        version = self._version(connection)
        connection.execute("COMMIT")
        if not version and not create:
            raise LedgerError(f"{self.where} is empty. Fix: create it with `sfumato ledger grant`.")
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if self.path is not None and mode != "wal":
            raise LedgerError(f"{self.where} lies on a disk that cannot keep it safe. Fix: use a local disk.")
        if version != _VERSION:
            connection.execute("BEGIN IMMEDIATE")
            for statement in {0: (*_SCHEMA, *_MARKS), 1: _UPGRADE}.get(self._version(connection), ()):
                connection.execute(statement)
            connection.execute("COMMIT")

    def _version(self, connection: sqlite3.Connection) -> int:
        """Return the format of the ledger in the file, 0 if there is nothing at all; anything else is refused."""
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        schema = {sql for (sql,) in connection.execute(_READ_SCHEMA)}
        if (application, version, schema) == (0, 0, set()):
            return 0
        if application != _APPLICATION:
            raise LedgerError(f"{self.where} is an SQLite file of another program. Fix: name another file.")
        if version not in (1, _VERSION):
            raise LedgerError(
                f"{self.where} has format {version}, but this sfumato reads up to {_VERSION}. "
                "Fix: use the sfumato that wrote it."
            )
        if schema != set(_SCHEMA_1 if version == 1 else _SCHEMA):
            raise LedgerError(f"{self.where}: its tables or triggers were changed by somebody else. {RESTORE}")
        return int(version)

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        """Turn every error of SQLite into one sentence that names the file and the fix."""
        try:
            yield
        except sqlite3.Error as error:
            match _code(error):
                case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                    reason = f"is locked by another process for longer than {self._timeout:g} s"
                    fix = "wait until that process is done, or raise the timeout"
                case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
                    reason = "is not an SQLite file, or is damaged"
                    fix = "name another file, or restore it from a backup"
                case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
                    reason = f"cannot be written ({error})"
                    fix = "make the file and its folder writable, or name another file"
                case _:
                    reason = f"cannot be used ({error})"
                    fix = "check the disk and the file; nothing was released"
            raise LedgerError(f"{self.where} {reason}. Fix: {fix}.") from error


def entries(connection: sqlite3.Connection, first: int = 1) -> Iterator[Entry]:
    """Return the entries from number `first` on, oldest first."""
    rows = connection.execute(f"SELECT {', '.join(_FIELDS)} FROM entries WHERE seq >= ? ORDER BY seq", (first,))
    return (Entry(*row) for row in rows)


def has_digest(connection: sqlite3.Connection, digest: str | None) -> bool:
    """Whether an entry has this digest."""
    return connection.execute("SELECT 1 FROM entries WHERE digest = ?", (digest,)).fetchone() is not None


def _follow(connection: sqlite3.Connection, books: Books) -> None:
    """Verify what the books know and add what was written since."""
    books.follow(entries(connection, books.seq or _LOWEST))
    books.check_head(connection.execute("SELECT seq, digest FROM head").fetchall())


def _insert(connection: sqlite3.Connection, entry: Entry) -> None:
    places = ", ".join("?" * len(_FIELDS))
    connection.execute(f"INSERT INTO entries ({', '.join(_FIELDS)}) VALUES ({places})", dataclasses.astuple(entry))
    connection.execute("UPDATE head SET seq = ?, digest = ?", (entry.seq, entry.digest))


def _code(error: BaseException) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _is_busy(error: BaseException) -> bool:
    return isinstance(error, sqlite3.Error) and _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
