"""A disk that fills up: nothing is lost, nothing is half done, and it goes on when there is room."""

from pathlib import Path

import pytest

from energyd.daemon.errors import LedgerError
from energyd.daemon.ledger import Ledger

from .rig import Desk, audited, closed, findings, opened


def fill(ledger: Ledger) -> None:
    """No page more."""
    ledger.db.execute(f"PRAGMA max_page_count = {ledger.db.execute('PRAGMA page_count').fetchone()[0]}")


def empty(ledger: Ledger) -> None:
    """Room again."""
    ledger.db.execute("PRAGMA max_page_count = 1000000")


def test_a_full_disk_keeps_energy_in_memory_and_events_with_the_proxy(tmp_path: Path) -> None:
    """While no page can be added, writes are refused with LedgerError and leave no trace.

    Afterwards all of it is booked, once: windows that waited in memory, and events that the worker still had.
    """
    with Desk(tmp_path / "e.db") as desk:
        desk.hello()
        desk.run(5)
        fill(desk.ledger)
        refused_windows, waiting = 0, []
        refused_events = 0
        for i in range(400):
            desk.now_s += 1
            fresh = desk.meters["GPU-a"].feed(desk.cards[0].reading(desk.now_s))
            waiting += fresh
            try:
                desk.books.add_windows(waiting)
                waiting = []
            except LedgerError:
                refused_windows += 1
            try:
                desk.say(opened(f"q{i}", desk.now_s - 0.5), closed(f"q{i}", desk.now_s))
            except LedgerError:
                desk.talking["w1"] -= 2
                refused_events += 1
            if refused_windows and refused_events > 2:
                break
        assert refused_windows
        assert refused_events
        last = i
        empty(desk.ledger)
        assert findings(desk.ledger) == []
        desk.books.add_windows(waiting)
        for j in range(last - refused_events + 1, last + 1):
            desk.say(opened(f"q{j}", desk.now_s - 0.5), closed(f"q{j}", desk.now_s))
        desk.run(6)
        rows = desk.ledger.db.execute("SELECT query_id, final FROM queries").fetchall()
        assert len(rows) == len({query_id for query_id, _ in rows})
        assert all(final for _, final in rows)
        sequence = [w["seq"] for w in desk.ledger.audit_windows()]
        assert sequence == list(range(len(sequence)))
    audited(tmp_path / "e.db")


def test_names_made_in_a_lost_transaction_are_made_again(tmp_path: Path) -> None:
    """The id of a model or tenant handed out in a transaction that was rolled back is not used afterwards."""
    with Desk(tmp_path / "e.db") as desk:
        desk.hello()

        def lost() -> None:
            with desk.ledger.transaction():
                desk.ledger._name("models", "ghost")
                raise LedgerError("the disk does not answer")

        with pytest.raises(LedgerError, match="does not answer"):
            lost()
        desk.say(opened("q", 0), closed("q", 0.2, served="ghost"))
        assert desk.query("q")["model"] == "ghost"
