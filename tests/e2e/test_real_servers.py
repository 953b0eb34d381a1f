"""Real vLLM and real `transformers serve` behind `energyd start`: bytes, usage, energy and books.

::

    client --> energyd proxy --> recording relay --> real server

The relay is plain TCP and keeps what the server really sent, so bodies are compared byte for byte and not against a
second answer, whose ids and times would differ.
"""

import http.client
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from energyd.bench.companion import Companion, free_port

SECRET_PROMPT = "zanzibar-prompt-marker"
SECRET_KEY = "zanzibar-key-marker"
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-connection"}
SETTLED_WITHIN_S = 60


class Answer(NamedTuple):
    """One HTTP answer: status, end-to-end headers in order, body as sent less chunk boundaries."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    @classmethod
    def read(cls, response: http.client.HTTPResponse) -> "Answer":
        """The answer, read to its end."""
        headers = [(k, v) for k, v in response.getheaders() if k.lower() not in HOP_BY_HOP]
        return cls(response.status, headers, response.read())

    def header(self, name: str) -> str | None:
        """The header `name`, None if it is absent."""
        return next((v for k, v in self.headers if k.lower() == name), None)

    def usage(self) -> dict[str, int]:
        """The usage that the server reported, in a plain answer or in the last event that has one."""
        if self.body.startswith(b"data:"):
            events = [line[6:] for line in self.body.splitlines() if line.startswith(b"data: {")]
            return next(u for e in reversed(events) if (u := json.loads(e).get("usage")))
        return json.loads(self.body)["usage"]  # type: ignore[no-any-return]


class Relay:
    """A TCP relay that keeps a copy of everything the server sent, connection by connection."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._sent: list[bytearray] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._run(self._accept)

    def close(self) -> None:
        """End the listener and every connection, and wait for the threads: a socket left open is a warning, and fails."""
        # shutdown wakes the threads that are blocked in accept and recv; close alone does not
        for each in (self._listener, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in (self._listener, *self._open):
            each.close()

    def answers(self) -> list[Answer]:
        """Every complete answer that the server has sent so far."""
        found = []
        for sent in list(self._sent):
            stream = _Recorded(bytes(sent))
            while stream.tell() < len(sent):
                response = http.client.HTTPResponse(stream)  # type: ignore[arg-type]
                response.begin()
                found.append(Answer.read(response))
        return found

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                server = socket.create_connection(self._target)
                self._open.append(server)
                sent = bytearray()
                self._sent.append(sent)
                for source, sink, copy in ((client, server, bytearray()), (server, client, sent)):
                    self._run(self._pump, source, sink, copy)

    def _run(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket, copy: bytearray) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                copy += data
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


class _Recorded(io.BytesIO):
    """Recorded bytes in the shape that `http.client` reads from; the answers of one connection follow each other."""

    def makefile(self, _mode: str) -> "_Recorded":
        """The stream itself: the next answer begins where this one ends."""
        return self

    def close(self) -> None:
        """Stay open: `http.client` closes its file after each answer."""


class Metered(NamedTuple):
    """A running energyd in front of a real server."""

    proxy: str
    relay: Relay
    db: Path
    model: str
    meter: Companion

    def ask(self, path: str, body: dict[str, Any]) -> Answer:
        """One request through the proxy, read to its end."""
        parts = urlsplit(self.proxy)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
        headers = {"content-type": "application/json", "authorization": f"Bearer {SECRET_KEY}", "x-energyd-report": "1"}
        connection.request("POST", path, json.dumps({"model": self.model, **body}), headers)
        answer = Answer.read(connection.getresponse())
        connection.close()
        return answer

    def queries(self) -> dict[str, dict[str, Any]]:
        """The exported queries by id."""
        done = energyd("export", "queries", "--db", str(self.db), "--format", "jsonl")
        return {row["query_id"]: row for row in map(json.loads, done.stdout.splitlines())}

    def settled(self, ids: set[str]) -> dict[str, dict[str, Any]]:
        """The exported queries, once every one of `ids` has its final energy: a provisional one has no `rel_u` yet."""
        deadline = time.monotonic() + SETTLED_WITHIN_S
        while True:
            rows = self.queries()
            if all(rows.get(i, {}).get("rel_u") is not None for i in ids):
                return rows
            assert time.monotonic() < deadline, f"no energy yet: {[rows.get(i) for i in ids]}"
            time.sleep(0.5)


def energyd(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a verb that must succeed."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def command(*arguments: str) -> list[str]:
    """The command line of a verb."""
    return [sys.executable, "-P", "-c", "from energyd.daemon.cli import main; main(prog_name='energyd')", *arguments]


@pytest.fixture(params=["vllm_server", "transformers_server"], scope="module")
def metered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Metered]:
    """`energyd start` with the CPU estimate in front of each real server."""
    url, model = request.getfixturevalue(request.param)
    parts = urlsplit(url)
    relay = Relay((parts.hostname or "", parts.port or 0))
    folder = tmp_path_factory.mktemp("e2e")
    listen, admin = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    arguments = ["start", "--upstream", relay.url, "--listen", listen, "--admin", admin]
    arguments += ["--db", str(folder / "energyd.db"), "--sensor", "estimate", "--estimate-watts", "100"]
    with Companion("energyd start", command(*arguments), log=folder / "energyd.log", cwd=folder) as meter:
        meter.wait_healthy(f"http://{admin}/readyz", 60)
        meter.wait_healthy(f"http://{listen}/health", 60)
        yield Metered(f"http://{listen}", relay, folder / "energyd.db", model, meter)
    relay.close()


CHAT = {"messages": [{"role": "user", "content": f"w5 w6 {SECRET_PROMPT} w7"}], "max_tokens": 12, "temperature": 0}
TEXT = {"prompt": f"w5 w6 {SECRET_PROMPT} w7 w8", "max_tokens": 8, "temperature": 0}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
REQUESTS = {
    "chat": ("/v1/chat/completions", CHAT),
    "chat streamed": ("/v1/chat/completions", CHAT | STREAMED),
    "text": ("/v1/completions", TEXT),
    "text streamed": ("/v1/completions", TEXT | STREAMED),
}


@pytest.fixture(scope="module")
def answers(metered: Metered) -> dict[str, Answer]:
    """One answer of each kind, all through the proxy."""
    return {kind: metered.ask(path, body) for kind, (path, body) in REQUESTS.items()}


def test_bytes_are_what_the_server_sent(metered: Metered, answers: dict[str, Answer]) -> None:
    """Status, headers in their order and body equal what left the server; only the id we were asked for is added."""
    sent = metered.relay.answers()
    for kind, answer in answers.items():
        assert answer.status == 200, (kind, answer.body)
        ours = [(k, v) for k, v in answer.headers if k.lower() != "x-energyd-id"]
        assert Answer(answer.status, ours, answer.body) in sent, kind


def test_usage_is_what_the_server_reports(metered: Metered, answers: dict[str, Answer]) -> None:
    """The token counts in the ledger are those of the server, streamed or not."""
    ids = {kind: answer.header("x-energyd-id") or "" for kind, answer in answers.items()}
    rows = metered.settled(set(ids.values()))
    for kind, answer in answers.items():
        usage, row = answer.usage(), rows[ids[kind]]
        reported = (usage["prompt_tokens"], usage["completion_tokens"])
        assert (row["prompt_tokens"], row["completion_tokens"]) == reported, kind


def test_every_query_gets_an_energy(metered: Metered, answers: dict[str, Answer]) -> None:
    """Each query is settled with an energy that is marked as the estimate it is, under the model's plain name."""
    ids = {answer.header("x-energyd-id") or "" for answer in answers.values()}
    rows = metered.settled(ids)
    assert {(rows[i]["status"], rows[i]["http_status"]) for i in ids} == {("ok", 200)}
    assert {rows[i]["model"] for i in ids} == {metered.model}
    assert {rows[i]["source"] for i in ids} == {"estimate"}
    assert sum(rows[i]["active_energy_uj"] + rows[i]["standing_energy_uj"] for i in ids) > 0


def test_the_books_balance(metered: Metered, answers: dict[str, Answer]) -> None:
    """`energyd audit` proves the ledger to the microjoule while the daemon writes it."""
    metered.settled({answer.header("x-energyd-id") or "" for answer in answers.values()})
    assert "residual 0 µJ" in energyd("audit", "--db", str(metered.db)).stdout


def test_prompt_and_key_are_nowhere(metered: Metered, answers: dict[str, Answer]) -> None:
    """Neither the prompt nor the bearer token is in any file that energyd wrote: ledger, log, spool."""
    metered.settled({answer.header("x-energyd-id") or "" for answer in answers.values()})
    written = [path for path in metered.db.parent.rglob("*") if path.is_file()]
    assert metered.db in written
    found = [p.name for p in written if any(s.encode() in p.read_bytes() for s in (SECRET_PROMPT, SECRET_KEY))]
    assert found == []
