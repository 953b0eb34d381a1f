"""`energyd proxy` as a process: start, stop, crash, several workers."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from .standins import FakeDaemon, Peer, answering, raw_upstream

STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    b'data: {"model":"m","choices":[{"text":"a"}]}\n\n'
    b'data: {"model":"m","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n'
)


class Command:
    """Runs the command; what is left over is killed at the end of the test."""

    def __init__(self, db: Path) -> None:
        self._db = db
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `energyd proxy ARGUMENTS --db DB`."""
        command = [str(Path(sys.executable).with_name("energyd")), "proxy", *arguments, "--db", str(self._db)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._processes.append(process)
        return process

    async def ready(self, process: subprocess.Popen[str]) -> str:
        """Wait for the line that says where it listens; returns the URL."""
        assert process.stdout is not None
        line = await asyncio.to_thread(process.stdout.readline)
        assert line.startswith("energyd proxy: http://127.0.0.1:"), line
        return line.split()[2]

    async def ended(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Wait for the end; returns exit code and stderr."""
        _, err = await asyncio.to_thread(process.communicate, timeout=20)
        return process.returncode, err

    def kill(self) -> None:
        """Leave nothing behind."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def command(db: Path) -> Iterator[Command]:
    """The command with its ledger beside the test's."""
    made = Command(db)
    yield made
    made.kill()


async def post(url: str) -> bytes:
    """One completion on a connection of its own."""
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/completions", json={"model": "m"}) as answer:
        return await answer.read()


async def test_serves_and_stops(command: Command, daemon: FakeDaemon) -> None:
    """One line when ready; on SIGTERM a running stream ends, everything is delivered, and the exit code is 0."""
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def stream(peer: Peer) -> None:
        await peer.request()
        arrived.set()
        await go_on.wait()
        await peer.send(STREAM)

    async with raw_upstream(stream) as upstream:
        process = command.start("--upstream", f"http://127.0.0.1:{upstream.port}", "--listen", "127.0.0.1:0")
        url = await command.ready(process)
        running = asyncio.create_task(post(url))
        await arrived.wait()
        process.send_signal(signal.SIGTERM)
        go_on.set()
        assert b"usage" in await running
        assert await command.ended(process) == (0, "")
    assert [c.status for c in daemon.closes()] == ["ok"]
    assert daemon.byes == [daemon.hellos[0].worker]


async def test_kill_9_without_a_daemon(command: Command, db: Path, daemon: FakeDaemon) -> None:
    """Queries that were spooled before a kill -9 of the proxy are delivered by the next one."""
    await daemon.stop()
    async with raw_upstream(answering(STREAM)) as upstream:
        arguments = ("--upstream", f"http://127.0.0.1:{upstream.port}", "--listen", "127.0.0.1:0")
        process = command.start(*arguments)
        url = await command.ready(process)
        for _ in range(3):
            await post(url)
        await daemon.wait(lambda: sum(p.read_bytes().count(b"close") for p in db.with_suffix(".spool").glob("*")) == 3)
        process.kill()
        await command.ended(process)
        await daemon.start()
        process = command.start(*arguments)
        await daemon.wait(lambda: len(daemon.closes()) == 3)
        await daemon.wait(lambda: len(daemon.byes) == 1)
        process.terminate()
        assert (await command.ended(process))[0] == 0
    assert [c.served for c in daemon.closes()] == ["m"] * 3
    assert not list(db.with_suffix(".spool").glob("*"))


async def test_workers(command: Command, daemon: FakeDaemon) -> None:
    """Workers share one port; a killed one is replaced; all end with the parent."""
    async with raw_upstream(answering(STREAM)) as upstream:
        process = command.start(
            "--upstream", f"http://127.0.0.1:{upstream.port}", "--listen", "127.0.0.1:0", "--workers", "2"
        )
        url = await command.ready(process)
        await daemon.wait(lambda: len(daemon.hellos) == 2)
        for _ in range(20):
            await post(url)
        await daemon.wait(lambda: len(daemon.closes()) == 20)
        victim = daemon.hellos[0].pid
        assert victim != process.pid
        os.kill(victim, signal.SIGKILL)
        await daemon.wait(lambda: len(daemon.hellos) == 3)
        await post(url)
        process.terminate()
        code, err = await command.ended(process)
    assert code == 0
    assert "a worker ended with code -9 and is replaced" in err
    for hello in daemon.hellos:
        with pytest.raises(ProcessLookupError):
            os.kill(hello.pid, 0)


async def test_workers_do_not_outlive_their_parent(command: Command, daemon: FakeDaemon) -> None:
    """A parent that is killed takes its workers along."""
    process = command.start("--upstream", "http://127.0.0.1:9", "--listen", "127.0.0.1:0", "--workers", "2")
    await command.ready(process)
    await daemon.wait(lambda: len(daemon.hellos) == 2)
    process.kill()
    await daemon.wait(lambda: len(daemon.byes) == 2)


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_taken_port(command: Command, workers: str) -> None:
    """A port in use ends the command with one line and exit code 2, with several workers too."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = command.start("--upstream", "http://127.0.0.1:9", "--listen", address, "--workers", workers)
        code, err = await command.ended(process)
    assert (code, err.count("\n")) == (2, 1)
    assert f"cannot listen on {address}: Address already in use" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--upstream", "nonsense"), "--upstream 'nonsense' is not an http or https URL"),
        (("--upstream", "http://h", "--listen", "x"), "--listen 'x' is not HOST:PORT"),
        (("--upstream", "http://h", "--tenant-header", "a: b"), "--tenant-header 'a: b' is not a header name"),
        (("--upstream", "http://h", "--tenant", "team-a"), "--tenant takes NAME=HASH"),
        (("--upstream", "http://h", "--tenant", "team-a=sk-secret"), "--tenant takes NAME=HASH"),
    ],
)
async def test_bad_input(command: Command, arguments: tuple[str, ...], said: str) -> None:
    """Bad input is one line that says what is wrong, exit code 2, and no traceback."""
    code, err = await command.ended(command.start(*arguments))
    assert (code, err.count("\n")) == (2, 1)
    assert said in err
    assert "sk-secret" not in err
