"""The host's secret key, under which tenants are hashed: without it nobody can try keys against the ledger."""

import os
import secrets
from pathlib import Path

from energyd.daemon.errors import UsageError
from energyd.daemon.paths import make_private

_KEY_BYTES = 32


def tenant_key(db: Path) -> bytes:
    """The key beside the ledger `db` (`<stem>.tenant-key`, 0600), made if it is missing.

    Raises UsageError if it is damaged or cannot be made.
    """
    path = db.with_suffix(".tenant-key").absolute()
    make_private(path.parent)
    try:
        if not path.exists():
            _make(path)
        key = path.read_bytes()
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as e:
        raise UsageError(
            f"cannot read or make the tenant key {path}: {e.strerror}; check the folder or name another --db"
        ) from e
    if len(key) != _KEY_BYTES:
        raise UsageError(
            f"the tenant key {path} has {len(key)} bytes, not {_KEY_BYTES}; restore it, or delete it to count anew"
        )
    return key


def _make(path: Path) -> None:
    # Written whole under another name, then linked: of two workers that start together both see one complete key.
    young = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(young, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, secrets.token_bytes(_KEY_BYTES))
    finally:
        os.close(fd)
    try:
        os.link(young, path)
    except FileExistsError:
        pass  # another worker was faster: its key counts
    finally:
        young.unlink()
