"""Where files go: private, short enough to bind, and one clear line if that is impossible."""

import os
import socket
import stat
from pathlib import Path

import pytest

from energyd.daemon import paths
from energyd.daemon.errors import UsageError


def test_the_state_folder_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ENERGYD_STATE_DIR goes before everything else, for root and others alike; the ledger lies in it."""
    monkeypatch.setenv("ENERGYD_STATE_DIR", str(tmp_path))
    assert paths.state_dir() == tmp_path
    assert paths.ledger_path() == tmp_path / "energyd.db"


def test_the_state_folder_follows_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Root gets /var/lib, others XDG's state folder, or its usual place in their home."""
    monkeypatch.setenv("ENERGYD_STATE_DIR", "")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert paths.state_dir() == Path("/var/lib/energyd")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert paths.state_dir() == tmp_path / "energyd"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.state_dir() == tmp_path / ".local/state/energyd"


def test_a_user_without_a_home_is_told_what_to_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container under any uid has no home: one line that names the variable, no RuntimeError."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ENERGYD_STATE_DIR")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UsageError, match="ENERGYD_STATE_DIR"):
        paths.state_dir()


def test_a_new_folder_is_private(tmp_path: Path) -> None:
    """A folder made by us is 0700 whatever lies above it; making it twice is fine."""
    folder = paths.make_private(tmp_path / "a" / "b")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert paths.make_private(folder) == folder


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    """A file in its place is a UsageError that names the place and the way out."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot create .*file.* name another folder"):
        paths.make_private(tmp_path / "file")
    with pytest.raises(UsageError, match="cannot create"):
        paths.make_private(tmp_path / "file" / "below")


def test_socket_and_spool_lie_beside_the_ledger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They carry the ledger's name, so two ledgers of a folder do not meet; relative names become absolute."""
    monkeypatch.chdir(tmp_path)
    assert paths.socket_path(Path("books.db")) == tmp_path / "books.sock"
    assert paths.spool_dir(Path("books.db")) == tmp_path / "books.spool"


def test_the_longest_socket_path_can_be_bound_and_a_longer_one_is_refused(tmp_path: Path) -> None:
    """107 bytes, non-ASCII names counted in bytes, are what the kernel binds; one more is refused with a way out."""
    room = 107 - len(os.fsencode(tmp_path)) - 1 - len(".sock")
    if room < 2:
        pytest.skip("the temporary folder's own path is too long")
    longest = tmp_path / ("é" * (room // 2) + "x" * (room % 2) + ".db")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(paths.socket_path(longest)))
    with pytest.raises(UsageError, match="shorter folder"):
        paths.socket_path(longest.with_name("x" + longest.name))
