"""The replay: sends samples to an endpoint, B at a time, and keeps one row for each.

A failed request is a row, never an exception: one bad answer must not cost a run of a thousand. Times are monotonic ns.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from .answers import Answer
from .batching import groups

REPORT_HEADER: Final = {"x-energyd-report": "1"}
ID_HEADER: Final = "x-energyd-id"
INTERRUPTED: Final = "interrupted"
_CONNECT_S: Final = 10.0
_KEEPALIVE_S: Final = 4.0
"""Below uvicorn's 5 s: a connection must not die under the first request after a pause."""
_READ_BYTES: Final = 65_536


@dataclass(frozen=True, slots=True)
class Row:
    """How one sample went. `query_id` is None without a proxy, counts when unknown; `error` never quotes the answer."""

    idx: int
    phase: str
    start_ns: int
    first_byte_ns: int | None
    end_ns: int
    ok: bool
    http_status: int | None
    error: str | None
    query_id: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    tokens_source: str
    served: str | None


Send = Callable[[int], Awaitable[Row]]


def session(limit_s: float, headers: dict[str, str]) -> aiohttp.ClientSession:
    """A client session: as many connections as the batch needs; `limit_s` bounds one request from send to last byte."""
    return aiohttp.ClientSession(
        headers={**REPORT_HEADER, **headers},
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=limit_s, connect=_CONNECT_S),
    )


async def send(client: aiohttp.ClientSession, url: str, data: bytes, *, idx: int, phase: str, stream: bool) -> Row:
    """Post one request and read its answer to the end; every outcome, also being cancelled, is a row."""
    answer = Answer(stream=stream)
    status: int | None = None
    query_id: str | None = None
    first_byte_ns: int | None = None
    error: str | None = None
    start_ns = time.monotonic_ns()
    try:
        async with client.post(url, data=data, headers={"content-type": "application/json"}) as response:
            status = response.status
            query_id = response.headers.get(ID_HEADER)
            async for chunk in response.content.iter_chunked(_READ_BYTES):
                first_byte_ns = first_byte_ns or time.monotonic_ns()
                if status == 200:
                    answer.feed(chunk)
            end_ns = time.monotonic_ns()
            if status == 200:
                answer.end()
                error = answer.error
            else:
                error = f"HTTP {status}"
    except TimeoutError:
        end_ns, error = time.monotonic_ns(), "timed out"
    except (aiohttp.ClientError, OSError) as e:
        # the type only: the text of some of these quotes what was received
        end_ns, error = time.monotonic_ns(), type(e).__name__
    except asyncio.CancelledError:
        end_ns, error = time.monotonic_ns(), INTERRUPTED
    return Row(
        idx=idx,
        phase=phase,
        start_ns=start_ns,
        first_byte_ns=first_byte_ns,
        end_ns=end_ns,
        ok=error is None,
        http_status=status,
        error=error,
        query_id=query_id,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.tokens,
        tokens_source=answer.tokens_source,
        served=answer.served,
    )


async def replay(
    count: int, size: int, send_one: Send, on_group: Callable[[Sequence[Row]], None], stop: asyncio.Event
) -> list[Row]:
    """Send samples 0 … count-1 in groups of `size`; once `stop` is set the group in flight is cancelled, none follows.

    `on_group` gets each group's rows as soon as it has ended; it must not block.
    """
    rows: list[Row] = []
    for group in groups(count, size):
        if stop.is_set():
            break
        tasks = [asyncio.ensure_future(send_one(idx)) for idx in group]
        await _all_or_stop(tasks, stop)
        ended = [t.result() for t in tasks if not t.cancelled()]
        rows += ended
        on_group(ended)
    return rows


async def _all_or_stop(tasks: Sequence[asyncio.Future[Row]], stop: asyncio.Event) -> None:
    together = asyncio.ensure_future(asyncio.wait(tasks))
    stopping = asyncio.ensure_future(stop.wait())
    futures: set[asyncio.Future[Any]] = {together, stopping}
    try:
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        if not together.done():
            for task in tasks:
                task.cancel()
            await together
    finally:
        stopping.cancel()
