"""Where a rating of ledger runs is kept: with the daemon while it runs (it alone writes then), else in the ledger."""

import http.client
from dataclasses import asdict, dataclass
from pathlib import Path

from energyd.daemon.errors import UnavailableError
from energyd.daemon.localclient import post_rating
from energyd.daemon.paths import socket_path


@dataclass(frozen=True, slots=True)
class StoredRating:
    """One rating as it is kept: `rows` are JSON-able, `created_ns` is ledger time."""

    rating_id: str
    created_ns: int
    edition: str
    method: str
    basis: str
    rows: list[dict[str, object]]


def store(rating: StoredRating, db: Path) -> None:
    """Keep `rating` with the ledger `db`; raises UnavailableError or LedgerError if neither it nor the daemon does."""
    path = socket_path(db)
    if path.exists():
        try:
            post_rating(path, asdict(rating))
        except http.client.HTTPException as e:
            raise UnavailableError(f"what answers at {path} is no daemon: {e!r}") from e
        except UnavailableError as e:
            # The socket of a daemon that died: nobody else writes, so we may. Any other refusal stands.
            if not isinstance(e.__cause__, ConnectionRefusedError | FileNotFoundError):
                raise
        else:
            return
    from energyd.daemon.ledger import Ledger  # noqa: PLC0415 - the database is loaded only by who needs it

    with Ledger.open(db) as ledger:
        ledger.add_rating(rating.rating_id, rating.created_ns, rating.edition, rating.method, rating.basis, rating.rows)
