"""The local socket: private, exactly once, and a hostile body gets a 400, never a 500 and never a daemon that is stuck."""

import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from energyd.daemon import localclient, wire
from energyd.daemon.clock import boot_id
from energyd.daemon.errors import UnavailableError
from energyd.daemon.ledger import Ledger
from energyd.daemon.localapi import LocalApi
from energyd.daemon.paths import socket_path
from tests.faults.rig import Daemon, Worker, asked, daemon, wait_for


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon for all tests of this file; in the end it must be able to stop and start again."""
    db = tmp_path_factory.mktemp("local") / "e.db"
    with daemon(db, "--recovery-wait", "5") as process:
        yield process
        assert process.stop() == 0
    with daemon(db) as again:  # nothing that a test posted keeps the next daemon from starting
        assert again.stop() == 0
    assert not any("Traceback" in line for line in process.lines), process.lines


@pytest.fixture
def worker(running: Daemon) -> Iterator[Worker]:
    """A worker that has said hello."""
    made = Worker(running.db)
    made.hello()
    yield made
    made.bye()


def packed(**fields: Any) -> bytes:
    """A message as a map, with whatever types."""
    return msgspec.msgpack.encode(fields)


def test_the_socket_is_private(running: Daemon) -> None:
    """0600 from the first instant."""
    assert stat.S_IMODE(socket_path(running.db).stat().st_mode) == 0o600


def test_no_message_has_room_for_a_prompt_an_answer_or_a_key() -> None:
    """The wire carries counts, times, names and ids; no field could hold what people say."""
    fields = {
        f.name
        for kind in (wire.Hello, wire.Open, wire.Progress, wire.Close, wire.Batch)
        for f in msgspec.structs.fields(kind)
    }
    assert fields == {
        "worker", "boot_id", "mono_ns", "unix_ns", "pid", "servers", "spool", "adopted", "version", "query_id", "start_ns",
        "server", "tenant", "from_ns", "deltas_us", "end_ns", "status", "http_status", "first_byte_ns", "requested", "served",
        "task", "stream", "prompt_tokens", "completion_tokens", "usage_source", "upload_bytes", "first_seq", "events",
        "watermark_ns", "dropped", "open_queries",
    }  # fmt: skip


def test_a_batch_that_was_answered_is_committed_and_a_second_time_skipped(running: Daemon, worker: Worker) -> None:
    """On 200 the query is in the ledger; the same batch again changes nothing; hello tells how far the daemon is."""
    query_id, events = asked()
    worker.say(*events)
    assert running.get(f"/v1/queries/{query_id}")[0] in (200, 202)
    again = worker.batch(*events, first_seq=worker.next_seq - 2)
    assert worker.post(wire.PATH_BATCH, again)[0] == 200
    assert worker.hello() == 2
    rows = [q for q in running.json("/v1/queries?limit=1000") if q["query_id"] == query_id]
    assert len(rows) == 1


def test_a_stranger_is_asked_to_say_hello(running: Daemon) -> None:
    """A batch of a worker that never introduced itself, or said goodbye, gets 409."""
    stranger = Worker(running.db)
    assert stranger.post(wire.PATH_BATCH, stranger.batch())[0] == 409
    stranger.hello()
    stranger.bye()
    assert stranger.post(wire.PATH_BATCH, stranger.batch())[0] == 409


def test_another_format_is_refused_by_its_number(running: Daemon) -> None:
    """A proxy of another version is told so, instead of being half understood."""
    hello = wire.Hello("w-new", boot_id(), 1, 1, 1, (), version=2)
    status, text = Worker(running.db).post(wire.PATH_HELLO, hello)
    assert (status, b"format 2" in text) == (400, True)


HOSTILE_BODIES = [
    b"",
    b"\xc1",
    b"\x93\x01\x02",
    b"\x91" * 100_000,
    b"\xa5\xff\xff\xff\xff\xff",
    msgspec.msgpack.encode("x" * 1000),
    msgspec.json.encode({"worker": "w"}),
    packed(worker=5),
]
PATHS = (
    wire.PATH_HELLO, wire.PATH_BATCH, wire.PATH_BYE, wire.PATH_RUN_START, wire.PATH_RUN_SAMPLES, wire.PATH_RUN_END,
    wire.PATH_ENERGY, wire.PATH_RATINGS,
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_is_no_message_gets_400(running: Daemon, path: str) -> None:
    """Empty, truncated, deeply nested, of the wrong type or the wrong encoding: 400 with a word, on every path."""
    for body in HOSTILE_BODIES:
        status, text = Worker(running.db).post(path, body)
        assert status == 400, (path, body[:20], text)


def test_values_that_make_no_sense_get_400_and_nothing_of_their_batch_is_kept(running: Daemon, worker: Worker) -> None:
    """Impossible times, statuses, counts and numbers are refused whole, and the daemon goes on settling."""
    good = asked()[1]
    late: dict[str, Any] = {"query_id": "x", "end_ns": 5, "http_status": 200}
    bad: list[wire.Event] = [
        wire.Open("x", -1, "s"),
        wire.Open("x", 2**63 + 5, "s"),
        wire.Open("", 1, "s"),
        wire.Open("x" * 1000, 1, "s"),
        wire.Progress("x", 2**62, ()),
        wire.Progress("x", 1, (-5,)),
        wire.Progress("x", 1, (2**60, 2**60)),
        wire.Close(status="sleeping", **late),
        wire.Close(status="open", **late),
        wire.Close(status="ok", prompt_tokens=-1, **late),
        wire.Close(status="ok", completion_tokens=2**63 + 1, **late),
        wire.Close(status="ok", first_byte_ns=2**63 + 1, **late),
        wire.Close(query_id="x", end_ns=-2, status="ok", http_status=200),
        wire.Close(query_id="x", end_ns=2, status="ok", http_status=2**63 + 1),
    ]
    for event in bad:
        status, text = worker.post(wire.PATH_BATCH, worker.batch(*good, event))
        assert status == 400, (event, text)
    for fields in ({"first_seq": 0}, {"first_seq": -3}, {"watermark_ns": 2**63 + 1}, {"dropped": -1}):
        batch = msgspec.structs.replace(worker.batch(*good), **fields)
        assert worker.post(wire.PATH_BATCH, batch)[0] == 400, fields
    for fields in ({"pid": -4}, {"pid": 2**40}, {"mono_ns": -1}, {"unix_ns": 2**63 + 1}):
        hello = msgspec.structs.replace(wire.Hello("w-bad", boot_id(), 1, 1, 1, ()), **fields)
        assert worker.post(wire.PATH_HELLO, hello)[0] == 400, fields
    assert running.get(f"/v1/queries/{good[0].query_id}")[0] == 404
    worker.say(*good)
    wait_for(lambda: worker.beat() and running.get(f"/v1/queries/{good[0].query_id}")[0] == 200)


def test_what_json_cannot_hold_gets_400(running: Daemon) -> None:
    """Provenance, summaries and ratings are stored as JSON: bytes and stamps are refused, not stumbled over."""
    worker = Worker(running.db)
    start = {"run_id": "r-json", "task": "t", "model": "m", "batch_size": 1, "url": "u"}
    assert worker.post(wire.PATH_RUN_START, packed(**start, provenance={"x": b"bytes"}))[0] == 400
    assert worker.post(wire.PATH_RUN_START, packed(**start, provenance={"x": [msgspec.msgpack.Ext(5, b"x")]}))[0] == 400
    end = {"run_id": "r-json", "status": "complete", "start_ns": 1, "end_ns": 2}
    assert worker.post(wire.PATH_RUN_END, packed(**end, summary={"x": b"bytes"}))[0] == 400
    rating = {"rating_id": "x", "created_ns": 1, "edition": "e", "method": "m", "basis": "b"}
    assert worker.post(wire.PATH_RATINGS, packed(**rating, rows=[{"x": b"bytes"}]))[0] == 400
    assert worker.post(wire.PATH_RATINGS, packed(**{**rating, "created_ns": 2**63 + 1}, rows=[]))[0] == 400


def test_samples_of_a_run_that_never_began_get_400(running: Daemon) -> None:
    """The sender is wrong, not the ledger."""
    sample = wire.Sample(0, None, "measured", 1, 2, ok=True, http_status=200)
    status, _ = Worker(running.db).post(wire.PATH_RUN_SAMPLES, wire.RunSamples("never", boot_id(), (sample,)))
    assert status == 400


def test_a_run_gets_the_energy_of_its_span_and_of_its_queries(running: Daemon, worker: Worker) -> None:
    """Start, samples, end, and the question that the bench asks until everything is settled."""
    begin_ns = time.monotonic_ns()
    wait_for(lambda: worker.beat() and running.json("/v1/status")["gpus"][0]["state"] == "ok")
    worker.post(wire.PATH_RUN_START, wire.RunStart("run-1", "reasoning", "m", 1, "http://x", {"n": 1}))
    time.sleep(0.3)
    query_id, events = asked(0.25)
    worker.say(*events)
    sample = wire.Sample(0, query_id, "measured", events[0].start_ns, events[1].end_ns, ok=True, http_status=200)  # type: ignore[union-attr]
    for _ in range(2):
        assert worker.post(wire.PATH_RUN_SAMPLES, wire.RunSamples("run-1", boot_id(), (sample,)))[0] == 200
    end_ns = time.monotonic_ns()
    assert worker.post(wire.PATH_RUN_END, wire.RunEnd("run-1", "complete", begin_ns, end_ns, {"n": 1}))[0] == 200

    def answer() -> wire.EnergyAnswer | None:
        worker.say()
        question = wire.EnergyQuestion(end_ns - 250_000_000, end_ns, "run-1")
        status, body = worker.post(wire.PATH_ENERGY, question)
        assert status == 200, body
        found = msgspec.msgpack.decode(body, type=wire.EnergyAnswer)
        return found if found.settled else None

    found = wait_for(answer)
    assert (found.queries, found.queries_with_energy) == (1, 1)
    assert found.gpus[0].source == "recording"
    assert found.gpus[0].energy_uj > 0
    (run,) = [r for r in running.json("/v1/runs") if r["run_id"] == "run-1"]
    assert (run["status"], run["task"]) == ("complete", "reasoning")


def test_status_tells_what_the_daemon_is(running: Daemon) -> None:
    """`energyd status` asks here; the answer names GPU, source, policy and ledger."""
    found = localclient.ask_status(socket_path(running.db))
    assert found["policy"] == "time"
    assert found["db"] == str(running.db)
    assert found["gpus"][0]["source"] == "recording"


def test_a_rating_is_posted_and_stored_once(running: Daemon) -> None:
    """Rating posts through the daemon, which alone writes."""
    rating = {
        "rating_id": "r1",
        "created_ns": 5,
        "edition": "e",
        "method": "m",
        "basis": "gpu_run",
        "rows": [{"stars": 5}],
    }
    for _ in range(2):
        localclient.post_rating(socket_path(running.db), rating)
    with Ledger.open(running.db, readonly=True) as ledger:
        assert ledger.db.execute("SELECT COUNT(*) FROM ratings WHERE rating_id = 'r1'").fetchone() == (1,)
    with pytest.raises(UnavailableError, match="answered 400"):
        localclient.post_rating(socket_path(running.db), {"rating_id": 5})


def test_nobody_at_the_socket_is_one_clear_line(tmp_path: Path) -> None:
    """No socket, or a socket that nobody serves: UnavailableError that says what to do."""
    with pytest.raises(UnavailableError, match=r"no daemon answers at .*start one"):
        localclient.ask_status(tmp_path / "none.sock")
    left = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    with pytest.raises(UnavailableError, match="no daemon answers"):
        localclient.ask_status(left)


async def test_a_socket_left_by_a_crash_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    """A stale socket file is no obstacle; a daemon that answers is not pushed aside."""
    path = tmp_path / "e.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    first, second = LocalApi(None), LocalApi(None)  # type: ignore[arg-type]
    await first.start(path)
    try:
        inode = path.stat().st_ino
        with pytest.raises(UnavailableError, match="already listens"):
            await second.start(path)
        await second.stop()
        assert path.stat().st_ino == inode
    finally:
        await first.stop()
    assert not path.exists()
