"""Events reach the daemon in order and exactly once, across crashes of either side."""

import asyncio
import contextlib
import os
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from energyd.daemon import wire
from energyd.daemon.paths import make_private, socket_path, spool_dir
from energyd.proxy.link import Link
from energyd.proxy.outbox import Outbox
from energyd.proxy.spool import Spool, SpoolFullError, after, joined, orphans

from .standins import FakeDaemon

LIMIT = 1 << 20


def hello(worker: str = "w") -> wire.Hello:
    """A worker's introduction."""
    return wire.Hello(worker=worker, boot_id="b", mono_ns=1, unix_ns=2, pid=3, servers=())


def event(number: int) -> wire.Open:
    """An event that can be told from others."""
    return wire.Open(query_id=f"{number:032x}", start_ns=number, server="s")


def numbers(events: list[wire.Event]) -> list[int]:
    """Which events these are."""
    return [e.start_ns for e in events if isinstance(e, wire.Open)]


@contextlib.asynccontextmanager
async def outbox(db: Path, worker: str = "w", limit: int = LIMIT, memory: int = 100_000) -> AsyncIterator[Outbox]:
    """A running outbox; it ends as a killed process does, without farewell, its lock released by the kernel."""
    link = Link(socket_path(db))
    folder = make_private(spool_dir(db))
    box = Outbox(
        hello=hello(worker), link=link, spool_dir=folder, spool_limit_bytes=limit, now_ns=time.monotonic_ns,
        memory_events=memory,
    )  # fmt: skip
    task = asyncio.create_task(box.run())
    try:
        yield box
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        box._spool.close()
        await link.close()


def spools(db: Path) -> list[Path]:
    """The spool files beside a ledger."""
    return sorted(spool_dir(db).glob("*"))


async def test_with_a_daemon_nothing_touches_the_disk(db: Path, daemon: FakeDaemon) -> None:
    """Events arrive in order under numbers without gaps, heartbeats come by themselves, and no file is made."""
    async with outbox(db) as box:
        for i in range(50):
            box.put(event(i))
            await asyncio.sleep(0.01)
        await daemon.wait(lambda: len(daemon.events) == 50 and daemon.heartbeats >= 2)
        assert numbers(daemon.events) == list(range(50))
        assert daemon.acked == {"w": 50}
        marks = daemon.watermarks["w"]
        assert marks == sorted(marks)
        assert not spools(db)


async def test_watermark_never_passes_an_unsent_event(db: Path, daemon: FakeDaemon) -> None:
    """With more events than one batch holds, no watermark lies after the time of an event still to come."""
    async with outbox(db) as box:
        before = time.monotonic_ns()
        for i in range(3500):
            box.put(wire.Open(query_id=str(i), start_ns=time.monotonic_ns(), server="s"))
        await daemon.wait(lambda: len(daemon.events) == 3500)
        marks = daemon.watermarks["w"]
        batches = [m for m in marks if m < before]
        assert len(batches) >= 3, "all batches but the one that completes the turn carry the old watermark"
        await daemon.wait(lambda: daemon.watermarks["w"][-1] > before)


async def test_the_book_is_asked_before_the_watermark(db: Path, daemon: FakeDaemon) -> None:
    """What open queries have to say is in the batch whose watermark covers it."""
    said: list[int] = []
    async with outbox(db) as box:

        def tell() -> None:
            said.append(time.monotonic_ns())
            box.put(wire.Progress(query_id="q", from_ns=said[-1], deltas_us=(0,)))

        box.ask(tell=tell, open_queries=lambda: 7)
        await daemon.wait(lambda: len(daemon.events) > 3)
    for mark, at in zip(daemon.watermarks["w"][1:], said[1:], strict=False):
        assert mark <= at


async def test_a_daemon_that_comes_and_goes(db: Path, daemon: FakeDaemon) -> None:
    """Whatever the daemon's ups and downs, each event arrives once, in order; the spool is 0600 and disappears."""
    async with outbox(db) as box:
        sent = 0
        for _ in range(3):
            await daemon.stop()
            for _ in range(20):
                box.put(event(sent))
                sent += 1
                await asyncio.sleep(0.02)
            await daemon.wait(lambda: spools(db))
            assert [stat.S_IMODE(p.stat().st_mode) for p in spools(db)] == [0o600]
            await daemon.start()
            for _ in range(5):
                box.put(event(sent))
                sent += 1
            await daemon.wait(lambda: len(daemon.events) == sent)  # noqa: B023 - called at once
        assert numbers(daemon.events) == list(range(sent))
        assert not daemon.gaps
        await daemon.wait(lambda: not spools(db))
        assert box.counts.dropped == 0


async def test_lost_replies_are_not_sent_twice(db: Path, daemon: FakeDaemon) -> None:
    """A batch that was committed while its answer was lost is recognised by its numbers."""
    daemon.lose_replies = 4
    async with outbox(db) as box:
        for i in range(40):
            box.put(event(i))
            await asyncio.sleep(0.02)
        await daemon.wait(lambda: daemon.lose_replies == 0 and box._acked_seq == 40)
        assert numbers(daemon.events) == list(range(40))
        assert not daemon.gaps


async def test_a_refused_batch_does_not_block(db: Path, daemon: FakeDaemon) -> None:
    """A batch that the daemon will never take is dropped and counted; what follows it is delivered."""
    daemon.refuse = 1
    async with outbox(db) as box:
        box.put(event(0))
        await daemon.wait(lambda: daemon.refuse == 0)
        box.put(event(1))
        await daemon.wait(lambda: numbers(daemon.events) == [1])
        assert box.counts.dropped == 1


async def test_a_hanging_daemon(db: Path, daemon: FakeDaemon) -> None:
    """While the daemon hangs, events go to the disk within a second; when it answers, they are not sent twice."""
    async with outbox(db) as box:
        await daemon.wait(lambda: daemon.heartbeats)
        daemon.hold = asyncio.Event()
        for i in range(30):
            box.put(event(i))
        await daemon.wait(lambda: box.counts.spooled == 30)
        daemon.hold.set()
        box.put(event(30))
        await daemon.wait(lambda: len(daemon.events) == 31)
        assert numbers(daemon.events) == list(range(31))
        await daemon.wait(lambda: not spools(db))


async def test_a_dead_worker_is_adopted(db: Path, daemon: FakeDaemon) -> None:
    """The spool of a killed worker is delivered under its name, marked adopted, followed by its bye, and deleted."""
    async with outbox(db, "old") as box:
        box.put(event(0))
        await daemon.wait(lambda: daemon.acked.get("old") == 1)
        await daemon.stop()
        for i in range(1, 30):
            box.put(event(i))
        await daemon.wait(lambda: spools(db))
    await daemon.start()
    async with outbox(db, "new"):
        await daemon.wait(lambda: "old" in daemon.byes)
    assert numbers(daemon.committed["old"]) == list(range(30))
    adopted = [h for h in daemon.hellos if h.worker == "old"][-1]
    assert (adopted.adopted, adopted.pid, adopted.boot_id, adopted.mono_ns) == (True, 0, "b", 1)
    assert not spools(db)


async def test_a_living_worker_is_not_adopted(db: Path, daemon: FakeDaemon) -> None:
    """The lock of a living worker keeps its spool its own."""
    await daemon.stop()
    async with outbox(db, "one") as one:
        one.put(event(1))
        await daemon.wait(lambda: spools(db))
        assert list(orphans(spool_dir(db))) == []
        await daemon.start()
        async with outbox(db, "two"):
            await daemon.wait(lambda: daemon.acked.get("one") == 1)
    assert not any(h.adopted for h in daemon.hellos)


def written(db: Path, batches: int) -> Path:
    """The spool of a dead worker with `batches` batches of one event."""
    spool = Spool(make_private(spool_dir(db)) / "old.spool", hello("old"), LIMIT)
    for i in range(batches):
        spool.append(wire.Batch(worker="old", first_seq=i + 1, events=(event(i),), watermark_ns=i))
    spool.close()
    return spool.path


async def test_a_truncated_spool(db: Path, daemon: FakeDaemon) -> None:
    """Cut anywhere in its last frame, a spool gives all frames before it."""
    size = written(db, 5).stat().st_size
    written(db, 4)
    short = written(db, 4).stat().st_size
    for cut in range(short, size):
        path = written(db, 5)
        os.truncate(path, cut)
        (orphan,) = orphans(spool_dir(db))
        assert numbers([e for b in orphan.batches() for e in b.events]) == [0, 1, 2, 3]
        orphan.remove()
    path = written(db, 5)
    os.truncate(path, size - 3)
    async with outbox(db, "new"):
        await daemon.wait(lambda: daemon.byes == ["old"])
    assert numbers(daemon.committed["old"]) == [0, 1, 2, 3]


async def test_a_damaged_spool(db: Path, daemon: FakeDaemon) -> None:
    """Flipped bits end the reading where they are; a file without a readable beginning is kept aside, not retried."""
    path = written(db, 5)
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    async with outbox(db, "new"):
        await daemon.wait(lambda: daemon.byes == ["old"])
        assert numbers(daemon.committed["old"]) == [0, 1, 2, 3]
    written(db, 2).write_bytes(b"\xff" * 100)
    async with outbox(db, "newer"):
        await daemon.wait(lambda: [p.name for p in spools(db)] == ["old.damaged"])


async def test_the_spool_is_bounded(db: Path) -> None:
    """Beyond its limit and memory's, events are dropped and counted; those kept are the oldest, without gaps."""
    async with outbox(db, limit=2000, memory=10) as box:
        for i in range(200):
            box.put(event(i))
            await asyncio.sleep(0.015)
        assert box.counts.dropped > 0
        assert box.counts.dropped + box._last_seq == 200
    assert spools(db)[0].stat().st_size <= 2000


def test_a_disk_that_refuses(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails half way leaves the spool as it was, and later writes are read back."""
    spool = Spool(make_private(spool_dir(db)) / "old.spool", hello("old"), LIMIT)
    batch = wire.Batch(worker="old", first_seq=1, events=(event(0),), watermark_ns=1)
    spool.append(batch)
    size = spool.path.stat().st_size
    real = os.pwrite

    def full(fd: int, data: memoryview, offset: int) -> int:
        if offset == size:
            return real(fd, data[:5], offset)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            spool.append(msgspec.structs.replace(batch, first_seq=2))
    assert spool.path.stat().st_size == size
    spool.append(msgspec.structs.replace(batch, first_seq=2))
    spool.close()
    (orphan,) = orphans(spool_dir(db))
    assert [b.first_seq for b in orphan.batches()] == [1, 2]
    orphan.release()


def test_the_limit_is_exact(db: Path) -> None:
    """A batch that would pass the limit is refused, and the file stays below it."""
    spool = Spool(make_private(spool_dir(db)) / "old.spool", hello("old"), 300)
    batches = [wire.Batch(worker="old", first_seq=i + 1, events=(event(i),), watermark_ns=1) for i in range(2)]
    spool.append(batches[0])
    assert spool.path.stat().st_size > 200
    with pytest.raises(SpoolFullError):
        spool.append(batches[1])
    assert spool.path.stat().st_size <= 300
    spool.close()


async def test_farewell_with_and_without_a_daemon(db: Path, daemon: FakeDaemon) -> None:
    """At the end everything is delivered and bye is said; without a daemon everything is left in the spool."""
    async with outbox(db, "one") as one:
        one.put(event(1))
        await one.farewell()
    assert (daemon.acked["one"], daemon.byes, spools(db)) == (1, ["one"], [])
    await daemon.stop()
    async with outbox(db, "two") as two:
        two.put(event(2))
        await two.farewell()
    await daemon.start()
    async with outbox(db, "three"):
        await daemon.wait(lambda: "two" in daemon.byes)
    assert numbers(daemon.events) == [1, 2]


def test_batches_are_joined_and_cut() -> None:
    """Small batches become large ones with the last watermark; what is committed is cut off the front."""
    small = [wire.Batch(worker="w", first_seq=i, events=(event(i),), watermark_ns=i) for i in range(1, 8)]
    large = list(joined(small, 3))
    assert [(b.first_seq, len(b.events), b.watermark_ns) for b in large] == [(1, 3, 3), (4, 3, 6), (7, 1, 7)]
    assert list(joined([small[0], small[2]], 3)) == [small[0], small[2]]
    assert after(large[0], 0) == large[0]
    rest = after(large[0], 2)
    assert rest is not None
    assert (rest.first_seq, numbers(list(rest.events))) == (3, [3])
    assert after(large[0], 3) is None
