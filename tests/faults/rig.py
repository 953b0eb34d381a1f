"""What the tests of books and daemon share: books on a clock that the test turns, a real daemon, a proxy worker by hand."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec

from energyd.daemon import audit, wire
from energyd.daemon.attribution import policy
from energyd.daemon.clock import boot_id
from energyd.daemon.ledger import Ledger
from energyd.daemon.ledger_views import Row
from energyd.daemon.localclient import _Unix
from energyd.daemon.meter import Meter
from energyd.daemon.paths import socket_path
from energyd.daemon.records import Counter, Gpu, Reading, Samples, Settlement, Source
from energyd.daemon.settlement import Books, Limits
from energyd.daemon.units import NS_PER_MS, NS_PER_S, ns_from_s

TRACE = Path(__file__).parent.parent / "data" / "h200_vllm_llama8b_eager.json.gz"
BEGIN_NS = 1_700_000_000 * NS_PER_S
"""Ledger time at which a desk's clock begins; not on an hour."""
HOST, BOOT, WORKER = "host", "boot-1", "w1"
IDLE_W, BUSY_W = 100, 300
AT_ONCE = Limits(greeting_ns=0)
PATIENCE_S = 30.0
"""How long a test waits for what happens within a second or two on an idle machine."""


def gpu_named(uuid_: str = "GPU-a", index: int = 0) -> Gpu:
    """A pretended GPU."""
    return Gpu(uuid_, index, "emulated", "1", Source.EMULATED, 700_000)


@dataclass
class Card:
    """A GPU whose counter the test controls: 100 W idle, 300 W in the spans given to it; seconds since BEGIN_NS."""

    gpu: Gpu
    busy: list[tuple[float, float]] = field(default_factory=list)
    born_s: float = -3600.0
    """When its counter stood at 0."""
    lost: bool = False

    def flowed_mj(self, upto_s: float) -> int:
        """The counter: 1 W for 1 ms is 1 mJ."""
        busy_s = sum(max(0.0, min(b, upto_s) - max(a, self.born_s)) for a, b in self.busy)
        return round(IDLE_W * (upto_s - self.born_s) * 1000 + (BUSY_W - IDLE_W) * busy_s * 1000)

    def reading(self, at_s: float) -> Reading:
        """Samples of the last 2.4 s and the counter at its last 100 ms step, as an H200 gives them."""
        ends = [round(at_s * 50) / 50 - i / 50 for i in range(118, -1, -1)]
        watts = [BUSY_W if any(a < e - 0.01 < b for a, b in self.busy) else IDLE_W for e in ends]
        at_ns = BEGIN_NS + ns_from_s(at_s) + 50 * NS_PER_MS  # half a step late: the meter places the value at `at_s`
        samples = Samples(tuple(BEGIN_NS + ns_from_s(e) for e in ends), tuple(w * 1000 for w in watts))
        step_s = int(at_s * 10) / 10
        return Reading(samples, Counter(at_ns, at_ns + NS_PER_MS, self.flowed_mj(step_s)))


class Desk:
    """`Books` on a real ledger file, real meters, and a clock that only `run` turns. Times in s since BEGIN_NS."""

    def __init__(
        self,
        path: Path,
        *cards: Card,
        now_s: float = 0.0,
        boot: str = BOOT,
        limits: Limits = AT_ONCE,
        spool_dir: Path | None = None,
        policy_name: str = "time",
    ) -> None:
        self.now_s = now_s
        self.path = path
        self.cards = cards or (Card(gpu_named()),)
        self.ledger = Ledger.open(path)
        self.ledger.register_host(HOST, HOST, self.now_ns)
        self.settled: list[Settlement] = []
        self.finals: list[str] = []
        self.books = Books(
            self.ledger,
            host_id=HOST,
            boot_id=boot,
            policy=policy(policy_name),
            rival=policy("tokens"),
            offset_ns=0,
            now_ns=self.now_ns,
            limits=limits,
            spool_dir=spool_dir,
            on_settled=lambda s, _models: self.settled.append(s),
            on_final=self.finals.append,
        )
        self.meters = {c.gpu.uuid: Meter(c.gpu.uuid, c.gpu.source, self.books.add_gpu(c.gpu, None)) for c in self.cards}
        self.books.recover()
        self.boot = boot
        self.talking: dict[str, int] = {}
        """Workers that send heartbeats, and the next sequence number of each."""

    @property
    def now_ns(self) -> int:
        """Ledger time."""
        return BEGIN_NS + ns_from_s(self.now_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ledger.close()

    def hello(self, worker: str = WORKER, *, pid: int | None = None, spool: str = "") -> int:
        """A proxy worker begins to talk; its monotonic clock is ledger time."""
        pid = os.getpid() if pid is None else pid
        acked = self.books.hello(wire.Hello(worker, self.boot, 0, 0, pid, (), spool), self.now_ns)
        self.talking[worker] = acked + 1
        return acked

    def say(self, *events: wire.Event, worker: str = WORKER, watermark_s: float | None = None) -> int:
        """Deliver events with the next sequence numbers, as one batch; returns how many were new."""
        first = self.talking[worker]
        self.talking[worker] = first + len(events)
        mark_ns = self.now_ns if watermark_s is None else at(watermark_s)
        return self.books.take(wire.Batch(worker, first, events, mark_ns), self.now_ns)

    def run(self, seconds: float, *, silent: bool = False, advance: bool = True) -> None:
        """Turn the clock in steps of 0.25 s: readings each second, heartbeats each half, settling each step."""
        for _ in range(round(seconds * 4)):
            self.now_s = round(self.now_s + 0.25, 6)
            if self.now_s % 1 == 0:
                self.read()
            if self.now_s % 0.5 == 0 and not silent:
                for worker in self.talking:
                    self.say(worker=worker)
            if advance:
                self.books.advance(self.now_ns)

    def read(self) -> None:
        """One reading of each GPU that is there."""
        for card in self.cards:
            if not card.lost:
                self.books.add_windows(self.meters[card.gpu.uuid].feed(card.reading(self.now_s)))

    def query(self, query_id: str) -> Row:
        """A query as the ledger has it."""
        row = self.ledger.query(query_id)
        assert row is not None, f"{query_id} is not in the ledger"
        return row


def at(seconds: float) -> int:
    """Ledger time of an instant given in s since BEGIN_NS."""
    return BEGIN_NS + ns_from_s(seconds)


def opened(query_id: str, start_s: float, **more: Any) -> wire.Open:
    """A request arrived."""
    return wire.Open(query_id, at(start_s), "server", **more)


def closed(query_id: str, end_s: float, **more: Any) -> wire.Close:
    """It was answered."""
    given: dict[str, Any] = {"status": "ok", "http_status": 200, "served": "m", "prompt_tokens": 5, **more}
    return wire.Close(query_id=query_id, end_ns=at(end_s), **given)


def findings(ledger: Ledger) -> list[audit.Finding]:
    """What `energyd audit` finds."""
    return [
        *audit.check_windows(ledger.audit_windows()),
        *audit.check_queries(ledger.audit_queries()),
        *audit.check_days(ledger.audit_days()),
        *audit.check_closings(ledger.audit_closings()),
    ]


def audited(path: Path) -> dict[str, int]:
    """Prove the books at `path`: no findings, Σ booked + unsettled = counter's difference; returns totals in µJ."""
    with Ledger.open(path, readonly=True) as ledger:
        assert findings(ledger) == []
        windows = list(ledger.audit_windows())
        counter_uj = sum(w["energy_uj"] or 0 for w in windows)
        for key in {(w["gpu_id"], w["epoch"]) for w in windows}:  # first and last value of each counter's life
            own = [w for w in windows if (w["gpu_id"], w["epoch"]) == key]
            booked_uj = sum(w["energy_uj"] or 0 for w in own)
            assert booked_uj == (own[-1]["counter_end_mj"] - own[0]["counter_start_mj"]) * 1000
        accounts: dict[str, int] = {}
        for total in ledger.account_totals():
            accounts[total.account] = accounts.get(total.account, 0) + total.energy_uj
        unsettled_uj = sum(w["energy_uj"] or 0 for w in windows if not w["settled"])
        assert sum(accounts.values()) + unsettled_uj == counter_uj
        return {**accounts, "counter": counter_uj, "unsettled": unsettled_uj}


def energyd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a verb to its end."""
    command = [sys.executable, "-m", "energyd.daemon.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment}
    )


def one_line(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """What a refusal said: exactly one line, no traceback, and this exit code."""
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def wait_for(condition: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """What `condition` gives once it is true; fails after a time that only a defect needs."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"still not true after {patience_s} s")


class Process:
    """A child whose output is kept and who does not outlive its test."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.lines: list[str] = []
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "energyd.daemon.cli", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **(environment or {})},
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(line.rstrip())

    def said(self, part: str) -> str:
        """Wait for a line with `part` in it."""

        def found() -> str | None:
            line = next((line for line in self.lines if part in line), None)
            assert line or self.popen.poll() is None, self.lines
            return line

        return str(wait_for(found))

    def kill(self) -> None:
        """`kill -9`."""
        self.popen.kill()
        self._gone()

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.popen.terminate()
        return self._gone()

    def _gone(self) -> int:
        code = self.popen.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self.popen.stdout is not None
        self.popen.stdout.close()
        return code


class Daemon(Process):
    """A real `energyd daemon`, by default on a replayed recording."""

    def __init__(
        self, db: Path, *more: str, sensor: Sequence[str] = ("--sensor", "replay", "--trace", str(TRACE))
    ) -> None:
        super().__init__("daemon", "--db", str(db), "--admin", "127.0.0.1:0", *sensor, *more)
        self.db = db
        self._base = ""

    def ready(self) -> Self:
        """Wait until it serves."""
        self._base = self.said("/metrics").split()[2].removesuffix("/metrics,").rstrip(",")
        return self

    @property
    def base(self) -> str:
        """http://HOST:PORT of its admin port."""
        return self._base

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        """Status and text of an answer of the admin port."""
        request = urllib.request.Request(self._base + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as e:
            with e:
                return e.code, e.read().decode()

    def json(self, path: str) -> Any:
        """The JSON of an answer, whatever its status."""
        return json.loads(self.get(path)[1])

    def settled(self) -> bool:
        """Whether it has booked anything yet."""
        return bool(self.json("/v1/status")["gpus"]) and "energyd_idle_energy_joules_total" in self.get("/metrics")[1]


@contextlib.contextmanager
def daemon(db: Path, *more: str, **how: Any) -> Iterator[Daemon]:
    """A daemon that is ready; killed at the end if it still lives."""
    process = Daemon(db, *more, **how)
    try:
        yield process.ready()
    finally:
        if process.popen.poll() is None:
            process.kill()


class Worker:
    """A proxy worker by hand: speaks `wire` to the daemon's socket, on this boot's monotonic clock."""

    def __init__(self, db: Path, name: str | None = None, *, pid: int | None = None, spool: str = "") -> None:
        self.socket = socket_path(db)
        self.name = name or uuid.uuid4().hex
        self.pid = os.getpid() if pid is None else pid
        self.spool = spool
        self.next_seq = 1

    def post(self, path: str, message: msgspec.Struct | bytes) -> tuple[int, bytes]:
        """Status and body; status 0: nobody answers."""
        connection = _Unix(self.socket)
        try:
            connection.request("POST", path, message if isinstance(message, bytes) else wire.encode(message))
            answer = connection.getresponse()
            return answer.status, answer.read()
        except OSError:
            return 0, b""
        finally:
            connection.close()

    def hello(self) -> int:
        """Introduce itself; returns what the daemon has of it."""
        now_ns, unix_ns = time.monotonic_ns(), time.time_ns()
        hello = wire.Hello(self.name, boot_id(), now_ns, unix_ns, self.pid, (), self.spool)
        status, body = self.post(wire.PATH_HELLO, hello)
        assert status == 200, (status, body)
        acked: int = msgspec.msgpack.decode(body, type=wire.HelloReply).acked_seq
        self.next_seq = max(self.next_seq, acked + 1)
        return acked

    def batch(self, *events: wire.Event, first_seq: int | None = None) -> wire.Batch:
        """A batch with everything up to now."""
        return wire.Batch(self.name, self.next_seq if first_seq is None else first_seq, events, time.monotonic_ns())

    def say(self, *events: wire.Event) -> None:
        """Deliver events; they must be taken."""
        status, body = self.post(wire.PATH_BATCH, self.batch(*events))
        assert status == 200, (status, body)
        self.next_seq += len(events)

    def beat(self) -> bool:
        """A heartbeat; true, so that a wait can go on with what it waits for."""
        self.say()
        return True

    def bye(self) -> None:
        """Nothing more to say."""
        assert self.post(wire.PATH_BYE, wire.Bye(self.name))[0] == 200


def asked(duration_s: float = 0.2, end_ns: int | None = None, **more: Any) -> tuple[str, tuple[wire.Event, ...]]:
    """A query that has just ended: its id and its events, on the monotonic clock."""
    query_id = uuid.uuid4().hex
    end_ns = time.monotonic_ns() if end_ns is None else end_ns
    given: dict[str, Any] = {
        "status": "ok", "http_status": 200, "served": "m", "task": "text_generation", "prompt_tokens": 5,
        "completion_tokens": 7, "usage_source": "response", **more,
    }  # fmt: skip
    return query_id, (
        wire.Open(query_id, end_ns - ns_from_s(duration_s), "server"),
        wire.Close(query_id=query_id, end_ns=end_ns, **given),
    )
