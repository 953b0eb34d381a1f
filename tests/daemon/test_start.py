"""`energyd start`: the daemon may die, the traffic goes on; bad input of either part ends both with one line."""

import http.server
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from energyd.daemon.paths import socket_path
from tests.faults.rig import TRACE, Process, audited, energyd, one_line, wait_for

REPLAY = ("--sensor", "replay", "--trace", str(TRACE))
SECRET = "sk-marked-key-4711"
PROMPT = "marked-prompt-0815"


class Upstream(http.server.BaseHTTPRequestHandler):
    """A server of one model."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        answer = b'{"model": "tiny", "usage": {"prompt_tokens": 3, "completion_tokens": 4}, "choices": []}'
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def upstream() -> Iterator[str]:
    """URL of a running upstream."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def ask(base: str) -> int:
    """One request with a marked prompt and key through the proxy."""
    body = f'{{"model": "tiny", "messages": [{{"role": "user", "content": "{PROMPT}"}}]}}'.encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {SECRET}"}
    request = urllib.request.Request(f"{base}/v1/chat/completions", data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return int(answer.status)


def children(pid: int) -> dict[str, int]:
    """Verb and process id of the supervisor's children."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                words = (stat.parent / "cmdline").read_text().split("\0")
                found[words[words.index("energyd.daemon.cli") + 1]] = int(stat.parent.name)
        except (OSError, ValueError, IndexError):
            continue
    return found


def alive(pid: int) -> bool:
    """Whether the process still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_daemon_dies_the_traffic_goes_on_and_the_daemon_comes_back(tmp_path: Path, upstream: str) -> None:
    """Under kill -9 of the daemon requests are answered all the same, and every one is in the books once.

    The daemon is started again; SIGTERM ends both parts with exit 0. No marked prompt or key is in any file or line.
    """
    db = tmp_path / "e.db"
    options = (
        "--upstream",
        upstream,
        "--listen",
        "127.0.0.1:0",
        "--admin",
        "127.0.0.1:0",
        "--db",
        str(db),
        "--drain",
        "1",
    )
    process = Process("start", *options, *REPLAY)
    parts: dict[str, int] = {}
    try:
        base = process.said("energyd proxy: http").split()[2]
        admin = process.said("/metrics").split()[2].rstrip(",").removesuffix("/metrics")
        assert ask(base) == 200
        parts = children(process.popen.pid)
        assert set(parts) == {"daemon", "proxy"}
        os.kill(parts["daemon"], signal.SIGKILL)
        for _ in range(5):
            assert ask(base) == 200
        process.said("the daemon ended with code -9; starting it again")
        wait_for(lambda: children(process.popen.pid).get("daemon") not in (None, parts["daemon"]))
        wait_for(lambda: sum("/metrics" in line for line in process.lines) == 2)
        parts = children(process.popen.pid)
        admin = (
            [line for line in process.lines if "/metrics" in line][-1].split()[2].rstrip(",").removesuffix("/metrics")
        )
        assert ask(base) == 200

        def booked() -> int:
            with urllib.request.urlopen(f"{admin}/v1/models", timeout=10) as answer:
                text = answer.read().decode()
            return text.count('"tiny"') and int(text.partition('"queries": ')[2].partition(",")[0])

        wait_for(lambda: booked() == 7)
        process.popen.terminate()
        assert process._gone() == 0
    finally:
        if process.popen.poll() is None:
            process.popen.terminate()
            process._gone()
    assert not any(alive(pid) for pid in parts.values())
    assert not socket_path(db).exists()
    audited(db)
    everything = "\n".join(process.lines).encode() + b"".join(
        p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()
    )
    assert SECRET.encode() not in everything
    assert PROMPT.encode() not in everything


def test_without_a_gpu_it_stops_with_one_line_that_names_the_choices(tmp_path: Path, upstream: str) -> None:
    """A host without NVML: exit 2, one line, no silent fallback to an estimate."""
    options = (
        "--upstream",
        upstream,
        "--listen",
        "127.0.0.1:0",
        "--admin",
        "127.0.0.1:0",
        "--db",
        str(tmp_path / "e.db"),
    )
    line = one_line(energyd("start", *options, "--drain", "0"))
    assert "--sensor estimate" in line
    assert "--sensor replay" in line


@pytest.mark.parametrize("part", ["listen", "admin"])
def test_a_port_that_is_taken_is_one_line(tmp_path: Path, upstream: str, part: str) -> None:
    """Whichever of the two ports is taken: exit 2, one line that names it, and no process is left."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ports = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", part: address}
        options = ("--upstream", upstream, "--listen", ports["listen"], "--admin", ports["admin"], "--drain", "0")
        line = one_line(energyd("start", *options, "--db", str(tmp_path / "e.db"), *REPLAY))
    assert address.partition(":")[2] in line


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--upstream", "ftp://x"), "--upstream"),
        (("--upstream", "http://127.0.0.1:1", "--listen", "nonsense"), "--listen"),
        (("--upstream", "http://127.0.0.1:1", "--admin", "0.0.0.0:0"), "--admin"),
    ],
)
def test_bad_input_of_either_part_ends_both(tmp_path: Path, options: tuple[str, ...], part: str) -> None:
    """The part that refuses says why, once; the other one is stopped; the exit code is 2."""
    ports = [x for name in ("--listen", "--admin") if name not in options for x in (name, "127.0.0.1:0")]
    line = one_line(
        energyd("start", *options, *ports, "--db", str(tmp_path / "e.db"), "--drain", "0", "--sensor", "none")
    )
    assert part in line


def test_a_config_file_fills_in_what_the_command_line_leaves_open(tmp_path: Path, upstream: str) -> None:
    """Options come from a TOML file; the command line has the last word."""
    config = tmp_path / "energyd.toml"
    config.write_text(f'upstream = "{upstream}"\nlisten = "nonsense"\nsensor = "none"\nadmin = "127.0.0.1:0"\n')
    line = one_line(energyd("start", "--config", str(config), "--db", str(tmp_path / "e.db"), "--drain", "0"))
    assert "nonsense" in line
    line = one_line(energyd("start", "--config", str(config), "--db", str(tmp_path / "e.db"), "--listen", "other"))
    assert "other" in line


@pytest.mark.parametrize(
    ("text", "part"),
    [("upstrem = 'x'", "upstrem"), ("= 5", "not TOML"), (None, "No such file"), (b"\xff\xfe", "not TOML")],
)
def test_a_broken_config_file_is_one_line(tmp_path: Path, text: str | bytes | None, part: str) -> None:
    """Missing, not TOML, or with an option that there is not: the file and what is wrong with it."""
    config = tmp_path / "energyd.toml"
    if text is not None:
        config.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = one_line(energyd("start", "--config", str(config)))
    assert part in line
    assert "energyd.toml" in line


def test_ctrl_c_ends_both_parts(tmp_path: Path, upstream: str) -> None:
    """SIGINT to the supervisor alone, as a terminal's Ctrl-C reaches it: proxy first, then daemon, exit 0."""
    options = (
        "--upstream",
        upstream,
        "--listen",
        "127.0.0.1:0",
        "--admin",
        "127.0.0.1:0",
        "--db",
        str(tmp_path / "e.db"),
    )
    process = Process("start", *options, "--sensor", "none", "--drain", "1")
    process.said("energyd proxy: http")
    process.said("/metrics")
    parts = children(process.popen.pid)
    time.sleep(0.2)
    process.popen.send_signal(signal.SIGINT)
    assert process._gone() == 0
    assert not any(alive(pid) for pid in parts.values())
    assert not any("Traceback" in line for line in process.lines)
