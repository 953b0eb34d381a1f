"""The idle floor: a recent, low level of quiet power; never hidden work, never yesterday's."""

import statistics

from hypothesis import given, settings
from hypothesis import strategies as st

from energyd.daemon.attribution.floor import IdleFloor, quiet_slices
from energyd.daemon.records import Service, Slice, Source, Window, WindowKind

MS = 1_000_000
S = 1_000_000_000
LAW = settings(deadline=None, derandomize=True)
"""No timing decides, and the same code passes or fails every time."""


def second(start_s: float, *powers_w: float, length_ms: int = 1000) -> Window:
    """A metered window of slices of equal length at these powers."""
    each_ns = length_ms * MS // len(powers_w)
    start_ns = round(start_s * S)
    slices = tuple(
        Slice(start_ns + i * each_ns, start_ns + (i + 1) * each_ns, round(w * each_ns / 1000))
        for i, w in enumerate(powers_w)
    )
    energy = sum(s.energy_uj for s in slices)
    return Window(
        gpu="gpu",
        epoch=0,
        seq=0,
        start_ns=start_ns,
        end_ns=slices[-1].end_ns,
        counter_start_mj=0,
        counter_end_mj=-(-energy // 1000),
        energy_uj=energy,
        u_uj=0,
        kind=WindowKind.METERED,
        source=Source.RECORDING,
        slices=slices,
    )


def query(from_ms: int, to_ms: int) -> Service:
    """A query in flight."""
    return Service("q", "m", from_ms * MS, to_ms * MS)


def after(*powers_w: float, floor: IdleFloor | None = None) -> IdleFloor:
    """A floor that saw one quiet second at each of these powers."""
    seen = floor or IdleFloor()
    for i, power_w in enumerate(powers_w):
        seen.see(second(i, power_w), ())
    return seen


def test_nothing_is_known_before_a_quiet_stretch() -> None:
    """None without configuration, else the configured level, until something quiet was seen; then the measured one."""
    assert IdleFloor().mw is None
    assert IdleFloor(95_000).mw == 95_000
    assert after(120, floor=IdleFloor(95_000)).mw == 120_000


def test_the_floor_is_the_lowest_tenth() -> None:
    """Of 100, 101, … 120 W (21 quiet seconds, in any order) a tenth lies at or below 102 W."""
    powers = [100 + (i * 8) % 21 for i in range(21)]
    assert sorted(powers) == list(range(100, 121))
    assert after(*powers).mw == 102_000


def test_hidden_work_does_not_become_idle() -> None:
    """A job that no proxy saw drew 312 W in 80 % of the quiet seconds: the floor stays at the true idle."""
    assert after(*[312, 312, 120, 312, 312] * 20).mw == 120_000


def test_only_slices_far_from_queries_are_quiet() -> None:
    """Slices from 300 ms after a query's end on, and until 300 ms before one begins, are quiet."""
    # ms   0    200   400   600   800   1000        A ends at 100, B begins at 1100
    # W     500   500   120   120   500             quiet: 400 to 800
    w = second(0, 500, 500, 120, 120, 500)
    near = (query(-500, 100), query(1100, 1500))
    assert [(c.start_ns // MS, c.end_ns // MS) for c in quiet_slices(w, near)] == [(400, 600), (600, 800)]
    floor = IdleFloor()
    floor.see(w, near)
    assert floor.mw == 120_000


def test_the_quiet_distance_is_300_ms_exactly() -> None:
    """A slice that begins 300 ms after the end is quiet, 1 ns earlier it is not."""
    w = second(1, 120)
    assert quiet_slices(w, (query(0, 700),)) == w.slices
    assert quiet_slices(w, (Service("q", "m", 0, 700 * MS + 1),)) == ()
    assert quiet_slices(w, (query(2300, 2500),)) == w.slices
    assert quiet_slices(w, (Service("q", "m", 2300 * MS - 1, 2500 * MS),)) == ()


def test_too_little_quiet_teaches_nothing() -> None:
    """180 ms of quiet are no level (they could be one deep dip), 200 ms are."""
    floor = IdleFloor()
    floor.see(second(0, 60, length_ms=180), ())
    assert floor.mw is None
    floor.see(second(1, 110, length_ms=200), ())
    assert floor.mw == 110_000


def test_the_floor_is_capped_by_the_lowest_since_the_processes_changed() -> None:
    """Deep idle at 81 W once: however high the quiet hour after it, the floor is 97.2 W at most."""
    floor = after(*[81] * 3, *[138] * 200)
    assert floor.mw == 97_200


def test_a_new_server_begins_a_new_level() -> None:
    """The set of processes changed: the old level stands in until the new one was seen, which no old cap holds down."""
    floor = after(*[81] * 20)
    floor.processes_changed()
    assert floor.mw == 81_000
    floor.see(second(100, 138), ())
    assert floor.mw == 138_000


def test_a_change_before_anything_was_seen_keeps_the_configured_level() -> None:
    """Processes change at the start as well: a configured level survives it, an unknown one stays unknown."""
    for prior in (None, 90_000):
        floor = IdleFloor(prior)
        floor.processes_changed()
        assert floor.mw == prior


def test_an_hour_later_the_old_level_is_forgotten() -> None:
    """Quiet seconds older than an hour no longer pull the quantile (the cap of 1.2 x 100 W still holds)."""
    floor = after(*[100] * 50)
    floor.see(second(3700, 115), ())
    assert floor.mw == 115_000
    floor.see(second(8000, 150), ())
    assert floor.mw == 120_000


def test_the_scatter_is_at_least_two_watts() -> None:
    """Before anything was seen, and for a level that stands still, one standard deviation counts as 2 W."""
    assert IdleFloor().sd_mw == 2_000
    assert after(*[120] * 50).sd_mw == 2_000


def test_the_scatter_is_that_of_the_middle_half() -> None:
    """Quiet power of a normal scatter of 10 W is found within a tenth, and a single burst of 700 W hardly moves it."""
    quantiles = [statistics.NormalDist(120, 10).inv_cdf((i + 0.5) / 200) for i in range(200)]
    assert 9_000 < after(*quantiles).sd_mw < 11_000
    assert 9_000 < after(*quantiles, 700).sd_mw < 11_000


@LAW
@given(st.lists(st.floats(40, 700), min_size=1, max_size=60))
def test_the_floor_lies_among_what_was_seen(powers_w: list[float]) -> None:
    """Never below the lowest quiet second nor above the median; of up to ten seconds it is the lowest."""
    floor_mw = after(*powers_w).mw
    assert floor_mw is not None
    assert floor_mw >= int(min(powers_w) * 1000) - 1
    assert floor_mw <= statistics.median(powers_w) * 1000 + 1
    if len(powers_w) <= 10:
        assert floor_mw <= min(powers_w) * 1000 + 1
