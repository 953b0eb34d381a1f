"""Ledger time: monotonic, one offset a boot, blind to steps of the wall clock."""

import time
from pathlib import Path

from energyd.daemon.clock import Clock, boot_id


def test_ledger_time_is_unix_time_at_its_start() -> None:
    """A fresh clock lies between two looks at the wall clock (which is not being stepped meanwhile)."""
    before = time.time_ns()
    clock = Clock.start()
    assert abs(clock.now_ns() - before) < 60_000_000_000
    assert abs(clock.wall_step_ns()) < 60_000_000_000


def test_ledger_time_never_runs_backwards() -> None:
    """Many looks in a row ascend."""
    clock = Clock.start()
    looks = [clock.now_ns() for _ in range(1000)]
    assert looks == sorted(looks)


def test_two_clocks_of_a_boot_with_one_offset_agree() -> None:
    """A process that is given the stored offset tells the same time: looks taken in turn ascend."""
    first = Clock.start()
    second = Clock(first.offset_ns)
    looks = [c.now_ns() for c in (first, second, first, second)]
    assert looks == sorted(looks)


def test_a_stored_offset_that_differs_is_seen_as_a_step() -> None:
    """With an offset one hour short the wall clock is an hour ahead of ledger time, which itself goes on."""
    hour_ns = 3600 * 10**9
    stale = Clock(Clock.start().offset_ns - hour_ns)
    assert abs(stale.wall_step_ns() - hour_ns) < 60_000_000_000


def test_the_boot_id_is_the_kernels(tmp_path: Path) -> None:
    """The id is the content of the kernel's file without its newline, the same at every look."""
    file = tmp_path / "boot_id"
    file.write_text("0f3c-boot\n")
    assert boot_id(file) == "0f3c-boot"
    assert boot_id(file) == boot_id(file)


def test_a_host_without_a_boot_id_still_gets_one(tmp_path: Path) -> None:
    """Where the kernel has no such file the id says so and is not empty."""
    assert boot_id(tmp_path / "missing").startswith("unknown-")
