"""Events on disk while the daemon is away: one file per worker, private, locked, complete frame by frame.

::

    file  = frame*            the first frame is the worker's Hello, each further one a wire.Batch
    frame = length u32 le, CRC-32 of the payload u32 le, payload (msgpack)

A plain write is enough: it survives a kill -9 of the proxy, not a power cut. A last frame that was cut off is ignored;
it can only hold what was being written when the writer died. The writer holds an exclusive lock as long as it lives, so
a file whose lock is free belongs to a dead worker, and whoever takes the lock delivers it.

Format history: 1 (0.1.0), the version of the Hello.
"""

import fcntl
import os
import struct
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from energyd.daemon import wire

_T = TypeVar("_T")
_HEAD: Final = struct.Struct("<II")
_MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
"""A length beyond this is damage, not data: reading it would take all memory."""


@dataclass(frozen=True, slots=True)
class _Frame:
    offset: int
    """Of the payload in the file."""
    size: int
    first_seq: int
    last_seq: int


class SpoolFullError(Exception):
    """The spool has reached its limit; the caller keeps or drops the events."""


class Spool:
    """The spool of a living worker. The file exists only while there is something undelivered in it."""

    def __init__(self, path: Path, hello: wire.Hello, limit_bytes: int) -> None:
        self.path = path
        self._hello = hello
        self._limit_bytes = limit_bytes
        self._fd: int | None = None
        self._end = 0
        self._frames: deque[_Frame] = deque()

    def __len__(self) -> int:
        """Undelivered frames."""
        return len(self._frames)

    def append(self, batch: wire.Batch) -> None:
        """Write a batch with at least one event; on return it survives the death of this process.

        Raises SpoolFullError beyond the limit and OSError if the disk refuses; the file is then as before.
        """
        payload = wire.encode(batch)
        if self._end + _HEAD.size + len(payload) > self._limit_bytes:
            raise SpoolFullError
        fd = self._fd if self._fd is not None else self._create()
        start = self._end
        self._end = _write_frame(fd, start, payload)
        last_seq = batch.first_seq + len(batch.events) - 1
        self._frames.append(_Frame(start + _HEAD.size, len(payload), batch.first_seq, last_seq))

    def first(self, max_events: int) -> wire.Batch | None:
        """The oldest undelivered batches joined into one of about `max_events` events; None if there is none.

        Raises OSError if the disk refuses and msgspec.DecodeError if the file was damaged behind our back.
        """
        if not self._frames or self._fd is None:
            return None
        oldest = self._frames[0].first_seq
        near = takewhile(lambda frame: frame.last_seq - oldest < max_events or frame.first_seq == oldest, self._frames)
        payloads = [os.pread(self._fd, frame.size, frame.offset) for frame in near]
        return next(joined((msgspec.msgpack.decode(p, type=wire.Batch) for p in payloads), max_events))

    def forget(self, acked_seq: int) -> None:
        """The daemon has committed everything up to `acked_seq`; an emptied file is removed."""
        while self._frames and self._frames[0].last_seq <= acked_seq:
            self._frames.popleft()
        if not self._frames and self._fd is not None:
            self.path.unlink(missing_ok=True)
            self.close()

    def close(self) -> None:
        """Release the lock; what is still in the file is for the next worker to adopt."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            self._end = 0

    def _create(self) -> int:
        # Born under another name: between creation and lock, a worker that looks for orphans would take it for one.
        young = self.path.with_suffix(".new")
        fd = os.open(young, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            end = _write_frame(fd, 0, wire.encode(self._hello))
            young.rename(self.path)
        except OSError:
            os.close(fd)
            young.unlink(missing_ok=True)
            raise
        self._fd, self._end = fd, end
        return fd


class Orphan:
    """The spool of a dead worker, locked by us. `hello` is None if nothing in it can be read."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        frames = self._payloads()
        self.hello = _decoded(next(frames, b""), wire.Hello)
        self._frames = frames

    def batches(self) -> Iterator[wire.Batch]:
        """Its batches in order, once; ends at the first frame that is cut off or damaged."""
        for payload in self._frames:
            batch = _decoded(payload, wire.Batch)
            if batch is None:
                return
            yield batch

    def remove(self) -> None:
        """Everything in it has been delivered: delete the file, then release the lock."""
        self.path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Leave it for a later attempt."""
        os.close(self._fd)

    def _payloads(self) -> Iterator[bytes]:
        offset = 0
        while len(head := os.pread(self._fd, _HEAD.size, offset)) == _HEAD.size:
            size, crc = _HEAD.unpack(head)
            if size > _MAX_FRAME_BYTES:
                return
            payload = os.pread(self._fd, size, offset + _HEAD.size)
            if len(payload) < size or zlib.crc32(payload) != crc:
                return
            yield payload
            offset += _HEAD.size + size


def orphans(folder: Path) -> Iterator[Orphan]:
    """The spools in `folder` whose writers are dead, each locked for us alone; the caller removes or releases them."""
    for path in sorted(folder.glob("*.spool")):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # another worker has just delivered it, or it is not ours to read
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.fstat(fd).st_ino == path.stat().st_ino
        except OSError:
            ours = False
        if ours:
            yield Orphan(path, fd)
        else:
            os.close(fd)


def joined(batches: Iterable[wire.Batch], max_events: int) -> Iterator[wire.Batch]:
    """The same events in fewer batches of about `max_events`: an hour of absence is thousands of small ones."""
    held: wire.Batch | None = None
    for batch in batches:
        if held is None:
            held = batch
        elif (
            held.first_seq + len(held.events) == batch.first_seq and len(held.events) + len(batch.events) <= max_events
        ):
            held = msgspec.structs.replace(batch, first_seq=held.first_seq, events=held.events + batch.events)
        else:
            yield held
            held = batch
    if held is not None:
        yield held


def after(batch: wire.Batch, acked_seq: int) -> wire.Batch | None:
    """The part of `batch` beyond `acked_seq`; None if nothing is left of it."""
    known = acked_seq - batch.first_seq + 1
    if known <= 0:
        return batch
    if known >= len(batch.events):
        return None
    return msgspec.structs.replace(batch, first_seq=acked_seq + 1, events=batch.events[known:])


def _write_frame(fd: int, offset: int, payload: bytes) -> int:
    """Write one frame at `offset`; returns where the next begins.

    On failure the file ends at `offset` again: garbage in the middle would hide every later frame from the reader.
    """
    frame = _HEAD.pack(len(payload), zlib.crc32(payload)) + payload
    view = memoryview(frame)
    try:
        while view:
            view = view[os.pwrite(fd, view, offset + len(frame) - len(view)) :]
    except OSError:
        os.ftruncate(fd, offset)
        raise
    return offset + len(frame)


def _decoded(payload: bytes, kind: type[_T]) -> _T | None:
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
