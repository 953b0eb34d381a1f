"""The line to the daemon: hello, batch, bye over its local socket. Nothing else of the proxy knows that it is HTTP."""

from pathlib import Path
from typing import Final

import aiohttp
import msgspec

from energyd.daemon import wire

_ANSWER_S: Final = 5.0
"""How long the daemon may take to commit; meanwhile events grow old and are spooled, so this may be generous."""


class DaemonAwayError(Exception):
    """No daemon answers on the socket, or not in time."""


class UnknownWorkerError(Exception):
    """The daemon does not know this worker (it was restarted): say hello again."""


class RefusedBatchError(Exception):
    """The daemon will never take this batch: it holds something that makes no sense."""


class Link:
    """One worker's connection to the daemon; opened lazily, reopened by itself."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._session: aiohttp.ClientSession | None = None

    async def hello(self, message: wire.Hello) -> int:
        """Introduce a worker; returns the number up to which its events are committed. Raises DaemonAwayError."""
        body = await self._post(wire.PATH_HELLO, message)
        try:
            return msgspec.msgpack.decode(body, type=wire.HelloReply).acked_seq
        except msgspec.DecodeError as e:
            raise DaemonAwayError(f"hello was answered with something else: {e}") from e

    async def batch(self, message: wire.Batch) -> None:
        """Deliver a batch: on return it is committed. Raises DaemonAwayError, UnknownWorkerError, RefusedBatchError."""
        await self._post(wire.PATH_BATCH, message)

    async def bye(self, worker: str) -> None:
        """This worker has nothing more to say. Raises DaemonAwayError."""
        await self._post(wire.PATH_BYE, wire.Bye(worker=worker))

    async def close(self) -> None:
        """Hang up."""
        if self._session is not None:
            await self._session.close()

    async def _post(self, path: str, message: msgspec.Struct) -> bytes:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(path=str(self._socket)),
                timeout=aiohttp.ClientTimeout(total=_ANSWER_S),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        try:
            async with self._session.post(f"http://localhost{path}", data=wire.encode(message)) as answer:
                body = await answer.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as e:
            raise DaemonAwayError(f"{type(e).__name__} on {self._socket}") from e
        if answer.status == 409:
            raise UnknownWorkerError
        if answer.status == 400 and path == wire.PATH_BATCH:
            raise RefusedBatchError
        if answer.status != 200:
            raise DaemonAwayError(f"{path} was answered with status {answer.status}")
        return body
