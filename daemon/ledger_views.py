"""What can be asked of the ledger; reads only. `Ledger` inherits this, so a reader and the writer answer alike."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from .ledger_sqlite import Database
from .records import Run

EXPORT_COLUMNS = (
    "query_id", "tenant", "model", "task", "started_ns", "ended_ns", "prompt_tokens", "completion_tokens",
    "active_energy_uj", "standing_energy_uj", "rel_u", "source", "status", "http_status",
)  # fmt: skip

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AccountTotal:
    """Energy booked to one account: `account` is active, standing, idle or unattributed:<reason>; µJ."""

    uuid: str
    account: str
    model: str | None
    energy_uj: int


@dataclass(frozen=True, slots=True)
class MeterTotal:
    """What the counter of one GPU said in all, and how much of it is not settled yet; µJ."""

    uuid: str
    gpu_index: int
    name: str
    source: str
    settled_uj: int
    unsettled_uj: int
    windows: int


class Views:
    """Read access to a ledger database."""

    def __init__(self, db: Database) -> None:
        self.db = db

    def gpus(self) -> list[Row]:
        """All GPUs ever metered, with host."""
        return list(self.db.query("SELECT * FROM gpus ORDER BY host_id, gpu_index"))

    def meter_totals(self) -> list[MeterTotal]:
        """Per GPU: energy metered so far, settled and not."""
        return [
            MeterTotal(**row)
            for row in self.db.query(
                "SELECT g.uuid, g.gpu_index, g.name, g.source, COALESCE((SELECT SUM(energy_uj) FROM settlements s"
                " WHERE s.gpu_id = g.gpu_id), 0) + COALESCE((SELECT SUM(energy_uj) FROM closings c WHERE c.gpu_id ="
                " g.gpu_id), 0) AS settled_uj, COALESCE((SELECT SUM(w.energy_uj) FROM windows w LEFT JOIN settlements s"
                " USING (gpu_id, epoch, seq) WHERE w.gpu_id = g.gpu_id AND s.gpu_id IS NULL), 0) AS unsettled_uj,"
                " (SELECT COUNT(*) FROM windows w WHERE w.gpu_id = g.gpu_id) AS windows FROM gpus g ORDER BY g.gpu_index"
            )
        ]

    def account_totals(self) -> list[AccountTotal]:
        """Settled energy by GPU, account and model since the ledger began."""
        return [
            AccountTotal(**row)
            for row in self.db.query(
                "SELECT g.uuid, d.account, m.name AS model, SUM(d.energy_uj) AS energy_uj FROM daily_energy d"
                " JOIN gpus g USING (gpu_id) LEFT JOIN models m ON m.model_id = d.model_id GROUP BY 1, 2, 3"
            )
        ]

    def query_totals(self) -> list[Row]:
        """Finished queries by model, task and HTTP status: counts, tokens, how many lack tokens or energy, µJ."""
        return list(
            self.db.query(
                "SELECT m.name AS model, t.name AS task, d.status, d.http_status, SUM(queries) AS queries,"
                " SUM(prompt_tokens) AS prompt_tokens, SUM(completion_tokens) AS completion_tokens, SUM(tokens_unknown) AS"
                " tokens_unknown, SUM(energy_unknown) AS energy_unknown, SUM(active_uj) AS active_uj, SUM(standing_uj) AS"
                " standing_uj FROM daily_queries d LEFT JOIN models m USING (model_id) LEFT JOIN tasks t USING (task_id)"
                " GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4"
            )
        )

    def export_queries(self) -> Iterator[dict[str, Any]]:
        """Every query in the columns EXPORT_COLUMNS, by time; streams, so a year fits."""
        return self.db.query(
            "SELECT q.query_id, t.name AS tenant, m.name AS model, k.name AS task, q.started_ns, q.ended_ns,"
            " q.prompt_tokens, q.completion_tokens, q.active_uj AS active_energy_uj, q.standing_uj AS standing_energy_uj,"
            " q.rel_u, q.source, q.status, q.http_status FROM queries q LEFT JOIN tenants t USING (tenant_id)"
            " LEFT JOIN models m USING (model_id) LEFT JOIN tasks k USING (task_id) ORDER BY q.started_ns, q.query_id"
        )

    def query(self, query_id: str) -> Row | None:
        """One query with model, tenant and task names; None if it is unknown."""
        sql = (
            "SELECT q.*, t.name AS tenant, m.name AS model, k.name AS task FROM queries q LEFT JOIN tenants t"
            " USING (tenant_id) LEFT JOIN models m USING (model_id) LEFT JOIN tasks k USING (task_id) WHERE query_id = ?"
        )
        return next(iter(self.db.query(sql, [query_id])), None)

    def recent_queries(self, limit: int) -> list[Row]:
        """The newest queries, newest first."""
        return list(
            self.db.query(
                "SELECT q.query_id, m.name AS model, k.name AS task, q.started_ns, q.ended_ns, q.prompt_tokens,"
                " q.completion_tokens, q.active_uj, q.standing_uj, q.rel_u, q.source, q.status, q.http_status, q.final"
                " FROM queries q LEFT JOIN models m USING (model_id) LEFT JOIN tasks k USING (task_id)"
                " ORDER BY q.query_no DESC LIMIT ?",
                [limit],
            )
        )

    def runs(self) -> list[Run]:
        """Bench runs, oldest first."""
        return [
            Run(
                run_id=r["run_id"], task=r["task"], model=r["model"], batch_size=r["batch_size"], url=r["url"],
                status=r["status"], started_ns=r["started_ns"], ended_ns=r["measured_end_ns"],
                provenance=json.loads(r["provenance"]), summary=json.loads(r["summary"]),
            )
            for r in self.db.query(
                "SELECT r.*, t.name AS task, m.name AS model FROM runs r JOIN tasks t USING (task_id)"
                " JOIN models m USING (model_id) ORDER BY r.started_ns, r.run_id"
            )
        ]  # fmt: skip

    def run_energy(self, run_id: str) -> Row:
        """Sums over the measured samples of a run: queries, with energy, final, active and standing µJ, tokens."""
        return next(
            iter(
                self.db.query(
                    "SELECT COUNT(*) AS queries, COUNT(q.active_uj) AS with_energy, COALESCE(SUM(q.final), 0) AS final,"
                    " COUNT(s.query_id) AS joined, SUM(q.active_uj) AS active_uj, SUM(q.standing_uj) AS standing_uj,"
                    " SUM(q.prompt_tokens) AS prompt_tokens, SUM(q.completion_tokens) AS completion_tokens"
                    " FROM run_samples s LEFT JOIN queries q USING (query_id) WHERE s.run_id = ? AND s.phase = 'measured'",
                    [run_id],
                )
            )
        )

    def run_servers(self, run_id: str) -> list[str]:
        """Names of the servers that answered a run's samples."""
        sql = "SELECT DISTINCT q.server FROM run_samples s JOIN queries q USING (query_id) WHERE s.run_id = ?"
        return [row[0] for row in self.db.execute(sql, [run_id]).fetchall() if row[0]]

    def events(self, limit: int = 50) -> list[Row]:
        """The newest events, newest first."""
        return list(self.db.query("SELECT * FROM events ORDER BY event_id DESC LIMIT ?", [limit]))

    # -- for the audit ------------------------------------------------------------------------------------------------

    def audit_windows(self) -> Iterator[Row]:
        """Every open window with its settlement and the sums of its parts, by GPU, epoch and sequence number."""
        for row in self.db.query(
            "SELECT w.*, s.gpu_id IS NOT NULL AS settled, s.energy_uj AS booked_uj, s.active_uj, s.standing_uj, s.idle_uj,"
            " s.unattributed_uj, s.charges, c.n AS charges_found, c.active_uj AS charged_active_uj,"
            " c.standing_uj AS charged_standing_uj, u.energy_uj AS reasons_uj, e.first_counter_mj, g.uuid,"
            " g.power_limit_mw FROM windows w JOIN gpus g USING (gpu_id) JOIN epochs e USING (gpu_id, epoch)"
            " LEFT JOIN settlements s USING (gpu_id, epoch, seq)"
            " LEFT JOIN (SELECT gpu_id, epoch, seq, COUNT(*) AS n, SUM(active_uj) AS active_uj, SUM(standing_uj) AS"
            " standing_uj FROM charges GROUP BY 1, 2, 3) c USING (gpu_id, epoch, seq)"
            " LEFT JOIN (SELECT gpu_id, epoch, seq, SUM(energy_uj) AS energy_uj FROM unattributed GROUP BY 1, 2, 3) u"
            " USING (gpu_id, epoch, seq) ORDER BY w.gpu_id, w.epoch, w.seq"
        ):
            shape = row.pop("shape")
            yield {**row, "shape_uj": None if shape is None else sum(msgspec.msgpack.decode(shape)[1])}

    def audit_queries(self) -> list[Row]:
        """Queries whose energy is not the sum of their charges (open ones and those in closed hours)."""
        return list(
            self.db.query(
                "SELECT q.query_id, q.active_uj, q.standing_uj, q.closed_active_uj + COALESCE(c.active_uj, 0) AS"
                " charged_active_uj, q.closed_standing_uj + COALESCE(c.standing_uj, 0) AS charged_standing_uj"
                " FROM queries q LEFT JOIN"
                " (SELECT query_no, SUM(active_uj) AS active_uj, SUM(standing_uj) AS standing_uj FROM charges GROUP BY 1) c"
                " USING (query_no) WHERE COALESCE(q.active_uj, 0) <> charged_active_uj"
                " OR COALESCE(q.standing_uj, 0) <> charged_standing_uj"
            )
        )

    def audit_orphans(self) -> list[Row]:
        """Charges to queries that are not there any more, by query number: count and µJ."""
        return list(
            self.db.query(
                "SELECT c.query_no, COUNT(*) AS charges, SUM(c.active_uj + c.standing_uj) AS energy_uj FROM charges c"
                " LEFT JOIN queries q USING (query_no) WHERE q.query_no IS NULL GROUP BY 1"
            )
        )

    def audit_days(self) -> list[Row]:
        """Per GPU and account: what the daily totals say, and what settlements and closed hours say."""
        return list(
            self.db.query(
                "WITH booked AS (SELECT gpu_id, active_uj, standing_uj, idle_uj, unattributed_uj FROM settlements"
                " UNION ALL SELECT gpu_id, active_uj, standing_uj, idle_uj, unattributed_uj FROM closings),"
                " detail AS (SELECT gpu_id, SUM(active_uj) AS active, SUM(standing_uj) AS standing, SUM(idle_uj) AS idle,"
                " SUM(unattributed_uj) AS unattributed FROM booked GROUP BY 1),"
                " days AS (SELECT gpu_id, SUM(CASE WHEN account = 'active' THEN energy_uj ELSE 0 END) AS active,"
                " SUM(CASE WHEN account = 'standing' THEN energy_uj ELSE 0 END) AS standing,"
                " SUM(CASE WHEN account = 'idle' THEN energy_uj ELSE 0 END) AS idle,"
                " SUM(CASE WHEN account LIKE 'unattributed:%' THEN energy_uj ELSE 0 END) AS unattributed"
                " FROM daily_energy GROUP BY 1)"
                " SELECT g.uuid, d.active AS active_uj, d.standing AS standing_uj, d.idle AS idle_uj, d.unattributed AS"
                " unattributed_uj, y.active AS day_active_uj, y.standing AS day_standing_uj, y.idle AS day_idle_uj,"
                " y.unattributed AS day_unattributed_uj FROM gpus g"
                " LEFT JOIN detail d USING (gpu_id) LEFT JOIN days y USING (gpu_id)"
            )
        )

    def audit_closings(self) -> Iterator[Row]:
        """Closed hours in order of their chain, GPU by GPU."""
        return self.db.query("SELECT * FROM closings ORDER BY gpu_id, hour_ns")

    def quality(self) -> Row:
        """What balance does not say: queries by energy known and final, mean stated rel_u weighted by energy."""
        return next(
            iter(
                self.db.query(
                    "SELECT COUNT(*) AS queries, COUNT(active_uj) AS with_energy, COALESCE(SUM(final), 0) AS final,"
                    " COALESCE(SUM(status = 'late'), 0) AS late, COALESCE(SUM(status = 'partial'), 0) AS partial,"
                    " SUM(rel_u * (active_uj + standing_uj)) / NULLIF(SUM(CASE WHEN rel_u IS NOT NULL THEN active_uj +"
                    " standing_uj END), 0) AS rel_u FROM queries"
                )
            )
        )

    def last_window_ns(self) -> int:
        """End of the newest window of any GPU (0: none)."""
        return int(self.db.execute("SELECT COALESCE(MAX(end_ns), 0) FROM windows").fetchone()[0])

    def late_queries(self) -> int:
        """Queries that were final as `late` since the ledger began."""
        sql = "SELECT COALESCE(SUM(queries), 0) FROM daily_queries WHERE status = 'late'"
        return int(self.db.execute(sql).fetchone()[0])

    def dropped_events(self) -> dict[str, int]:
        """Events that each proxy worker, also one that is gone, had to drop because its outbox and spool were full."""
        return {
            r["worker"]: r["dropped"] for r in self.db.query("SELECT worker, dropped FROM workers WHERE dropped > 0")
        }
