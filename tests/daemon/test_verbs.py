"""The verbs on a ledger: figures that can be checked, and one clear line for every input that is wrong."""

import csv
import gzip
import io
import json
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from click.testing import CliRunner

from energyd.daemon.cli import main
from energyd.daemon.ledger import Ledger
from energyd.daemon.ledger_views import EXPORT_COLUMNS
from energyd.daemon.trace import read_trace
from tests.faults.rig import TRACE, audited, daemon, energyd
from tests.faults.rig import one_line as one_line_of


def verb(*arguments: str) -> CompletedProcess[str]:
    """Run a verb in this process: what it wrote and its exit code. Anything but a clean end is raised."""
    done = CliRunner().invoke(main, list(arguments), prog_name="energyd", standalone_mode=True)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return CompletedProcess(list(arguments), done.exit_code, done.stdout, done.stderr)


def one_line(*arguments: str) -> str:
    """The line with which a verb refuses these arguments."""
    return one_line_of(verb(*arguments))


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """The recording settled, and what `--json` said."""
    db = tmp_path_factory.mktemp("verbs") / "e.db"
    done = verb("settle", str(TRACE), "--db", str(db), "--json")
    assert done.returncode == 0, done.stderr
    return db, json.loads(done.stdout)


@pytest.mark.parametrize("policy", ["time", "tokens"])
def test_every_joule_of_a_recording_is_booked(tmp_path: Path, policy: str) -> None:
    """All requests get an energy, and the sum of all accounts is the counter's difference to the microjoule."""
    db = tmp_path / "e.db"
    done = verb("settle", str(TRACE), "--db", str(db), "--policy", policy, "--json")
    summary = json.loads(done.stdout)
    trace = read_trace(TRACE)
    assert summary["queries"] == summary["queries_with_energy"] == len(trace.requests) == 1544
    counter_uj = (trace.anchors[0][-1].counter_mj - trace.anchors[0][0].counter_mj) * 1000
    assert sum(summary["accounts_uj"].values()) == summary["metered_energy_uj"] == counter_uj
    assert summary["residual_uj"] == summary["unsettled_energy_uj"] == 0
    assert audited(db)["counter"] == counter_uj


def test_settle_prints_a_table_and_where_the_books_are(tmp_path: Path) -> None:
    """Without --json: model, joules, accounts, residual, and the name of the ledger."""
    done = verb("settle", str(TRACE), "--db", str(tmp_path / "e.db"))
    assert done.returncode == 0
    for part in ("default", "1,544", "idle", "unattributed:unknown", "residual 0 µJ", "recording"):
        assert part in done.stdout


def test_audit_says_that_the_books_balance_and_what_balance_does_not_say(settled: tuple[Path, object]) -> None:
    """Residual 0 µJ, and apart from it source, unattributed share, coverage and stated uncertainty."""
    done = verb("audit", "--db", str(settled[0]))
    assert done.returncode == 0
    assert "the books balance: residual 0 µJ" in done.stdout
    for part in ("balance is not accuracy", "source: recording", "unattributed share", "1,544 of 1,544", "±1 sd"):
        assert part in done.stdout


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE charges SET active_uj = active_uj + 1 WHERE (seq, query_no) = (SELECT seq, query_no FROM charges LIMIT 1)",
        "UPDATE queries SET standing_uj = standing_uj - 1 WHERE query_no = 9",
        "UPDATE daily_energy SET energy_uj = energy_uj + 1 WHERE account = 'idle'",
        "UPDATE settlements SET idle_uj = idle_uj + 1, active_uj = active_uj - 1 WHERE seq = 20",
        "DELETE FROM unattributed",
        "UPDATE windows SET counter_start_mj = counter_start_mj + 1, counter_end_mj = counter_end_mj + 1 WHERE seq = 5",
        "DELETE FROM daily_energy",
    ],
)
def test_audit_finds_one_microjoule_that_was_moved(settled: tuple[Path, object], tmp_path: Path, change: str) -> None:
    """Any change of the books by one microjoule is a finding, exit 1."""
    db = tmp_path / "e.db"
    db.write_bytes(settled[0].read_bytes())
    with Ledger.open(db) as ledger:
        ledger.db.execute("PRAGMA foreign_keys = OFF")
        ledger.db.execute(change)
    done = verb("audit", "--db", str(db))
    assert done.returncode == 1, done.stdout
    assert "FINDING" in done.stdout
    report = json.loads(verb("audit", "--db", str(db), "--json").stdout)
    assert not report["balanced"]
    assert report["findings"]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_export_writes_the_stated_columns(settled: tuple[Path, object], tmp_path: Path, form: str) -> None:
    """Every query in the columns of the contract, in order of time; what is unknown is empty, never 0."""
    output = tmp_path / "out"
    command = ("export", "queries", "--db", str(settled[0]), "--format", form)
    done = verb(*command)
    assert verb(*command, "--output", str(output)).returncode == 0
    assert output.read_text("utf-8") == done.stdout
    rows: list[dict[str, object]]
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(done.stdout)))
    else:
        rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert tuple(rows[0]) == EXPORT_COLUMNS
    requests = read_trace(TRACE).requests
    assert len(rows) == len(requests)
    first = min(requests, key=lambda r: (r.start_ns, r.index))
    assert rows[0]["query_id"] == f"{first.index:04d}"
    assert int(str(rows[0]["started_ns"])) == first.start_ns
    assert rows[0]["tenant"] == ("" if form == "csv" else None)
    assert {r["source"] for r in rows} == {"recording"}


def bad_trace(folder: Path, kind: str) -> Path:
    """A trace that cannot be settled."""
    path = folder / "trace.json.gz"
    whole = TRACE.read_bytes()
    contents = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "not gzip": b"\x1f\x8b" + b"x" * 100,
        "not json": b"{'anchors': [",
        "no anchors": gzip.compress(b'{"samples": []}'),
        "one anchor": gzip.compress(b'{"anchors": [[1, 2, 3]]}'),
        "wrong shape": gzip.compress(b'{"anchors": [[1, 2], [3, 4]]}'),
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    "kind",
    ["missing", "folder", "truncated", "empty", "not gzip", "not json", "no anchors", "one anchor", "wrong shape"],
)
def test_a_trace_that_cannot_be_settled_is_one_line(tmp_path: Path, kind: str) -> None:
    """Exit 2, the file named, no traceback, and no half-made ledger beside it."""
    path = bad_trace(tmp_path, kind)
    line = one_line("settle", str(path), "--db", str(tmp_path / "e.db"))
    assert "trace.json.gz" in line
    assert not (tmp_path / "e.db").exists()


def test_a_ledger_with_books_is_not_settled_into(settled: tuple[Path, object]) -> None:
    """Two recordings never mix, nor a recording with a host's own books."""
    line = one_line("settle", str(TRACE), "--db", str(settled[0]))
    assert "holds books already; name a new file" in line


@pytest.mark.parametrize("verb", [("audit",), ("export", "queries"), ("status",)])
@pytest.mark.parametrize("kind", ["missing", "text", "other", "newer", "empty"])
def test_a_ledger_that_is_none_is_one_line(tmp_path: Path, verb: tuple[str, ...], kind: str) -> None:
    """Missing, no database, somebody else's, of a newer version, empty: exit 2 and one line, whatever the verb."""
    db = tmp_path / "e.db"
    if kind == "text":
        db.write_text("no database\n" * 1000)
    elif kind in ("other", "newer"):
        with Ledger.open(db) as ledger:
            rename = "ALTER TABLE _sqlite_migrations RENAME TO photos"
            newer = "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('energyd', 'v9', '')"
            ledger.db.execute(rename if kind == "other" else newer)
    elif kind == "empty":
        db.touch()
    line = one_line(*verb, "--db", str(db))
    assert "e.db" in line or "e.sock" in line


def test_settle_refuses_places_where_no_ledger_can_be(tmp_path: Path) -> None:
    """A folder that does not exist, a database of something else, a ledger that a daemon writes."""
    line = one_line("settle", str(TRACE), "--db", str(tmp_path / "nowhere" / "e.db"))
    assert "nowhere" in line
    db = tmp_path / "e.db"
    with daemon(db, sensor=("--sensor", "none")) as process:
        line = one_line("settle", str(TRACE), "--db", str(db))
        assert f"process {process.popen.pid} " in line
        done = verb("status", "--db", str(db))
        assert done.returncode == 0
        assert "queries in flight" in done.stdout
        found = json.loads(verb("status", "--db", str(db), "--json").stdout)
        assert found["db"] == str(db)
        assert verb("audit", "--db", str(db)).returncode == 0
        assert process.stop() == 0
    assert "no daemon answers" in one_line("status", "--db", str(db))


def test_an_export_that_cannot_be_written_leaves_nothing(settled: tuple[Path, object], tmp_path: Path) -> None:
    """A folder that does not exist: one line."""
    line = one_line("export", "queries", "--db", str(settled[0]), "--output", str(tmp_path / "no" / "out.csv"))
    assert "out.csv" in line


def test_the_help_names_every_verb_without_torch() -> None:
    """`energyd --help` lists own and plugged-in verbs; an unknown verb is exit 2."""
    done = energyd("--help")
    for verb in ("start", "daemon", "settle", "audit", "export", "status", "proxy", "bench", "rate", "demo"):
        assert verb in done.stdout
    assert energyd("nonsense").returncode == 2
