"""Bench runs and their samples, ratings, and events, as rows."""

import json
from collections.abc import Mapping, Sequence

from .errors import LedgerError
from .ledger_store import Store
from .wire import RunEnd, RunStart, Sample


class Runs(Store):
    """Runs, ratings, events."""

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
