"""The daemon's composition root: sensors in threads, the ledger in one writer thread, HTTP on the event loop.

Who may block: a sensor its own thread; the ledger the writer thread; nothing the event loop. A hung driver call therefore
blocks nothing but itself, a full disk leaves windows in memory and the proxies' events with the proxies, and the traffic
never comes through here at all.
"""

import asyncio
import contextlib
import hashlib
import logging
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from . import paths
from .adminapi import AdminApi
from .attribution import policy as policy_named
from .clock import Clock, boot_id
from .config import Settings
from .errors import LedgerError, LostGpu, RetryReading, UnavailableError, UsageError
from .ledger import Ledger
from .localapi import LocalApi
from .meter import Meter, Resume
from .metrics import Health, Totals
from .offline import rival_of
from .records import Gpu, Source, Window
from .retention import Retention
from .sensors import Sensor
from .settlement import Books, Limits
from .units import MW_PER_W, NS_PER_S, ns_from_s, seconds

log = logging.getLogger(__name__)
T = TypeVar("T")

_POLL_S = {Source.ESTIMATE: 0.5}
"""Seconds between anchors; one a second costs 0.5 % of a core on an H200. The estimate is cheap and has no samples."""
_TICK_S = 0.25
_PROCESSES_EVERY = 10
_HUNG_NS = 10 * NS_PER_S
_IDLE_PRIOR_SHARE = 0.15
"""Idle power as a share of the power limit until a quiet moment was seen: 105 W for an H200 (measured: 81 to 138 W)."""
_RETENTION_EVERY_NS = 600 * NS_PER_S


@dataclass(slots=True)
class MeterThread:
    """What one GPU's thread shares with the event loop; single fields only, so no lock is needed."""

    gpu: Gpu
    meter: Meter
    state: str = "starting"
    read_ns: int = 0
    failed: int = 0
    windows: "deque[Window]" = field(default_factory=deque)
    processes_changed: bool = False


def open_sensor(settings: Settings, clock: Clock) -> Sensor | None:
    """The sensor that was asked for, never another one; None for `none`. Raises NoGpuError or UsageError."""
    if settings.sensor != "replay" and settings.trace is not None:
        raise UsageError("--trace goes with --sensor replay")
    if settings.sensor == "none":
        return None
    if settings.sensor == "estimate":
        from .sensors.estimate import DEFAULT_WATTS, EstimateSensor

        return EstimateSensor(clock, settings.estimate_watts or DEFAULT_WATTS)
    if settings.sensor == "replay":
        if settings.trace is None:
            raise UsageError("--sensor replay needs --trace FILE, a recorded trace")
        from .sensors.replay import ReplaySensor
        from .trace import read_trace

        return ReplaySensor(read_trace(settings.trace), clock)
    from .sensors.nvml import NvmlSensor

    bad = [g for g in settings.gpus if not (g.isascii() and g.isdecimal())]
    if bad:
        raise UsageError(f"--gpu takes the index of a GPU, such as 0, not {bad[0]!r}")
    return NvmlSensor.open(clock, [int(g) for g in settings.gpus] or None)


def host_id(machine_id: Path = Path("/etc/machine-id")) -> str:
    """A stable id of this host: a hash of the machine id (which must not be shown to others), else of the host name."""
    try:
        secret = machine_id.read_text().strip()
    except OSError:
        secret = ""
    return hashlib.sha256(f"energyd:{secret or socket.gethostname()}".encode()).hexdigest()[:16]


class Service:
    """The running daemon. `run` returns after SIGTERM or SIGINT, with everything that can be settled settled."""

    def __init__(self, settings: Settings, open_with: Callable[[Settings, Clock], Sensor | None] = open_sensor) -> None:
        self.settings = settings
        self.host_id = host_id()
        self.boot_id = boot_id()
        paths.make_private(settings.db.parent)
        self.ledger = Ledger.open(settings.db)
        started = Clock.start()
        self.ledger.register_host(self.host_id, socket.gethostname(), started.now_ns())
        # A clock that was set back over a reboot must not put new windows before the old ones.
        behind_ns = max(0, self.ledger.last_window_ns() - started.now_ns())
        first_offset_ns = started.offset_ns + behind_ns
        offset_ns = self.ledger.boot_offset(self.host_id, self.boot_id, first_offset_ns, started.now_ns() + behind_ns)
        self.clock = Clock(offset_ns)
        self.sensor = open_with(settings, self.clock)
        gpus = self.sensor.gpus() if self.sensor else ()
        self.totals = Totals(gpus)
        self.books = Books(
            self.ledger,
            host_id=self.host_id,
            boot_id=self.boot_id,
            policy=policy_named(settings.policy),
            rival=policy_named(rival_of(settings.policy)),
            offset_ns=offset_ns,
            now_ns=self.clock.now_ns(),
            limits=Limits(ns_from_s(settings.horizon_s), ns_from_s(settings.recovery_wait_s)),
            spool_dir=paths.spool_dir(settings.db),
            on_settled=self.totals.settled,
            on_final=self._final,
        )
        self.meters = {g.uuid: MeterThread(g, Meter(g.uuid, g.source, self._resume(g))) for g in gpus}
        self.books.recover()
        self.totals.load(self.ledger.account_totals(), self.books.unsettled_uj(), self.ledger.query_totals())
        self.retention = Retention.from_days(
            settings.keep_shape_days, settings.keep_windows_days, settings.keep_queries_days, settings.keep_runs_days
        )
        self.ledger_failures = 0
        self.failing: str | None = None
        self._stop = threading.Event()
        self._stopped = asyncio.Event()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._retained_ns = self.clock.now_ns()
        self._stepped = False
        self._stored: list[Window] = []

    def _resume(self, gpu: Gpu) -> Resume | None:
        idle_mw = round(self.settings.idle_watts * MW_PER_W) if self.settings.idle_watts is not None else None
        if idle_mw is None and gpu.power_limit_mw and gpu.source is not Source.ESTIMATE:
            idle_mw = round(_IDLE_PRIOR_SHARE * gpu.power_limit_mw)
        return self.books.add_gpu(gpu, idle_mw)

    def _final(self, query_id: str) -> None:
        row = self.ledger.query(query_id)
        if row is not None:
            self.totals.finished(row)

    # -- threads ------------------------------------------------------------------------------------------------------

    def _meter_loop(self, thread: MeterThread) -> None:
        """Read one GPU about once a second until told to stop; never raises."""
        assert self.sensor is not None  # noqa: S101 - threads exist only with a sensor
        period_ns = ns_from_s(_POLL_S.get(thread.gpu.source, 1.0))
        due_ns, polls = self.clock.now_ns(), 0
        pids: frozenset[int] | None = None
        while True:
            last = self._stop.is_set()  # one more reading after the word to stop: the outage begins as late as possible
            try:
                thread.windows.extend(thread.meter.feed(self.sensor.read(thread.gpu)))
                thread.state, thread.read_ns = "ok", self.clock.now_ns()
                if polls % _PROCESSES_EVERY == 0:
                    found = self.sensor.compute_pids(thread.gpu)
                    thread.processes_changed |= pids is not None and found != pids
                    pids = found
            except RetryReading as e:
                thread.state, thread.failed = f"retrying: {e}", thread.failed + 1
            except LostGpu as e:
                thread.meter.lost()
                thread.state, thread.failed = f"lost: {e}", thread.failed + 1
            except Exception:  # a loop root: a meter that dies silently would end every figure
                log.exception("reading GPU %s failed", thread.gpu.index)
                thread.state, thread.failed = "failing: see the log", thread.failed + 1
            if last:
                return
            polls += 1
            due_ns += period_ns
            if due_ns < self.clock.now_ns():
                due_ns = self.clock.now_ns() + period_ns  # a stalled host: do not catch up in a burst of reads
            self._stop.wait(seconds(due_ns - self.clock.now_ns()))

    async def write(self, job: Callable[[], T]) -> T:
        """Run `job` in the writer thread, which alone touches books and ledger."""

        def run() -> T:
            with self.ledger.reading():
                return job()

        return await asyncio.get_running_loop().run_in_executor(self._writer, run)

    def _tick(self) -> None:
        """In the writer thread: store what the meters completed, settle what can be settled."""
        now_ns = self.clock.now_ns()
        for thread in self.meters.values():
            if thread.processes_changed:
                thread.processes_changed = False
                self.books.processes_changed(thread.gpu.uuid)
            while thread.windows:
                self._stored.append(thread.windows.popleft())
        if self._stored:
            self.books.add_windows(self._stored)
            self.totals.metered(self._stored)
            self._stored = []  # only now: a ledger that refuses gets them again at the next tick
        self.books.advance(now_ns)
        self._watch_clock(now_ns)
        if now_ns - self._retained_ns > _RETENTION_EVERY_NS:
            self._retained_ns = now_ns
            self.retention.apply(self.ledger, now_ns)

    def _watch_clock(self, now_ns: int) -> None:
        """A step of the wall clock is an event, not a gap; said once."""
        step_ns = self.clock.wall_step_ns()
        if abs(step_ns) > NS_PER_S and not self._stepped:
            self._stepped = True
            self.ledger.add_event(
                self.host_id, now_ns, "clock-step", f"the wall clock is {seconds(step_ns):.3f} s off ledger time"
            )

    async def _settle_loop(self) -> None:
        while not self._stopped.is_set():
            try:
                await self.write(self._tick)
                self.failing = None
            except LedgerError as e:
                self.ledger_failures += 1
                if self.failing is None:
                    log.error("%s; energy is kept in memory until the ledger takes it", e)  # noqa: TRY400 - expected, one line
                self.failing = str(e)
            except Exception:  # a loop root
                self.ledger_failures += 1
                if self.failing is None:
                    log.exception("settling failed")
                self.failing = "settling failed: see the log"
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), _TICK_S)

    # -- what can be asked --------------------------------------------------------------------------------------------

    async def health(self) -> Health:
        """State for metrics and status; taken in the writer thread, which alone may look at the books."""
        return await self.write(self._health)

    def _health(self) -> Health:
        now_ns = self.clock.now_ns()
        oldest_ns = self.books.oldest_unsettled_ns()
        return Health(
            power_mw={u: t.meter.last_power_mw for u, t in self.meters.items()},
            idle_floor_mw={u: self.books.idle_floor_mw(u) for u in self.meters},
            read_age_ns={u: now_ns - t.read_ns if t.read_ns else 0 for u, t in self.meters.items()},
            readings_failed={u: t.failed for u, t in self.meters.items()},
            unsettled_uj=self.books.unsettled_uj(),
            oldest_unsettled_age_ns=None if oldest_ns is None else now_ns - oldest_ns,
            open_queries=self.books.open_queries,
            workers=self.books.workers,
            late_queries=self.books.late_queries,
            dropped_events=self.books.dropped_events,
            ledger_failures=self.ledger_failures,
            wall_step_ns=self.clock.wall_step_ns(),
        )

    def meter_state(self, uuid: str) -> str:
        """`ok`, or what is wrong with the meter of this GPU."""
        thread = self.meters[uuid]
        age_ns = self.clock.now_ns() - thread.read_ns
        if thread.state == "ok" and age_ns > _HUNG_NS:
            return f"hung: no answer from the driver for {seconds(age_ns):.0f} s"
        return thread.state

    def troubles(self) -> list[str]:
        """Why the daemon is not ready; empty if it is."""
        found = [f"GPU {t.gpu.index}: {s}" for u, t in self.meters.items() if (s := self.meter_state(u)) != "ok"]
        return [*found, self.failing] if self.failing else found

    # -- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopped.set)
        local, admin = LocalApi(self), AdminApi(self)
        try:
            bound = await self._listen(local, admin)
        except BaseException:
            await admin.stop()
            await local.stop()
            self.close()
            raise
        threads = [
            threading.Thread(target=self._meter_loop, args=(t,), name=f"meter-{t.gpu.index}", daemon=True)
            for t in self.meters.values()
        ]
        for thread in threads:
            thread.start()
        self._announce(bound)
        settling = asyncio.create_task(self._settle_loop())
        await self._stopped.wait()
        self._stop.set()
        for thread in threads:
            await asyncio.to_thread(thread.join, 3.0)
        await settling
        await admin.stop()
        await local.stop()
        with contextlib.suppress(LedgerError):
            await self.write(self._tick)
        self.close()

    async def _listen(self, local: LocalApi, admin: AdminApi) -> str:
        """Open both doors; returns the admin address that was bound. Raises UnavailableError or UsageError."""
        path = paths.socket_path(self.settings.db)
        try:
            await local.start(path)
        except OSError as e:
            raise UnavailableError(f"cannot listen at {path} ({e.strerror or e}); name another place with --db") from e
        try:
            return await admin.start(self.settings.admin)
        except OSError as e:
            raise UnavailableError(
                f"cannot listen on {self.settings.admin} ({e.strerror or e}); another daemon may be running,"
                " or name another address with --admin"
            ) from e

    def _announce(self, admin: str) -> None:
        for t in self.meters.values():
            print(f"energyd daemon: GPU {t.gpu.index} {t.gpu.name}, {t.gpu.source}", flush=True)
        if not self.meters:
            print("energyd daemon: no sensor; queries are counted, their energy stays unknown", flush=True)
        print(f"energyd daemon: http://{admin}/metrics, ledger {self.settings.db}", flush=True)

    def close(self) -> None:
        """Give everything back; a thread that hangs in the driver is left behind."""
        self._writer.shutdown(wait=True)
        if self.sensor and all(t.state == "ok" for t in self.meters.values()):
            self.sensor.close()
        self.ledger.close()
