"""The admin port: loopback only, reads only, and honest about what is provisional."""

import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import quote

import pytest

from energyd.daemon import wire
from tests.faults.rig import Daemon, Worker, asked, daemon, energyd, one_line, wait_for


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon for all tests of this file."""
    with daemon(tmp_path_factory.mktemp("admin") / "e.db") as process:
        yield process
        assert process.stop() == 0


@pytest.fixture
def worker(running: Daemon) -> Iterator[Worker]:
    """A worker that has said hello."""
    made = Worker(running.db)
    made.hello()
    yield made
    made.bye()


def test_a_page_under_a_foreign_name_reads_nothing(running: Daemon) -> None:
    """A name that somebody made point to loopback gets 421, on every path; our own names are served."""
    for host in ("evil.example", "evil.example:9709", "127.0.0.1.evil.example", "127.0.0.1@evil", "[::2]:1", ""):
        for path in ("/metrics", "/v1/queries", "/healthz"):
            assert running.get(path, Host=host)[0] == 421, host
    for host in ("127.0.0.1", "127.0.0.1:1", "localhost:9709", "LocalHost", "[::1]:9709", "[::1]"):
        assert running.get("/healthz", Host=host)[0] == 200, host


def test_an_address_that_others_can_reach_is_refused(running: Daemon) -> None:
    """0.0.0.0 and a LAN address: exit 2 and one line with the way out; nothing is left behind."""
    for address in ("0.0.0.0:0", "192.0.2.1:9709", "[::]:0"):
        db = running.db.with_name("refused.db")
        line = one_line(energyd("daemon", "--db", str(db), "--sensor", "none", "--admin", address))
        assert "can be reached from other machines" in line
        assert not db.with_suffix(".sock").exists()


def test_a_port_that_is_taken_is_one_line(running: Daemon) -> None:
    """Exit 2, and the address that is taken; the socket that was opened before is gone again."""
    db = running.db.with_name("second.db")
    address = running.base.removeprefix("http://")
    line = one_line(energyd("daemon", "--db", str(db), "--sensor", "none", "--admin", address))
    assert address in line
    assert not db.with_suffix(".sock").exists()


def test_a_second_daemon_on_the_same_ledger_is_refused(running: Daemon) -> None:
    """One writer: the line names the process that writes."""
    line = one_line(energyd("daemon", "--db", str(running.db), "--sensor", "none", "--admin", "127.0.0.1:0"))
    assert f"process {running.popen.pid} " in line
    assert running.get("/healthz")[0] == 200


def test_health_and_readiness(running: Daemon) -> None:
    """/healthz while the process lives; /readyz once every meter has read."""
    assert running.get("/healthz") == (200, "ok\n")
    wait_for(lambda: running.get("/readyz")[0] == 200)


def test_the_index_names_what_there_is(running: Daemon) -> None:
    """Every path that the index names answers."""
    status, text = running.get("/")
    assert status == 200
    paths = [line.split()[0].partition("?")[0] for line in text.splitlines() if line.startswith("/")]
    wait_for(lambda: running.get("/readyz")[0] == 200)
    for path in paths:
        assert running.get(path)[0] == (404 if path.endswith("ID") else 200), path


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "x", "1.5", "", "²", "٣", "9" * 5000])
def test_a_limit_that_is_none_gets_400(running: Daemon, limit: str) -> None:
    """Only a number from 1 to 1000 will do."""
    status, text = running.get(f"/v1/queries?limit={quote(limit)}")
    assert (status, "limit must be" in text) == (400, True)


def test_unknown_paths_queries_and_methods(running: Daemon) -> None:
    """404 for what there is not, also for ids that mean to break out; nothing can be written."""
    for path in ("/v1/queries/none", "/v1/queries/'%20OR%201=1--", "/nothing", "/v1/queries/%00"):
        assert running.get(path)[0] == 404
    request = urllib.request.Request(running.base + "/v1/queries", data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="405") as refused:
        urllib.request.urlopen(request, timeout=10)
    refused.value.close()


def test_a_query_is_provisional_until_it_is_settled(running: Daemon, worker: Worker) -> None:
    """202 with a figure while a stream holds its windows up, 200 when it is final; the list says the same."""
    stream_id, (stream, _) = asked()
    worker.say(stream)
    query_id, events = asked(0.5, end_ns=time.monotonic_ns() + 500_000_000)
    time.sleep(0.55)
    worker.say(*events)

    def provisional() -> bool:
        worker.say()
        status, found = running.get(f"/v1/queries/{query_id}")[0], running.json(f"/v1/queries/{query_id}")
        assert status == 202
        assert found["provisional"]
        return bool(found["standing_energy_uj"] or found["active_energy_uj"])

    wait_for(provisional)
    status = running.json("/v1/status")
    assert status["unsettled_uj"] > 0
    assert status["oldest_unsettled_age_ns"] > 0
    assert status["open_queries"] >= 1
    worker.say(wire.Close(query_id=stream_id, end_ns=time.monotonic_ns(), status="aborted", http_status=200))
    wait_for(lambda: worker.beat() and running.get(f"/v1/queries/{query_id}")[0] == 200)
    found = running.json(f"/v1/queries/{query_id}")
    assert not found["provisional"]
    assert (found["status"], found["model"], found["source"]) == ("ok", "m", "recording")
    listed = {q["query_id"]: q["provisional"] for q in running.json("/v1/queries")}
    assert listed[query_id] is False
    assert running.json(f"/v1/queries/{stream_id}")["status"] == "aborted"
    (model,) = [m for m in running.json("/v1/models") if m["model"] == "m"]
    assert model["serving_wh_per_1000"] > 0


def test_answers_are_not_cached_nor_sniffed(running: Daemon) -> None:
    """Figures change: no cache keeps them, and no browser guesses what they are."""
    with urllib.request.urlopen(running.base + "/v1/status", timeout=10) as answer:
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
