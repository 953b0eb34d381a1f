"""After the last answer: wait until the daemon has booked the energy of the run, then take it."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from energyd.daemon import wire
from energyd.daemon.errors import UnavailableError, UsageError

from . import summary
from .meterclient import MeterClient
from .progress import Progress

_POLL_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Settling:
    """Asks `meter` for the energy of the `gpus` (empty: all), at most `limit_s` long, and stops early with `stop`."""

    meter: MeterClient
    progress: Progress
    stop: asyncio.Event
    gpus: tuple[str, ...]
    limit_s: float

    async def energy(
        self, run_id: str, measured_ns: tuple[int, int], idle_ns: tuple[int, int] | None
    ) -> summary.Energy | None:
        """Energy over the measured span and of the run's queries; provisional if it did not settle in time.

        None if no GPU is metered. Raises UnavailableError if the daemon does not come back within the limit.
        """
        deadline = time.monotonic() + self.limit_s
        question = wire.EnergyQuestion(*measured_ns, run_id)
        self.progress.phase("waiting until the energy is settled", None)
        answer = await self._ask(question, deadline)
        if not answer.gpus:
            self.progress.warn("the daemon meters no GPU: the run has no energy")
            return None
        while not (answer.settled and answer.complete) and time.monotonic() < deadline:
            self.progress.advance(1)
            if await wait(self.stop, _POLL_S):
                break
            answer = await self._ask(question, deadline)
        if not (answer.settled and answer.complete):
            self.progress.warn("the energy is not settled yet: figures are provisional")
        # the daemon may know which GPUs the run's server uses: idle must be that of the same ones
        counted = tuple(g.uuid for g in summary.select(answer.gpus, self.gpus))
        found = summary.energy(answer, counted, await self._idle_mw(counted, idle_ns, deadline))
        if found and not self.gpus and found.gpus > 1:
            self.progress.warn(f"all {found.gpus} metered GPUs are counted; name the model's own with --gpu INDEX")
        return found

    async def _ask(self, question: wire.EnergyQuestion, deadline: float) -> wire.EnergyAnswer:
        """The daemon may have been restarted in mid-run, so it is asked again until `deadline`."""
        while True:
            try:
                return await self.meter.energy(question)
            except UnavailableError:
                if time.monotonic() >= deadline or await wait(self.stop, _POLL_S):
                    raise

    async def _idle_mw(self, counted: Sequence[str], idle_ns: tuple[int, int] | None, deadline: float) -> int | None:
        if idle_ns is None or not counted:
            return None
        answer = await self._ask(wire.EnergyQuestion(*idle_ns), deadline)
        return summary.mean_mw(answer, counted, idle_ns[1] - idle_ns[0])


def check_gpus(status: wire.Status, chosen: Sequence[str]) -> None:
    """Raises UsageError if the daemon does not meter one of the `chosen` GPUs (index or UUID)."""
    known = {str(g.get(key)) for g in status.gpus for key in ("uuid", "index")}
    for gpu in chosen:
        if gpu not in known:
            shown = ", ".join(f"{g.get('index')} ({g.get('name')})" for g in status.gpus) or "none"
            raise UsageError(f"the daemon meters no GPU {gpu!r}; it meters: {shown}")


async def wait(stop: asyncio.Event, limit_s: float) -> bool:
    """Sleep for `limit_s`; True, at once, if `stop` is set meanwhile."""
    try:
        return await asyncio.wait_for(stop.wait(), limit_s)
    except TimeoutError:
        return False
