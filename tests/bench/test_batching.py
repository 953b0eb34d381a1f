"""Fixed batches, in theory and in flight."""

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from energyd.bench.batching import groups
from energyd.bench.load import INTERRUPTED, Row, replay


@given(st.integers(0, 300), st.integers(1, 40))
def test_groups_cover_everything_once_in_order(count: int, size: int) -> None:
    """Every index comes once, in order; all groups but the last are full."""
    found = [list(g) for g in groups(count, size)]
    assert [i for g in found for i in g] == list(range(count))
    assert all(len(g) == size for g in found[:-1])
    assert all(found)


def test_an_empty_batch_is_refused() -> None:
    """A size below one has no meaning."""
    with pytest.raises(ValueError, match="at least one"):
        list(groups(3, 0))


def row(idx: int, start_ns: int, *, error: str | None = None) -> Row:
    """A row that ends now."""
    end_ns = time.monotonic_ns()
    return Row(idx, "measured", start_ns, None, end_ns, error is None, 200, error, None, None, None, "absent", None)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 9))
def test_groups_never_overlap(steps: list[int], size: int) -> None:
    """However long each sample takes, no sample of a group starts before all of the group before have ended."""

    async def send_one(idx: int) -> Row:
        start_ns = time.monotonic_ns()
        for _ in range(steps[idx]):
            await asyncio.sleep(0)
        return row(idx, start_ns)

    rows = asyncio.run(replay(len(steps), size, send_one, lambda _: None, asyncio.Event()))
    assert [r.idx for r in rows] == list(range(len(steps)))
    for first in range(size, len(rows), size):
        before, after = rows[first - size : first], rows[first : first + size]
        assert max(r.end_ns for r in before) <= min(r.start_ns for r in after)


async def test_stopping_ends_the_group_in_flight_and_begins_no_other() -> None:
    """Requests in flight become rows that say interrupted; later samples are not sent."""
    stop = asyncio.Event()
    told: list[int] = []

    async def send_one(idx: int) -> Row:
        start_ns = time.monotonic_ns()
        if idx == 3:
            stop.set()
        try:
            await asyncio.sleep(0 if idx < 2 else 60)
        except asyncio.CancelledError:
            return row(idx, start_ns, error=INTERRUPTED)
        return row(idx, start_ns)

    rows = await replay(8, 2, send_one, lambda some: told.extend(r.idx for r in some), stop)
    assert [(r.idx, r.error) for r in rows] == [(0, None), (1, None), (2, INTERRUPTED), (3, INTERRUPTED)]
    assert told == [0, 1, 2, 3]
