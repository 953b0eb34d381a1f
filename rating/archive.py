"""Where a rating of ledger runs is kept: with the daemon while it runs (it alone writes then), else in the ledger."""

import http.client
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
from energyd.daemon.errors import LedgerError, UnavailableError
from energyd.daemon.paths import socket_path
from energyd.daemon.wire import PATH_RATINGS

_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class StoredRating:
    """One rating as it is kept: `rows` are JSON-able, `created_ns` is ledger time."""

    rating_id: str
    created_ns: int
    edition: str
    method: str
    basis: str
    rows: list[dict[str, object]]


class _LocalConnection(http.client.HTTPConnection):
    """HTTP over the daemon's Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def store(rating: StoredRating, db: Path) -> None:
    """Keep `rating` with the ledger `db`; raises UnavailableError or LedgerError if neither it nor the daemon does."""
    path = socket_path(db)
    if path.exists():
        try:
            _post(rating, path)
        except (ConnectionRefusedError, FileNotFoundError):
            pass  # the socket of a daemon that died: nobody else writes, so we may
        except (OSError, http.client.HTTPException) as e:
            raise UnavailableError(f"the daemon at {path} does not answer: {e}") from e
        else:
            return
    from energyd.daemon.ledger import Ledger  # noqa: PLC0415 - the database is loaded only by who needs it

    with Ledger.open(db) as ledger:
        ledger.add_rating(rating.rating_id, rating.created_ns, rating.edition, rating.method, rating.basis, rating.rows)


def _post(rating: StoredRating, path: Path) -> None:
    connection = _LocalConnection(path)
    try:
        body = msgspec.msgpack.encode(asdict(rating))
        connection.request("POST", PATH_RATINGS, body, {"Content-Type": "application/msgpack"})
        answer = connection.getresponse()
        said = answer.read(200).decode("utf-8", "replace").strip().partition("\n")[0]
    finally:
        connection.close()
    if answer.status >= http.client.BAD_REQUEST:
        raise LedgerError(f"the daemon refused the rating ({answer.status} {said or answer.reason})")
