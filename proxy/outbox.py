r"""Events on their way to the daemon: delivered in order, exactly once, and never lost with the daemon.

::

    put --> memory --sender--> daemon          (the daemon is up: nothing touches the disk)
               \\--guard--> spool --sender--> daemon   (an event that waited 0.5 s is written to disk)

An event is forgotten only after the daemon's 200. One that arrives twice (the 200 was lost, the spool overlaps) has its
old sequence number, by which the daemon knows it. Numbers are given out without gaps: what is dropped never had one.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from energyd.daemon import wire
from energyd.daemon.units import NS_PER_MS, NS_PER_S, seconds

from .link import DaemonAwayError, Link, RefusedBatchError, UnknownWorkerError
from .spool import Orphan, Spool, SpoolFullError, after, joined, orphans

_LOG = logging.getLogger("energyd.proxy")

_PERIOD_S: Final = 0.25
_OLD_NS: Final = 500 * NS_PER_MS
"""An event that is not delivered after this long is written to disk: what a kill -9 of the proxy may cost."""
_BATCH_EVENTS: Final = 1000
"""Keeps a batch well under 1 MiB, the body size that the daemon accepts."""
_TELL_AFTER_NS: Final = 2 * NS_PER_S
"""A daemon that starts together with the proxy, or restarts, is not worth a line."""
_ADOPT_S: Final = 5.0
_FAREWELL_S: Final = 3.0


@dataclass(slots=True)
class OutboxCounts:
    """`dropped`: events lost because memory and spool were full. `spool_errors`: writes that the disk refused."""

    dropped: int = 0
    spool_errors: int = 0
    sent: int = 0
    spooled: int = 0
    adopted: int = 0


@dataclass(frozen=True, slots=True)
class _Waiting:
    seq: int
    since_ns: int
    event: wire.Event


class Outbox:
    """The outbox of one worker: `put` from the event loop, `run` as a task, `farewell` at the end."""

    def __init__(
        self,
        *,
        hello: wire.Hello,
        link: Link,
        spool_dir: Path,
        spool_limit_bytes: int,
        now_ns: Callable[[], int],
        memory_events: int = 100_000,
    ) -> None:
        self.counts = OutboxCounts()
        self._hello = hello
        self._link = link
        self._spool_dir = spool_dir
        self._spool = Spool(spool_dir / f"{hello.worker}.spool", hello, spool_limit_bytes)
        self._now_ns = now_ns
        self._memory_events = memory_events
        self._memory: deque[_Waiting] = deque()
        self._last_seq = 0
        self._acked_seq = 0
        self._watermark_ns = now_ns()
        self._marks: deque[tuple[int, int]] = deque()
        self._connected = False
        self._away_since_ns = 0
        self._away_told = False
        self._tell: Callable[[], None] = lambda: None
        self._open_queries: Callable[[], int] = lambda: 0

    def ask(self, *, tell: Callable[[], None], open_queries: Callable[[], int]) -> None:
        """Connect the book of open queries: `tell` makes them put what they have seen, `open_queries` counts them."""
        self._tell, self._open_queries = tell, open_queries

    def put(self, event: wire.Event) -> None:
        """Take an event; never waits, never raises. Beyond the bounds of memory and spool it is dropped and counted."""
        if len(self._memory) >= self._memory_events:
            self.counts.dropped += 1
            return
        self._last_seq += 1
        self._memory.append(_Waiting(self._last_seq, self._now_ns(), event))

    async def run(self) -> None:
        """Deliver until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._guard())
            tasks.create_task(self._adopt_for_ever())
            while True:
                with suppress(DaemonAwayError):
                    await self._deliver()
                await asyncio.sleep(_PERIOD_S)

    async def farewell(self) -> None:
        """Deliver everything and say bye; if the daemon is away, leave it in the spool. Call it after `run` ended."""
        try:
            async with asyncio.timeout(_FAREWELL_S):
                while True:
                    await self._deliver()
                    if not self._memory and not len(self._spool):
                        break
                await self._link.bye(self._hello.worker)
        except (DaemonAwayError, UnknownWorkerError, TimeoutError):
            self._mark()
            self._spill(self._now_ns())
            if self._memory:
                self.counts.dropped += len(self._memory)
                _LOG.warning("energyd proxy: %d events could neither be delivered nor spooled", len(self._memory))
        self._spool.close()

    # Delivery.

    def _mark(self) -> None:
        """Everything before now has been put: note it with the number of the last event that says so."""
        now_ns = self._now_ns()
        try:
            self._tell()
        except Exception as e:  # noqa: BLE001 - loop root: a defect in one query must not stop all others
            _LOG.warning("energyd proxy: open queries could not be asked: %s", type(e).__name__)
        if self._marks and self._marks[-1][0] == self._last_seq:
            self._marks.pop()
        self._marks.append((self._last_seq, now_ns))

    def _watermark(self, seq: int) -> int:
        """The time before which everything is delivered once `seq` is."""
        while self._marks and self._marks[0][0] <= seq:
            self._watermark_ns = self._marks.popleft()[1]
        return self._watermark_ns

    async def _deliver(self) -> None:
        """One turn: greet if need be, then the spool, then memory, at least one batch (a heartbeat may be empty)."""
        try:
            if not self._connected:
                await self._greet()
            while (spooled := self._oldest_spooled()) is not None:
                await self._send(spooled)
            self._mark()
            until = self._last_seq
            while True:
                batch = self._batch()
                await self._send(batch)
                if not self._memory or self._memory[0].seq > until or len(self._spool):
                    return
        except UnknownWorkerError:
            self._connected = False
        except DaemonAwayError as e:
            self._connected = False
            self._away_since_ns = self._away_since_ns or self._now_ns()
            if not self._away_told and self._now_ns() - self._away_since_ns > _TELL_AFTER_NS:
                self._away_told = True
                _LOG.warning(
                    "energyd proxy: no daemon (%s); traffic goes on, queries are kept in %s", e, self._spool_dir
                )
            raise

    async def _greet(self) -> None:
        acked = await self._link.hello(self._hello)
        self._connected = True
        self._away_since_ns = 0
        self._acknowledge(acked)
        if self._away_told:
            self._away_told = False
            _LOG.warning("energyd proxy: the daemon is back")

    async def _send(self, batch: wire.Batch) -> None:
        await self._post(batch)
        self._acknowledge(batch.first_seq + len(batch.events) - 1)

    async def _post(self, batch: wire.Batch) -> None:
        try:
            await self._link.batch(batch)
            self.counts.sent += len(batch.events)
        except RefusedBatchError:
            # Sent again it would be refused again, and everything behind it would wait for ever.
            self.counts.dropped += len(batch.events)
            _LOG.warning("energyd proxy: the daemon refused %d events; they are dropped and counted", len(batch.events))

    def _acknowledge(self, acked_seq: int) -> None:
        self._acked_seq = max(self._acked_seq, acked_seq)
        while self._memory and self._memory[0].seq <= acked_seq:
            self._memory.popleft()
        self._spool.forget(acked_seq)

    def _batch(self, limit: int = _BATCH_EVENTS) -> wire.Batch:
        waiting = [self._memory[i] for i in range(min(limit, len(self._memory)))]
        first_seq = waiting[0].seq if waiting else self._last_seq + 1
        last_seq = first_seq + len(waiting) - 1
        return wire.Batch(
            worker=self._hello.worker,
            first_seq=first_seq,
            events=tuple(w.event for w in waiting),
            watermark_ns=self._watermark(last_seq),
            dropped=self.counts.dropped,
            open_queries=self._open_queries(),
        )

    # Spool.

    async def _guard(self) -> None:
        while True:
            await asyncio.sleep(_PERIOD_S)
            if self._memory and self._now_ns() - self._memory[0].since_ns > _OLD_NS:
                self._mark()
                self._spill(self._now_ns())

    def _spill(self, now_ns: int) -> None:
        """Move all of memory to the spool; what the disk or the limit refuses stays in memory."""
        try:
            while self._memory:
                batch = self._batch()
                self._spool.append(batch)
                self.counts.spooled += len(batch.events)
                for _ in batch.events:
                    self._memory.popleft()
        except SpoolFullError:
            pass
        except OSError as e:
            self.counts.spool_errors += 1
            if self.counts.spool_errors == 1:
                _LOG.warning(
                    "energyd proxy: cannot write to %s (%s); queries wait in memory, at most %d events, since %.1f s",
                    self._spool_dir, e.strerror, self._memory_events, seconds(now_ns - self._memory[0].since_ns),
                )  # fmt: skip

    def _oldest_spooled(self) -> wire.Batch | None:
        try:
            # The guard may have written a batch that was already on its way: what is committed is not sent again.
            while (batch := self._spool.first(_BATCH_EVENTS)) is not None:
                if (rest := after(batch, self._acked_seq)) is not None:
                    return rest
                self._spool.forget(self._acked_seq)
        except (OSError, msgspec.DecodeError) as e:
            _LOG.warning("energyd proxy: the spool cannot be read back: %s", e)
            raise DaemonAwayError("the spool cannot be read back") from e
        return None

    # Adoption.

    async def _adopt_for_ever(self) -> None:
        while True:
            for orphan in orphans(self._spool_dir):
                try:
                    await self._adopt(orphan)
                except (DaemonAwayError, UnknownWorkerError):
                    orphan.release()
                    break
                except BaseException:
                    orphan.release()
                    raise
            await asyncio.sleep(_ADOPT_S)

    async def _adopt(self, orphan: Orphan) -> None:
        """Deliver a dead worker's spool under its own name, so that the daemon knows what it has already."""
        if orphan.hello is None:
            orphan.path.rename(orphan.path.with_suffix(".damaged"))
            orphan.release()
            _LOG.warning("energyd proxy: %s cannot be read; kept as .damaged", orphan.path)
            return
        acked = await self._link.hello(msgspec.structs.replace(orphan.hello, pid=0, adopted=True))
        for batch in joined(orphan.batches(), _BATCH_EVENTS):
            if (rest := after(batch, acked)) is not None:
                await self._post(rest)
                self.counts.adopted += len(rest.events)
        await self._link.bye(orphan.hello.worker)
        orphan.remove()
