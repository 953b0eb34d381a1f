"""The ledger refuses what would not balance, what is not its own, and whoever comes second."""

import os
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from energyd.daemon.errors import LedgerError, UsageError
from energyd.daemon.ledger import Ledger
from energyd.daemon.ledger_intake import booked_model, chunk_times, model_key
from energyd.daemon.records import Charge, Settlement, Slice, Source, Unattributed, Window, WindowKind
from energyd.daemon.units import NS_PER_S
from energyd.daemon.wire import Close, Event, Hello, Open, Progress, RunEnd, RunStart, Sample, Server
from tests.faults.rig import BEGIN_NS, HOST, gpu_named

WINDOW = Window(
    "GPU-a", 0, 0, BEGIN_NS, BEGIN_NS + NS_PER_S, 1000, 1300, 300_000, 5, WindowKind.METERED, Source.EMULATED,
    (Slice(BEGIN_NS, BEGIN_NS + 400_000_000, 100_000), Slice(BEGIN_NS + 400_000_000, BEGIN_NS + NS_PER_S, 200_000)),
)  # fmt: skip
BOOKED = Settlement("GPU-a", 0, 0, 300_000, 100_000, {}, (Charge("q", 150_000, 50_000),), "time", None, 100_000)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A ledger with one GPU, one window and one query that has ended."""
    made = Ledger.open(tmp_path / "e.db")
    made.register_host(HOST, "name", BEGIN_NS)
    made.register_gpu(HOST, gpu_named(), BEGIN_NS)
    made.append_windows([WINDOW], "boot")
    made.register_worker(HOST, Hello("w", "boot", 0, 0, 1, (Server("s", "u"),)), 0)
    ended = Close(query_id="q", end_ns=BEGIN_NS + NS_PER_S, status="ok", http_status=200, served="m@main", task="chat")
    made.record(HOST, "w", 1, [Open("q", BEGIN_NS, "s", "tenant"), ended], BEGIN_NS)
    return made


def count(ledger: Ledger, table: str) -> int:
    """Rows of a table."""
    return int(ledger.db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])


def test_a_window_comes_back_as_it_was_stored(ledger: Ledger) -> None:
    """Window, slices and all, from the ledger as it went in."""
    with ledger:
        assert ledger.unsettled("GPU-a") == [WINDOW]
        assert ledger.windows_between("GPU-a", BEGIN_NS, BEGIN_NS + 1) == [WINDOW]
        assert ledger.windows_between("GPU-a", BEGIN_NS + NS_PER_S, BEGIN_NS + 2 * NS_PER_S) == []


def test_a_settlement_that_leaves_energy_over_is_refused(ledger: Ledger) -> None:
    """A residual of one microjoule is enough; nothing of it is booked."""
    with ledger:
        with pytest.raises(LedgerError, match="1 µJ left over"):
            ledger.settle(replace(BOOKED, idle_uj=99_999), WINDOW.end_ns, 0)
        assert count(ledger, "settlements") == count(ledger, "charges") == count(ledger, "daily_energy") == 0


def test_the_schema_itself_refuses_a_row_that_does_not_balance(ledger: Ledger) -> None:
    """No code of ours is needed: raw SQL cannot write a settlement, a closing or a window that contradicts itself."""
    with ledger:
        unbalanced = (
            "INSERT INTO settlements VALUES (1, 0, 0, 300000, 1, 0, 0, 0, 0, 'x', NULL, NULL, 0)",
            "INSERT INTO settlements VALUES (1, 0, 0, 0, -5, 5, 0, 0, 0, 'x', NULL, NULL, 0)",
            "INSERT INTO closings VALUES (1, 0, 1, 10, 1, 1, 1, 1, '{}', '', '')",
            "INSERT INTO windows VALUES (1, 0, 1, 5, 6, 0, 10, 9999, 0, 'metered', 'x', NULL)",
            "INSERT INTO windows VALUES (1, 0, 1, 5, 6, 0, 10, NULL, 0, 'metered', 'x', NULL)",
            "INSERT INTO windows VALUES (1, 0, 1, 6, 6, 0, 0, 0, 0, 'metered', 'x', NULL)",
            "INSERT INTO windows VALUES (1, 0, 1, 5, 6, 10, 0, -10000, 0, 'metered', 'x', NULL)",
            "INSERT INTO windows VALUES (1, 0, 1, 5, 6, 0, 0, 0, 0, 'invented', 'x', NULL)",
            "INSERT INTO queries (query_id, host_id, started_ns, status, active_uj) VALUES ('x', 'h', 1, 'ok', 5)",
        )
        for sql in unbalanced:
            with pytest.raises(sqlite3.IntegrityError):
                ledger.db.execute(sql)


def test_a_window_is_settled_once_and_the_second_time_dropped_whole(ledger: Ledger) -> None:
    """The second settlement of a window changes no account, no query and no daily total, whatever it says."""
    with ledger:
        assert ledger.settle(BOOKED, WINDOW.end_ns, 0)
        before = [t.energy_uj for t in ledger.account_totals()], ledger.energy_of("q")
        assert not ledger.settle(BOOKED, WINDOW.end_ns, 1)
        other = replace(BOOKED, idle_uj=0, unattributed_uj={Unattributed.LOAD: 300_000}, charges=())
        assert not ledger.settle(other, WINDOW.end_ns, 1)
        assert ([t.energy_uj for t in ledger.account_totals()], ledger.energy_of("q")) == before
        assert ledger.unsettled("GPU-a") == []
        assert ledger.settled_until_ns("GPU-a") == WINDOW.end_ns


def test_a_charge_to_a_query_that_nobody_knows_refuses_the_window(ledger: Ledger) -> None:
    """Energy booked to an unknown query would vanish: the whole window is refused."""
    with ledger:
        with pytest.raises(LedgerError, match="do not sum"):
            ledger.settle(replace(BOOKED, charges=(Charge("nobody", 150_000, 50_000),)), WINDOW.end_ns, 0)
        assert count(ledger, "settlements") == 0
        assert ledger.settle(BOOKED, WINDOW.end_ns, 0)


def test_a_settlement_of_no_window_is_refused(ledger: Ledger) -> None:
    """Only what the meter said can be divided."""
    with ledger, pytest.raises(LedgerError, match="refused"):
        ledger.settle(replace(BOOKED, seq=7), WINDOW.end_ns, 0)


def test_a_query_counts_once_however_often_it_is_finished(ledger: Ledger) -> None:
    """Saying twice that a query is final adds it to the daily counts once."""
    with ledger:
        ledger.settle(BOOKED, WINDOW.end_ns, 0)
        for _ in range(2):
            ledger.finish([("q", None, 0.1, "emulated")])
        (row,) = ledger.query_totals()
        assert (row["queries"], row["active_uj"], row["model"]) == (1, 150_000, "m")


def test_what_the_schema_refuses_is_the_sender_s_fault_and_leaves_no_trace(ledger: Ledger) -> None:
    """Numbers beyond 64 bits and negative counts raise UsageError; the batch they came in is not stored."""
    with ledger:
        for bad in (2**70, -1):
            events: list[Event] = [
                Open("x", 1, "s", "new"),
                Close(query_id="x", end_ns=2, status="ok", http_status=200, prompt_tokens=bad),
            ]
            with pytest.raises(UsageError, match="cannot hold"):
                ledger.record(HOST, "w", 3, events, 1)
        assert ledger.query("x") is None
        assert count(ledger, "tenants") == 1
        with pytest.raises(UsageError):
            ledger.add_samples("no-such-run", [Sample(0, "q", "measured", 1, 2, ok=True, http_status=200)])


def test_chunks_of_a_query_that_has_ended_are_not_kept(ledger: Ledger) -> None:
    """Nothing would ever remove them, and they would keep the query from being dropped after its year."""
    with ledger:
        ledger.record(HOST, "w", 3, [Progress("q", BEGIN_NS, (0, 5))], BEGIN_NS)
        assert count(ledger, "timelines") == 0


def test_a_run_is_stored_once_and_ends_only_if_it_began(ledger: Ledger) -> None:
    """Starting twice and sending samples twice change nothing; the end of an unknown run is refused."""
    with ledger:
        run = RunStart("r", "reasoning", "m", 4, "http://x", {"dataset": "d"})
        for _ in range(2):
            ledger.start_run(HOST, run, 5)
            ledger.add_samples("r", [Sample(0, "q", "measured", 1, 2, ok=True, http_status=200)])
        ledger.end_run(RunEnd("r", "complete", 1, 9, {"n": 1}))
        with pytest.raises(LedgerError, match="not in this ledger"):
            ledger.end_run(RunEnd("unknown", "complete", 1, 9, {}))
        (stored,) = ledger.runs()
        assert (stored.task, stored.model, stored.status, stored.summary) == ("reasoning", "m", "complete", {"n": 1})
        assert ledger.run_energy("r")["queries"] == 1
        assert ledger.run_servers("r") == ["s"]


def test_a_rating_is_stored_once(ledger: Ledger) -> None:
    """The same id twice is one rating."""
    with ledger:
        for _ in range(2):
            ledger.add_rating("id", 1, "2025-12", "bands", "gpu_run", [{"model": "m", "stars": 5}])
        assert count(ledger, "ratings") == 1


def test_an_offset_is_kept_for_a_whole_boot(ledger: Ledger) -> None:
    """The first offset of a boot stands; another boot has its own."""
    with ledger:
        assert [ledger.boot_offset(HOST, boot, ns, 0) for boot, ns in (("a", 5), ("a", 9), ("b", 7))] == [5, 5, 7]


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    """Two processes cannot write: the message names the one that does. When it is gone, the next one can."""
    db = tmp_path / "e.db"
    script = (
        f"from pathlib import Path\nfrom energyd.daemon.ledger import Ledger\nledger = Ledger.open(Path({str(db)!r}))\n"
    )
    script += "print('open', flush=True)\ninput()\n"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as holder:  # type: ignore[call-overload]
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(LedgerError, match=rf"written by process {holder.pid} "):
            Ledger.open(db)
        Ledger.open(db, readonly=True).close()
        holder.kill()
        holder.wait()
        Ledger.open(db).close()


def test_a_ledger_that_could_not_be_opened_holds_no_lock(tmp_path: Path) -> None:
    """After a refusal the lock is free again, in this process too."""
    db = tmp_path / "e.db"
    db.write_text("this is not a database, but it is long enough to be looked at" * 100)
    for _ in range(2):
        with pytest.raises(LedgerError, match="cannot be used as a ledger"):
            Ledger.open(db)
    db.unlink()
    Ledger.open(db).close()


def test_files_are_private(tmp_path: Path) -> None:
    """Ledger, its log and its lock are 0600, whatever the umask says."""
    before = os.umask(0)
    try:
        with Ledger.open(tmp_path / "e.db") as ledger:
            ledger.register_host(HOST, "name", 1)
            names = {p.name for p in tmp_path.iterdir()}
            assert {"e.db", "e.db-wal", "e.db.lock"} <= names
            assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o600}
    finally:
        os.umask(before)


def test_a_ledger_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    """A migration that this version does not know: one line that says to update, for readers and writers."""
    db = tmp_path / "e.db"
    with Ledger.open(db) as ledger:
        ledger.db.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('energyd', 'v9_x', '')"
        )
    for readonly in (False, True):
        with pytest.raises(LedgerError, match=r"newer energyd \(it has 'v9_x'\); update"):
            Ledger.open(db, readonly=readonly)


def test_somebody_else_s_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    """A database of something else keeps its bytes, its mode and its journal."""
    db = tmp_path / "other.db"
    with sqlite3.connect(db) as other:
        other.execute("CREATE TABLE photos (name TEXT)")
    other.close()
    db.chmod(0o644)
    before = db.read_bytes()
    for readonly in (False, True):
        with pytest.raises(LedgerError, match="something else; name another file"):
            Ledger.open(db, readonly=readonly)
    assert db.read_bytes() == before
    assert stat.S_IMODE(db.stat().st_mode) == 0o644


@pytest.mark.parametrize("readonly", [True, False])
def test_places_where_no_ledger_can_be(tmp_path: Path, readonly: bool) -> None:
    """A missing file, a missing folder, a folder in the file's place, a folder that takes no file: LedgerError each."""
    (tmp_path / "folder.db").mkdir()
    places = [tmp_path / "nowhere" / "e.db", tmp_path / "folder.db", Path("/sys/kernel/e.db")]
    for place in [*places, tmp_path / "missing.db"] if readonly else places:
        with pytest.raises(LedgerError) as refused:
            Ledger.open(place, readonly=readonly)
        assert str(place.parent) in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_damaged_page_is_one_line_when_it_is_read(ledger: Ledger, tmp_path: Path) -> None:
    """Damage shows only when the page is read: it comes out as LedgerError all the same."""
    ledger.settle(BOOKED, WINDOW.end_ns, 0)
    ledger.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ledger.close()
    data = bytearray((tmp_path / "e.db").read_bytes())
    page = int.from_bytes(data[16:18], "big")
    for offset in range(2 * page, len(data), page):
        data[offset : offset + 64] = b"\xff" * 64
    (tmp_path / "e.db").write_bytes(bytes(data))
    with pytest.raises(LedgerError, match=r"e\.db"), Ledger.open(tmp_path / "e.db", readonly=True) as damaged:
        list(damaged.audit_windows())


def test_a_reader_sees_what_was_committed_and_cannot_write(ledger: Ledger, tmp_path: Path) -> None:
    """Readers need no lock and have no right to write."""
    with ledger, Ledger.open(tmp_path / "e.db", readonly=True) as reader:
        assert reader.query("q") is not None
        with pytest.raises(LedgerError, match="readonly"):
            reader.register_host("x", "x", 1)


def test_a_model_is_booked_by_its_served_name() -> None:
    """Served before requested, without revision; `other` where nobody was named or no 2xx answer came."""
    assert model_key("asked", "org/m@main") == "org/m"
    assert model_key("asked", None) == "asked"
    assert model_key(None, None) == model_key(None, "@main") == "other"

    def close(http_status: int | None) -> Close:
        return Close(query_id="q", end_ns=1, status="ok", http_status=http_status, requested="r", served="s")

    assert [booked_model(close(s)) for s in (200, 204, 302, 404, 500, None)] == ["s", "s", *["other"] * 4]


def test_chunk_times_are_running_sums() -> None:
    """Deltas in µs, each from the one before."""
    assert chunk_times(1_000, (0, 2, 3)) == [1_000, 3_000, 6_000]
