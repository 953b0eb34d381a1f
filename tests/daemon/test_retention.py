"""Detail goes, sums stay: hours close with a chained hash, and the audit finds nothing before, between and after."""

from pathlib import Path

import pytest

from energyd.daemon.audit import GENESIS
from energyd.daemon.ledger import Ledger
from energyd.daemon.records import Charge, Settlement, Slice, Source, Unattributed, Window, WindowKind
from energyd.daemon.retention import NS_PER_HOUR, Retention
from energyd.daemon.units import NS_PER_S
from energyd.daemon.wire import Close, Hello, Open, RunEnd, RunStart, Sample
from tests.faults.rig import BEGIN_NS, HOST, findings, gpu_named

FIRST_HOUR_NS = BEGIN_NS // NS_PER_HOUR * NS_PER_HOUR
HOURS = 5
WINDOWS = 12
"""Windows an hour; 5 minutes each."""
SPAN_NS = NS_PER_HOUR // WINDOWS
KEEP = Retention.from_days(shape=1 / 24, windows=2 / 24, queries=3 / 24)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Five hours of one GPU, settled, with a query in each window."""
    made = Ledger.open(tmp_path / "e.db")
    made.register_host(HOST, "name", BEGIN_NS)
    made.register_gpu(HOST, gpu_named(), BEGIN_NS)
    made.register_worker(HOST, Hello("w", "boot", 0, 0, 1, ()), 0)
    for seq in range(HOURS * WINDOWS):
        start_ns = FIRST_HOUR_NS + seq * SPAN_NS
        end_ns = start_ns + SPAN_NS
        slices = (Slice(start_ns, end_ns, 600_000),)
        window = Window(
            "GPU-a", 0, seq, start_ns, end_ns, seq * 600, (seq + 1) * 600, 600_000, 1, WindowKind.METERED, Source.EMULATED,
            slices,
        )  # fmt: skip
        made.append_windows([window], "boot")
        ended = Close(query_id=f"q{seq}", end_ns=end_ns - NS_PER_S, status="ok", http_status=200, served=f"m{seq % 3}")
        made.record(HOST, "w", 2 * seq + 1, [Open(f"q{seq}", start_ns, "s", "t"), ended], end_ns)
        charge = Charge(f"q{seq}", 300_000, 100_000)
        made.settle(
            Settlement("GPU-a", 0, seq, 600_000, 150_000, {Unattributed.LOAD: 50_000}, (charge,), "time", None, 1),
            end_ns,
            0,
        )
        made.finish([(f"q{seq}", None, 0.1, "emulated")])
    return made


def at_hour(hour: float) -> int:
    """Ledger time of that many hours after the first."""
    return FIRST_HOUR_NS + round(hour * NS_PER_HOUR)


def closings(ledger: Ledger) -> list[tuple[int, int, int, str, str]]:
    """Hour, windows, energy and hashes of the closed hours."""
    sql = "SELECT hour_ns, windows, energy_uj, previous_hash, hash FROM closings ORDER BY hour_ns"
    return list(ledger.db.execute(sql).fetchall())


def count(ledger: Ledger, table: str) -> int:
    """Rows of a table."""
    return int(ledger.db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])


def test_hours_close_one_after_the_other_and_the_books_stay_proved(ledger: Ledger) -> None:
    """As time goes on, hours close in order, chained; no step leaves a finding, and no total changes."""
    with ledger:
        totals = {(t.account, t.model): t.energy_uj for t in ledger.account_totals()}
        metered = ledger.meter_totals()[0].settled_uj
        assert findings(ledger) == []
        for step in range(1, 33):
            KEEP.apply(ledger, at_hour(step / 4))
            assert findings(ledger) == [], step
            assert {(t.account, t.model): t.energy_uj for t in ledger.account_totals()} == totals
            assert ledger.meter_totals()[0].settled_uj == metered
        rows = closings(ledger)
        assert [hour for hour, *_ in rows] == [at_hour(h) for h in range(HOURS)]
        assert sum(windows for _, windows, *_ in rows) == HOURS * WINDOWS - 1
        previous = GENESIS
        for _, _, _, before, own in rows:
            assert before == previous
            previous = own


def test_the_newest_window_survives_and_the_meter_goes_on_from_it(ledger: Ledger) -> None:
    """However long the daemon was away: the last anchor is there, so the outage is booked, not the whole counter."""
    with ledger:
        KEEP.apply(ledger, at_hour(1_000_000))
        resume = ledger.resume("GPU-a", "boot")
        assert resume is not None
        assert (resume.epoch, resume.next_seq, resume.anchor.counter_mj) == (0, HOURS * WINDOWS, HOURS * WINDOWS * 600)
        assert resume.same_boot
        assert findings(ledger) == []


def test_nothing_unsettled_is_closed(ledger: Ledger) -> None:
    """An hour with a window that is not settled stays open, and so do the hours after it."""
    with ledger:
        ledger.db.execute("DELETE FROM unattributed WHERE seq = 14")
        ledger.db.execute("DELETE FROM charges WHERE seq = 14")
        ledger.db.execute("DELETE FROM settlements WHERE seq = 14")
        assert KEEP.apply(ledger, at_hour(100)) == 1
        assert len(closings(ledger)) == 1


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE closings SET idle_uj = idle_uj + 1, energy_uj = energy_uj + 1 WHERE hour_ns = {hour}",
        "UPDATE closings SET windows = windows + 1 WHERE hour_ns = {hour}",
        "UPDATE closings SET detail = replace(detail, '\"t\"', '\"u\"') WHERE hour_ns = {hour}",
        "UPDATE closings SET active_uj = active_uj - 5, standing_uj = standing_uj + 5 WHERE hour_ns = {hour}",
        "UPDATE closings SET hash = 'x' WHERE hour_ns = {hour}",
        "DELETE FROM closings WHERE hour_ns = {hour}",
    ],
)
def test_tampering_with_a_closed_hour_is_found(ledger: Ledger, change: str) -> None:
    """A closed hour that was changed or taken away breaks its hash or the chain."""
    with ledger:
        KEEP.apply(ledger, at_hour(6))
        assert len(closings(ledger)) == 4
        ledger.db.execute(change.format(hour=at_hour(1)))
        assert "tamper evidence" in {f.law for f in findings(ledger)}


def test_a_run_keeps_the_windows_of_its_span(ledger: Ledger) -> None:
    """Shapes and windows of a run stay until the run is released; then they go like the others."""
    with ledger:
        ledger.start_run(HOST, RunStart("r", "reasoning", "m", 1, "u", {}), at_hour(1.2))
        ledger.add_samples("r", [Sample(0, "q15", "measured", at_hour(1.25), at_hour(1.3), ok=True, http_status=200)])
        ledger.end_run(RunEnd("r", "complete", at_hour(1.25), at_hour(1.5), {}))
        KEEP.apply(ledger, at_hour(8))
        assert [hour for hour, *_ in closings(ledger)] == [at_hour(0)]
        shaped = [r[0] for r in ledger.db.execute("SELECT seq FROM windows WHERE shape IS NOT NULL").fetchall()]
        assert shaped == [14, 15, 16, 17]
        assert findings(ledger) == []
        ledger.db.execute("UPDATE runs SET released = 1")
        KEEP.apply(ledger, at_hour(8))
        assert len(closings(ledger)) == HOURS
        assert ledger.query("q15") is not None  # the sample still names it
        assert ledger.query("q16") is None
        assert findings(ledger) == []


def test_a_run_that_nobody_releases_pins_for_a_bounded_time(ledger: Ledger) -> None:
    """Hours close oldest first: a pin for ever would keep all later detail, so it ends 90 days after the run (here 9 hours)."""
    keep = Retention.from_days(shape=1 / 24, windows=2 / 24, queries=3 / 24, runs=9 / 24)
    with ledger:
        ledger.start_run(HOST, RunStart("r", "reasoning", "m", 1, "u", {}), at_hour(1.2))
        ledger.end_run(RunEnd("r", "complete", at_hour(1.25), at_hour(1.5), {}))
        keep.apply(ledger, at_hour(10))
        assert len(closings(ledger)) == 1
        keep.apply(ledger, at_hour(11))
        assert len(closings(ledger)) == HOURS
        assert findings(ledger) == []


def test_shapes_go_first_and_only_of_settled_windows(ledger: Ledger) -> None:
    """After their age the 20 ms shapes are forgotten; the windows and their energy stay."""
    with ledger:
        ledger.db.execute("DELETE FROM unattributed WHERE seq = 3")
        ledger.db.execute("DELETE FROM charges WHERE seq = 3")
        ledger.db.execute("DELETE FROM settlements WHERE seq = 3")
        Retention.from_days(shape=1 / 24, windows=1000, queries=1000).apply(ledger, at_hour(3))
        kept = [r[0] for r in ledger.db.execute("SELECT seq FROM windows WHERE shape IS NOT NULL").fetchall()]
        assert kept == [3, *range(2 * WINDOWS - 1, HOURS * WINDOWS)]
        assert count(ledger, "windows") == HOURS * WINDOWS


def test_queries_go_after_their_age_and_daily_totals_stay(ledger: Ledger) -> None:
    """A year later the queries are gone; how many there were and what they used is still known."""
    with ledger:
        before = [dict(r) for r in ledger.query_totals()]
        KEEP.apply(ledger, at_hour(6))
        KEEP.apply(ledger, at_hour(6))
        left = {r[0] for r in ledger.db.execute("SELECT query_id FROM queries").fetchall()}
        assert left == {f"q{seq}" for seq in range(3 * WINDOWS, HOURS * WINDOWS)}
        assert [dict(r) for r in ledger.query_totals()] == before
        assert findings(ledger) == []


def test_a_query_keeps_the_sum_of_its_dropped_charges(ledger: Ledger) -> None:
    """When the hour of a query is closed, the audit still proves its energy, from the sum that was kept of its charges."""
    with ledger:
        charged = ledger.energy_of("q5")
        KEEP.apply(ledger, at_hour(3.4))
        assert count(ledger, "charges") < HOURS * WINDOWS
        assert ledger.energy_of("q5") == charged
        ledger.db.execute("UPDATE queries SET active_uj = active_uj + 1 WHERE query_id = 'q5'")
        assert [f.residual_uj for f in findings(ledger)] == [1]


def test_a_second_pass_closes_nothing_twice(ledger: Ledger) -> None:
    """Applying it again at the same time does nothing."""
    with ledger:
        assert KEEP.apply(ledger, at_hour(5)) > 0
        rows = closings(ledger)
        assert KEEP.apply(ledger, at_hour(5)) == 0
        assert closings(ledger) == rows
