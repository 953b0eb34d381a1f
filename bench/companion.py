"""A program that runs beside us for a while: its own process group, its own log file, and it surely ends with us.

Used by `energyd demo` for the server and the meter, and by the tests for the real servers. A server forks workers that
hold gigabytes: they are ended as a group, also when their parent has died before them.
"""

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from energyd.daemon.errors import UnavailableError

_POLL_S = 0.25
_PROGRESS_S = 5.0
_REQUEST_TIMEOUT_S = 5.0
_GRACE_S = 40.0
"""What a clean stop may take before it is forced: the proxy drains its streams for up to 30 s."""
_LOG_TAIL_BYTES = 4096


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago; whoever binds it may still lose the race and says so then."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Companion:
    """A started program. As a context manager it is stopped at the end of the block, however the block ends.

    `name` is for messages. `log` receives its stdout and stderr. `environment` is added to ours; a value of None
    removes the variable. Raises UnavailableError if the program cannot be started.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        log: Path,
        cwd: Path | None = None,
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        merged: dict[str, str | None] = {**os.environ, **(environment or {})}
        try:
            with log.open("ab") as sink:
                self.process = subprocess.Popen(
                    list(arguments),
                    cwd=cwd,
                    env={k: v for k, v in merged.items() if v is not None},
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    # A group of its own: Ctrl-C in the terminal reaches us alone, and we end the others in order.
                    start_new_session=True,
                )
        except OSError as e:
            raise UnavailableError(f"cannot start {name} ({arguments[0]}): {e.strerror}") from e

    def __enter__(self) -> Self:
        """The program itself; it runs already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it."""
        self.stop()

    def wait_healthy(self, url: str, timeout_s: float, progress: Callable[[float], None] | None = None) -> float:
        """Wait until GET `url` answers 200; returns the seconds it took.

        `progress` is called about every 5 s with the seconds so far. Raises UnavailableError, with the end of the log,
        if the program ends first or is not healthy after `timeout_s`.
        """
        begin = time.monotonic()
        shown = 0.0
        while True:
            waited = time.monotonic() - begin
            if self.process.poll() is not None:
                raise UnavailableError(f"{self.name} ended with code {self.process.returncode}: {self._last_words()}")
            if _answers_200(url):
                return waited
            if waited > timeout_s:
                raise UnavailableError(f"{self.name} is not ready after {timeout_s:.0f} s: {self._last_words()}")
            if progress and waited - shown >= _PROGRESS_S:
                shown = waited
                progress(waited)
            time.sleep(_POLL_S)

    def stop(self, grace_s: float = _GRACE_S) -> int:
        """Ask it to end, wait up to `grace_s`, then kill what is left of its group; returns its exit code."""
        try:
            if self.process.poll() is None:
                # Only the leader: it ends its own workers in order, and flushes what they hand back.
                self.process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(grace_s)
        finally:  # also when an impatient second Ctrl-C interrupts the waiting
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def _last_words(self) -> str:
        with self.log.open("rb") as f:
            f.seek(max(0, self.log.stat().st_size - _LOG_TAIL_BYTES))
            lines = [line.strip() for line in f.read().decode(errors="replace").splitlines() if line.strip()]
        return f"{lines[-1] if lines else 'it said nothing'} (log: {self.log})"


def _answers_200(url: str) -> bool:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_REQUEST_TIMEOUT_S)
    try:
        connection.request("GET", parts.path or "/")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
