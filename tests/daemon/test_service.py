"""The running daemon: what it says, what it survives, and how it stops."""

import asyncio
import contextlib
import signal
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from energyd.daemon.config import Settings
from energyd.daemon.errors import LedgerError, LostGpu, RetryReading, UsageError
from energyd.daemon.ledger import Ledger
from energyd.daemon.records import Counter, Gpu, Reading, Samples, Source, Window, WindowKind
from energyd.daemon.service import Service, host_id, open_sensor
from tests.faults.rig import Worker, asked, audited, daemon, energyd, one_line, wait_for

ESTIMATE = ("--sensor", "estimate", "--estimate-watts", "50")


def test_a_query_is_final_within_seconds_of_its_end(tmp_path: Path) -> None:
    """From a real daemon on its own clock: no long query is open, so the figure is final soon."""
    with daemon(tmp_path / "e.db") as process:
        worker = Worker(tmp_path / "e.db")
        worker.hello()
        time.sleep(2.2)  # the greeting
        query_id, events = asked()
        worker.say(*events)
        wait_for(lambda: worker.beat() and process.get(f"/v1/queries/{query_id}")[0] == 200, 10)
        assert process.stop() == 0
    audited(tmp_path / "e.db")


def test_an_estimate_says_so_wherever_it_goes(tmp_path: Path) -> None:
    """Source `estimate` on the first screen, in the status, in the metrics and in the ledger."""
    with daemon(tmp_path / "e.db", sensor=ESTIMATE) as process:
        assert "estimate" in process.said("GPU 0")
        assert process.json("/v1/status")["gpus"][0]["source"] == "estimate"
        assert 'source="estimate"' in process.get("/metrics")[1]
        assert process.stop() == 0


def test_without_a_sensor_queries_are_counted_and_have_no_energy(tmp_path: Path) -> None:
    """`--sensor none`: the energy is NULL, not 0."""
    with daemon(tmp_path / "e.db", sensor=("--sensor", "none")) as process:
        worker = Worker(tmp_path / "e.db")
        worker.hello()
        query_id, events = asked()
        worker.say(*events)
        wait_for(lambda: worker.beat() and process.get(f"/v1/queries/{query_id}")[0] == 200)
        found = process.json(f"/v1/queries/{query_id}")
        assert (found["active_energy_uj"], found["standing_energy_uj"], found["source"]) == (None, None, None)
        assert process.stop() == 0


def test_ctrl_c_stops_it_as_cleanly_as_sigterm(tmp_path: Path) -> None:
    """Exit 0, no traceback, the socket is gone, the books are whole though a query was running."""
    db = tmp_path / "e.db"
    with daemon(db) as process:
        worker = Worker(db)
        worker.hello()
        worker.say(asked()[1][0])
        time.sleep(1.3)
        process.popen.send_signal(signal.SIGINT)
        assert process._gone() == 0
        assert not any("Traceback" in line for line in process.lines), process.lines
    assert not db.with_suffix(".sock").exists()
    audited(db)


def test_all_files_are_private(tmp_path: Path) -> None:
    """The folder that the daemon makes is 0700, every file in it 0600."""
    db = tmp_path / "made" / "e.db"
    with daemon(db) as process:
        wait_for(lambda: db.with_name("e.db-wal").exists())
        assert stat.S_IMODE(db.parent.stat().st_mode) == 0o700
        assert {stat.S_IMODE(p.stat().st_mode) for p in db.parent.iterdir()} == {0o600}
        assert process.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "estimate"),
        (("--sensor", "replay"), "--trace"),
        (("--sensor", "replay", "--trace", "/nowhere.json"), "/nowhere.json"),
        (("--sensor", "none", "--trace", "/nowhere.json"), "--sensor replay"),
        (("--sensor", "none", "--admin", "nonsense"), "HOST:PORT"),
        (("--sensor", "none", "--horizon", "-1"), "--horizon"),
        (("--sensor", "estimate", "--estimate-watts", "-5"), "--estimate-watts"),
        (("--gpu", "x"), "--gpu"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path: Path, arguments: tuple[str, ...], part: str) -> None:
    """No GPU, no trace, an address that is none, numbers out of range: what, where, what to do."""
    assert part in one_line(energyd("daemon", "--db", str(tmp_path / "e.db"), "--admin", "127.0.0.1:0", *arguments))


def test_a_socket_path_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    """The kernel's limit of 107 bytes is told with the way out."""
    folder = tmp_path / ("x" * 100)
    line = one_line(energyd("daemon", "--db", str(folder / "e.db"), "--sensor", "none", "--admin", "127.0.0.1:0"))
    assert "shorter folder" in line


class Flaky:
    """A sensor whose one GPU does what the test says."""

    def __init__(self) -> None:
        self.gpu = Gpu("GPU-a", 0, "emulated", "1", Source.ESTIMATE, 100_000)
        self.trouble: Exception | None = None
        self.reads = 0

    def gpus(self) -> tuple[Gpu, ...]:
        return (self.gpu,)

    def read(self, gpu: Gpu) -> Reading:
        self.reads += 1
        if self.trouble:
            raise self.trouble
        now_ns = time.time_ns()
        stamps = range(now_ns - 500_000_000, now_ns, 1_000_000)  # dense: a window fills a page of the ledger
        samples = Samples(tuple(stamps), tuple(1000 + i for i in range(len(stamps))))
        return Reading(samples, Counter(now_ns, now_ns, 1000 + self.reads * 50))

    def compute_pids(self, gpu: Gpu) -> frozenset[int] | None:
        return None

    def close(self) -> None:
        """Nothing."""


@pytest.fixture
def flaky() -> Flaky:
    """The sensor of `service`."""
    return Flaky()


@pytest.fixture
def service(tmp_path: Path, flaky: Flaky) -> Service:
    """A service in this process with a sensor that the test controls."""
    settings = Settings.checked(db=tmp_path / "e.db", admin={"host": "127.0.0.1", "port": 0})
    return Service(settings, lambda _settings, _clock: flaky)


@contextlib.asynccontextmanager
async def running(service: Service) -> AsyncIterator[None]:
    """The service's own life beside the test, from its first reading on; stopped in the end."""
    task = asyncio.create_task(service.run())
    try:
        await until(lambda: not service.troubles())
        yield
    finally:
        service._stopped.set()
        await task


async def until(condition: Any) -> None:
    """Wait for what happens within a second or two."""
    for _ in range(600):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("still not true")


async def test_readings_that_fail_are_told_and_got_over(service: Service, flaky: Flaky, tmp_path: Path) -> None:
    """A transient failure, a lost GPU, even a defect: not ready while it lasts, ready again after; nothing dies."""
    async with running(service):
        for trouble, word in (
            (RetryReading("busy"), "retrying"),
            (LostGpu("gone"), "lost"),
            (ValueError("bug"), "failing"),
        ):
            flaky.trouble = trouble
            await until(lambda w=word: any(w in t for t in service.troubles()))
            flaky.trouble = None
            await until(lambda: not service.troubles())
        assert service._health().readings_failed["GPU-a"] >= 3
    audited(tmp_path / "e.db")


async def test_a_ledger_that_refuses_is_told_and_nothing_is_lost(service: Service, tmp_path: Path) -> None:
    """While the disk is full: not ready, failures counted, windows kept in memory; afterwards all are in the ledger."""
    async with running(service):

        def fill() -> None:
            pages = service.ledger.db.execute("PRAGMA page_count").fetchone()[0]
            service.ledger.db.execute(f"PRAGMA max_page_count = {pages}")
            for size in (3000, 300, 30, 1):
                with contextlib.suppress(LedgerError):
                    while True:
                        service.ledger.add_event(service.host_id, 0, "filler", "x" * size)

        await service.write(fill)
        await until(lambda: service.failing)
        await until(lambda: len(service._stored) >= 2)
        assert "full" in service.troubles()[0]
        assert service.ledger_failures > 0
        await service.write(lambda: service.ledger.db.execute("PRAGMA max_page_count = 1000000"))
        await until(lambda: not service.troubles())
        assert service._stored == []
    audited(tmp_path / "e.db")


async def test_a_hung_driver_blocks_only_itself(service: Service) -> None:
    """A read that does not come back is told as hung; status, metrics and the stop go on."""
    async with running(service):
        thread = service.meters["GPU-a"]
        thread.state, thread.read_ns = "ok", service.clock.now_ns() - 60 * 10**9
        assert "hung" in service.meter_state("GPU-a")
        assert (await service.health()).read_age_ns["GPU-a"] >= 0


def test_a_clock_set_back_over_a_reboot_puts_no_window_before_the_old_ones(tmp_path: Path, flaky: Flaky) -> None:
    """Ledger time of a new boot begins after the newest window, whatever the wall clock says; else windows would be 1 ns."""
    far_ns = time.time_ns() + 3600 * 10**9
    settings = Settings.checked(db=tmp_path / "e.db", admin={"host": "127.0.0.1", "port": 0})
    with Ledger.open(tmp_path / "e.db") as ledger:
        ledger.register_host("h", "h", 0)
        ledger.register_gpu("h", flaky.gpu, 0)
        window = Window("GPU-a", 0, 0, far_ns - 10**9, far_ns, 0, 1, 1000, 0, WindowKind.METERED, Source.ESTIMATE)
        ledger.append_windows([window], "an earlier boot")
    service = Service(settings, lambda _settings, _clock: flaky)
    assert service.clock.now_ns() >= far_ns
    service.close()


def test_the_host_is_named_by_a_hash(tmp_path: Path) -> None:
    """The machine id itself is never shown; without one the host name serves."""
    machine = tmp_path / "machine-id"
    machine.write_text("secret-id\n")
    assert "secret-id" not in host_id(machine)
    assert host_id(machine) == host_id(machine) != host_id(tmp_path / "none")
    assert len(host_id(tmp_path / "none")) == 16


def test_a_gpu_is_named_by_its_index(tmp_path: Path) -> None:
    """A name, a sign or an exotic digit is refused before the driver is asked."""
    for bad in ("x", "-1", "²", ""):
        with pytest.raises(UsageError, match="--gpu takes the index"):
            open_sensor(Settings.checked(db=tmp_path / "e.db", gpus=(bad,)), None)  # type: ignore[arg-type]
