"""The audit: books from the H200 recording pass; one thing changed gives exactly the finding that it deserves."""

import json
import shutil
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from energyd.daemon import audit
from energyd.daemon.cli import main
from energyd.daemon.ledger import Ledger
from energyd.daemon.ledger_closing import close_hours
from energyd.daemon.offline import settle_trace
from energyd.daemon.records import Counter, Gpu, Samples, Source
from energyd.daemon.trace import Trace, TracedRequest, read_trace

RECORDING = Path(__file__).parents[1] / "data" / "h200_vllm_llama8b_eager.json.gz"
S = 1_000_000_000
HOUR = 3600 * S
PLACE = 60
"""A window of the busy middle."""

Row = dict[str, Any]
Change = dict[str, int | str | None]


@pytest.fixture(scope="module")
def ledger_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settled recording as a closed ledger file."""
    path = tmp_path_factory.mktemp("audit") / "books.db"
    with Ledger.open(path) as ledger:
        settle_trace(read_trace(RECORDING), ledger, policy="time")
    return path


@pytest.fixture(scope="module")
def stored(ledger_file: Path) -> list[Row]:
    """All windows of the ledger as the audit sees them."""
    with Ledger.open(ledger_file, readonly=True) as ledger:
        return [dict(row) for row in ledger.audit_windows()]


@pytest.fixture
def rows(stored: list[Row]) -> list[Row]:
    """A copy to tamper with, without the windows after the 100th."""
    return [dict(row) for row in stored[:100]]


@pytest.fixture
def rich(rows: list[Row]) -> int:
    """The place of a window with energy on all four accounts."""
    accounts = ("active_uj", "standing_uj", "idle_uj", "unattributed_uj")
    return next(i for i, row in enumerate(rows) if all(row[a] > 0 for a in accounts))


def laws(findings: Iterable[audit.Finding]) -> list[tuple[str, int]]:
    """Law and µJ of each finding, in order."""
    return [(f.law, f.residual_uj) for f in findings]


TRUTH, CONSERVED, LOST = "the counter is the truth", "conservation", "nothing is lost"
SHAPED, MISSING, NEGATIVE = "samples only shape it", "missing is never a number", "none is negative"


def test_true_books_have_no_finding(stored: list[Row]) -> None:
    """172 windows, all settled, pass every check."""
    assert len(stored) == 172
    assert all(row["settled"] for row in stored)
    assert list(audit.check_windows(stored)) == []


@pytest.mark.parametrize(
    ("field", "by", "expected"),
    [
        ("energy_uj", 1, [(TRUTH, 1), (SHAPED, -1), (CONSERVED, 1)]),
        ("shape_uj", -3, [(SHAPED, -3)]),
        ("booked_uj", 9, [(CONSERVED, -9)]),
        ("idle_uj", 5, [(CONSERVED, -5)]),
        ("active_uj", 5, [(CONSERVED, -5), (CONSERVED, 5)]),
        ("standing_uj", -4, [(CONSERVED, 4), (CONSERVED, -4)]),
        ("unattributed_uj", 2, [(CONSERVED, -2), (CONSERVED, 2)]),
        ("charges", 1, [(CONSERVED, 0)]),
        ("charges_found", -1, [(CONSERVED, 0)]),
        ("charged_active_uj", -7, [(CONSERVED, 7)]),
        ("charged_standing_uj", 7, [(CONSERVED, -7)]),
        ("reasons_uj", 1, [(CONSERVED, -1)]),
        ("start_ns", 5, [(LOST, 0)]),
        ("seq", 1000, [(LOST, 0), (LOST, 0)]),
        ("counter_start_mj", -7, [(TRUTH, -7_000), (TRUTH, -7_000)]),
    ],
)
def test_one_changed_figure_is_found(
    rows: list[Row], rich: int, field: str, by: int, expected: list[tuple[str, int]]
) -> None:
    """A single figure of a real window moved: the laws it breaks, with the µJ it breaks them by, and nothing else."""
    rows[rich][field] += by
    findings = list(audit.check_windows(rows))
    assert laws(findings) == expected
    assert findings[0].where == f"GPU recording-0 epoch 0 window {rows[rich]['seq']}"


@pytest.mark.parametrize("field", ["charged_active_uj", "charged_standing_uj", "reasons_uj", "charges_found"])
def test_parts_that_are_gone_are_found(rows: list[Row], rich: int, field: str) -> None:
    """All charges or reasons of a window deleted (no row at all): the whole account is missing."""
    account = {"charged_active_uj": "active_uj", "charged_standing_uj": "standing_uj", "reasons_uj": "unattributed_uj"}
    lost = rows[rich][account[field]] if field in account else 0
    rows[rich][field] = None
    assert laws(audit.check_windows(rows)) == [(CONSERVED, lost)]


def test_a_removed_window_is_found(rows: list[Row]) -> None:
    """Its number is missing, and so is its energy of the counter."""
    gone = rows.pop(PLACE)
    first, second = audit.check_windows(rows)
    assert (first.law, first.what) == (LOST, f"windows {gone['seq']} to {gone['seq']} are missing")
    assert (second.law, second.residual_uj) == (TRUTH, gone["energy_uj"])


def test_a_window_that_is_there_twice_is_found(rows: list[Row]) -> None:
    """The same key again: out of order, and its counter begins where it had begun before."""
    rows.insert(PLACE, dict(rows[PLACE]))
    assert laws(audit.check_windows(rows)) == [(LOST, 0), (TRUTH, -rows[PLACE]["energy_uj"])]


def test_the_beginning_of_an_epoch_is_held(rows: list[Row]) -> None:
    """The first window must begin at the epoch's first counter value."""
    rows[0]["first_counter_mj"] -= 3
    assert laws(audit.check_windows(rows)) == [(TRUTH, 3_000)]


def test_epochs_and_gpus_are_chains_of_their_own(rows: list[Row]) -> None:
    """A new epoch or another GPU begins anywhere; windows of closed hours may be gone from the front."""
    other = [{**row, "gpu_id": 2, "uuid": "other", "counter_start_mj": row["counter_start_mj"] + 10**9,
              "counter_end_mj": row["counter_end_mj"] + 10**9} for row in rows[10:]]  # fmt: skip
    later = [{**row, "epoch": 1, "start_ns": row["start_ns"] + HOUR, "end_ns": row["end_ns"] + HOUR} for row in rows]
    assert list(audit.check_windows([*rows, *later, *other])) == []


def test_one_bad_row_hides_no_other(rows: list[Row]) -> None:
    """Two windows are wrong, each is told."""
    rows[20]["shape_uj"] += 1
    rows[70]["shape_uj"] += 2
    assert laws(audit.check_windows(rows)) == [(SHAPED, 1), (SHAPED, 2)]


def test_what_is_not_there_is_no_finding(rows: list[Row]) -> None:
    """A shape that retention dropped and a window that is not settled yet are in order."""
    rows[PLACE]["shape_uj"] = None
    rows[-1].update(settled=0, active_uj=None, standing_uj=None, idle_uj=None, unattributed_uj=None, booked_uj=None)
    assert list(audit.check_windows(rows)) == []


def test_negative_energy_on_an_account_is_found(rows: list[Row], rich: int) -> None:
    """Books that balance by an idle of −1 µJ do not pass."""
    row = rows[rich]
    for moved in ("standing_uj", "charged_standing_uj"):
        row[moved] += row["idle_uj"] + 1
    row["idle_uj"] = -1
    findings = list(audit.check_windows(rows))
    assert laws(findings) == [(NEGATIVE, 0)]
    assert findings[0].what == "books -1 µJ as idle"


def test_a_counter_that_falls_within_a_window_is_found(rows: list[Row]) -> None:
    """A window that ends below where it began holds negative energy, which no reset explains."""
    row = rows[-1]
    row["counter_end_mj"] = row["counter_start_mj"] - 2
    row.update(energy_uj=-2_000, shape_uj=-2_000, settled=0)
    assert laws(audit.check_windows(rows)) == [(NEGATIVE, -2_000)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"energy_uj": None}, [(MISSING, 0), (MISSING, 0)]),
        ({"energy_uj": None, "kind": "gap"}, [(MISSING, 0)]),
        ({"energy_uj": None, "kind": "gap", "settled": 0}, []),
        ({"kind": "gap"}, [(MISSING, 0)]),
    ],
)
def test_unknown_energy_is_kept_apart(rows: list[Row], change: Change, expected: list[tuple[str, int]]) -> None:
    """NULL belongs to a gap and to nothing else, and a gap is never settled; broken rows are findings, no traceback."""
    rows[PLACE].update(change)
    assert laws(audit.check_windows(rows)) == expected


def test_a_window_of_no_length_is_found(rows: list[Row]) -> None:
    """Energy within no time is a broken row."""
    row = rows[-1]
    row["end_ns"] = row["start_ns"]
    assert laws(audit.check_windows(rows)) == [(LOST, 0)]


@pytest.mark.parametrize(("limit_mw", "found"), [(None, False), (700_000, False), (200_000, True)])
def test_implausible_power_is_found(rows: list[Row], limit_mw: int | None, found: bool) -> None:
    """Above 1.2 times the power limit over a second: no GPU draws that, so a figure is wrong; without a limit no check."""
    for row in rows:
        row["power_limit_mw"] = limit_mw
    findings = list(audit.check_windows(rows))
    watts = [row["energy_uj"] / 1e6 / (row["end_ns"] - row["start_ns"]) * 1e9 for row in rows]
    long = [row["end_ns"] - row["start_ns"] >= S for row in rows]
    assert {f.law for f in findings} == ({"plausible"} if found else set())
    assert len(findings) == sum(w > 240 and n for w, n in zip(watts, long, strict=True)) * found


def test_a_querys_energy_is_its_charges(ledger_file: Path) -> None:
    """True books have no such query; a difference is told by account, also when two differences would cancel."""
    with Ledger.open(ledger_file, readonly=True) as ledger:
        assert list(audit.check_queries(ledger.audit_queries())) == []
    row = {"query_id": "7", "active_uj": 10, "standing_uj": 5, "charged_active_uj": 8, "charged_standing_uj": 7}
    assert laws(audit.check_queries([row])) == [(CONSERVED, 2), (CONSERVED, -2)]
    unknown = {**row, "active_uj": None, "standing_uj": None, "charged_standing_uj": 0}
    assert laws(audit.check_queries([unknown])) == [(CONSERVED, -8)]


def test_charges_of_a_query_that_was_deleted_are_found(tmp_path: Path) -> None:
    """A deleted query leaves its charges without an owner: a finding that names how much."""
    with Ledger.open(tmp_path / "e.db") as ledger:
        settle_trace(read_trace(RECORDING), ledger, policy="time")
        assert list(audit.check_orphans(ledger.audit_orphans())) == []
        ledger.db.execute("PRAGMA foreign_keys = OFF")
        active, standing, _ = ledger.energy_of("0007")
        ledger.db.execute("DELETE FROM queries WHERE query_id = '0007'")
        (finding,) = audit.check_orphans(ledger.audit_orphans())
    assert (finding.law, finding.residual_uj) == (CONSERVED, (active or 0) + (standing or 0))


def test_daily_totals_are_the_settlements(ledger_file: Path) -> None:
    """True books agree; one account that differs is one finding that names it."""
    with Ledger.open(ledger_file, readonly=True) as ledger:
        (row,) = (dict(r) for r in ledger.audit_days())
    assert list(audit.check_days([row])) == []
    row["day_idle_uj"] += 11
    (finding,) = audit.check_days([row])
    assert (finding.law, finding.where, finding.residual_uj) == (CONSERVED, "GPU recording-0 idle", 11)


# -- closed hours -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Five hours of two GPUs at an anchor in 10 minutes, all but the newest closed."""
    first = 500_000 * HOUR
    reads = [first + i * HOUR // 6 for i in range(31)]
    gpus = tuple(Gpu(f"recording-{i}", i, "GPU", "1", Source.RECORDING) for i in range(2))
    counters = tuple(tuple(Counter(at, at, (1 + g) * i * 60_000_000) for i, at in enumerate(reads)) for g in range(2))
    none = Samples((), ())
    requests = tuple(TracedRequest(i, at, at + HOUR, (), False, 200, 1, 1) for i, at in enumerate(reads[:-6:4]))
    with Ledger.open(tmp_path_factory.mktemp("closed") / "books.db") as ledger:
        settle_trace(Trace({}, gpus, counters, (none, none), (), requests), ledger, policy="time")
        assert close_hours(ledger, first + 10 * HOUR) >= 8
        assert list(audit.check_windows(ledger.audit_windows())) == []
        assert list(audit.check_queries(ledger.audit_queries())) == []
        assert list(audit.check_days(ledger.audit_days())) == []
        return [dict(row) for row in ledger.audit_closings()]


def test_closed_hours_form_a_chain_a_gpu(closed: list[Row]) -> None:
    """Each GPU's first hour hangs on nothing, each later one on the one before; the whole passes."""
    assert [r["previous_hash"] for r in closed].count(audit.GENESIS) == 2
    assert list(audit.check_closings(closed)) == []


@pytest.mark.parametrize(
    "field",
    ["windows", "energy_uj", "active_uj", "standing_uj", "idle_uj", "unattributed_uj", "hour_ns", "detail"],
)
def test_a_changed_closed_hour_is_found(closed: list[Row], field: str) -> None:
    """Any figure of a closed hour altered: its own hash no longer fits, the rest of the chain still does."""
    rows = [dict(r) for r in closed]
    rows[1][field] = rows[1][field] + (" " if field == "detail" else 1)
    (finding,) = audit.check_closings(rows)
    assert (finding.law, finding.what) == ("tamper evidence", "its hash does not fit its contents")


def test_a_rehashed_closed_hour_is_found(closed: list[Row]) -> None:
    """Whoever alters an hour and its hash breaks the link of the hour after it."""
    rows = [dict(r) for r in closed]
    rows[1]["idle_uj"] += 1
    rows[1]["hash"] = audit.closing_hash(rows[1])
    (finding,) = audit.check_closings(rows)
    assert finding.what == "is not chained to the closed hour before"
    assert finding.where.endswith(f"hour {rows[2]['hour_ns']}")


def test_a_removed_closed_hour_is_found(closed: list[Row]) -> None:
    """An hour taken out of the chain is missed by the one after it."""
    rows = [dict(r) for r in closed]
    del rows[1]
    assert [f.what for f in audit.check_closings(rows)] == ["is not chained to the closed hour before"]


# -- the verb ---------------------------------------------------------------------------------------------------------


_ONE_CHARGE = "seq = 50 AND query_no = (SELECT MAX(query_no) FROM charges WHERE seq = 50)"
"""Its window and its query both vouch for it."""


def audited(path: Path) -> tuple[int, dict[str, Any]]:
    """Exit code and report of `energyd audit`."""
    result = CliRunner().invoke(main, ["audit", "--db", str(path), "--json"])
    report: dict[str, Any] = json.loads(result.output)
    return result.exit_code, report


def test_the_verb_passes_true_books(ledger_file: Path) -> None:
    """Exit 0, residual 0, and beside it what balance does not say."""
    code, report = audited(ledger_file)
    assert (code, report["balanced"], report["residual_uj"], report["findings"]) == (0, True, 0, [])
    assert report["metered_energy_uj"] == sum(report["accounts_uj"].values()) == 62_181_046_000
    assert (report["queries"], report["queries_with_energy"], report["sources"]) == (1544, 1544, ["recording"])


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        (f"UPDATE charges SET active_uj = active_uj + 1 WHERE {_ONE_CHARGE}", [-1, -1]),
        (f"DELETE FROM charges WHERE {_ONE_CHARGE}", None),
        ("UPDATE queries SET standing_uj = standing_uj + 5 WHERE query_id = '0100'", [5]),
        ("UPDATE daily_energy SET energy_uj = energy_uj - 2 WHERE account = 'idle'", [-2]),
        ("UPDATE windows SET start_ns = start_ns + 1 WHERE seq = 50", [0]),
        ("DELETE FROM unattributed WHERE seq = (SELECT MIN(seq) FROM unattributed)", None),
        ("DELETE FROM settlements WHERE seq = 50", None),
        ("DELETE FROM settlements", None),
        ("DELETE FROM windows WHERE seq = 50", None),
    ],
)
def test_the_verb_finds_tampering(ledger_file: Path, tmp_path: Path, sql: str, expected: list[int] | None) -> None:
    """A ledger altered behind energyd's back: exit 1; `expected`: the µJ of each finding, where they are few."""
    path = tmp_path / "books.db"
    shutil.copy(ledger_file, path)
    db = sqlite3.connect(path)
    with db:
        db.execute(sql)
    db.close()
    code, report = audited(path)
    assert code == 1
    assert not report["balanced"]
    if expected is not None:
        assert [f["residual_uj"] for f in report["findings"]] == expected
