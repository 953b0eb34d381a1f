"""One bench run, from the probe to the stored record.

::

    detect → probe → run start → idle → warm-up → measured → settle → summary → run end

Idle comes before the warm-up, on a server that rests. The run is announced first and closed in every case, so the
ledger shows interrupted and failed runs too.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import aiohttp

from energyd.daemon import wire
from energyd.daemon.clock import boot_id
from energyd.daemon.errors import EnergydError, UnavailableError

from . import load, summary
from .datasets import Prompt
from .meterclient import MeterClient, SamplePoster
from .order import Order, Outcome
from .payloads import body, warmup
from .progress import Progress
from .provenance import detected_hardware, provenance
from .settling import Settling, check_gpus, wait
from .target import Target, resolve

_Result = TypeVar("_Result")
MEASURED: Final = "measured"
WARMUP: Final = "warmup"
_STOPPED_SETTLE_S: Final = 2.0
"""After Ctrl-C the user wants to leave: the energy is taken as it then is."""


class Interrupted(EnergydError):  # noqa: N818 - it is not an error, but it has an exit code
    """The user stopped the bench before a run had begun: there is nothing to store."""

    exit_code = 130


@dataclass(slots=True)
class _Course:
    """What has happened so far; read when the run ends, however it ends."""

    idle_ns: tuple[int, int] | None = None
    rows: list[load.Row] = field(default_factory=list)


async def bench(order: Order, meter: MeterClient | None, progress: Progress, stop: asyncio.Event) -> Outcome:
    """Carry out `order`; `meter` None: no energy. Setting `stop` ends the run early, stored as `interrupted`.

    Raises UnavailableError (server or daemon missing) and UsageError (the server refuses) before anything is measured,
    Interrupted if `stop` came before that.
    """
    status = await meter.status() if meter else None
    if status is not None:
        check_gpus(status, order.gpus)
    prompts = order.dataset.prompts[: order.samples]
    if len(prompts) < order.samples:
        progress.note(f"{order.dataset.name} holds {len(prompts)} samples, not {order.samples}: all of them are sent")
    run_id = uuid.uuid4().hex
    where = order.hardware or detected_hardware(status, order.gpus)
    async with load.session(order.request_limit_s, order.headers) as client:
        progress.phase("looking at the server", None)
        target = await _unless(stop, resolve(order, client))
        _tell(target, progress, metered=meter is not None)
        record = provenance(order, target, where, len(prompts), status)
        poster = await _announce(meter, run_id, order, target, record)
        course = _Course()
        replaying = _Replaying(order, target, client, poster, progress, stop, course)
        try:
            await replaying.all(prompts)
        except BaseException:
            # a failure of ours in mid-run must not leave the run open in the ledger for ever
            await _abandon(meter, poster, run_id, course)
            raise
    found = None
    if meter and poster:
        try:
            found = await _energy(order, meter, poster, run_id, course, progress, stop)
        except UnavailableError as e:
            progress.warn(f"{e}; the run has no energy")  # but the times of an hour are still worth having
    told = summary.summarise(
        course.rows, found, _setup(order, target, record, where, stop), summary.gaps(course.rows, order.batch_size)
    )
    state = "interrupted" if stop.is_set() else "complete" if summary.is_ratable(course.rows) else "failed"
    stored = await _close(meter, wire.RunEnd(run_id, state, *_span(course), told), progress)
    return Outcome(run_id, state, target.public_url, record, told, stored)


@dataclass(frozen=True, slots=True)
class _Replaying:
    """The phases that send, or deliberately do not."""

    order: Order
    target: Target
    client: aiohttp.ClientSession
    poster: SamplePoster | None
    progress: Progress
    stop: asyncio.Event
    course: _Course

    async def all(self, prompts: Sequence[Prompt]) -> None:
        """Idle, warm-up, measured; fills `course`."""
        if self.poster and self.order.idle_s > 0:
            self.progress.phase("measuring idle power: nothing is sent", None)
            start_ns = time.monotonic_ns()
            await wait(self.stop, self.order.idle_s)
            self.course.idle_ns = (start_ns, time.monotonic_ns())
        first = [warmup(prompts[i % len(prompts)]) for i in range(self.order.warmup)]
        await self._phase("warming up", WARMUP, first, [])
        await self._phase("measuring", MEASURED, prompts, self.course.rows)

    async def _phase(self, title: str, phase: str, prompts: Sequence[Prompt], kept: list[load.Row]) -> None:
        if self.stop.is_set() or not prompts:
            return
        self.progress.phase(title, len(prompts))
        way = self.target.dialect

        async def send_one(idx: int) -> load.Row:
            data = body(prompts[idx], self.order.model, way, self.target.generation)
            return await load.send(self.client, self.target.url, data, idx=idx, phase=phase, stream=way.stream)

        def keep(rows: Sequence[load.Row]) -> None:
            self._warn_once(rows, kept)
            kept.extend(rows)
            self.progress.advance(len(rows))
            if self.poster:
                self.poster.add(rows)

        await load.replay(len(prompts), self.order.batch_size, send_one, keep, self.stop)

    def _warn_once(self, rows: Sequence[load.Row], before: Sequence[load.Row]) -> None:
        bad = next((r for r in rows if not r.ok and r.error != load.INTERRUPTED), None)
        if bad and all(r.ok for r in before):
            self.progress.warn(
                f"{bad.phase} sample {bad.idx} failed ({bad.error}); the run goes on and counts failures"
            )


def _tell(target: Target, progress: Progress, *, metered: bool) -> None:
    way, count = target.dialect, target.generation.max_new_tokens
    progress.note(
        f"{target.server.name} at {target.public_url}: {way.api}, {'streamed' if way.stream else 'not streamed'}, "
        f"{'exactly' if way.exact else 'at most'} {count} new tokens"
    )
    if metered and not target.metered:
        progress.warn(
            f"{target.public_url} is not energyd's proxy (no {load.ID_HEADER} in the answer): only the energy of the "
            "whole GPU over the run will be known, not what the queries caused; send to the proxy's address instead"
        )


async def _announce(
    meter: MeterClient | None, run_id: str, order: Order, target: Target, record: dict[str, object]
) -> SamplePoster | None:
    if meter is None:
        return None
    await meter.start(
        wire.RunStart(run_id, order.task.task_id, order.model, order.batch_size, target.public_url, record)
    )
    return SamplePoster(meter, run_id, boot_id())


async def _energy(
    order: Order,
    meter: MeterClient,
    poster: SamplePoster,
    run_id: str,
    course: _Course,
    progress: Progress,
    stop: asyncio.Event,
) -> summary.Energy | None:
    limit_s = _STOPPED_SETTLE_S if stop.is_set() else order.settle_limit_s
    progress.phase("storing the samples", None)
    await poster.drain(max(limit_s, _STOPPED_SETTLE_S))
    if not course.rows:
        return None
    settling = Settling(meter, progress, stop, order.gpus, limit_s)
    return await settling.energy(run_id, summary.span(course.rows), course.idle_ns)


def _setup(
    order: Order, target: Target, record: dict[str, object], where: str | None, stop: asyncio.Event
) -> summary.Setup:
    return summary.Setup(
        task=order.task,
        batch_size=order.batch_size,
        max_new_tokens=target.generation.max_new_tokens,
        precision=order.precision,
        engine=str(record["engine"]),
        hardware=where,
        dataset_is_sample=order.dataset.is_sample,
        dataset_verified=order.dataset.sha256 in order.task.dataset.sha256,
        interrupted=stop.is_set(),
    )


def _span(course: _Course) -> tuple[int, int]:
    """The measured span; the present instant if nothing was measured, since 0 would be the time of the boot."""
    now_ns = time.monotonic_ns()
    return summary.span(course.rows) if course.rows else (now_ns, now_ns)


async def _close(meter: MeterClient | None, end: wire.RunEnd, progress: Progress) -> bool:
    if meter is None:
        return False
    try:
        await meter.end(end)
    except UnavailableError as e:
        progress.warn(f"run {end.run_id} could not be closed in the ledger: {e}")
        return False
    return True


async def _abandon(meter: MeterClient | None, poster: SamplePoster | None, run_id: str, course: _Course) -> None:
    if meter and poster:
        await poster.close()
        with contextlib.suppress(UnavailableError):  # the error that brought us here is the one to report
            await meter.end(wire.RunEnd(run_id, "failed", *_span(course), {}))


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`; raises Interrupted if the user stops first."""
    task = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise Interrupted("interrupted before the run began; nothing was stored")
    return await task
