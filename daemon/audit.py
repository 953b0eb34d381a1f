"""The audit: every law of the books proved again from what is stored. Pure: rows in, findings out.

A finding is a value that says what is wrong and where; one bad row never hides the rest. That the books balance says
nothing about who caused what: accuracy, coverage and the unattributed share are reported beside it, never as findings.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .units import UJ_PER_MJ, mean_power_mw

Row = Mapping[str, Any]
GENESIS: Final = "0" * 64
"""What the first closed hour of a GPU is chained to."""
_POWER_MARGIN: Final = 1.2
_LONG_ENOUGH_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that breaks a law: which law, where, and by how much (µJ, if it is energy)."""

    law: str
    where: str
    what: str
    residual_uj: int = 0


def check_windows(rows: Iterable[Row]) -> Iterator[Finding]:
    """Windows ordered by GPU, epoch and sequence number: chained, equal to the counter, shaped and booked without rest."""
    previous: Row | None = None
    for row in rows:
        where = f"GPU {row['uuid']} epoch {row['epoch']} window {row['seq']}"
        yield from _check_chain(previous, row, where)
        yield from _check_energy(row, where)
        if row["settled"]:
            yield from _check_settlement(row, where) if row["energy_uj"] is not None else _check_unknown(where)
        previous = row


def _check_chain(previous: Row | None, row: Row, where: str) -> Iterator[Finding]:
    """An epoch begins at its first counter value; in it each window begins where the one before ended.

    That is in number, time and counter. Windows of closed hours are gone: then an epoch's rows begin in its middle.
    """
    if row["seq"] == 0 and row["counter_start_mj"] != row["first_counter_mj"]:
        lost_uj = (row["counter_start_mj"] - row["first_counter_mj"]) * UJ_PER_MJ
        yield Finding("the counter is the truth", where, f"{lost_uj} µJ of the counter are in no window", lost_uj)
    if previous is None or (previous["gpu_id"], previous["epoch"]) != (row["gpu_id"], row["epoch"]):
        return
    if row["seq"] != previous["seq"] + 1:
        yield Finding("nothing is lost", where, f"windows {previous['seq'] + 1} to {row['seq'] - 1} are missing")
    elif row["start_ns"] != previous["end_ns"]:
        yield Finding(
            "nothing is lost", where, f"begins {row['start_ns'] - previous['end_ns']} ns after the one before ended"
        )
    if row["counter_start_mj"] != previous["counter_end_mj"]:
        lost_uj = (row["counter_start_mj"] - previous["counter_end_mj"]) * UJ_PER_MJ
        yield Finding("the counter is the truth", where, f"{lost_uj} µJ of the counter are in no window", lost_uj)


def _check_energy(row: Row, where: str) -> Iterator[Finding]:
    if (row["energy_uj"] is None) != (row["kind"] == "gap"):
        yield Finding("missing is never a number", where, f"is of kind {row['kind']} and holds {row['energy_uj']} µJ")
    if row["end_ns"] <= row["start_ns"]:
        yield Finding("nothing is lost", where, f"ends {row['start_ns'] - row['end_ns']} ns before it begins")
    if row["energy_uj"] is None:
        return
    if row["energy_uj"] < 0:
        yield Finding("none is negative", where, f"holds {row['energy_uj']} µJ", row["energy_uj"])
    counter_uj = (row["counter_end_mj"] - row["counter_start_mj"]) * UJ_PER_MJ
    if row["energy_uj"] != counter_uj:
        off_uj = row["energy_uj"] - counter_uj
        yield Finding("the counter is the truth", where, f"holds {off_uj} µJ more than the counter says", off_uj)
    if row["shape_uj"] is not None and row["shape_uj"] != row["energy_uj"]:
        off_uj = row["shape_uj"] - row["energy_uj"]
        yield Finding("samples only shape it", where, f"its slices sum to {off_uj} µJ more than it holds", off_uj)
    duration_ns = row["end_ns"] - row["start_ns"]
    limit_mw = row["power_limit_mw"]
    if row["kind"] == "metered" and limit_mw and duration_ns >= _LONG_ENOUGH_NS:
        power_mw = mean_power_mw(row["energy_uj"], duration_ns)
        if power_mw > _POWER_MARGIN * limit_mw:
            yield Finding("plausible", where, f"{power_mw} mW over {duration_ns} ns, the limit is {limit_mw} mW")


def _check_unknown(where: str) -> Iterator[Finding]:
    yield Finding("missing is never a number", where, "is settled though its energy is unknown")


def _check_settlement(row: Row, where: str) -> Iterator[Finding]:
    for account in ("active", "standing", "idle", "unattributed"):
        if row[f"{account}_uj"] < 0:
            yield Finding("none is negative", where, f"books {row[f'{account}_uj']} µJ as {account}")
    booked_uj = row["active_uj"] + row["standing_uj"] + row["idle_uj"] + row["unattributed_uj"]
    if booked_uj != row["energy_uj"] or row["booked_uj"] != row["energy_uj"]:
        off_uj = (row["energy_uj"] - booked_uj) or (row["energy_uj"] - row["booked_uj"])
        yield Finding("conservation", where, f"{off_uj} µJ of the window are on no account", off_uj)
    if (row["charges_found"] or 0) != row["charges"]:
        yield Finding("conservation", where, f"{row['charges_found'] or 0} charges found, {row['charges']} were booked")
    for account in ("active", "standing"):
        off_uj = row[f"{account}_uj"] - (row[f"charged_{account}_uj"] or 0)
        if off_uj:
            yield Finding("conservation", where, f"charges differ from the {account} total by {off_uj} µJ", off_uj)
    off_uj = row["unattributed_uj"] - (row["reasons_uj"] or 0)
    if off_uj:
        yield Finding("conservation", where, f"reasons differ from the unattributed total by {off_uj} µJ", off_uj)


def check_queries(rows: Iterable[Row]) -> Iterator[Finding]:
    """Rows are queries with their energy and the sum of their charges: a difference is a finding, account by account."""
    for row in rows:
        for account in ("active", "standing"):
            off_uj = (row[f"{account}_uj"] or 0) - row[f"charged_{account}_uj"]
            if off_uj:
                where = f"query {row['query_id']}"
                yield Finding("conservation", where, f"holds {off_uj} µJ {account} more than its charges", off_uj)


def check_orphans(rows: Iterable[Row]) -> Iterator[Finding]:
    """Rows are charges whose query is gone: each is a finding."""
    for row in rows:
        what = f"{row['charges']} charges of {row['energy_uj']} µJ belong to a query that is not in the ledger"
        yield Finding("conservation", f"query number {row['query_no']}", what, row["energy_uj"])


def check_days(rows: Iterable[Row]) -> Iterator[Finding]:
    """Daily totals, which outlive the rows they came from, equal what was settled."""
    for row in rows:
        for account in ("active", "standing", "idle", "unattributed"):
            off_uj = (row[f"day_{account}_uj"] or 0) - (row[f"{account}_uj"] or 0)
            if off_uj:
                where = f"GPU {row['uuid']} {account}"
                yield Finding("conservation", where, f"daily totals hold {off_uj} µJ more than the settlements", off_uj)


def check_closings(rows: Iterable[Row]) -> Iterator[Finding]:
    """Closed hours ordered by GPU and hour: each carries the hash of the one before and its own."""
    chain: dict[int, str] = {}
    for row in rows:
        where = f"GPU number {row['gpu_id']} hour {row['hour_ns']}"
        if row["previous_hash"] != chain.get(row["gpu_id"], GENESIS):
            yield Finding("tamper evidence", where, "is not chained to the closed hour before")
        if row["hash"] != closing_hash(row):
            yield Finding("tamper evidence", where, "its hash does not fit its contents")
        chain[row["gpu_id"]] = row["hash"]


_HASHED: Final = (
    "gpu_id", "hour_ns", "windows", "energy_uj", "active_uj", "standing_uj", "idle_uj", "unattributed_uj", "detail",
    "previous_hash",
)  # fmt: skip


def closing_hash(row: Row) -> str:
    """SHA-256 (hex) over a closed hour's contents and the hash before it."""
    return hashlib.sha256(json.dumps([row[k] for k in _HASHED]).encode()).hexdigest()
