"""Settlement: windows from the meters and queries from the proxies become charges in the ledger.

`Books` is synchronous and belongs to one thread (the ledger's writer); `service` feeds it live, `offline` feeds it a
recording. All it knows it can rebuild from the ledger: readings and events are stored before they are used, a window is
booked in one transaction under a unique key, so a process killed at any instant continues where it stopped.

Decided: windows of a GPU settle in order of time. A query that is still open blocks its window and so all later ones,
which it overlaps too; nothing is gained by settling out of order, and "settled until" is one number a GPU.
"""

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from .activity import Activity, ActivityBook, WorkerState
from .attribution import Policy
from .attribution.accounts import LEAD_NS, TAIL_NS, divide
from .attribution.floor import QUIET_DISTANCE_NS, IdleFloor
from .errors import RefusedWindow
from .ledger import Ledger
from .ledger_intake import booked_model, chunk_times
from .meter import Resume
from .records import Gpu, QueryStatus, Service, Settlement, Unattributed, Window, WindowKind
from .units import NS_PER_MS, NS_PER_S
from .wire import Batch, Event, Hello, Open, Progress

log = logging.getLogger(__name__)

HORIZON_NS = 600 * NS_PER_S
RECOVERY_WAIT_NS = 120 * NS_PER_S
_METER_REL_U = 0.003
"""Scatter of Σ samples against the counter over minutes of serving on an H200 (0.03 % to 0.3 %): one standard deviation."""
_EDGE_NS = 15 * NS_PER_MS
"""How far a query's end may lie from where the meter sees it: less than one 20 ms sample."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long settlement waits.

    `horizon_ns` for an open query, `recovery_wait_ns` for a silent worker or an unknown spool, `greeting_ns` after a
    start for workers that began while the daemon was away.
    """

    horizon_ns: int = HORIZON_NS
    recovery_wait_ns: int = RECOVERY_WAIT_NS
    greeting_ns: int = 2 * NS_PER_S


@dataclass(slots=True)
class _Pending:
    window: Window
    touch_ns: int
    """Value of the touch clock when the window came: its age towards the horizon."""
    seen: bool = False
    """The idle floor has learned from it: a window that a full disk sends back must not count again and again."""


class _GpuBooks:
    """What settlement keeps of one GPU."""

    def __init__(self, gpu: Gpu, floor: IdleFloor, settled_until_ns: int) -> None:
        self.gpu = gpu
        self.floor = floor
        self.settled_until_ns = settled_until_ns
        self.pending: deque[_Pending] = deque()
        self.newest = (-1, -1)
        """Epoch and sequence number of the newest window taken in."""


class Books:
    """Everything between the meters and the ledger; one thread only."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        host_id: str,
        boot_id: str,
        policy: Policy,
        rival: Policy | None,
        offset_ns: int,
        now_ns: int,
        limits: Limits = Limits(),
        spool_dir: Path | None = None,
        on_settled: Callable[[Settlement, Mapping[str, str]], None] | None = None,
        on_final: Callable[[str], None] | None = None,
    ) -> None:
        self.ledger = ledger
        self.host_id = host_id
        self.boot_id = boot_id
        self.policy = policy
        self.rival = rival
        self.offset_ns = offset_ns
        self.limits = limits
        self.late_queries = ledger.late_queries()
        self._spool_dir = spool_dir
        self._on_settled = on_settled or (lambda _settlement, _models: None)
        self._on_final = on_final or (lambda _query_id: None)
        self._gpus: dict[str, _GpuBooks] = {}
        self._workers: dict[str, WorkerState] = {}
        self._book = ActivityBook()
        self._dropped = ledger.dropped_events()
        self._touch_ns = 0
        self._advanced_ns = now_ns
        self._started_ns = now_ns

    # -- set-up and recovery ------------------------------------------------------------------------------------------

    def add_gpu(self, gpu: Gpu, idle_prior_mw: int | None) -> Resume | None:
        """Take a GPU into the books; returns where its meter must go on (None: it was never metered)."""
        self.ledger.register_gpu(self.host_id, gpu, self._started_ns)
        state = _GpuBooks(gpu, IdleFloor(idle_prior_mw), self.ledger.settled_until_ns(gpu.uuid))
        state.pending.extend(_Pending(w, 0) for w in self.ledger.unsettled(gpu.uuid))
        self._gpus[gpu.uuid] = state
        return self.ledger.resume(gpu.uuid, self.boot_id)

    def recover(self) -> None:
        """After all GPUs were added: wait again for the workers and queries that the ledger knows of."""
        for w in self.ledger.workers():
            servers = {name: self._gpus_of(gpus) for name, _url, gpus in msgspec.json.decode(w.servers)}
            self._workers[w.worker] = WorkerState(
                w.worker, w.offset_ns, w.pid, w.spool, servers, w.watermark_ns, self._started_ns
            )
        for q in self.ledger.pending_queries():
            worker = self._workers.get(q.worker)
            gpus = worker.servers.get(q.server, self._all_gpus()) if worker else self._all_gpus()
            activity = Activity(
                q.query_id, q.worker, gpus, q.start_ns, q.end_ns, prompt_tokens=q.prompt_tokens,
                completion_tokens=q.completion_tokens, model=q.model or "", status=q.status,
            )  # fmt: skip
            activity.chunks.extend(t - q.start_ns for t in q.chunks_ns)
            # Only the horizon (or its lateness) settles a window under an open query.
            activity.partial = q.end_ns is None and self._settled_after(q.start_ns, gpus)
            self._book.add(activity)

    def _settled_after(self, at_ns: int, gpus: Iterable[str]) -> bool:
        """Whether a window that ends after this instant is settled on any of these GPUs."""
        return any(self._gpus[g].settled_until_ns > at_ns for g in gpus)

    def _all_gpus(self) -> frozenset[str]:
        return frozenset(self._gpus)

    def _gpus_of(self, named: Sequence[str]) -> frozenset[str]:
        """UUIDs of the GPUs a server was said to run on, by UUID or index; all of them if none was named."""
        wanted = {str(n) for n in named}
        found = {u for u, g in self._gpus.items() if u in wanted or str(g.gpu.index) in wanted}
        if wanted and len(found) < len(wanted):
            log.warning("GPUs %s are not metered here; metered are %s", sorted(wanted), sorted(self._gpus))
        return frozenset(found) if wanted else self._all_gpus()

    # -- what comes in ------------------------------------------------------------------------------------------------

    def hello(self, hello: Hello, now_ns: int) -> int:
        """A worker introduces itself; returns the last of its sequence numbers that is committed."""
        # One offset a boot: if the daemon ran in that boot, its windows lie on the offset that is stored for it.
        same_boot, own_ns = hello.boot_id == self.boot_id, hello.unix_ns - hello.mono_ns
        offset_ns = (
            self.offset_ns if same_boot else self.ledger.boot_offset(self.host_id, hello.boot_id, own_ns, now_ns)
        )
        acked = self.ledger.register_worker(self.host_id, hello, offset_ns)
        servers: dict[str, frozenset[str]] = {s.name: self._gpus_of(s.gpus) for s in hello.servers}
        known = self._workers.get(hello.worker)
        self._workers[hello.worker] = WorkerState(
            hello.worker, offset_ns, hello.pid, hello.spool, servers,
            watermark_ns=known.watermark_ns if known else 0,  # a stranger may bring a spool: wait for its first batch
            heard_ns=now_ns,
        )  # fmt: skip
        return acked

    def knows(self, worker: str) -> bool:
        """Whether this worker has introduced itself since the daemon started (or the ledger remembers it)."""
        return worker in self._workers

    def take(self, batch: Batch, now_ns: int) -> int:
        """Store a worker's events and use them; returns how many were new. Raises KeyError for a stranger."""
        worker = self._workers[batch.worker]
        worker.heard_ns = now_ns
        self._dropped[batch.worker] = max(batch.dropped, self._dropped.get(batch.worker, 0))
        events = [_shifted(e, worker.offset_ns) for e in batch.events]
        watermark_ns = batch.watermark_ns + worker.offset_ns
        if batch.events or watermark_ns - worker.watermark_ns > NS_PER_S:
            # an idle worker's watermark is stored once a second: a restart waits for it anyhow
            fresh = self.ledger.record(self.host_id, batch.worker, batch.first_seq, events, watermark_ns, batch.dropped)
        else:
            fresh = 0
        for event in events[len(events) - fresh :]:
            self._apply(worker, event)
        worker.watermark_ns = max(worker.watermark_ns, watermark_ns)
        return fresh

    def bye(self, worker: str, now_ns: int) -> None:
        """A worker has nothing more to say; what it left open ended when it was last seen."""
        # The ledger first: what it refuses (a full disk) is asked of it again, what memory has forgotten is not.
        self._cut_off(worker, now_ns)
        self.ledger.worker_gone(worker)
        self._workers.pop(worker, None)

    def add_windows(self, windows: Sequence[Window]) -> None:
        """Store what a meter completed; it is settled when its time has come."""
        with self.ledger.transaction():
            self.ledger.append_windows(windows, self.boot_id)
            for window in windows:
                if window.kind is not WindowKind.METERED:
                    self._note(window)
        for window in windows:
            state = self._gpus[window.gpu]
            if (window.epoch, window.seq) <= state.newest:
                continue
            state.newest = (window.epoch, window.seq)
            if window.kind is not WindowKind.GAP:
                state.pending.append(_Pending(window, self._touch_ns))

    def _note(self, window: Window) -> None:
        detail = {
            WindowKind.GAP: "the counter was lost: the energy until its restart is unknown",
            WindowKind.RESET: "the counter restarted: its first value is booked as unattributed",
        }.get(window.kind, "the meter was away: its energy is one interval without shape")
        self.ledger.add_event(self.host_id, window.end_ns, str(window.kind), detail, window.gpu)

    def _apply(self, worker: WorkerState, event: Event) -> None:
        if isinstance(event, Open):
            gpus = worker.servers.get(event.server, self._all_gpus())
            activity = Activity(event.query_id, worker.worker, gpus, event.start_ns)
            activity.late = self._settled_after(event.start_ns, gpus)
            self.late_queries += activity.late
            self._book.add(activity)
            return
        found = self._book.get(event.query_id)
        if found is None or found.end_ns is not None:
            return  # a worker that was given up for lost is back: its queries have ended
        if isinstance(event, Progress):
            found.chunks.extend(t - found.start_ns for t in chunk_times(event.from_ns, event.deltas_us))
        else:
            found.end_ns = max(event.end_ns, found.start_ns + 1)
            found.prompt_tokens, found.completion_tokens = event.prompt_tokens, event.completion_tokens
            found.model = booked_model(event)
            found.status = QueryStatus(event.status)

    def _cut_off(self, worker: str, now_ns: int) -> None:
        for activity in self._book.open_queries():
            if activity.worker == worker:
                end_ns = max(activity.start_ns + 1, min(now_ns, activity.last_seen_ns() + 1))
                self.ledger.cut_off(activity.query_id, end_ns)
                activity.end_ns, activity.status = end_ns, QueryStatus.PARTIAL

    # -- settling -----------------------------------------------------------------------------------------------------

    def advance(self, now_ns: int) -> int:
        """Settle what can be settled now; returns how many windows were. Call a few times a second."""
        self._tend_workers(now_ns)
        if self._awaits_strangers(now_ns):
            return 0
        settled = 0
        for state in self._gpus.values():
            while state.pending and self._ready(state.pending[0]):
                self._settle(state, state.pending[0], now_ns)
                state.pending.popleft()  # only now: a ledger that refuses (disk full) leaves the window to be tried again
                settled += 1
        self._finish(now_ns)
        return settled

    def _tend_workers(self, now_ns: int) -> None:
        """Advance the touch clock; give up on workers that are dead without a spool, or silent for too long."""
        elapsed_ns = max(0, min(now_ns - self._advanced_ns, NS_PER_S * 2))
        self._advanced_ns = now_ns
        if all(w.connected(now_ns) for w in self._workers.values()):
            self._touch_ns += elapsed_ns
        for w in list(self._workers.values()):
            if w.connected(now_ns):
                continue
            patience_ns = 0 if _dead(w.pid) and not _spooled(w.spool) else self.limits.recovery_wait_ns
            if now_ns - w.heard_ns >= max(patience_ns, 0):
                log.warning("proxy worker %s fell silent; windows settle without it", w.worker)
                self.ledger.add_event(self.host_id, now_ns, "worker-lost", f"worker {w.worker} fell silent")
                self.bye(w.worker, now_ns)

    def _awaits_strangers(self, now_ns: int) -> bool:
        """After a start, workers and spools that the ledger does not know yet get the time to report."""
        waited_ns = now_ns - self._started_ns
        if waited_ns < self.limits.greeting_ns:
            return True
        if self._spool_dir is None or waited_ns >= self.limits.recovery_wait_ns:
            return False
        known = {w.spool for w in self._workers.values()}
        return any(str(f) not in known for f in self._spool_dir.glob("*.spool"))

    def _ready(self, pending: _Pending) -> bool:
        window = pending.window
        reach_ns = window.end_ns + LEAD_NS
        if any(w.watermark_ns < reach_ns for w in self._workers.values()):
            return False
        if self._touch_ns - pending.touch_ns > self.limits.horizon_ns:
            return True
        return not any(a.end_ns is None for a in self._book.on(window.gpu, window.start_ns - TAIL_NS, reach_ns))

    def _settle(self, state: _GpuBooks, pending: _Pending, now_ns: int) -> None:
        window = pending.window
        near = self._book.on(window.gpu, *_reach(window))
        services = [a.service(now_ns) for a in near]
        if window.kind is WindowKind.METERED and not pending.seen:
            state.floor.see(window, services)
            pending.seen = True
        reached = _reached(window, services)
        settlement = divide(window, reached, state.floor, self.policy, self.rival)
        try:
            booked = self.ledger.settle(settlement, window.end_ns, now_ns)
        except RefusedWindow as e:
            settlement = self._set_aside(window, settlement, str(e), now_ns)
            booked = self.ledger.settle(settlement, window.end_ns, now_ns)
        if booked:
            self._on_settled(settlement, {a.query_id: a.model for a in near})
        state.settled_until_ns = max(state.settled_until_ns, window.end_ns)
        charged = {c.query_id for c in settlement.charges}
        for activity in near:
            if activity.query_id in charged:
                activity.source = str(window.source)
                activity.partial |= activity.end_ns is None
        if window.kind is WindowKind.METERED:
            self.policy.learn(window, reached, settlement.active_uj)

    def _set_aside(self, window: Window, refused: Settlement, why: str, now_ns: int) -> Settlement:
        """One window that breaks a law must not hold up all later ones: its energy is booked, to nobody, and said."""
        log.error("%s; its energy is booked as unattributed", why)
        self.ledger.add_event(self.host_id, now_ns, "window-refused", why, window.gpu)
        energy_uj = window.energy_uj or 0
        unknown = {Unattributed.UNKNOWN: energy_uj} if energy_uj else {}
        return replace(refused, energy_uj=energy_uj, idle_uj=0, unattributed_uj=unknown, charges=())

    def _finish(self, now_ns: int) -> None:
        """Queries whose last window is settled become final."""
        done = [a for a in self._book.closed_queries() if self._settled_past(a, now_ns)]
        if not done:
            return
        self.ledger.finish(self._final(a) for a in done)
        self._forget(done)

    def _forget(self, done: Sequence[Activity]) -> None:
        self._book.drop(a.query_id for a in done)
        for activity in done:
            self._on_final(activity.query_id)

    def _settled_past(self, activity: Activity, now_ns: int) -> bool:
        reach_ns = (activity.end_ns or now_ns) + TAIL_NS
        behind = [self._gpus[g] for g in activity.gpus if self._gpus[g].settled_until_ns < reach_ns]
        if behind and all(not g.pending and now_ns - reach_ns > self.limits.horizon_ns for g in behind):
            activity.partial = True  # a GPU that fell off the bus: nobody waits for its next reading for ever
            return True
        return not behind

    def _final(self, a: Activity) -> tuple[str, QueryStatus | None, float | None, str | None]:
        active_uj, standing_uj, spread_uj = self.ledger.energy_of(a.query_id)
        status = QueryStatus.LATE if a.late else QueryStatus.PARTIAL if a.partial else None
        if active_uj is None or standing_uj is None:
            return a.query_id, status, None, None
        duration_ns = (a.end_ns or a.start_ns + 1) - a.start_ns
        source = a.source or next((str(self._gpus[g].gpu.source) for g in a.gpus), None)  # recovered: charged before
        return a.query_id, status, rel_u(active_uj + standing_uj, spread_uj, duration_ns), source

    def finish_recording(self) -> None:
        """A recording is over: queries that outlast its last window are final with what they have."""
        left = self._book.closed_queries()
        self.ledger.finish(self._final(a) for a in left)
        self._forget(left)

    # -- what can be asked --------------------------------------------------------------------------------------------

    def unsettled_uj(self) -> Mapping[str, int]:
        """Metered but not settled energy by GPU, µJ."""
        return {u: sum(p.window.energy_uj or 0 for p in s.pending) for u, s in self._gpus.items()}

    def oldest_unsettled_ns(self) -> int | None:
        """Start of the oldest window that is not settled; None if all are."""
        return min((s.pending[0].window.start_ns for s in self._gpus.values() if s.pending), default=None)

    def settled_until_ns(self, gpus: Iterable[str] | None = None) -> int:
        """Everything before this is settled on these GPUs (all, if none are named)."""
        chosen = list(gpus) if gpus is not None else list(self._gpus)
        return min((self._gpus[g].settled_until_ns for g in chosen), default=0)

    def processes_changed(self, gpu: str) -> None:
        """Another server was loaded on the GPU, or one left: its idle level is a new one."""
        self._gpus[gpu].floor.processes_changed()

    def provisional_uj(self, query_id: str, now_ns: int) -> tuple[int, int]:
        """Active and standing energy that a query would get of the windows not settled yet, µJ; nothing is booked.

        Windows wait for the longest query that overlaps them: until then this is what there is to show.
        """
        found = self._book.get(query_id)
        active_uj = standing_uj = 0
        for gpu in found.gpus if found else ():
            state = self._gpus[gpu]
            for window in (p.window for p in state.pending):
                reached = _reached(window, [a.service(now_ns) for a in self._book.on(gpu, *_reach(window))])
                if any(s.query_id == query_id for s in reached):
                    settlement = divide(window, reached, state.floor, self.policy)
                    own = next((c for c in settlement.charges if c.query_id == query_id), None)
                    active_uj += own.active_uj if own else 0
                    standing_uj += own.standing_uj if own else 0
        return active_uj, standing_uj

    def idle_floor_mw(self, gpu: str) -> int | None:
        """The idle floor of a GPU as it is now, mW; None: unknown."""
        return self._gpus[gpu].floor.mw

    def gpus_of_servers(self, servers: Iterable[str]) -> frozenset[str]:
        """UUIDs of the GPUs that these servers (by name) run on; all, for a server that no worker names any more."""
        named = {name: gpus for w in self._workers.values() for name, gpus in w.servers.items()}
        return frozenset().union(*(named.get(s, self._all_gpus()) for s in servers))

    @property
    def dropped_events(self) -> int:
        """Events that workers, also those that are gone, had to drop."""
        return sum(self._dropped.values())

    @property
    def open_queries(self) -> int:
        """Queries in flight."""
        return len(self._book.open_queries())

    @property
    def workers(self) -> int:
        """Proxy workers that have not said goodbye."""
        return len(self._workers)


def rel_u(energy_uj: int, spread_uj: int, duration_ns: int) -> float | None:
    """Relative standard deviation of a query's serving energy; None for 0 µJ.

    Terms: the meter (0.3 %), the edges of the query in the meter's time (15 ms at either end), half of what the rival
    policy would have charged differently; at most 1, where the policies differ by more than the figure itself. It is
    comparative: the sensor's gain (±5 %) is not in it, and for the policies `time` and `tokens` it is stated, not
    validated against known shares.
    """
    if energy_uj <= 0:
        return None
    edge = math.sqrt(2) * _EDGE_NS / max(duration_ns, _EDGE_NS)
    return min(1.0, math.hypot(_METER_REL_U, edge, spread_uj / 2 / energy_uj))


def _reach(window: Window) -> tuple[int, int]:
    """From when until when a query can matter to a window."""
    return window.start_ns - QUIET_DISTANCE_NS, window.end_ns + QUIET_DISTANCE_NS


def _reached(window: Window, services: Sequence[Service]) -> list[Service]:
    """Services whose span, lead or tail reaches into the window."""
    return [s for s in services if s.start_ns - LEAD_NS < window.end_ns and s.end_ns + TAIL_NS > window.start_ns]


def _shifted(event: Event, offset_ns: int) -> Event:
    """The event with its times moved from the sender's monotonic clock to ledger time."""
    if isinstance(event, Open):
        return msgspec.structs.replace(event, start_ns=event.start_ns + offset_ns)
    if isinstance(event, Progress):
        return msgspec.structs.replace(event, from_ns=event.from_ns + offset_ns)
    first = None if event.first_byte_ns is None else event.first_byte_ns + offset_ns
    return msgspec.structs.replace(event, end_ns=event.end_ns + offset_ns, first_byte_ns=first)


def _dead(pid: int) -> bool:
    """Whether no process has this id (0: a spool's writer, dead by definition; others' processes count as alive)."""
    if pid <= 0:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _spooled(spool: str) -> bool:
    """Whether a dead worker left a spool that an heir will deliver."""
    return bool(spool) and Path(spool).exists()
