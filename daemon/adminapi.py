"""The admin port: `/metrics`, `/healthz`, `/readyz` and a small read-only JSON API; loopback only.

Reads go through a connection of their own in a thread of their own, so a slow question delays no settlement.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from aiohttp import web

from .config import Address
from .errors import EnergydError, UsageError
from .ledger import Ledger
from .localapi import status
from .metrics import CONTENT_TYPE, per_model

if TYPE_CHECKING:
    from .service import Service

log = logging.getLogger(__name__)
T = TypeVar("T")
_READY_TIMEOUT_S = 3.0
_MAX_LIMIT = 1000
_INDEX = """energyd admin port

/metrics             Prometheus
/healthz             200 while the process lives
/readyz              200 if every meter reads and the ledger takes; else 503 and why
/v1/status           the daemon, its GPUs, unsettled energy
/v1/models           finished queries by model, Wh per 1,000 queries
/v1/queries?limit=N  the newest queries
/v1/queries/ID       one query; 202 while its energy is provisional
/v1/runs             bench runs
/v1/events           resets, outages, lost workers
"""


class AdminApi:
    """HTTP on the admin address."""

    def __init__(self, service: "Service") -> None:
        self._service = service
        self._runner: web.AppRunner | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._ledger: Ledger | None = None
        self._hosts: frozenset[str] = frozenset()

    async def start(self, address: Address) -> str:
        """Listen; returns the bound HOST:PORT. Raises UsageError for an address others can reach, OSError if it is taken."""
        if not address.loopback:
            raise UsageError(
                f"--admin {address} can be reached from other machines and has no password yet; use 127.0.0.1 and a tunnel"
            )
        app = web.Application(middlewares=[self._guard])
        app.add_routes(
            [
                web.get("/", self._index),
                web.get("/metrics", self._metrics),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/v1/status", self._status),
                web.get("/v1/models", self._models),
                web.get("/v1/queries", self._queries),
                web.get("/v1/queries/{query_id}", self._query),
                web.get("/v1/runs", self._runs),
                web.get("/v1/events", self._events),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, address.host, address.port)
        await site.start()
        port = self._runner.addresses[0][1]
        bound = Address(host=address.host, port=port)
        self._hosts = frozenset({"localhost", "127.0.0.1", "[::1]", address.host})
        return str(bound)

    async def stop(self) -> None:
        """Stop listening and close the reader."""
        if self._runner:
            await self._runner.cleanup()
        self._reader.shutdown(wait=True)
        if self._ledger:
            self._ledger.close()

    async def _read(self, job: Callable[[Ledger], T]) -> T:
        def run() -> T:
            if self._ledger is None:
                self._ledger = Ledger.open(self._service.settings.db, readonly=True)
            with self._ledger.reading():
                return job(self._ledger)

        return await asyncio.get_running_loop().run_in_executor(self._reader, run)

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """A page in somebody's browser must not read us through a name that it made point to loopback."""
        named = request.host.lower()
        host = named.rpartition(":")[0] if named.count(":") == 1 or "]:" in named else named
        if host not in self._hosts:
            return web.json_response({"error": f"host {host!r} is not served here"}, status=421)
        try:
            response = await handler(request)
        except EnergydError as e:
            response = web.json_response({"error": str(e)}, status=503)
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-store"
        return response

    async def _index(self, _request: web.Request) -> web.Response:
        return web.Response(text=_INDEX)

    async def _metrics(self, _request: web.Request) -> web.Response:
        health = await self._service.health()
        page = self._service.totals.page(health)
        return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE})

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        troubles = self._service.troubles()
        try:
            await asyncio.wait_for(self._service.health(), _READY_TIMEOUT_S)
        except TimeoutError:
            troubles.append("the ledger does not answer")
        return web.Response(text="\n".join(troubles) + "\n", status=503) if troubles else web.Response(text="ok\n")

    async def _status(self, _request: web.Request) -> web.Response:
        return web.json_response(msgspec.to_builtins(await status(self._service)))

    async def _models(self, _request: web.Request) -> web.Response:
        rows = await self._read(lambda ledger: ledger.query_totals())
        return web.json_response(per_model(rows))

    async def _queries(self, request: web.Request) -> web.Response:
        text = request.query.get("limit", "100")
        number = text.isascii() and text.isdecimal() and len(text) < 10  # int() refuses thousands of digits
        if not number or not 0 < int(text) <= _MAX_LIMIT:
            return web.json_response({"error": f"limit must be 1 to {_MAX_LIMIT}"}, status=400)
        rows = await self._read(lambda ledger: ledger.recent_queries(int(text)))
        return web.json_response([_public(r) for r in rows])

    async def _query(self, request: web.Request) -> web.Response:
        query_id = request.match_info["query_id"]
        row = await self._read(lambda ledger: ledger.query(query_id))
        if row is None:
            return web.json_response({"error": "no such query"}, status=404)
        if row["final"]:
            return web.json_response(_public(row))
        s = self._service
        active_uj, standing_uj = await s.write(lambda: s.books.provisional_uj(query_id, s.clock.now_ns()))
        if active_uj or standing_uj:
            row = {
                **row,
                "active_uj": (row["active_uj"] or 0) + active_uj,
                "standing_uj": (row["standing_uj"] or 0) + standing_uj,
            }
        return web.json_response(_public(row), status=202)

    async def _runs(self, _request: web.Request) -> web.Response:
        runs = await self._read(lambda ledger: ledger.runs())
        return web.json_response(msgspec.to_builtins(runs))

    async def _events(self, _request: web.Request) -> web.Response:
        rows = await self._read(lambda ledger: ledger.events())
        return web.json_response([dict(r) for r in rows])


_PUBLIC = (
    "query_id", "tenant", "model", "task", "started_ns", "ended_ns", "prompt_tokens", "completion_tokens", "rel_u", "source",
    "status", "http_status",
)  # fmt: skip


def _public(row: Mapping[str, Any]) -> dict[str, object]:
    """A query as the API shows it: energies with their unit, and whether they are provisional."""
    shown: dict[str, object] = {key: row[key] for key in _PUBLIC if key in row.keys()}  # noqa: SIM118 - a Mapping
    return {
        **shown,
        "active_energy_uj": row["active_uj"],
        "standing_energy_uj": row["standing_uj"],
        "provisional": not row["final"],
    }
