"""The ledger's file: opened by one writer and any number of readers, migrated, locked, all or nothing.

One writer: whoever writes holds an exclusive lock on `<db>.lock` for as long as the ledger is open; readers need none (WAL).
Every method that writes is one transaction. `synchronous=NORMAL` in WAL mode: a killed process loses nothing that was
committed; a power cut may lose the last second, whose joules the counter of the next boot no longer holds either.
"""

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from .errors import LedgerError, UsageError
from .ledger_sqlite import Database
from .ledger_views import Views
from .migrations import migrations


class Store(Views):
    """An open ledger file; a context manager."""

    @classmethod
    def open(cls, path: Path, *, readonly: bool = False) -> Self:
        """Open the ledger at `path`; a writer creates and migrates it and takes the writer lock.

        Raises LedgerError if it is missing (readonly), not a ledger, of a newer version, or written by someone else.
        """
        if readonly and not path.exists():
            raise LedgerError(f"there is no ledger at {path}; name one with --db, or run `energyd start` first")
        if not readonly and not path.parent.is_dir():
            raise LedgerError(f"the folder {path.parent} does not exist; create it or name another place with --db")
        lock = None if readonly else _lock(path)
        try:
            return cls(_ready(path, readonly=readonly), path, lock)
        except BaseException:
            if lock is not None:
                os.close(lock)
            raise

    def __init__(self, db: Database, path: Path, lock: int | None) -> None:
        super().__init__(db)
        self.path = path
        self._lock = lock
        self._gpu_ids: dict[str, int] = {}
        self._names: dict[tuple[str, str], int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if isinstance(error, sqlite3.Error):
            with self.reading():
                raise error

    def close(self) -> None:
        """Close the database and give up the writer lock."""
        self.db.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; SQLite's own complaints (disk full, damaged file) come out as LedgerError.

        Raises UsageError for what the schema refuses: a number beyond 64 bits, a negative count, a sample of a run
        that never began.
        """
        try:
            with self.db.atomic():
                yield
        except BaseException as e:
            self._names.clear()  # ids handed out inside the lost transaction do not exist
            if isinstance(e, sqlite3.IntegrityError | OverflowError):
                raise UsageError(f"the ledger cannot hold this: {e}") from e
            if isinstance(e, sqlite3.Error):
                raise LedgerError(f"the ledger {self.path} refused a write: {e}") from e
            raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Reads within come out as LedgerError if they fail: a damaged page shows only when it is read."""
        try:
            yield
        except sqlite3.Error as e:
            raise LedgerError(f"{self.path} cannot be read: {e}; restore it from a copy") from e

    def _name(self, table: str, name: str) -> int:
        """The id of a model, tenant or task name, created if it is new."""
        key = (table, name)
        if key not in self._names:
            column = {"models": "model_id", "tenants": "tenant_id", "tasks": "task_id"}[table]
            self.db.execute(f"INSERT OR IGNORE INTO {table} (name) VALUES (?)", [name])  # noqa: S608 - names from the line above
            row = self.db.execute(f"SELECT {column} FROM {table} WHERE name = ?", [name]).fetchone()  # noqa: S608
            self._names[key] = int(row[0])
        return self._names[key]


def _ready(path: Path, *, readonly: bool) -> Database:
    """The database at `path`, known to be a ledger of this version before anything about the file is changed."""
    connection = None
    try:
        if not readonly:
            # Born private: SQLite would ask the umask.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        uri = f"{path.absolute().as_uri()}?mode={'ro' if readonly else 'rw'}"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=10)
        db = Database(connection)
        _check(db, path, readonly=readonly)
        if not readonly:
            path.chmod(0o600)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA foreign_keys = ON")
            migrations.apply(db)
    except BaseException as e:
        if connection is not None:
            connection.close()
        if isinstance(e, sqlite3.Error):
            raise LedgerError(f"{path} cannot be used as a ledger: {e}") from e
        if isinstance(e, OSError):
            raise LedgerError(f"cannot write {path}: {e.strerror}; name another place with --db") from e
        raise
    return db


def _check(db: Database, path: Path, *, readonly: bool) -> None:
    known = {m.name for m in migrations._migrations}  # noqa: SLF001 - the library has no public list of a set's names
    unknown = [m.name for m in migrations.applied(db) if m.name not in known]
    if unknown:
        raise LedgerError(f"{path} was written by a newer energyd (it has {unknown[-1]!r}); update energyd to read it")
    if migrations.pending(db):
        # A process killed while it made the ledger may have left the migrations' own table, and nothing else.
        if {*db.table_names()} - {migrations.migrations_table} and not migrations.applied(db):
            raise LedgerError(f"{path} is a database of something else; name another file with --db")
        if readonly:
            raise LedgerError(f"{path} is not a ledger of this version of energyd; open it once with a writing verb")


def _lock(path: Path) -> int:
    """Take the writer lock of the ledger at `path`; raises LedgerError naming the process that holds it."""
    lock_path = path.with_name(path.name + ".lock")
    try:
        handle = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise LedgerError(f"cannot write {lock_path}: {e.strerror}; name another place with --db") from e
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        holder = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise LedgerError(
            f"{path} is being written by process {holder} (an energyd daemon?); ask it, or stop it first"
        ) from e
    os.ftruncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)
    return handle
