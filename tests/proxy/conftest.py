"""Fixtures of the proxy's tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from energyd.daemon.paths import socket_path

from .standins import FakeDaemon


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """Where the ledger would be; socket, spools and key lie beside it."""
    return tmp_path / "e.db"


@pytest.fixture
async def daemon(db: Path) -> AsyncIterator[FakeDaemon]:
    """A running stand-in for the daemon."""
    fake = FakeDaemon(socket_path(db))
    await fake.start()
    yield fake
    await fake.stop()
