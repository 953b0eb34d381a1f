"""The ledger: append, settle, read back. All SQL of energyd is in `ledger*.py` and `migrations.py`; another engine may come.

::

    Views (reads) <- Store (file, lock, transactions) <- Intake (queries), Runs (runs, ratings, events) <- Ledger
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from .errors import RefusedWindow, UsageError
from .ledger_intake import Intake
from .ledger_runs import Runs
from .meter import Anchor, Resume
from .records import Charge, Gpu, QueryStatus, Settlement, Slice, Window, WindowKind
from .units import NS_PER_S

NS_PER_DAY = 86_400 * NS_PER_S
_SHAPE = msgspec.msgpack.Decoder(tuple[tuple[int, ...], tuple[int, ...]])


class Ledger(Intake, Runs):
    """The SQLite ledger. Use as a context manager; see `Views` for what can be asked of it."""

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
        """Charges, and the query's sums; the source goes with the first joule: no figure is ever without one."""
        found = self.db.execute(
            "SELECT source FROM windows WHERE gpu_id = ? AND epoch = ? AND seq = ?", [gpu_id, *key]
        ).fetchone()
        source = found[0] if found else None
        for c in charges:
            self.db.execute(
                "INSERT INTO charges SELECT ?, ?, ?, query_no, ?, ? FROM queries WHERE query_id = ?",
                [gpu_id, *key, c.active_uj, c.standing_uj, c.query_id],
            )
            self.db.execute(
                "UPDATE queries SET active_uj = COALESCE(active_uj, 0) + ?, standing_uj = COALESCE(standing_uj, 0) + ?,"
                " spread_uj = spread_uj + ?, source = COALESCE(?, source) WHERE query_id = ?",
                [c.active_uj, c.standing_uj, c.spread_uj, source, c.query_id],
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
                    "UPDATE queries SET final = 1, status = COALESCE(?, status), rel_u = ?, source = COALESCE(?, source)"
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
