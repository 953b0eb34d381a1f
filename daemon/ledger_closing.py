"""Closing hours: the SQL behind `retention`. Detail goes only after a chained entry vouches for its sums."""

import json

from .audit import GENESIS, closing_hash
from .ledger import Ledger
from .units import NS_PER_S

NS_PER_HOUR = 3_600 * NS_PER_S
_MOST_HOURS = 48
"""Hours closed in one go, so that the writer thread is never busy for long."""

# Hours close oldest first, so a pinned one holds up all that follow: a run pins for a bounded time (`runs_since_ns`).
_PINNED = (
    "EXISTS (SELECT 1 FROM runs r WHERE r.released = 0 AND r.measured_start_ns IS NOT NULL"
    " AND r.started_ns < {end} AND r.measured_end_ns > {start} AND r.measured_end_ns > {since})"
)


def drop_shapes(ledger: Ledger, before_ns: int, runs_since_ns: int = 0) -> None:
    """Forget the 20 ms shape of settled windows that ended before `before_ns`.

    Those that a run pins stay, if it ended after `runs_since_ns`.
    """
    pinned = _PINNED.format(start="windows.start_ns", end="windows.end_ns", since=runs_since_ns)
    with ledger.transaction():
        ledger.db.execute(
            "UPDATE windows SET shape = NULL WHERE shape IS NOT NULL AND end_ns < ? AND EXISTS (SELECT 1 FROM settlements s"  # noqa: S608 - constants only
            " WHERE s.gpu_id = windows.gpu_id AND s.epoch = windows.epoch AND s.seq = windows.seq)"
            f" AND NOT {pinned}",
            [before_ns],
        )


def close_hours(ledger: Ledger, before_ns: int, runs_since_ns: int = 0) -> int:
    """Close whole hours that ended before `before_ns`, are settled and unpinned, oldest first; returns how many."""
    closed = 0
    for row in ledger.gpus():
        while closed < _MOST_HOURS:
            first = ledger.db.execute("SELECT MIN(end_ns) FROM windows WHERE gpu_id = ?", [row["gpu_id"]]).fetchone()[0]
            if first is None:
                break
            hour_ns = first // NS_PER_HOUR * NS_PER_HOUR
            if hour_ns + NS_PER_HOUR > before_ns or not _closable(ledger, row["gpu_id"], hour_ns, runs_since_ns):
                break
            _close(ledger, row["gpu_id"], hour_ns)
            closed += 1
    return closed


def _closable(ledger: Ledger, gpu_id: int, hour_ns: int, runs_since_ns: int) -> bool:
    end_ns = hour_ns + NS_PER_HOUR
    unsettled, last = ledger.db.execute(
        "SELECT SUM(s.gpu_id IS NULL AND w.kind <> 'gap'), MAX(w.end_ns) = (SELECT MAX(end_ns) FROM windows x WHERE"
        " x.gpu_id = w.gpu_id) FROM windows w LEFT JOIN settlements s USING (gpu_id, epoch, seq)"
        " WHERE w.gpu_id = ? AND w.end_ns < ?",
        [gpu_id, end_ns],
    ).fetchone()
    pinned = ledger.db.execute(f"SELECT {_PINNED.format(start=hour_ns, end=end_ns, since=runs_since_ns)}").fetchone()[0]
    return not unsettled and not last and not pinned  # the newest window stays: the meter goes on from it


def _close(ledger: Ledger, gpu_id: int, hour_ns: int) -> None:
    """One hour: closing entry, queries keep the sums of their dropped charges, then the detail goes."""
    end_ns = hour_ns + NS_PER_HOUR
    keys = "SELECT gpu_id, epoch, seq FROM windows WHERE gpu_id = ? AND end_ns < ?"
    of_hour = f"(gpu_id, epoch, seq) IN ({keys})"
    args = [gpu_id, end_ns]
    with ledger.transaction():
        db = ledger.db
        sums = db.execute(
            "SELECT COALESCE(SUM(energy_uj), 0), COALESCE(SUM(active_uj), 0), COALESCE(SUM(standing_uj), 0),"  # noqa: S608
            f" COALESCE(SUM(idle_uj), 0), COALESCE(SUM(unattributed_uj), 0) FROM settlements WHERE {of_hour}",
            args,
        ).fetchone()
        windows, first, last = db.execute(
            "SELECT COUNT(*), MIN(counter_start_mj), MAX(counter_end_mj) FROM windows WHERE gpu_id = ? AND end_ns < ?",
            args,
        ).fetchone()
        shares = db.execute(
            "SELECT COALESCE(t.name, ''), COALESCE(m.name, ''), COUNT(*), SUM(c.active_uj), SUM(c.standing_uj) FROM charges c"  # noqa: S608
            " JOIN queries q USING (query_no) LEFT JOIN tenants t USING (tenant_id) LEFT JOIN models m USING (model_id)"
            f" WHERE {of_hour} GROUP BY 1, 2 ORDER BY 1, 2",
            args,
        ).fetchall()
        previous = db.execute(
            "SELECT hash FROM closings WHERE gpu_id = ? ORDER BY hour_ns DESC LIMIT 1", [gpu_id]
        ).fetchone()
        detail = json.dumps(
            {"first_counter_mj": first, "last_counter_mj": last, "tenant_model_rows_active_standing": shares}
        )
        row = dict(
            zip(
                ("gpu_id", "hour_ns", "windows", "energy_uj", "active_uj", "standing_uj", "idle_uj", "unattributed_uj",
                 "detail", "previous_hash"),
                (gpu_id, hour_ns, windows, *sums, detail, previous[0] if previous else GENESIS),
                strict=True,
            )
        )  # fmt: skip
        db.execute("INSERT INTO closings VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", [*row.values(), closing_hash(row)])
        db.execute(
            "UPDATE queries SET closed_active_uj = closed_active_uj + c.a, closed_standing_uj = closed_standing_uj + c.s"  # noqa: S608
            f" FROM (SELECT query_no, SUM(active_uj) AS a, SUM(standing_uj) AS s FROM charges WHERE {of_hour} GROUP BY 1) c"
            " WHERE c.query_no = queries.query_no",
            args,
        )
        for table in ("charges", "unattributed", "settlements", "windows"):
            db.execute(f"DELETE FROM {table} WHERE {of_hour}", args)  # noqa: S608 - names from the line above


def drop_queries(ledger: Ledger, before_ns: int) -> None:
    """Forget queries that ended before `before_ns` and have no open charges and no run; daily totals keep their sums."""
    with ledger.transaction():
        ledger.db.execute(
            "DELETE FROM queries WHERE query_no IN (SELECT query_no FROM queries q WHERE final = 1 AND ended_ns < ?"
            " AND started_ns < ?"  # implied, but this one has an index
            " AND NOT EXISTS (SELECT 1 FROM charges c WHERE c.query_no = q.query_no)"
            " AND NOT EXISTS (SELECT 1 FROM run_samples s WHERE s.query_id = q.query_id) LIMIT 10000)",
            [before_ns, before_ns],
        )
