"""Where energyd keeps its files: one state folder (0700) with the ledger, the socket, the spools and the tenant key."""

import os
from pathlib import Path

from .errors import UsageError

_MAX_SOCKET_PATH_BYTES = 107
"""Linux `sun_path` holds 108 bytes with the final NUL; longer paths fail in bind() with an unclear message."""


def state_dir() -> Path:
    """`$ENERGYD_STATE_DIR`, else `/var/lib/energyd` for root, else `~/.local/state/energyd` (XDG).

    Raises UsageError for a user without a home (a container that runs under any uid).
    """
    if given := os.environ.get("ENERGYD_STATE_DIR"):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/energyd")
    try:
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "energyd"
    except RuntimeError as e:
        raise UsageError("this user has no home folder: name a folder with ENERGYD_STATE_DIR or --db") from e


def make_private(folder: Path) -> Path:
    """Create `folder` (0700) if it is missing and return it; raises UsageError if that is impossible."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(
            f"cannot create {folder}: {e.strerror}; name another folder with ENERGYD_STATE_DIR or --db"
        ) from e
    return folder


def ledger_path() -> Path:
    """The ledger's default place."""
    return state_dir() / "energyd.db"


def socket_path(db: Path) -> Path:
    """The daemon's local socket, beside the ledger it writes; raises UsageError if the path is too long to bind."""
    path = db.with_suffix(".sock").absolute()
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
        raise UsageError(
            f"the socket path {path} is longer than {_MAX_SOCKET_PATH_BYTES} bytes; put --db in a shorter folder"
        )
    return path


def spool_dir(db: Path) -> Path:
    """Where proxy workers spool queries while the daemon is away, beside the ledger."""
    return db.with_suffix(".spool").absolute()
