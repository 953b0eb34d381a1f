"""When a figure becomes final, and what happens when somebody does not say how it ended."""

import os
from pathlib import Path

import pytest

from energyd.daemon import wire
from energyd.daemon.errors import LedgerError
from energyd.daemon.ledger import Ledger
from energyd.daemon.records import QueryStatus, Unattributed
from energyd.daemon.settlement import Limits, rel_u
from energyd.daemon.units import NS_PER_S
from tests.faults.rig import (
    BEGIN_NS,
    BUSY_W,
    IDLE_W,
    WORKER,
    Card,
    Desk,
    at,
    audited,
    closed,
    findings,
    gpu_named,
    opened,
)

DEAD_PID = 2**22 - 1
"""Beyond what a kernel with default settings hands out on this kind of machine; checked by the test that needs it."""


def test_a_figure_is_final_within_three_seconds_when_no_long_query_is_open(tmp_path: Path) -> None:
    """With windows of 1 s, heartbeats of 0.5 s and ticks of 0.25 s, a query is final at most 3 s after its end."""
    card = Card(gpu_named())
    with Desk(tmp_path / "e.db", card) as desk:
        desk.hello()
        desk.run(3)
        for i in range(12):
            start_s = desk.now_s
            card.busy.append((start_s, start_s + 0.25))
            desk.say(opened(f"q{i}", start_s))
            desk.run(0.25)
            desk.say(closed(f"q{i}", desk.now_s))
            ended_s = desk.now_s
            while not desk.query(f"q{i}")["final"]:
                desk.run(0.25)
                assert desk.now_s - ended_s <= 3
            desk.run(0.25 * (i % 4))
        assert findings(desk.ledger) == []


def test_a_query_alone_gets_what_it_caused_and_the_idle_watts_of_its_time(tmp_path: Path) -> None:
    """One query that makes the GPU draw 200 W more for 2 s causes 400 J; 100 W for 2 s stand by; nothing is lost."""
    card = Card(gpu_named(), busy=[(5.0, 7.0)])
    with Desk(tmp_path / "e.db", card) as desk:
        desk.hello()
        desk.run(5)
        desk.say(opened("q", 5))
        desk.run(2)
        desk.say(closed("q", 7))
        desk.run(4)
        row = desk.query("q")
        assert row["final"]
        assert row["status"] == "ok"
        assert row["active_uj"] == pytest.approx((BUSY_W - IDLE_W) * 2 * 1e6, rel=0.02)
        assert row["standing_uj"] == pytest.approx(IDLE_W * 2 * 1e6, rel=0.02)
    audited(tmp_path / "e.db")


def test_a_long_stream_leaves_the_others_provisional_but_visible(tmp_path: Path) -> None:
    """While a stream of 5 minutes is open, a query that ended is not final, but has a figure all the same.

    The unsettled joules and their age are there to export; when the stream ends, both are final with what was shown.
    """
    card = Card(gpu_named(), busy=[(5.0, 7.0)])
    with Desk(tmp_path / "e.db", card) as desk:
        desk.hello()
        desk.run(4)
        desk.say(opened("stream", 4))
        desk.run(3)
        desk.say(opened("short", 5), closed("short", 7))
        desk.run(298)
        row = desk.query("short")
        assert not row["final"]
        assert row["active_uj"] is None
        active_uj, standing_uj = desk.books.provisional_uj("short", desk.now_ns)
        assert active_uj == pytest.approx((BUSY_W - IDLE_W) * 2 * 1e6 / 2, rel=0.05)  # the other half is the stream's
        assert standing_uj > 0
        assert sum(desk.books.unsettled_uj().values()) == pytest.approx(IDLE_W * 300 * 1e6, rel=0.03)
        oldest_ns = desk.books.oldest_unsettled_ns()
        assert oldest_ns is not None
        assert 290 * NS_PER_S < desk.now_ns - oldest_ns < 310 * NS_PER_S
        assert findings(desk.ledger) == []
        desk.say(closed("stream", desk.now_s))
        desk.run(4)
        assert desk.query("stream")["final"]
        assert desk.query("short")["final"]
        assert desk.query("short")["active_uj"] == pytest.approx(active_uj, abs=2)
        assert desk.books.provisional_uj("short", desk.now_ns) == (0, 0)
        assert desk.query("short")["status"] == "ok"
    audited(tmp_path / "e.db")


def test_beyond_the_horizon_an_open_query_is_partial_and_holds_nobody_up(tmp_path: Path) -> None:
    """Windows older than the horizon settle under an open query, which counts with what it did so far: `partial`."""
    limits = Limits(horizon_ns=20 * NS_PER_S, greeting_ns=0)
    with Desk(tmp_path / "e.db", Card(gpu_named(), busy=[(4.0, 40.0)]), limits=limits) as desk:
        desk.hello()
        desk.run(4)
        desk.say(opened("long", 4), opened("short", 5), closed("short", 6))
        desk.run(30)
        assert desk.query("short")["final"]
        assert desk.query("short")["status"] == "ok"
        assert not desk.query("long")["final"]
        assert desk.query("long")["active_uj"] > 0
        desk.say(closed("long", desk.now_s))
        desk.run(4)
        assert desk.query("long")["status"] == QueryStatus.PARTIAL
        assert desk.query("long")["final"]
    audited(tmp_path / "e.db")


def test_a_query_open_over_the_horizon_and_a_restart_is_still_partial(tmp_path: Path) -> None:
    """That a window was settled under an open query is not forgotten when the daemon is killed."""
    limits = Limits(horizon_ns=5 * NS_PER_S, greeting_ns=0)
    card = Card(gpu_named())
    with Desk(tmp_path / "e.db", card, limits=limits) as desk:
        desk.hello()
        desk.run(2)
        desk.say(opened("long", 2))
        desk.run(12)
        assert desk.query("long")["active_uj"] is not None
    with Desk(tmp_path / "e.db", card, limits=limits, now_s=16) as desk:
        desk.hello()
        desk.run(2)
        desk.say(closed("long", 18))
        desk.run(4)
        assert desk.query("long")["status"] == QueryStatus.PARTIAL


def test_the_horizon_counts_only_time_in_touch(tmp_path: Path) -> None:
    """While a worker is silent, its open query does not grow older: after the silence the horizon is where it was."""
    limits = Limits(horizon_ns=20 * NS_PER_S, greeting_ns=0)
    with Desk(tmp_path / "e.db", limits=limits) as desk:
        desk.hello()
        desk.run(2)
        desk.say(opened("long", 2))
        desk.run(10)
        desk.run(60, silent=True)
        desk.run(5)
        assert desk.query("long")["active_uj"] is None
        desk.run(20)
        assert desk.query("long")["active_uj"] is not None


def test_a_late_query_is_stored_without_energy_and_counted(tmp_path: Path) -> None:
    """A query that is told of after its windows were settled is stored once, `late`, energy NULL; nothing reopens."""
    with Desk(tmp_path / "e.db") as desk:
        desk.hello()
        desk.run(20)
        before = len(desk.settled)
        desk.say(opened("late", 5), closed("late", 6))
        desk.run(1)
        row = desk.query("late")
        assert (row["status"], row["active_uj"], row["standing_uj"], row["final"]) == ("late", None, None, 1)
        assert desk.books.late_queries == 1
        assert {s.seq for s in desk.settled[before:]}.isdisjoint({s.seq for s in desk.settled[:before]})
        totals = desk.ledger.query_totals()
        assert [(t["status"], t["queries"], t["energy_unknown"]) for t in totals] == [("late", 1, 1)]
    with Desk(tmp_path / "e.db", now_s=22) as desk:
        assert desk.books.late_queries == 1  # a counter does not fall at a restart
    audited(tmp_path / "e.db")


def test_a_query_half_of_whose_windows_are_settled_is_late_with_the_rest(tmp_path: Path) -> None:
    """A late query gets what its windows that are not settled yet give it."""
    with Desk(tmp_path / "e.db", Card(gpu_named(), busy=[(1.0, 30.0)])) as desk:
        desk.hello()
        desk.run(20)
        desk.say(opened("late", 10))
        desk.run(5)
        desk.say(closed("late", 25))
        desk.run(3)
        row = desk.query("late")
        assert row["status"] == "late"
        assert 0 < row["standing_uj"] + row["active_uj"] < 300 * 15 * 1e6 * 0.5
    audited(tmp_path / "e.db")


def test_a_worker_that_died_without_a_spool_leaves_partial_queries(tmp_path: Path) -> None:
    """Nobody waits for a dead worker without a spool: its open queries end at the last event seen, `partial`."""
    with pytest.raises(ProcessLookupError):
        os.kill(DEAD_PID, 0)
    with Desk(tmp_path / "e.db", Card(gpu_named(), busy=[(2.0, 5.0)])) as desk:
        desk.hello(pid=DEAD_PID)
        desk.run(2)
        desk.say(opened("q", 2), wire.Progress("q", at(3), (0, 500_000, 500_000)))
        desk.talking.clear()
        desk.run(12)
        row = desk.query("q")
        assert (row["status"], row["final"], row["ended_ns"]) == ("partial", 1, at(4) + 1)
        assert row["active_uj"] == pytest.approx(200 * 2 * 1e6, rel=0.1)
        assert desk.books.workers == 0
        assert [e["kind"] for e in desk.ledger.events()] == ["worker-lost"]
    audited(tmp_path / "e.db")


def test_a_silent_worker_with_a_spool_is_waited_for_at_most_the_recovery_wait(tmp_path: Path) -> None:
    """Windows wait for a dead worker's spool, but not longer than the recovery wait."""
    (tmp_path / "w1.spool").touch()
    limits = Limits(recovery_wait_ns=30 * NS_PER_S, greeting_ns=0)
    with Desk(tmp_path / "e.db", limits=limits) as desk:
        desk.hello(pid=DEAD_PID, spool=str(tmp_path / "w1.spool"))
        desk.run(2)
        desk.say(opened("q", 2))
        desk.talking.clear()
        settled = len(desk.settled)
        desk.run(28)
        assert len(desk.settled) - settled <= 1
        desk.run(8)
        assert len(desk.settled) - settled > 20
        assert desk.query("q")["status"] == "partial"


def test_a_spool_that_the_ledger_does_not_know_is_waited_for_after_a_start(tmp_path: Path) -> None:
    """A worker that began and died while the daemon was away left a spool: settling waits for it, bounded."""
    (tmp_path / "stranger.spool").touch()
    limits = Limits(recovery_wait_ns=20 * NS_PER_S, greeting_ns=0)
    with Desk(tmp_path / "e.db", limits=limits, spool_dir=tmp_path) as desk:
        desk.run(15)
        assert desk.settled == []
        desk.run(10)
        assert desk.settled != []


def test_a_worker_given_up_for_lost_that_returns_changes_nothing_that_was_settled(tmp_path: Path) -> None:
    """Its queries ended when it was given up; chunks and ends that come later are stored nowhere, twice counted never."""
    limits = Limits(recovery_wait_ns=10 * NS_PER_S, greeting_ns=0)
    with Desk(tmp_path / "e.db", limits=limits) as desk:
        desk.hello()
        desk.run(2)
        desk.say(opened("q", 2))
        desk.run(20, silent=True)
        assert desk.query("q")["status"] == "partial"
        assert not desk.books.knows(WORKER)
        desk.hello()
        desk.say(wire.Progress("q", at(3), (0, 1000)), closed("q", 21))
        desk.run(4)
        assert desk.query("q")["status"] == "partial"
        assert desk.ledger.db.execute("SELECT COUNT(*) FROM timelines").fetchone()[0] == 0
        assert sum(t["queries"] for t in desk.ledger.query_totals()) == 1
    audited(tmp_path / "e.db")


def test_batches_that_overlap_count_once(tmp_path: Path) -> None:
    """The same events under the same numbers are taken once, in whatever batches they come."""
    with Desk(tmp_path / "e.db") as desk:
        desk.hello()
        desk.run(3)
        events = [e for i in range(4) for e in (opened(f"q{i}", 1 + i / 10), closed(f"q{i}", 2 + i / 10))]

        def send(first: int, last: int) -> int:
            batch = wire.Batch(WORKER, first, tuple(events[first - 1 : last]), desk.now_ns)
            return desk.books.take(batch, desk.now_ns)

        assert [send(1, 3), send(1, 3), send(2, 5), send(5, 8), send(1, 8), send(3, 4)] == [3, 0, 2, 3, 0, 0]
        desk.talking[WORKER] = 9
        desk.run(4)
        assert sorted(desk.finals) == ["q0", "q1", "q2", "q3"]
        assert sum(t["queries"] for t in desk.ledger.query_totals()) == 4


def test_a_heartbeat_acknowledges_no_event(tmp_path: Path) -> None:
    """A batch without events moves the watermark, never the number up to which events are committed."""
    with Desk(tmp_path / "e.db") as desk:
        desk.hello()
        desk.run(2)
        desk.books.take(wire.Batch(WORKER, 50, (), desk.now_ns + 5 * NS_PER_S), desk.now_ns)
        assert desk.hello() == 0


def test_a_batch_of_another_boot_is_placed_by_the_offset_of_that_boot(tmp_path: Path) -> None:
    """Monotonic times of a worker of another boot are moved by that boot's own offset."""
    with Desk(tmp_path / "e.db", now_s=100) as desk:
        desk.books.hello(wire.Hello("old", "boot-0", 7 * NS_PER_S, at(50), 0, (), adopted=True), desk.now_ns)
        event = wire.Open("q", 2 * NS_PER_S, "server")
        desk.books.take(wire.Batch("old", 1, (event,), 8 * NS_PER_S), desk.now_ns)
        assert desk.query("q")["started_ns"] == at(45)


def test_a_boot_has_one_offset_also_for_the_worker_that_outlived_the_daemon(tmp_path: Path) -> None:
    """If the daemon ran in that boot, the worker's times go by the offset that its windows went by.

    The wall clock may have been set in between.
    """
    with Desk(tmp_path / "e.db", now_s=100) as desk:
        desk.ledger.boot_offset("host", "boot-0", BEGIN_NS, 0)
        desk.books.hello(wire.Hello("old", "boot-0", 7 * NS_PER_S, at(50), 0, (), adopted=True), desk.now_ns)
        desk.books.take(wire.Batch("old", 1, (wire.Open("q", 2 * NS_PER_S, "server"),), 8 * NS_PER_S), desk.now_ns)
        assert desk.query("q")["started_ns"] == at(2)


def test_after_a_restart_everything_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Open queries, their chunks and unsettled windows are read back; the interval without a daemon is one outage."""
    card = Card(gpu_named(), busy=[(2.0, 32.0)])
    with Desk(tmp_path / "e.db", card) as desk:
        desk.hello()
        desk.run(2)
        desk.say(opened("q", 2), wire.Progress("q", at(3), (0, 250_000)))
        desk.run(5)
    with Desk(tmp_path / "e.db", card, now_s=30) as desk:
        assert desk.hello() == 2
        desk.run(2)
        assert desk.books._book.open_queries()[0].service(desk.now_ns).chunks_ns == (at(3), at(3.25))
        desk.say(closed("q", 32))
        desk.run(4)
        assert desk.query("q")["final"]
        outages = [s for s in desk.settled if s.unattributed_uj]
        assert [list(s.unattributed_uj) for s in outages] == [[Unattributed.OUTAGE]]
        assert outages[0].energy_uj == pytest.approx(BUSY_W * 23.0 * 1e6, rel=0.06)
    totals = audited(tmp_path / "e.db")
    assert totals["unattributed:outage"] == outages[0].energy_uj


def test_a_counter_that_fell_is_a_gap_and_a_reset(tmp_path: Path) -> None:
    """The old epoch ends in a gap with NULL energy; the new one's first value is booked to unattributed(outage)."""
    card = Card(gpu_named())
    with Desk(tmp_path / "e.db", card) as desk:
        desk.hello()
        desk.run(5)
        card.born_s = 5.2
        desk.run(5)
        kinds = [r[0] for r in desk.ledger.db.execute("SELECT kind FROM windows ORDER BY epoch, seq").fetchall()]
        assert kinds == ["metered"] * 4 + ["gap", "reset"] + ["metered"] * 4
        gap = desk.ledger.db.execute("SELECT energy_uj FROM windows WHERE kind = 'gap'").fetchone()
        assert gap == (None,)
        assert {e["kind"] for e in desk.ledger.events()} == {"gap", "reset"}
        assert [e["kind"] for e in desk.ledger.events()].count("reset") == 1
    totals = audited(tmp_path / "e.db")
    assert totals["unattributed:outage"] == pytest.approx(IDLE_W * 0.8 * 1e6, rel=0.01)


def test_another_boot_is_another_epoch(tmp_path: Path) -> None:
    """After a reboot the counter is not compared with the old one, even where it is higher."""
    card = Card(gpu_named())
    with Desk(tmp_path / "e.db", card) as desk:
        desk.run(4)
    with Desk(tmp_path / "e.db", card, now_s=60, boot="boot-2") as desk:
        desk.run(4)
        epochs = desk.ledger.db.execute("SELECT epoch, boot_id, reason FROM epochs ORDER BY epoch").fetchall()
        assert epochs == [(0, "boot-1", "first seen"), (1, "boot-2", "reset")]
        assert [w["kind"] for w in desk.ledger.audit_windows()][2:5] == ["metered", "gap", "reset"]
    audited(tmp_path / "e.db")


def test_a_lost_gpu_does_not_keep_the_others_queries_open_for_ever(tmp_path: Path) -> None:
    """A GPU off the bus gives no window; after the horizon a query that might have run on it is final, `partial`."""
    near, far = Card(gpu_named("GPU-a", 0)), Card(gpu_named("GPU-b", 1))
    limits = Limits(horizon_ns=20 * NS_PER_S, greeting_ns=0)
    with Desk(tmp_path / "e.db", near, far, limits=limits) as desk:
        desk.hello()
        desk.run(3)
        far.lost = True
        desk.run(2)
        desk.say(opened("q", 5))
        desk.run(1)
        desk.say(closed("q", 6))
        desk.run(15)
        assert not desk.query("q")["final"]
        desk.run(10)
        assert desk.query("q")["status"] == "partial"
        assert desk.query("q")["standing_uj"] == pytest.approx(IDLE_W * 1e6, rel=0.05)
        far.lost = False
        desk.meters["GPU-b"].lost()
        desk.run(3)
        assert findings(desk.ledger) == []


def test_the_same_windows_twice_are_settled_once(tmp_path: Path) -> None:
    """A ledger that refuses gets the same windows again: they are pending once, and settled once."""
    with Desk(tmp_path / "e.db") as desk:
        meter, card = desk.meters["GPU-a"], desk.cards[0]
        meter.feed(card.reading(1))
        windows = meter.feed(card.reading(2))
        desk.books.add_windows(windows)
        desk.books.add_windows(windows)
        assert len(desk.books._gpus["GPU-a"].pending) == 1
        desk.now_s = 2
        desk.run(2)
        assert [s.seq for s in desk.settled] == [0, 1, 2]


def test_a_full_disk_loses_nothing_and_teaches_the_idle_floor_nothing_twice(tmp_path: Path) -> None:
    """While the ledger refuses, windows stay and are tried again; when there is room, all are booked, once."""
    with Desk(tmp_path / "e.db") as desk:
        desk.hello()
        desk.run(5)
        desk.run(4, advance=False)
        db = desk.ledger.db
        db.execute("CREATE TEMP TRIGGER full BEFORE INSERT ON main.settlements BEGIN SELECT RAISE(ABORT, 'full'); END")
        floor_seen = len(desk.books._gpus["GPU-a"].floor._recent)
        for _ in range(5):
            with pytest.raises(LedgerError):
                desk.books.advance(desk.now_ns)
        assert len(desk.books._gpus["GPU-a"].floor._recent) - floor_seen <= 1
        db.execute("DROP TRIGGER full")
        desk.run(2)
        assert len(desk.settled) == len({s.seq for s in desk.settled})
    audited(tmp_path / "e.db")


def test_a_bye_that_the_ledger_refused_can_be_said_again(tmp_path: Path) -> None:
    """What a full disk refused of a goodbye is not half done: the worker is still known, its query still open."""
    with Desk(tmp_path / "e.db") as desk:
        desk.hello()
        desk.run(2)
        desk.say(opened("q", 2))
        db = desk.ledger.db
        db.execute("CREATE TEMP TRIGGER full BEFORE UPDATE ON main.queries BEGIN SELECT RAISE(FAIL, 'full'); END")
        with pytest.raises(Exception, match="full"):
            desk.books.bye(WORKER, desk.now_ns)
        assert desk.books.knows(WORKER)
        assert desk.books.open_queries == 1
        db.execute("DROP TRIGGER full")
        desk.talking.clear()
        desk.books.bye(WORKER, desk.now_ns)
        desk.run(4)
        assert desk.query("q")["status"] == "partial"
        assert desk.query("q")["final"]


def test_events_dropped_by_a_worker_that_is_gone_still_count(tmp_path: Path) -> None:
    """The number of dropped events never falls: not when a worker leaves, not at a restart."""
    with Desk(tmp_path / "e.db") as desk:
        for name, dropped in (("a", 3), ("b", 4)):
            desk.hello(name)
            event = opened(f"q-{name}", 0)
            desk.books.take(wire.Batch(name, 1, (event,), desk.now_ns, dropped=dropped), desk.now_ns)
        assert desk.books.dropped_events == 7
        desk.books.bye("a", desk.now_ns)
        assert desk.books.dropped_events == 7
    with Desk(tmp_path / "e.db", now_s=5) as desk:
        assert desk.books.dropped_events == 7


def test_a_name_of_a_failed_request_is_nobodys_model(tmp_path: Path) -> None:
    """Clients can ask for any name: without a 2xx answer the energy goes to `other`, in books and metrics alike."""
    seen: list[str] = []
    with Desk(tmp_path / "e.db") as desk:
        desk.books._on_settled = lambda _s, models: seen.extend(models.values())
        desk.hello()
        desk.run(2)
        desk.say(opened("q", 1), closed("q", 2, status="failed", http_status=404, requested="invented", served=None))
        desk.run(4)
        assert set(seen) == {"other"}
        assert desk.query("q")["model"] == "other"


def test_a_query_on_no_metered_gpu_is_final_at_once_without_energy(tmp_path: Path) -> None:
    """A server on GPUs that are not metered here: the query is counted, its energy stays NULL."""
    with Desk(tmp_path / "e.db") as desk:
        server = wire.Server("server", "http://x", ("GPU-elsewhere",))
        desk.books.hello(wire.Hello(WORKER, desk.boot, 0, 0, 1, (server,)), desk.now_ns)
        desk.talking[WORKER] = 1
        desk.say(opened("q", 0), closed("q", 0.1))
        desk.run(0.25)
        assert desk.query("q")["final"]
        assert desk.query("q")["active_uj"] is None


def test_two_gpus_charge_a_query_that_runs_on_both(tmp_path: Path) -> None:
    """A query of a server on all GPUs gets its part of each; a query of a server on one GPU only of that."""
    with Desk(tmp_path / "e.db", Card(gpu_named("GPU-a", 0)), Card(gpu_named("GPU-b", 1))) as desk:
        one = wire.Server("one", "http://x", ("1",))
        desk.books.hello(wire.Hello(WORKER, desk.boot, 0, 0, 1, (one,)), desk.now_ns)
        desk.talking[WORKER] = 1
        desk.run(3)
        desk.say(wire.Open("qa", at(3), "all"), wire.Open("qb", at(3), "one"))
        desk.run(1)
        desk.say(closed("qa", 4), closed("qb", 4))
        desk.run(4)
        rows = desk.ledger.db.execute(
            "SELECT DISTINCT q.query_id, g.uuid FROM charges c JOIN queries q USING (query_no) JOIN gpus g USING (gpu_id)"
            " WHERE c.standing_uj > 0 ORDER BY 1, 2"
        ).fetchall()
        assert rows == [("qa", "GPU-a"), ("qa", "GPU-b"), ("qb", "GPU-b")]
    audited(tmp_path / "e.db")


def test_the_stated_uncertainty_grows_for_short_queries_and_rival_policies() -> None:
    """The shorter a query, the less its edges are known; what policies disagree about counts by half; 0 µJ has none."""
    assert rel_u(0, 0, NS_PER_S) is None
    long_u, short_u, disputed_u = (
        rel_u(10**6, 0, 60 * NS_PER_S),
        rel_u(10**6, 0, NS_PER_S),
        rel_u(10**6, 10**6, NS_PER_S),
    )
    assert long_u is not None
    assert short_u is not None
    assert disputed_u is not None
    assert 0.003 <= long_u < short_u < 0.03
    assert disputed_u > 0.5


def test_a_second_daemon_on_the_same_books_is_refused(tmp_path: Path) -> None:
    """Two writers of one ledger are impossible; the message names the process that has it."""
    with Desk(tmp_path / "e.db"), pytest.raises(LedgerError, match=rf"process {__import__('os').getpid()}\b"):
        Ledger.open(tmp_path / "e.db")


def test_a_window_that_breaks_a_law_is_set_aside_and_the_next_ones_settle(tmp_path: Path) -> None:
    """A query that vanished from the ledger cannot be charged: its window goes to nobody, an event says so, nothing halts."""
    card = Card(gpu_named(), busy=[(5.0, 7.0)])
    with Desk(tmp_path / "e.db", card) as desk:
        desk.hello()
        desk.run(5)
        desk.say(opened("q", 5))
        desk.run(1)
        desk.ledger.db.execute("DELETE FROM queries WHERE query_id = 'q'")
        desk.say(closed("q", 6))
        desk.run(6)
        assert any(e["kind"] == "window-refused" for e in desk.ledger.events())
        assert desk.books.settled_until_ns() > BEGIN_NS + 9 * NS_PER_S
        accounts = {a.account for a in desk.ledger.account_totals()}
        assert f"unattributed:{Unattributed.UNKNOWN}" in accounts
        assert findings(desk.ledger) == []


def test_a_provisional_figure_has_its_source(tmp_path: Path) -> None:
    """While a long query's first windows are settled and its last are not, its energy is there, and so is its source."""
    card = Card(gpu_named(), busy=[(5.0, 12.0)])
    with Desk(tmp_path / "e.db", card, limits=Limits(horizon_ns=2 * NS_PER_S)) as desk:
        desk.hello()
        desk.run(5)
        desk.say(opened("q", 5))
        desk.run(6)
        row = desk.query("q")
        assert (row["active_uj"] or 0) > 0
        assert not row["final"]
        assert row["source"] == str(card.gpu.source)
