"""Talks to the daemon over its local socket: run start, samples, run end, energy, status."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import aiohttp
import msgspec

from energyd.daemon import wire
from energyd.daemon.errors import UnavailableError

from .load import Row

_Reply = TypeVar("_Reply")
_TIMEOUT_S = 30.0
_HOST = "http://energyd"
_ROWS_PER_POST = 1_000
"""After an outage of the daemon many rows wait; one message of them all could be larger than it accepts."""


class MeterClient:
    """The daemon, as the bench sees it. Every call raises UnavailableError, one line, if the daemon does not answer."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Open the session; nothing is sent yet."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(path=str(self._socket)), timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the session."""
        if self._session is not None:
            await self._session.close()

    async def status(self) -> wire.Status:
        """What the daemon says of itself."""
        return self._decode(await self._call("GET", wire.PATH_STATUS, None), wire.Status)

    async def start(self, run: wire.RunStart) -> None:
        """Announce a run."""
        await self._call("POST", wire.PATH_RUN_START, run)

    async def samples(self, samples: wire.RunSamples) -> None:
        """Store sample rows; sending them again changes nothing."""
        await self._call("POST", wire.PATH_RUN_SAMPLES, samples)

    async def end(self, end: wire.RunEnd) -> None:
        """Close a run with its summary."""
        await self._call("POST", wire.PATH_RUN_END, end)

    async def energy(self, question: wire.EnergyQuestion) -> wire.EnergyAnswer:
        """Energy over a span, and of a run's queries if one is named."""
        return self._decode(await self._call("POST", wire.PATH_ENERGY, question), wire.EnergyAnswer)

    async def _call(self, method: str, path: str, message: msgspec.Struct | None) -> bytes:
        if self._session is None:
            raise RuntimeError("MeterClient is used outside `async with`")
        data = None if message is None else wire.encode(message)
        try:
            async with self._session.request(method, _HOST + path, data=data) as response:
                answer = await response.read()
                status = response.status
        except (aiohttp.ClientError, OSError, TimeoutError) as e:
            raise UnavailableError(self._absent(e)) from e
        if status != 200:
            reason = answer[:300].decode("utf-8", "replace").strip().splitlines()
            said = f": {reason[0]}" if reason else ""
            raise UnavailableError(f"the energyd daemon at {self._socket} refused {path} (HTTP {status}){said}")
        return answer

    def _absent(self, error: BaseException) -> str:
        cause = getattr(error, "os_error", error)
        if isinstance(cause, PermissionError):
            return f"no permission to use {self._socket}: run as the user of `energyd start`, or name another --db"
        return (
            f"no energyd daemon answers at {self._socket}: start one with `energyd start --upstream URL`, "
            "name its ledger with --db, or replay without energy by --no-meter"
        )

    def _decode(self, answer: bytes, kind: type[_Reply]) -> _Reply:
        try:
            return msgspec.msgpack.decode(answer, type=kind)
        except msgspec.MsgspecError as e:
            raise UnavailableError(
                f"the daemon at {self._socket} speaks another version of energyd; restart it with this one"
            ) from e


class SamplePoster:
    """Hands sample rows to the daemon while the replay goes on, so that posting never makes the GPU wait.

    Rows wait in memory while the daemon is away and are sent again when it is back; the key (run, phase, idx) makes
    that harmless. A crash of the bench costs the rows of the group in flight and of the post in flight.
    """

    def __init__(self, meter: MeterClient, run_id: str, boot_id: str, retry_s: float = 1.0) -> None:
        self._meter = meter
        self._run_id = run_id
        self._boot_id = boot_id
        self._retry_s = retry_s
        self._pending: list[wire.Sample] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.failures = 0
        """Posts that failed and were tried again."""

    def add(self, rows: Sequence[Row]) -> None:
        """Queue rows; returns at once."""
        self._pending += [sample(r) for r in rows]
        self._wake.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def drain(self, limit_s: float) -> None:
        """Wait until everything has been stored; raises UnavailableError after `limit_s`."""
        await self.close()  # one poster at a time: `_post` removes what it sent from the front
        try:
            async with asyncio.timeout(limit_s):
                while self._pending:
                    await self._post()
        except TimeoutError:
            lost = len(self._pending)
            raise UnavailableError(
                f"the daemon went away and {lost} sample rows of run {self._run_id} could not be stored"
            ) from None

    async def close(self) -> None:
        """Stop posting in the background."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                await self._post()

    async def _post(self) -> None:
        batch = tuple(self._pending[:_ROWS_PER_POST])
        try:
            await self._meter.samples(wire.RunSamples(self._run_id, self._boot_id, batch))
        except UnavailableError:
            self.failures += 1
            await asyncio.sleep(self._retry_s)
        else:
            del self._pending[: len(batch)]


def sample(row: Row) -> wire.Sample:
    """What the daemon is told of a row: times, outcome and id; nothing else leaves this process."""
    return wire.Sample(
        idx=row.idx,
        query_id=row.query_id,
        phase=row.phase,
        start_ns=row.start_ns,
        end_ns=row.end_ns,
        ok=row.ok,
        http_status=row.http_status,
        error=row.error,
    )
