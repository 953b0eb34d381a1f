"""Programs that run beside us end with us, and say why when they do not start."""

import os
import sys
import time
from pathlib import Path

import pytest

from energyd.bench.companion import Companion, free_port
from energyd.daemon.errors import UnavailableError

FORKER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
print(child.pid, flush=True)
time.sleep(600)
"""
WEB = "import http.server, sys; http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), type('H', \
(http.server.BaseHTTPRequestHandler,), {'do_GET': lambda s: (s.send_response(200), s.end_headers())})).serve_forever()"


def runs(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_of_a_program_end_with_it(tmp_path: Path) -> None:
    """Leaving the block ends the program and what it has forked, though the fork ignores its parent's end."""
    log = tmp_path / "log"
    with Companion("forker", [sys.executable, "-c", FORKER], log=log) as forker:
        while not log.read_text():
            time.sleep(0.01)
        child = int(log.read_text())
        assert runs(child)
    assert not runs(forker.process.pid)
    while runs(child):  # the kernel takes a moment to deliver the kill; pytest's own limit ends a hang
        time.sleep(0.01)


def test_healthy_is_an_answer_of_200(tmp_path: Path) -> None:
    """A program counts as ready once it answers 200, and its output is in the log."""
    port = free_port()
    with Companion("web", [sys.executable, "-c", WEB, str(port)], log=tmp_path / "log") as web:
        assert web.wait_healthy(f"http://127.0.0.1:{port}/health", 30) >= 0
    assert "GET /health" in (tmp_path / "log").read_text()


def test_a_program_that_fails_says_its_last_words(tmp_path: Path) -> None:
    """A program that ends before it is ready is reported with its code and the last line of its log."""
    code = "import sys; print('no such model', file=sys.stderr); sys.exit(3)"
    with (
        Companion("server", [sys.executable, "-c", code], log=tmp_path / "log") as server,
        pytest.raises(UnavailableError, match=r"server ended with code 3: no such model"),
    ):
        server.wait_healthy(f"http://127.0.0.1:{free_port()}/health", 30)


def test_a_program_that_is_missing_is_one_line(tmp_path: Path) -> None:
    """A program that does not exist is an error of ours, not a traceback."""
    with pytest.raises(UnavailableError, match="cannot start server"):
        Companion("server", [str(tmp_path / "missing")], log=tmp_path / "log")


def test_the_environment_is_ours_with_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables are added to ours, and None removes one."""
    monkeypatch.setenv("COMPANION_OLD", "1")
    code = "import os; print(os.environ.get('COMPANION_OLD'), os.environ['COMPANION_NEW'], 'PATH' in os.environ)"
    changes = {"COMPANION_OLD": None, "COMPANION_NEW": "2"}
    with Companion("env", [sys.executable, "-c", code], log=tmp_path / "log", environment=changes) as env:
        env.process.wait()
    assert (tmp_path / "log").read_text().split() == ["None", "2", str("PATH" in os.environ)]
