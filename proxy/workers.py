"""Workers of one port: processes that share it by SO_REUSEPORT, kept alive by a parent that serves nothing itself."""

import asyncio
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

import uvloop

from .app import Settings, listen, work

_LOG = logging.getLogger("energyd.proxy")
_RESTART_S = 1.0


def run_one(settings: Settings, host: str, port: int, *, announce: Callable[[int], None]) -> None:
    """Serve in this process until it is told to stop; `announce` gets the port once connections are accepted."""
    bound = listen(host, port)
    port = bound.getsockname()[1]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work(settings, bound, ready=lambda: announce(port)))


def run_many(settings: Settings, host: str, port: int, *, workers: int, announce: Callable[[int], None]) -> None:
    """Serve with `workers` processes until told to stop; one that dies is replaced, and its spool is adopted."""
    listen(host, port).close()  # not shared: finds a port that another proxy would silently share with us
    holder = listen(host, port, shared=True)  # keeps the port ours between the workers' lives
    port = holder.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    running: dict[int, ForkProcess] = {}
    stopping = False

    def stop(_signal: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True
        for process in running.values():
            if process.is_alive():
                process.terminate()

    def start() -> Connection:
        ours, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=_child, args=(settings, host, port, theirs, os.getpid()))
        process.start()
        theirs.close()
        running[process.sentinel] = process
        return ours

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    reports = [start() for _ in range(workers)]
    started = all(_reported(report) for report in reports)
    if started:
        announce(port)
    while running:
        for sentinel in wait(list(running), timeout=1.0):
            process = running.pop(int(sentinel))  # type: ignore[arg-type, unused-ignore]
            process.join()
            if not stopping and started:
                _LOG.warning("energyd proxy: a worker ended with code %s and is replaced", process.exitcode)
                time.sleep(_RESTART_S)
                start().close()
    holder.close()


def _child(settings: Settings, host: str, port: int, report: Connection, parent: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def ready() -> None:
        with suppress(OSError):  # a replacement: nobody waits for it
            report.send(True)
        report.close()

    bound = listen(host, port, shared=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work(settings, bound, ready=ready, parent=parent))


def _reported(report: Connection) -> bool:
    try:
        return bool(report.recv())
    except EOFError:
        return False
    finally:
        report.close()
