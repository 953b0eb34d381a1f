"""Two small real servers in a thread: an OpenAI-style server (as seen with or without a proxy) and a daemon."""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from energyd.daemon import wire
from energyd.daemon.paths import socket_path

SECRET = "MARKED-PROMPT-TEXT"


class Loop:
    """An event loop in a thread of its own, so that commands can run their own loop in the test's thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runners: list[web.AppRunner] = []

    def serve(self, app: web.Application, socket: Path | None = None) -> int:
        """Serve `app` on 127.0.0.1 (the port is returned) or on a Unix socket (0 is returned)."""

        async def start() -> int:
            runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=0.2)
            await runner.setup()
            self._runners.append(runner)
            if socket is not None:
                await web.UnixSite(runner, str(socket)).start()
                return 0
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            port: int = runner.addresses[0][1]
            return port

        return asyncio.run_coroutine_threadsafe(start(), self._loop).result(10)

    def stop_serving(self) -> None:
        """Close all servers."""

        async def cleanup() -> None:
            for runner in self._runners:
                await runner.cleanup()
            self._runners.clear()

        asyncio.run_coroutine_threadsafe(cleanup(), self._loop).result(10)

    def close(self) -> None:
        """Close all servers, end the thread."""
        self.stop_serving()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@dataclass
class FakeServer:
    """An OpenAI-style server. `style` decides what it accepts; `fail` gives a status for the nth replayed request."""

    style: str = "vllm"
    proxied: bool = True
    tokens: int = 10
    usage: bool = True
    delay_s: float = 0.0
    fail: Callable[[int], int | None] = lambda _n: None
    chat: bool = True
    completions: bool = True
    probe_status: int = 200
    error_inside: bool = False
    seen: list[dict[str, object]] = field(default_factory=list)
    active: int = 0
    peak: int = 0
    headers: list[dict[str, str]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def app(self) -> web.Application:
        app = web.Application()
        if self.style == "vllm":
            app.router.add_get("/version", self._version)
        if self.style == "transformers":
            app.router.add_get("/openapi.json", self._openapi)
            app.router.add_get("/v1/models", self._broken)
        if self.chat:
            app.router.add_post("/v1/chat/completions", self._answer)
        if self.completions:
            app.router.add_post("/v1/completions", self._answer)
        return app

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "0.99.0"})

    async def _openapi(self, _: web.Request) -> web.Response:
        return web.json_response({"paths": {"/load_model": {}, "/v1/chat/completions": {}}})

    async def _broken(self, _: web.Request) -> web.Response:
        return web.Response(status=500)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        number = len(self.seen)
        self.seen.append(asked)
        self.headers.append(dict(request.headers))
        if self.probe_status != 200:
            return web.json_response({"error": {"message": f"no, not {asked['model']}"}}, status=self.probe_status)
        if self.style == "transformers" and ({"min_tokens", "ignore_eos"} & set(asked)):
            return web.json_response({"detail": "Unexpected fields in the request"}, status=422)
        status = self.fail(number - 1) if number else None
        if status is not None:
            return web.json_response(
                {"error": {"message": f"cannot do {asked}"}}, status=status, headers=self._id(request)
            )
        self.active += 1
        self.peak = max(self.peak, self.active)
        try:
            await asyncio.sleep(self.delay_s)
            if asked.get("stream"):
                return await self._stream(request, asked)
            body = {"model": asked["model"], "choices": [{"text": "word"}], **self._usage(asked)}
            return web.json_response(body, headers=self._id(request))
        finally:
            self.active -= 1

    async def _stream(self, request: web.Request, asked: dict[str, object]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream", **self._id(request)})
        await response.prepare(request)
        is_chat = request.path.startswith("/v1/chat")
        for _ in range(self.tokens):
            choice = {"delta": {"content": "word "}} if is_chat else {"text": "word "}
            await response.write(_event({"model": asked["model"], "choices": [choice]}))
        if self.error_inside:
            await response.write(_event({"error": "the model fell over"}))
        if self.usage and (self.style == "transformers" or asked.get("stream_options")):
            await response.write(_event({"model": asked["model"], "choices": [], **self._usage(asked)}))
        if self.style != "transformers":
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    def _usage(self, asked: dict[str, object]) -> dict[str, object]:
        return {"usage": {"prompt_tokens": 7, "completion_tokens": self.tokens}} if self.usage else {}

    def _id(self, request: web.Request) -> dict[str, str]:
        if not self.proxied or request.headers.get("x-energyd-report") != "1":
            return {}
        return {"x-energyd-id": f"{len(self.seen):032x}"}


def _event(found: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(found).encode() + b"\n\n"


@dataclass
class FakeDaemon:
    """A daemon that stores what it is told and draws a constant 100 W (idle and busy alike) on one GPU."""

    socket: Path
    settle_after: int = 0
    gpu_name: str = "NVIDIA H200"
    gpus: int = 1
    away: bool = False
    starts: list[wire.RunStart] = field(default_factory=list)
    samples: dict[tuple[str, str, int], wire.Sample] = field(default_factory=dict)
    ends: list[wire.RunEnd] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    asked: int = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get(wire.PATH_STATUS, self._status)
        for path, handler in (
            (wire.PATH_RUN_START, self._start),
            (wire.PATH_RUN_SAMPLES, self._samples),
            (wire.PATH_RUN_END, self._end),
            (wire.PATH_ENERGY, self._energy),
        ):
            app.router.add_post(path, self._guarded(handler))
        return app

    def _guarded(
        self, handler: Callable[[bytes], msgspec.Struct | None]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            data = await request.read()
            if self.away:
                return web.Response(status=503, text="starting")
            self.bodies.append(data)
            answer = handler(data)
            return web.Response(body=wire.encode(answer) if answer else b"")

        return handle

    async def _status(self, _: web.Request) -> web.Response:
        gpus = tuple(
            {"uuid": f"GPU-{i}", "index": i, "name": self.gpu_name, "driver": "580.0", "source": "nvml-counter"}
            for i in range(self.gpus)
        )
        status = wire.Status("0.1.0", "host-1", "boot", 0, "x.db", "time", gpus, 0, None, 0, 1)
        return web.Response(body=wire.encode(status))

    def _start(self, data: bytes) -> None:
        self.starts.append(msgspec.msgpack.decode(data, type=wire.RunStart))

    def _samples(self, data: bytes) -> None:
        found = msgspec.msgpack.decode(data, type=wire.RunSamples)
        for s in found.samples:
            self.samples[found.run_id, s.phase, s.idx] = s

    def _end(self, data: bytes) -> None:
        self.ends.append(msgspec.msgpack.decode(data, type=wire.RunEnd))

    def _energy(self, data: bytes) -> wire.EnergyAnswer:
        question = msgspec.msgpack.decode(data, type=wire.EnergyQuestion)
        self.asked += 1
        energy_uj = 100 * (question.end_ns - question.start_ns) // 1_000
        gpus = tuple(
            wire.GpuEnergy(f"GPU-{i}", i, self.gpu_name, "nvml-counter", energy_uj, energy_uj // 100, 90_000)
            for i in range(self.gpus)
        )
        settled = self.asked > self.settle_after
        if question.run_id is None:
            return wire.EnergyAnswer(settled, True, gpus)
        mine = [s for (_, phase, _), s in self.samples.items() if phase == "measured" and s.query_id]
        return wire.EnergyAnswer(settled, True, gpus, len(mine), len(mine), energy_uj // 2, energy_uj // 4)


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A loop in a thread."""
    found = Loop()
    yield found
    found.close()


@pytest.fixture
def server(loop: Loop) -> FakeServer:
    """A vLLM-like server behind a proxy."""
    return started(loop, FakeServer())


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """Where a ledger would be."""
    return tmp_path / "e.db"


@pytest.fixture
def daemon(loop: Loop, db: Path) -> FakeDaemon:
    """A daemon beside `db`."""
    found = FakeDaemon(socket_path(db))
    loop.serve(found.app(), found.socket)
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A dataset of 12 samples, each with a marked prompt."""
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": f"{SECRET} number {i} of the day"}) + "\n" for i in range(12)))
    return path


def started(loop: Loop, server: FakeServer) -> FakeServer:
    """`server`, listening."""
    server.port = loop.serve(server.app())
    return server


def until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Wait for `condition`; fails after `limit_s`."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
