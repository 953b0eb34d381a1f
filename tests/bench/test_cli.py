"""`energyd bench` and `energyd tasks` against real small servers."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from energyd.daemon.cli import main

from .conftest import FakeDaemon, FakeServer


def bench(server: FakeServer, db: Path, data: Path, *more: str) -> Result:
    """Run the verb as a user would, without waiting for idle."""
    fixed = ["--url", server.url, "--model", "org/tiny-1B", "--db", str(db), "--data", str(data)]
    return CliRunner().invoke(main, ["bench", *fixed, "--idle-seconds", "0.05", *more])


def found(result: Result) -> dict[str, Any]:
    """The JSON of a run."""
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_a_run_is_stored_whole(server: FakeServer, daemon: FakeDaemon, db: Path, data: Path) -> None:
    """Every sample of warm-up and measurement reaches the daemon with its query's id, and the run is closed."""
    run = found(bench(server, db, data, "--samples", "12", "--warmup", "3", "--json"))
    assert run["status"] == "complete"
    assert run["stored"]
    phases = [phase for _, phase, _ in daemon.samples]
    assert (phases.count("warmup"), phases.count("measured")) == (3, 12)
    assert all(s.query_id for s in daemon.samples.values())
    assert [e.status for e in daemon.ends] == ["complete"]
    assert daemon.starts[0].task == "text_generation"
    assert daemon.ends[0].summary == run["summary"]
