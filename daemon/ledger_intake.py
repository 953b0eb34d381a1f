"""What proxy workers report, as rows: queries from their opening to their close, exactly once."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from .ledger_store import Store
from .records import QueryStatus
from .wire import Close, Event, Hello, Open, Progress


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


class Intake(Store):
    """Workers and the queries that they report."""

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
