"""The ledger: append, settle, read back. All SQL of energyd is in `ledger*.py` and `migrations.py`; another engine may come.

One writer: whoever writes holds an exclusive lock on `<db>.lock` for as long as the ledger is open (DESIGN §10.9); readers
need none (WAL). Every method that writes is one transaction. `synchronous=NORMAL` in WAL mode: a killed process loses
nothing that was committed; a power cut may lose the last second, whose joules the counter of the next boot no longer
holds either.
"""

import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from .errors import LedgerError, RefusedWindow, UsageError
from .ledger_sqlite import Database
from .ledger_views import Views
from .meter import Anchor, Resume
from .migrations import migrations
from .records import Charge, Gpu, QueryStatus, Settlement, Slice, Window, WindowKind
from .units import NS_PER_S
from .wire import Close, Event, Hello, Open, Progress, RunEnd, RunStart, Sample

NS_PER_DAY = 86_400 * NS_PER_S
_SHAPE = msgspec.msgpack.Decoder(tuple[tuple[int, ...], tuple[int, ...]])


@dataclass(frozen=True, slots=True)
class StoredQuery:
    """A query that is not final yet, as the ledger holds it: what a restarted daemon needs to go on."""

    query_id: str
    worker: str
    server: str
    tenant: str | None
    start_ns: int
    end_ns: int | None
    chunks_ns: tuple[int, ...]
    prompt_tokens: int | None
    completion_tokens: int | None
    model: str | None
    status: QueryStatus


@dataclass(frozen=True, slots=True)
class StoredWorker:
    """A proxy worker that is not gone: whom settlement waits for after a restart."""

    worker: str
    boot_id: str
    offset_ns: int
    pid: int
    spool: str
    servers: str
    watermark_ns: int


class Ledger(Views):
    """The SQLite ledger. Use as a context manager; see `Views` for what can be asked of it."""

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

    # -- hosts, boots, GPUs -------------------------------------------------------------------------------------------

    def register_host(self, host_id: str, hostname: str, at_ns: int) -> None:
        """Remember the host; every key starts with it."""
        with self.transaction():
            self.db.execute("INSERT OR IGNORE INTO hosts VALUES (?, ?, ?)", [host_id, hostname, at_ns])

    def boot_offset(self, host_id: str, boot_id: str, offset_ns: int, at_ns: int) -> int:
        """The clock offset of this boot: the stored one, or `offset_ns`, which is then stored (see `clock`)."""
        with self.transaction():
            self.db.execute("INSERT OR IGNORE INTO boots VALUES (?, ?, ?, ?)", [host_id, boot_id, offset_ns, at_ns])
        sql = "SELECT offset_ns FROM boots WHERE host_id = ? AND boot_id = ?"
        return int(self.db.execute(sql, [host_id, boot_id]).fetchone()[0])

    def register_gpu(self, host_id: str, gpu: Gpu, at_ns: int) -> None:
        """Remember a GPU (by host and UUID); its name, driver and source follow what is seen now."""
        with self.transaction():
            self.db.execute(
                "INSERT INTO gpus (host_id, uuid, gpu_index, name, driver, source, power_limit_mw, first_seen_ns)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (host_id, uuid) DO UPDATE SET gpu_index = excluded.gpu_index,"
                " name = excluded.name, driver = excluded.driver, power_limit_mw = excluded.power_limit_mw",
                [host_id, gpu.uuid, gpu.index, gpu.name, gpu.driver, str(gpu.source), gpu.power_limit_mw, at_ns],
            )
        row = self.db.execute("SELECT gpu_id FROM gpus WHERE host_id = ? AND uuid = ?", [host_id, gpu.uuid]).fetchone()
        self._gpu_ids[gpu.uuid] = int(row[0])

    def gpu_id(self, uuid: str) -> int:
        """The ledger's number of a registered GPU; raises KeyError for one that is not."""
        return self._gpu_ids[uuid]

    def resume(self, uuid: str, boot_id: str) -> Resume | None:
        """Where the meter of this GPU must go on; None if it was never metered."""
        row = self.db.execute(
            "SELECT w.epoch, w.seq, w.end_ns, w.counter_end_mj, e.boot_id FROM windows w JOIN epochs e"
            " USING (gpu_id, epoch) WHERE w.gpu_id = ? ORDER BY w.epoch DESC, w.seq DESC LIMIT 1",
            [self.gpu_id(uuid)],
        ).fetchone()
        if row is None:  # retention never takes a GPU's newest window
            return None
        epoch, seq, end_ns, counter_mj, boot = row
        return Resume(Anchor(end_ns, counter_mj), epoch, seq + 1, same_boot=boot == boot_id)

    # -- windows ------------------------------------------------------------------------------------------------------

    def append_windows(self, windows: Sequence[Window], boot_id: str) -> None:
        """Store metered windows before anything is done with them; the same window twice is stored once."""
        with self.transaction():
            for w in windows:
                gpu_id = self.gpu_id(w.gpu)
                if w.seq == 0:
                    self.db.execute(
                        "INSERT OR IGNORE INTO epochs VALUES (?, ?, ?, ?, ?, ?)",
                        [gpu_id, w.epoch, boot_id, w.start_ns, w.counter_start_mj,
                         "reset" if w.kind is WindowKind.RESET else "first seen"],
                    )  # fmt: skip
                self.db.execute(
                    "INSERT OR IGNORE INTO windows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [gpu_id, w.epoch, w.seq, w.start_ns, w.end_ns, w.counter_start_mj, w.counter_end_mj, w.energy_uj,
                     w.u_uj, str(w.kind), str(w.source), _shape_blob(w.slices)],
                )  # fmt: skip

    def unsettled(self, uuid: str) -> list[Window]:
        """Windows of a GPU that are not settled yet, in order; gaps have nothing to settle."""
        rows = self.db.query(
            "SELECT w.* FROM windows w LEFT JOIN settlements s USING (gpu_id, epoch, seq) WHERE w.gpu_id = ?"
            " AND s.gpu_id IS NULL AND w.kind <> 'gap' ORDER BY w.epoch, w.seq",
            [self.gpu_id(uuid)],
        )
        return [_window(uuid, row) for row in rows]

    def windows_between(self, uuid: str, start_ns: int, end_ns: int) -> list[Window]:
        """Windows of a GPU that touch [start, end), in order of time."""
        rows = self.db.query(
            "SELECT * FROM windows WHERE gpu_id = ? AND end_ns > ? AND start_ns < ? ORDER BY end_ns",
            [self.gpu_id(uuid), start_ns, end_ns],
        )
        return [_window(uuid, row) for row in rows]

    def settled_until_ns(self, uuid: str) -> int:
        """Everything before this is settled (0: nothing)."""
        row = self.db.execute(
            "SELECT MAX(w.end_ns) FROM windows w JOIN settlements s USING (gpu_id, epoch, seq) WHERE w.gpu_id = ?",
            [self.gpu_id(uuid)],
        ).fetchone()
        return int(row[0] or 0)

    # -- workers and queries ------------------------------------------------------------------------------------------

    def register_worker(self, host_id: str, hello: Hello, offset_ns: int) -> int:
        """Remember a worker; returns the last sequence number of its events that is committed (0: none)."""
        with self.transaction():
            servers = json.dumps([[s.name, s.url, list(s.gpus)] for s in hello.servers])
            self.db.execute(
                "INSERT INTO workers (worker, host_id, boot_id, offset_ns, pid, spool, servers) VALUES (?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (worker) DO UPDATE SET pid = excluded.pid, spool = excluded.spool, gone = 0",
                [hello.worker, host_id, hello.boot_id, offset_ns, hello.pid, hello.spool, servers],
            )
        return int(self.db.execute("SELECT acked_seq FROM workers WHERE worker = ?", [hello.worker]).fetchone()[0])

    def workers(self) -> list[StoredWorker]:
        """Workers that have not said goodbye."""
        columns = "worker, boot_id, offset_ns, pid, spool, servers, watermark_ns"
        return [StoredWorker(**row) for row in self.db.query(f"SELECT {columns} FROM workers WHERE gone = 0")]  # noqa: S608

    def worker_gone(self, worker: str) -> None:
        """A worker said goodbye, or is dead and left no spool: nobody waits for it any more."""
        with self.transaction():
            self.db.execute("UPDATE workers SET gone = 1 WHERE worker = ?", [worker])

    def record(
        self, host_id: str, worker: str, first_seq: int, events: Sequence[Event], watermark_ns: int, dropped: int = 0
    ) -> int:
        """Commit a worker's events (times already in ledger time) and its watermark; returns how many were new.

        Events whose sequence number was committed before are skipped: a batch that is sent twice counts once.
        """
        acked = self.db.execute("SELECT acked_seq FROM workers WHERE worker = ?", [worker]).fetchone()
        if acked is None:
            raise KeyError(worker)
        fresh = events[max(0, int(acked[0]) + 1 - first_seq) :]
        last_seq = first_seq + len(events) - 1 if events else 0  # a heartbeat acknowledges nothing
        with self.transaction():
            for event in fresh:
                self._record_event(host_id, worker, event)
            self.db.execute(
                "UPDATE workers SET acked_seq = MAX(acked_seq, ?), watermark_ns = MAX(watermark_ns, ?), dropped = ?"
                " WHERE worker = ?",
                [last_seq, watermark_ns, dropped, worker],
            )
        return len(fresh)

    def _record_event(self, host_id: str, worker: str, event: Event) -> None:
        if isinstance(event, Open):
            tenant = self._name("tenants", event.tenant) if event.tenant else None
            self.db.execute(
                "INSERT OR IGNORE INTO queries (query_id, host_id, worker, server, tenant_id, started_ns, status)"
                " VALUES (?, ?, ?, ?, ?, ?, 'open')",
                [event.query_id, host_id, worker, event.server, tenant, event.start_ns],
            )
        elif isinstance(event, Progress):
            self.db.execute(
                "INSERT INTO timelines SELECT query_no, (SELECT COUNT(*) FROM timelines t WHERE t.query_no = q.query_no), ?"
                " FROM queries q WHERE query_id = ? AND ended_ns IS NULL",  # no part after the end: nothing would remove it
                [msgspec.msgpack.encode((event.from_ns, event.deltas_us)), event.query_id],
            )
            self.db.execute(
                "UPDATE queries SET chunks = chunks + ? WHERE query_id = ? AND ended_ns IS NULL",
                [len(event.deltas_us), event.query_id],
            )
        else:
            self._record_close(event)

    def _record_close(self, event: Close) -> None:
        self.db.execute(
            "UPDATE queries SET ended_ns = MAX(started_ns + 1, ?), status = ?, http_status = ?, first_byte_ns = ?,"
            " requested = ?, served = ?, model_id = ?, task_id = ?, stream = ?, prompt_tokens = ?, completion_tokens = ?,"
            " usage_source = ?, upload_bytes = ? WHERE query_id = ? AND ended_ns IS NULL",
            [event.end_ns, event.status, event.http_status, event.first_byte_ns, event.requested, event.served,
             self._name("models", booked_model(event)),
             self._name("tasks", event.task) if event.task else None, event.stream, event.prompt_tokens,
             event.completion_tokens, event.usage_source, event.upload_bytes, event.query_id],
        )  # fmt: skip

    def cut_off(self, query_id: str, end_ns: int) -> None:
        """A query whose worker died: it ends at the last event seen, status `partial`."""
        with self.transaction():
            self.db.execute(
                "UPDATE queries SET ended_ns = MAX(started_ns + 1, ?), status = 'partial', model_id = ?"
                " WHERE query_id = ? AND ended_ns IS NULL",
                [end_ns, self._name("models", model_key(None, None)), query_id],
            )

    def pending_queries(self) -> list[StoredQuery]:
        """Queries that are not final, with the times of their chunks."""
        rows = self.db.query(
            "SELECT q.*, t.name AS tenant, m.name AS model FROM queries q LEFT JOIN tenants t USING (tenant_id)"
            " LEFT JOIN models m USING (model_id) WHERE final = 0 ORDER BY query_no"
        )
        return [
            StoredQuery(
                query_id=r["query_id"], worker=r["worker"] or "", server=r["server"] or "", tenant=r["tenant"],
                start_ns=r["started_ns"], end_ns=r["ended_ns"], chunks_ns=self._chunks(r["query_no"]),
                prompt_tokens=r["prompt_tokens"], completion_tokens=r["completion_tokens"], model=r["model"],
                status=QueryStatus(r["status"]),
            )
            for r in list(rows)
        ]  # fmt: skip

    def _chunks(self, query_no: int) -> tuple[int, ...]:
        times: list[int] = []
        for row in self.db.query("SELECT chunks FROM timelines WHERE query_no = ? ORDER BY part", [query_no]):
            from_ns, deltas_us = msgspec.msgpack.decode(row["chunks"])
            times.extend(chunk_times(from_ns, deltas_us))
        return tuple(times)

    # -- settling -----------------------------------------------------------------------------------------------------

    def settle(self, settlement: Settlement, window_end_ns: int, settled_ns: int) -> bool:
        """Book a window: header row first, then its charges, all or nothing; False if it was booked before.

        Raises RefusedWindow if it does not balance or its charges do not sum to the header (nothing is booked then).
        """
        gpu_id, key = self.gpu_id(settlement.gpu), (settlement.epoch, settlement.seq)
        unattributed_uj = sum(settlement.unattributed_uj.values())
        if settlement.residual_uj:
            raise RefusedWindow(
                f"window {gpu_id}/{key[0]}/{key[1]} does not balance: {settlement.residual_uj} µJ left over"
            )
        try:
            with self.transaction():
                self.db.execute(
                    "INSERT INTO settlements VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [gpu_id, *key, settlement.energy_uj, settlement.active_uj, settlement.standing_uj, settlement.idle_uj,
                     unattributed_uj, len(settlement.charges), settlement.policy, settlement.coefficients_version,
                     settlement.idle_floor_mw, settled_ns],
                )  # fmt: skip
                for reason, energy_uj in settlement.unattributed_uj.items():
                    if energy_uj:
                        self.db.execute(
                            "INSERT INTO unattributed VALUES (?, ?, ?, ?, ?)", [gpu_id, *key, str(reason), energy_uj]
                        )
                self._charge(gpu_id, key, settlement.charges)
                self._book_day(gpu_id, window_end_ns // NS_PER_DAY, settlement)
                self._check_charges(gpu_id, key, settlement)
        except UsageError as e:
            if "UNIQUE constraint failed: settlements" in str(e):
                return False
            raise RefusedWindow(f"window {gpu_id}/{key[0]}/{key[1]} was refused: {e}") from e
        return True

    def _charge(self, gpu_id: int, key: tuple[int, int], charges: Iterable[Charge]) -> None:
        for c in charges:
            self.db.execute(
                "INSERT INTO charges SELECT ?, ?, ?, query_no, ?, ? FROM queries WHERE query_id = ?",
                [gpu_id, *key, c.active_uj, c.standing_uj, c.query_id],
            )
            self.db.execute(
                "UPDATE queries SET active_uj = COALESCE(active_uj, 0) + ?, standing_uj = COALESCE(standing_uj, 0) + ?,"
                " spread_uj = spread_uj + ? WHERE query_id = ?",
                [c.active_uj, c.standing_uj, c.spread_uj, c.query_id],
            )

    def _book_day(self, gpu_id: int, day: int, settlement: Settlement) -> None:
        """Add the window to the daily totals by account, tenant and model, which outlive the rows they come from."""
        self._add_day(day, gpu_id, "idle", settlement.idle_uj)
        for reason, energy_uj in settlement.unattributed_uj.items():
            self._add_day(day, gpu_id, f"unattributed:{reason}", energy_uj)
        rows = self.db.execute(
            "SELECT COALESCE(q.tenant_id, 0), COALESCE(q.model_id, 0), SUM(c.active_uj), SUM(c.standing_uj) FROM charges c"
            " JOIN queries q USING (query_no) WHERE c.gpu_id = ? AND c.epoch = ? AND c.seq = ? GROUP BY 1, 2",
            [gpu_id, settlement.epoch, settlement.seq],
        ).fetchall()
        for tenant_id, model_id, active_uj, standing_uj in rows:
            self._add_day(day, gpu_id, "active", active_uj, tenant_id, model_id)
            self._add_day(day, gpu_id, "standing", standing_uj, tenant_id, model_id)

    def _add_day(
        self, day: int, gpu_id: int, account: str, energy_uj: int, tenant_id: int = 0, model_id: int = 0
    ) -> None:
        if energy_uj:
            self.db.execute(
                "INSERT INTO daily_energy VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE"
                " SET energy_uj = energy_uj + excluded.energy_uj",
                [day, gpu_id, account, tenant_id, model_id, energy_uj],
            )

    def _check_charges(self, gpu_id: int, key: tuple[int, int], settlement: Settlement) -> None:
        """A charge to a query that the ledger does not know would vanish in the INSERT … SELECT: refuse the window."""
        row = self.db.execute(
            "SELECT COUNT(*), COALESCE(SUM(active_uj), 0), COALESCE(SUM(standing_uj), 0) FROM charges"
            " WHERE gpu_id = ? AND epoch = ? AND seq = ?",
            [gpu_id, *key],
        ).fetchone()
        if row != (len(settlement.charges), settlement.active_uj, settlement.standing_uj):
            raise RefusedWindow(f"the charges of window {gpu_id}/{key[0]}/{key[1]} do not sum to its header")

    def energy_of(self, query_id: str) -> tuple[int | None, int | None, int]:
        """Active, standing (None: no window with a known shape covered it) and spread of a query so far, µJ."""
        row = self.db.execute(
            "SELECT active_uj, standing_uj, spread_uj FROM queries WHERE query_id = ?", [query_id]
        ).fetchone()
        return (None, None, 0) if row is None else (row[0], row[1], row[2])

    def finish(self, finals: Iterable[tuple[str, QueryStatus | None, float | None, str | None]]) -> None:
        """Mark queries final: (id, status to set or None to keep it, rel_u, source); adds them to the daily counts."""
        with self.transaction():
            for query_id, status, rel_u, source in finals:
                done = self.db.execute(
                    "UPDATE queries SET final = 1, status = COALESCE(?, status), rel_u = ?, source = ?"
                    " WHERE query_id = ? AND final = 0",
                    [str(status) if status else None, rel_u, source, query_id],
                )
                if done.rowcount:  # a query counts once, whoever says twice that it is over
                    self._count_day(query_id)
                self.db.execute(
                    "DELETE FROM timelines WHERE query_no = (SELECT query_no FROM queries WHERE query_id = ?)",
                    [query_id],
                )

    def _count_day(self, query_id: str) -> None:
        self.db.execute(
            f"INSERT INTO daily_queries SELECT ended_ns / {NS_PER_DAY}, COALESCE(tenant_id, 0), COALESCE(model_id, 0),"  # noqa: S608 - a constant
            " COALESCE(task_id, 0), status, COALESCE(http_status, 0), 1, COALESCE(prompt_tokens, 0),"
            " COALESCE(completion_tokens, 0), completion_tokens IS NULL, active_uj IS NULL, COALESCE(active_uj, 0),"
            " COALESCE(standing_uj, 0) FROM queries WHERE query_id = ? ON CONFLICT DO UPDATE SET queries = queries + 1,"
            " prompt_tokens = prompt_tokens + excluded.prompt_tokens, completion_tokens = completion_tokens"
            " + excluded.completion_tokens, tokens_unknown = tokens_unknown + excluded.tokens_unknown, energy_unknown ="
            " energy_unknown + excluded.energy_unknown, active_uj = active_uj + excluded.active_uj, standing_uj ="
            " standing_uj + excluded.standing_uj",
            [query_id],
        )

    # -- runs, ratings, events ----------------------------------------------------------------------------------------

    def start_run(self, host_id: str, run: RunStart, started_ns: int) -> None:
        """A bench run begins; saying so twice changes nothing."""
        with self.transaction():
            self.db.execute(
                "INSERT OR IGNORE INTO runs (run_id, host_id, task_id, model_id, batch_size, url, status, started_ns,"
                " provenance, summary) VALUES (?, ?, ?, ?, ?, ?, 'running', ?, ?, '{}')",
                [run.run_id, host_id, self._name("tasks", run.task), self._name("models", run.model), run.batch_size,
                 run.url, started_ns, json.dumps(run.provenance)],
            )  # fmt: skip

    def add_samples(self, run_id: str, samples: Sequence[Sample]) -> None:
        """Sample rows of a run (times in ledger time); a row that is already there is left alone."""
        with self.transaction():
            for s in samples:
                self.db.execute(
                    "INSERT OR IGNORE INTO run_samples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [run_id, s.phase, s.idx, s.query_id, s.start_ns, s.end_ns, s.ok, s.http_status, s.error],
                )

    def end_run(self, run: RunEnd) -> None:
        """A run ended (times in ledger time); raises LedgerError for a run that never began."""
        with self.transaction():
            done = self.db.execute(
                "UPDATE runs SET status = ?, measured_start_ns = ?, measured_end_ns = ?, summary = ? WHERE run_id = ?",
                [run.status, run.start_ns, run.end_ns, json.dumps(run.summary), run.run_id],
            )
            if done.rowcount != 1:
                raise LedgerError(f"run {run.run_id} is not in this ledger")

    def add_rating(
        self,
        rating_id: str,
        created_ns: int,
        edition: str,
        method: str,
        basis: str,
        rows: Sequence[Mapping[str, object]],
    ) -> None:
        """Stars that were given; the same id twice is stored once."""
        with self.transaction():
            self.db.execute(
                "INSERT OR IGNORE INTO ratings VALUES (?, ?, ?, ?, ?, ?)",
                [rating_id, created_ns, edition, method, basis, json.dumps(list(rows))],
            )

    def add_event(self, host_id: str, at_ns: int, kind: str, detail: str, uuid: str | None = None) -> None:
        """Something happened to the meter that explains its figures: reset, outage, clock step, late queries."""
        with self.transaction():
            self.db.execute(
                "INSERT INTO events (at_ns, host_id, gpu_id, kind, detail) VALUES (?, ?, ?, ?, ?)",
                [at_ns, host_id, self._gpu_ids.get(uuid or ""), kind, detail],
            )

    def _name(self, table: str, name: str) -> int:
        """The id of a model, tenant or task name, created if it is new."""
        key = (table, name)
        if key not in self._names:
            column = {"models": "model_id", "tenants": "tenant_id", "tasks": "task_id"}[table]
            self.db.execute(f"INSERT OR IGNORE INTO {table} (name) VALUES (?)", [name])  # noqa: S608 - names from the line above
            row = self.db.execute(f"SELECT {column} FROM {table} WHERE name = ?", [name]).fetchone()  # noqa: S608
            self._names[key] = int(row[0])
        return self._names[key]


OTHER = "other"


def model_key(requested: str | None, served: str | None) -> str:
    """A model's name in the books: the served name without `@revision`, else the requested one, else `other`."""
    name = served or requested
    return (name.split("@", 1)[0] or OTHER) if name else OTHER


def booked_model(close: Close) -> str:
    """The model that a query is booked to: `other` without a 2xx answer, because clients can ask for any name."""
    answered = close.http_status is not None and 200 <= close.http_status < 300
    return model_key(close.requested, close.served) if answered else OTHER


def chunk_times(from_ns: int, deltas_us: Sequence[int]) -> list[int]:
    """Absolute times of delta-coded chunks, ns."""
    times = []
    at_ns = from_ns
    for delta in deltas_us:
        at_ns += delta * 1_000
        times.append(at_ns)
    return times


def _shape_blob(slices: Sequence[Slice]) -> bytes | None:
    if not slices:
        return None
    return msgspec.msgpack.encode(([s.end_ns - s.start_ns for s in slices], [s.energy_uj for s in slices]))


def _window(uuid: str, row: Mapping[str, Any]) -> Window:
    slices = []
    if row["shape"] is not None:
        at_ns = row["start_ns"]
        for duration_ns, energy_uj in zip(*_SHAPE.decode(row["shape"]), strict=True):
            slices.append(Slice(at_ns, at_ns + duration_ns, energy_uj))
            at_ns += duration_ns
    keys = ("epoch", "seq", "start_ns", "end_ns", "counter_start_mj", "counter_end_mj", "energy_uj", "u_uj", "source")
    return Window(gpu=uuid, kind=WindowKind(row["kind"]), slices=tuple(slices), **{k: row[k] for k in keys})


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
