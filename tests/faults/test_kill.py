"""`kill -9` of a real daemon: no energy lost, none twice, every query once."""

import random
import time
from pathlib import Path

from energyd.daemon import wire
from energyd.daemon.ledger import Ledger
from energyd.daemon.sensors.replay import ReplaySensor
from energyd.daemon.trace import read_trace
from energyd.daemon.units import NS_PER_MS

from .rig import TRACE, Daemon, Worker, asked, audited, daemon, wait_for


class Still:
    """A clock that stands at one instant."""

    def __init__(self) -> None:
        self.at_ns = 0

    def now_ns(self) -> int:
        """That instant."""
        return self.at_ns


def stored(path: Path) -> list[tuple[str, str, int, int | None]]:
    """Id, status, final and energy of every query."""
    with Ledger.open(path, readonly=True) as ledger:
        sql = "SELECT query_id, status, final, active_uj + standing_uj FROM queries ORDER BY query_no"
        return list(ledger.db.execute(sql).fetchall())


def windows(path: Path) -> list[tuple[str, int, int, int]]:
    """Kind, end, first and last counter value of every window, in order."""
    with Ledger.open(path, readonly=True) as ledger:
        sql = "SELECT kind, end_ns, counter_start_mj, counter_end_mj FROM windows ORDER BY epoch, seq"
        return list(ledger.db.execute(sql).fetchall())


def outage_is_settled(path: Path) -> bool:
    """Whether the window in which no daemon ran is booked."""
    with Ledger.open(path, readonly=True) as ledger:
        sql = "SELECT COUNT(*) FROM windows JOIN settlements USING (gpu_id, epoch, seq) WHERE kind = 'outage'"
        return bool(ledger.db.execute(sql).fetchone()[0])


def test_kill_9_in_mid_run_loses_no_joule_and_no_query(tmp_path: Path) -> None:
    """Killed under traffic and started again: audit has no findings, what was booked is the counter's difference.

    The outage is one window booked to unattributed(outage), and what was spooled meanwhile is stored exactly once.
    """
    db = tmp_path / "e.db"
    worker = Worker(db)
    before, spooled = [], []
    with daemon(db) as first:
        assert worker.hello() == 0
        for _ in range(5):
            query_id, events = asked(0.1)
            before.append(query_id)
            worker.say(*events)
            time.sleep(0.3)
        running = asked()[1][0]
        worker.say(running)
        wait_for(lambda: len(windows(db)) >= 2)
        first.kill()
    for _ in range(5):  # the daemon is away: the proxy keeps these
        query_id, events = asked(0.1)
        spooled.append((query_id, events))
        assert worker.post(wire.PATH_BATCH, worker.batch(*events))[0] == 0
        time.sleep(0.2)
    with daemon(db) as second:
        assert worker.hello() == 2 * len(before) + 1
        everything = tuple(e for _, events in spooled for e in events)
        worker.say(*everything)
        assert (
            worker.post(wire.PATH_BATCH, worker.batch(*everything, first_seq=worker.next_seq - len(everything)))[0]
            == 200
        )

        def ended() -> bool:
            worker.say()
            return outage_is_settled(db)

        worker.say(wire.Close(query_id=running.query_id, end_ns=time.monotonic_ns(), status="ok", http_status=200))
        wait_for(ended)
        wait_for(lambda: ended() and all(final for _, _, final, _ in stored(db)))
        assert second.stop() == 0
    ids = [query_id for query_id, *_ in stored(db)]
    assert sorted(ids) == sorted([*before, running.query_id, *(query_id for query_id, _ in spooled)])
    assert {status for _, status, *_ in stored(db)} <= {"ok", "late"}
    totals = audited(db)
    outages = [(end_mj - start_mj) * 1000 for kind, _, start_mj, end_mj in windows(db) if kind == "outage"]
    assert len(outages) == 1
    assert totals["unattributed:outage"] == outages[0]


def test_kill_9_at_any_moment_keeps_the_counter_s_word(tmp_path: Path) -> None:
    """Killed again and again at random moments under traffic: every window holds what the counter said at its ends."""
    db = tmp_path / "e.db"
    chance = random.Random(11)
    worker = Worker(db)
    sent: list[str] = []
    until = time.monotonic() + 8
    rounds = 0
    process: Daemon | None = None
    while time.monotonic() < until:
        process = Daemon(db)
        dies_at = time.monotonic() + chance.uniform(0.4, 3.0)
        while time.monotonic() < dies_at:
            query_id, events = asked(0.05)
            if worker.post(wire.PATH_BATCH, worker.batch(*events))[0] == 409:
                worker.hello()
            elif worker.post(wire.PATH_BATCH, worker.batch(*events))[0] == 200:  # said twice, as after a lost answer
                worker.next_seq += 2
                sent.append(query_id)
            time.sleep(0.05)
        process.kill()
        rounds += 1
    assert rounds >= 3
    assert len(sent) > 20
    with daemon(db) as last:
        worker.hello()

        def final() -> bool:
            worker.say()
            return all(f for _, _, f, _ in stored(db))

        wait_for(final)
        assert last.stop() == 0
    found = [query_id for query_id, *_ in stored(db)]
    assert len(found) == len(set(found))
    assert set(sent) <= set(found)
    totals = audited(db)
    assert totals["unattributed:outage"] > 0
    clock = Still()
    sensor = ReplaySensor(read_trace(TRACE), clock)
    for _, end_ns, _, end_mj in windows(db):
        clock.at_ns = end_ns + 50 * NS_PER_MS  # a window ends half a step before the value was read
        late_mj = sensor.read(sensor.gpus()[0]).counter.counter_mj  # type: ignore[union-attr]
        clock.at_ns -= 5 * NS_PER_MS  # reading takes a moment: the step may have come in between
        early_mj = sensor.read(sensor.gpus()[0]).counter.counter_mj  # type: ignore[union-attr]
        clock.at_ns += 10 * NS_PER_MS
        latest_mj = sensor.read(sensor.gpus()[0]).counter.counter_mj  # type: ignore[union-attr]
        assert end_mj in {early_mj, late_mj, latest_mj}


def test_a_daemon_killed_while_it_made_its_ledger_starts_again(tmp_path: Path) -> None:
    """A ledger that was half made (nothing but the table of migrations) is completed, not taken for somebody else's."""
    db = tmp_path / "e.db"
    with Ledger.open(db) as ledger:
        for (name,) in ledger.db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            if name != "_sqlite_migrations":
                ledger.db.execute("PRAGMA foreign_keys = OFF")
                ledger.db.execute(f"DROP TABLE {name}")
        ledger.db.execute("DELETE FROM _sqlite_migrations")
    with Ledger.open(db) as ledger:
        assert ledger.gpus() == []
