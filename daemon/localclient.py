"""Asking the daemon over its local socket from a command line verb."""

import http.client
import socket
from pathlib import Path
from typing import Any

import msgspec

from .errors import UnavailableError
from .wire import PATH_RATINGS, PATH_STATUS

_TIMEOUT_S = 10.0


class _Unix(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))


def listens(path: Path) -> bool:
    """Whether somebody listens at `path`: a socket file alone may be left from a crash."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def ask(path: Path, method: str, target: str, body: bytes | None = None) -> bytes:
    """The daemon's answer; raises UnavailableError if nobody answers at `path` or the answer is not 200."""
    connection = _Unix(path)
    try:
        connection.request(method, target, body)
        answer = connection.getresponse()
        text = answer.read()
    except (OSError, http.client.HTTPException) as e:
        why = getattr(e, "strerror", None) or e or type(e).__name__
        raise UnavailableError(f"no daemon answers at {path} ({why}); start one with `energyd start`") from e
    finally:
        connection.close()
    if answer.status != 200:
        raise UnavailableError(f"the daemon at {path} answered {answer.status}: {text.decode(errors='replace')[:200]}")
    return text


def ask_status(path: Path) -> dict[str, Any]:
    """What the daemon says of itself: the fields of `wire.Status`."""
    found: dict[str, Any] = msgspec.msgpack.decode(ask(path, "GET", PATH_STATUS))
    return found


def post_rating(path: Path, rating: dict[str, object]) -> None:
    """Have the daemon store a rating: the arguments of `Ledger.add_rating`."""
    ask(path, "POST", PATH_RATINGS, msgspec.msgpack.encode(rating))
