"""Attribution: laws that hold for any window, and worked examples with the arithmetic beside them.

Examples draw power in W over time in ms; the floor is 100 W unless said, so 1 W for 1 ms is 1 mJ = 1,000 µJ.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from energyd.daemon.attribution import POLICIES, Overlap, Policy, policy
from energyd.daemon.attribution.accounts import LEAD_NS, TAIL_NS, divide, overlaps
from energyd.daemon.attribution.floor import IdleFloor
from energyd.daemon.attribution.time import TimeShare
from energyd.daemon.attribution.tokens import TokenShare, _tokens_within
from energyd.daemon.records import Charge, Service, Settlement, Slice, Source, Unattributed, Window, WindowKind

MS = 1_000_000
J = 1_000_000
T0 = 1_795_463_583_000_000_000
"""An instant of 2026: differences must not drown in the digits of unix ns."""
LAW = settings(deadline=None, derandomize=True, max_examples=150)
"""No timing decides, and the same code passes or fails every time."""


def window(*runs: tuple[int, float], step_ms: int = 20, kind: WindowKind = WindowKind.METERED) -> Window:
    """A window from T0 on, of runs (ms, W), cut into slices of `step_ms`; only a metered one keeps them."""
    slices, at_ns = [], T0
    for ms, power_w in runs:
        for piece in range(0, ms, step_ms):
            length = min(step_ms, ms - piece)
            slices.append(Slice(at_ns, at_ns + length * MS, round(length * power_w * 1000)))
            at_ns += length * MS
    return from_slices(slices, kind)


def from_slices(slices: Sequence[Slice], kind: WindowKind = WindowKind.METERED) -> Window:
    """The window that these slices make up."""
    energy = sum(s.energy_uj for s in slices)
    return Window(
        gpu="gpu",
        epoch=0,
        seq=0,
        start_ns=slices[0].start_ns,
        end_ns=slices[-1].end_ns,
        counter_start_mj=0,
        counter_end_mj=-(-energy // 1000),
        energy_uj=None if kind is WindowKind.GAP else energy,
        u_uj=0,
        kind=kind,
        source=Source.RECORDING,
        slices=tuple(slices) if kind is WindowKind.METERED else (),
    )


def query(
    name: str,
    from_ms: float,
    to_ms: float,
    *,
    chunks: Sequence[float] = (),
    prompt: int | None = None,
    completion: int | None = None,
) -> Service:
    """A query in flight from `from_ms` to `to_ms` after T0."""

    def at(ms: float) -> int:
        return T0 + round(ms * MS)

    return Service(name, "m", at(from_ms), at(to_ms), tuple(at(c) for c in chunks), prompt, completion)


def settled(
    w: Window, *services: Service, by: Policy | None = None, floor_w: float | None = 100, rival: Policy | None = None
) -> Settlement:
    """The window divided with a floor that stands fixed."""
    floor = IdleFloor(None if floor_w is None else round(floor_w * 1000))
    return divide(w, services, floor, by or TimeShare(), rival)


def active(s: Settlement) -> dict[str, int]:
    """Active µJ by query."""
    return {c.query_id: c.active_uj for c in s.charges}


def standing(s: Settlement) -> dict[str, int]:
    """Standing µJ by query."""
    return {c.query_id: c.standing_uj for c in s.charges}


# -- worked examples --------------------------------------------------------------------------------------------------


def test_a_query_alone_gets_the_whole_gpu() -> None:
    """One query over the whole window: 200 W above the floor are active, the floor is standing, nothing is idle."""
    # ms  0 .............. 1000
    # A   ================         300 W
    s = settled(window((1000, 300)), query("A", -500, 1500))
    assert s.charges == (Charge("A", active_uj=200 * J, standing_uj=100 * J),)
    assert (s.idle_uj, dict(s.unattributed_uj), s.residual_uj) == (0, {}, 0)


def test_time_shares_slice_by_slice() -> None:
    """Where two are in flight they halve the active energy; the one before had its slices alone."""
    # ms   0 ....... 500 ....... 1000
    # A    =====================        first half 300 W, second half 500 W
    # B              ===========
    # active J:  100 A       200 halved       A 200, B 100
    # standing:  100 J by time in flight 2:1
    s = settled(window((500, 300), (500, 500)), query("A", 0, 1000), query("B", 500, 1000))
    assert active(s) == {"A": 200 * J, "B": 100 * J}
    assert standing(s) == {"A": 66_666_667, "B": 33_333_333}


def test_overlapping_flights_are_covered_once() -> None:
    """Two queries that overlap for a fifth of the window stand for the whole floor together, not for 1.2 of it."""
    # ms   0 ... 400 .. 600 ... 1000
    # A    ==============
    # B            ================
    s = settled(window((1000, 300)), query("A", 0, 600), query("B", 400, 1000))
    assert standing(s) == {"A": 50 * J, "B": 50 * J}
    assert s.idle_uj == 0


def test_a_slice_below_the_floor_lowers_nobodys_share() -> None:
    """A was alone while the GPU dipped below the floor and shared what came after: the dip is no credit to it."""
    # ms   0 ....... 500 ....... 1000
    # A    =====================        80 W, then 300 W: -10 J and 100 J above the floor, 90 J in all
    # B              ===========        weights 50 : 50
    s = settled(window((500, 80), (500, 300)), query("A", 0, 1000), query("B", 500, 1000))
    assert active(s) == {"A": 45 * J, "B": 45 * J}


def test_a_chunk_on_the_border_belongs_to_the_window_it_begins() -> None:
    """A chunk at the end of a window counts in the next one, a first chunk at once brings its whole prompt with it."""
    w = window((1000, 300))
    a = query("A", 0, 1500, chunks=[0, 1000], prompt=8, completion=4)  # 8 + 2 within
    b = query("B", 0, 1000, chunks=[500], prompt=0, completion=30)
    assert active(settled(w, a, b, by=TokenShare())) == {"A": 50 * J, "B": 150 * J}


def test_a_last_token_does_not_bill_who_has_left() -> None:
    """A's last chunk and its end lie on the border: the window after it, in which B is served, is B's."""
    a = query("A", -500, 0, chunks=[-200, 0], prompt=8, completion=2)
    b = query("B", 0, 1000, prompt=5, completion=5)
    assert active(settled(window((1000, 300)), a, b, by=TokenShare())) == {"A": 0, "B": 200 * J}


def test_token_shares() -> None:
    """Tokens within the window share its active energy, one chunk or token as good as another."""
    # A: 10 prompt tokens until its first chunk at 200 ms, then 30 completion tokens in 3 chunks  -> 40 in the window
    # B: 20 prompt tokens, half of them before the window                                         -> 10 in the window
    a = query("A", 0, 800, chunks=[200, 400, 600], prompt=10, completion=30)
    b = query("B", -500, 1500, chunks=[500, 1200], prompt=20, completion=0)
    assert active(settled(window((1000, 300)), a, b, by=TokenShare())) == {"A": 160 * J, "B": 40 * J}


def test_tokens_of_a_query_that_does_not_stream_are_spread_over_its_flight() -> None:
    """60 tokens over 2 s, of which the window sees half: 30, beside 10 chunks of unknown token count."""
    a = query("A", 0, 2000, prompt=20, completion=40)
    b = query("B", 0, 1000, chunks=[50 + 100 * i for i in range(10)])
    assert active(settled(window((1000, 300)), a, b, by=TokenShare())) == {"A": 150 * J, "B": 50 * J}


def test_unknown_tokens_fall_back_to_time() -> None:
    """When nobody's tokens are known the tokens policy shares by time."""
    a, b = query("A", 0, 1000), query("B", 500, 1000)
    w = window((500, 300), (500, 500))
    assert active(settled(w, a, b, by=TokenShare())) == active(settled(w, a, b, by=TimeShare()))


def test_foreign_load_is_not_billed_to_a_short_query() -> None:
    """A job beside a query: what was drawn where no query was near is unattributed(unknown)."""
    # ms   0 .. 100 .. 200 .... 400 ............ 1000
    # A    ====
    # W     300    100     100        400 (foreign: 300 W above the floor for 600 ms = 180 J)
    s = settled(window((100, 300), (300, 100), (600, 400)), query("A", 0, 100))
    assert active(s) == {"A": 20 * J}
    assert standing(s) == {"A": 10 * J}
    assert dict(s.unattributed_uj) == {Unattributed.UNKNOWN: 180 * J}
    assert s.idle_uj == 90 * J


def test_foreign_load_without_any_query_is_unattributed() -> None:
    """Nobody asked anything and the GPU drew 250 W: 150 J are unattributed, the floor is idle."""
    s = settled(window((1000, 250)))
    assert (s.idle_uj, dict(s.unattributed_uj), s.charges) == (100 * J, {Unattributed.UNKNOWN: 150 * J}, ())


@pytest.mark.parametrize("services", [(), (query("A", -900, -300),)])
def test_noise_above_the_floor_stays_idle(services: tuple[Service, ...]) -> None:
    """Up to three standard deviations (6 W) above the floor are idle, with or without a query that ended long ago."""
    quiet, loud = settled(window((1000, 106)), *services), settled(window((1000, 106.5)), *services)
    assert (quiet.idle_uj, dict(quiet.unattributed_uj)) == (106 * J, {})
    assert (loud.idle_uj, dict(loud.unattributed_uj)) == (100 * J, {Unattributed.UNKNOWN: 6_500_000})


def test_noise_beside_a_query_stays_idle() -> None:
    """4 W above the floor in slices far from the query are neither its own nor a stranger's."""
    s = settled(window((100, 300), (100, 100), (800, 104)), query("A", 0, 100))
    assert active(s) == {"A": 20 * J}
    assert (s.idle_uj, dict(s.unattributed_uj)) == (90 * J + 3_200_000, {})


def test_late_idle_charges_nobody() -> None:
    """Idle after a query's tail: the query is listed with 0 µJ, the window is idle."""
    s = settled(window((1000, 100)), query("A", -500, -200))
    assert s.charges == (Charge("A", 0, 0),)
    assert s.idle_uj == 100 * J


def test_the_tail_belongs_to_the_query_that_ended() -> None:
    """Power that decays for up to 100 ms after the end is still the query's work; idle watts are not its own any more."""
    # ms   -300 ... 0 .. 60 ......... 1000
    # A    ========
    # W               300     100            60 ms x 200 W = 12 J
    s = settled(window((60, 300), (940, 100)), query("A", -300, 0))
    assert s.charges == (Charge("A", active_uj=12 * J, standing_uj=0),)
    assert s.idle_uj == 100 * J


def test_the_tail_ends() -> None:
    """Beyond 100 ms after the end, what the GPU draws is no longer the query's."""
    s = settled(window((100, 300), (400, 300)), query("A", -300, 0))
    assert active(s) == {"A": 20 * J}
    assert dict(s.unattributed_uj) == {Unattributed.UNKNOWN: 80 * J}


def test_a_slice_begins_before_its_query() -> None:
    """One slot of jitter: a slice that ends just before the query came is the query's, one earlier is not."""
    # ms   0 .... 480  500 520 .... 1000
    # A                     ========       W 300 from 480 on: slices 480-500 (early), 500-520 (lead), 520- (A)
    s = settled(window((480, 100), (520, 300)), query("A", 520, 1000))
    assert active(s) == {"A": 100 * J}  # 20 + 480 ms
    assert s.idle_uj + sum(s.unattributed_uj.values()) == 52 * J + 4 * J


def test_a_tail_gives_way_to_a_query_in_flight() -> None:
    """While B is served, A's tail takes nothing of B's slices."""
    s = settled(window((1000, 300)), query("A", -300, 0), query("B", 0, 1000))
    assert active(s) == {"A": 0, "B": 200 * J}
    assert standing(s) == {"A": 0, "B": 100 * J}


def test_without_a_shape_the_query_takes_what_is_above_the_floor() -> None:
    """Counter alone (one slice a window): a query of 100 ms gets the window's active energy and a tenth of the floor."""
    s = settled(window((1000, 150), step_ms=1000), query("A", 300, 400))
    assert s.charges == (Charge("A", active_uj=50 * J, standing_uj=10 * J),)
    assert s.idle_uj == 90 * J


def test_a_query_of_no_length_is_charged_the_slice_it_fell_into() -> None:
    """Sent and answered in the same nanosecond: its slice and its tail are its own."""
    # ms   0 ... 400 420 ... 1000      A at 410; 300 W from 400 to 500
    s = settled(window((400, 100), (100, 300), (500, 100)), query("A", 410, 410))
    assert active(s) == {"A": 20 * J}
    assert standing(s) == {"A": 0}


def test_below_the_floor_nothing_is_active() -> None:
    """An H200 that fell to a deeper idle: all of it is standing or idle, never a negative active."""
    s = settled(window((1000, 80)), query("A", 0, 500))
    assert s.charges == (Charge("A", active_uj=0, standing_uj=40 * J),)
    assert s.idle_uj == 40 * J


def test_without_a_floor_nothing_is_standing_or_idle() -> None:
    """No idle level known: what queries are near to is active, the rest is unattributed; no watts are invented."""
    s = settled(window((500, 300), (500, 90)), query("A", 0, 380), floor_w=None)
    assert active(s) == {"A": 144 * J}  # 480 ms: until 380, and a tail of 100
    assert (s.idle_uj, dict(s.unattributed_uj)) == (0, {Unattributed.UNKNOWN: 51 * J})
    assert s.idle_floor_mw is None


def test_an_idle_hour_charges_nobody() -> None:
    """3,600 quiet seconds that scatter by 1 W, the floor learned from them: no charge, nothing unattributed."""
    floor = IdleFloor()
    for second in range(3600):
        w = window((1000, 120 + (second * 7) % 3), step_ms=1000)
        floor.see(w, ())
        s = divide(w, (), floor, TimeShare())
        assert (s.charges, dict(s.unattributed_uj), s.idle_uj) == ((), {}, w.energy_uj)


def test_the_rivals_difference_is_kept() -> None:
    """The spread of a query is what the other policy would have charged on top: it sums to 0 over the window."""
    # by time A and B halve 200 J; by tokens they are 1 : 3
    a, b = query("A", 0, 1000, completion=10), query("B", 0, 1000, completion=30)
    s = settled(window((1000, 300)), a, b, rival=TokenShare())
    assert {c.query_id: c.spread_uj for c in s.charges} == {"A": -50 * J, "B": 50 * J}
    assert {c.spread_uj for c in settled(window((1000, 300)), a, b).charges} == {0}


# -- windows without a shape ------------------------------------------------------------------------------------------


@dataclass
class Oracle(TimeShare):
    """A policy that predicts, as one with coefficients will."""

    predicted: list[int]
    name = "oracle"
    coefficients_version: int | None = 7

    def predict_uj(self, window: Window, services: Sequence[Service]) -> list[int] | None:
        return self.predicted


def test_an_outage_is_nobodys_without_a_prediction() -> None:
    """The daemon was away: `time` and `tokens` predict nothing, so all of it is unattributed(outage)."""
    w = window((60_000, 300), kind=WindowKind.OUTAGE)
    for by in (TimeShare(), TokenShare()):
        s = settled(w, query("A", 0, 60_000, prompt=5, completion=5), by=by)
        assert (s.charges, dict(s.unattributed_uj)) == ((), {Unattributed.OUTAGE: 18_000 * J})
        assert s.residual_uj == 0


def test_an_outage_is_charged_up_to_the_prediction() -> None:
    """Spooled queries get what is predicted, the rest stays unattributed; the version is named."""
    w = window((1000, 300), kind=WindowKind.OUTAGE)
    s = settled(w, query("A", 0, 500), query("B", 0, 500), by=Oracle([40 * J, 60 * J]))
    assert active(s) == {"A": 40 * J, "B": 60 * J}
    assert standing(s) == {"A": 0, "B": 0}
    assert dict(s.unattributed_uj) == {Unattributed.OUTAGE: 200 * J}
    assert s.coefficients_version == 7


def test_a_prediction_beyond_the_counter_is_cut_to_it() -> None:
    """600 J predicted where 300 J flowed: in proportion, nothing left, nothing invented."""
    w = window((1000, 300), kind=WindowKind.OUTAGE)
    s = settled(w, query("A", 0, 500), query("B", 0, 500), by=Oracle([200 * J, 400 * J]))
    assert active(s) == {"A": 100 * J, "B": 200 * J}
    assert dict(s.unattributed_uj) == {}


def test_the_first_value_after_a_reset_is_nobodys() -> None:
    """What flowed in a new epoch before we looked is unattributed(outage), whatever a policy would predict."""
    w = window((1000, 300), kind=WindowKind.RESET)
    s = settled(w, query("A", 0, 500), by=Oracle([40 * J]))
    assert (s.charges, dict(s.unattributed_uj)) == ((), {Unattributed.OUTAGE: 300 * J})


def test_a_gap_cannot_be_divided() -> None:
    """Unknown energy is never booked: a caller that tries is wrong."""
    with pytest.raises(ValueError, match="no energy"):
        settled(window((1000, 300), kind=WindowKind.GAP))


# -- policies ---------------------------------------------------------------------------------------------------------


def test_policies_are_found_by_name() -> None:
    """Each is stored under its own name and has no coefficients; an unknown name is a KeyError."""
    assert {name: policy(name).name for name in POLICIES} == {"time": "time", "tokens": "tokens"}
    assert {policy(name).coefficients_version for name in POLICIES} == {None}
    with pytest.raises(KeyError):
        policy("fair")


def test_learning_changes_nothing() -> None:
    """The two simple policies keep no state: a window after a thousand is divided as the first was."""
    w, a, b = window((1000, 300)), query("A", 0, 1000, completion=3), query("B", 0, 700, completion=9)
    for name in POLICIES:
        by = policy(name)
        before = settled(w, a, b, by=by)
        for _ in range(1000):
            by.learn(w, (a, b), 7)
        assert settled(w, a, b, by=by) == before


class Bent(TimeShare):
    """Policy `time` whose weights come out bent."""

    def __init__(self, bend: float, places: slice = slice(None)) -> None:
        self._bend = bend
        self._places = places

    def weights(
        self, window: Window, services: Sequence[Service], overlap: Overlap, active_uj: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        weights = super().weights(window, services, overlap, active_uj).copy()
        with np.errstate(invalid="ignore"):  # 0 x infinity is the point here
            weights[self._places] *= self._bend
        return weights


@pytest.mark.parametrize("broken", [math.nan, math.inf, 0.0, -1.0])
def test_unusable_weights_become_equal_parts_of_those_present(broken: float) -> None:
    """NaN, infinite, zero or negative weights throughout: equal parts of those in flight, nothing for who had left."""
    here, there, gone = query("A", 0, 1000), query("B", 0, 500), query("C", -400, -50)
    s = settled(window((1000, 300)), here, there, gone, by=Bent(broken))
    assert active(s) == {"A": 100 * J, "B": 100 * J, "C": 0}


def test_one_broken_weight_does_not_poison_the_others() -> None:
    """A NaN for one query: it gets nothing, the others share by their own weights."""
    a, b, c = (query(n, 0, 1000) for n in "ABC")
    assert active(settled(window((1000, 300)), a, b, c, by=Bent(math.nan, slice(0, 1)))) == {
        "A": 0, "B": 100 * J, "C": 100 * J,
    }  # fmt: skip


@LAW
@given(
    start=st.integers(0, 10**9),
    gaps=st.lists(st.integers(0, 10**8), max_size=20),
    end=st.integers(0, 10**8),
    cuts=st.lists(st.integers(-(10**8), 4 * 10**9), max_size=8),
    prompt=st.integers(0, 10_000),
    completion=st.integers(0, 10_000),
)
def test_every_token_falls_into_one_window(
    start: int, gaps: list[int], end: int, cuts: list[int], prompt: int, completion: int
) -> None:
    """However a query's time is cut into windows, its tokens over them sum to its tokens."""
    chunks = [start + sum(gaps[: i + 1]) for i in range(len(gaps))]
    s = Service("q", "m", start, (chunks or [start])[-1] + end, tuple(chunks), prompt, completion)
    edges = sorted({-(10**9), *cuts, 10**10})
    within = sum(_tokens_within(s, a, b) for a, b in pairwise(edges))
    assert within == pytest.approx(prompt + completion, rel=1e-9)


# -- laws -------------------------------------------------------------------------------------------------------------

ENERGIES = st.one_of(st.integers(0, 20 * J), st.integers(0, 2**62 // 12))
SLICES = st.lists(st.tuples(st.integers(1, 60 * MS), ENERGIES), min_size=1, max_size=12)
TOKENS = st.none() | st.integers(0, 5_000)
FLOORS = st.none() | st.integers(0, 500)
QUERIES = st.lists(
    st.tuples(
        st.integers(-300, 800),
        st.one_of(st.just(0), st.integers(0, 900)),
        st.lists(st.floats(0, 1), max_size=6),
        TOKENS,
        TOKENS,
    ),
    max_size=7,
)
NAMES = st.sampled_from(sorted(POLICIES))


def made_window(drawn: list[tuple[int, int]]) -> Window:
    """A metered window from T0 on of the drawn (ns, µJ)."""
    slices, at_ns = [], T0
    for length_ns, energy in drawn:
        slices.append(Slice(at_ns, at_ns + length_ns, energy))
        at_ns += length_ns
    return from_slices(slices)


def made_queries(drawn: list[tuple[int, int, list[float], int | None, int | None]]) -> list[Service]:
    """Queries of the drawn (start ms, length ms, places of chunks, tokens), ids not in order of place."""
    return [
        query(f"{(5 * i + 3) % 11:02d}", start, start + length, chunks=sorted(start + length * c for c in chunks),
              prompt=prompt, completion=completion)
        for i, (start, length, chunks, prompt, completion) in enumerate(drawn)
    ]  # fmt: skip


def by_query(s: Settlement) -> dict[str, tuple[int, int, int]]:
    """Charges by query."""
    return {c.query_id: (c.active_uj, c.standing_uj, c.spread_uj) for c in s.charges}


@LAW
@given(SLICES, QUERIES, NAMES, FLOORS)
def test_every_microjoule_is_on_one_account(
    slices: list[tuple[int, int]], queries: list[tuple[int, int, list[float], int | None, int | None]],
    name: str, floor_w: int | None,
) -> None:  # fmt: skip
    """Any window to 2^62 µJ, any queries, any floor: the accounts sum to the window, and none is below 0."""
    w = made_window(slices)
    s = settled(w, *made_queries(queries), by=policy(name), rival=policy("time"), floor_w=floor_w)
    parts = [x for c in s.charges for x in (c.active_uj, c.standing_uj)]
    parts += [s.idle_uj, *s.unattributed_uj.values()]
    assert sum(parts) == w.energy_uj
    assert min(parts) >= 0
    assert sum(c.spread_uj for c in s.charges) == 0
    assert [c.query_id for c in s.charges] == [q.query_id for q in made_queries(queries)]


@LAW
@given(SLICES, QUERIES, FLOORS)
def test_policies_differ_in_shares_only(
    slices: list[tuple[int, int]], queries: list[tuple[int, int, list[float], int | None, int | None]],
    floor_w: int | None,
) -> None:  # fmt: skip
    """Active, standing, idle and unattributed of a window are the same whatever the policy; so is each standing part."""
    w, qs = made_window(slices), made_queries(queries)
    one, other = (settled(w, *qs, by=policy(name), floor_w=floor_w) for name in ("time", "tokens"))
    assert (one.active_uj, one.idle_uj, one.unattributed_uj) == (other.active_uj, other.idle_uj, other.unattributed_uj)
    assert standing(one) == standing(other)


@LAW
@given(SLICES, QUERIES, NAMES, FLOORS, st.data())
def test_the_order_of_queries_does_not_matter(
    slices: list[tuple[int, int]], queries: list[tuple[int, int, list[float], int | None, int | None]],
    name: str, floor_w: int | None, data: st.DataObject,
) -> None:  # fmt: skip
    """The same queries told in another order get the same charges, to the microjoule where sums are exact."""
    w, qs = made_window(slices), made_queries(queries)
    shuffled = data.draw(st.permutations(qs))
    one = by_query(settled(w, *qs, by=policy(name), floor_w=floor_w))
    other = by_query(settled(w, *shuffled, by=policy(name), floor_w=floor_w))
    tolerance = max(1, (w.energy_uj or 0) >> 36)  # sums of floats in another order differ in their last bits
    assert one.keys() == other.keys()
    assert all(abs(a - b) <= tolerance for q in one for a, b in zip(one[q], other[q], strict=True))


@LAW
@given(SLICES, QUERIES, NAMES, FLOORS)
def test_equal_queries_get_equal_parts(
    slices: list[tuple[int, int]], queries: list[tuple[int, int, list[float], int | None, int | None]],
    name: str, floor_w: int | None,
) -> None:  # fmt: skip
    """Symmetry: a query and its twin differ by 1 µJ at most."""
    w, qs = made_window(slices), made_queries(queries)
    twins = [replace(q, query_id=f"twin of {q.query_id}") for q in qs]
    s = settled(w, *qs, *twins, by=policy(name), floor_w=floor_w)
    own = by_query(s)
    for q in qs:
        for a, b in zip(own[q.query_id][:2], own[f"twin of {q.query_id}"][:2], strict=True):
            assert abs(a - b) <= 1


@LAW
@given(SLICES, QUERIES, NAMES, FLOORS)
def test_who_was_not_there_pays_nothing(
    slices: list[tuple[int, int]], queries: list[tuple[int, int, list[float], int | None, int | None]],
    name: str, floor_w: int | None,
) -> None:  # fmt: skip
    """A query that ended more than a tail before the window, or came more than a lead after it, gets 0 and changes nothing."""
    w, qs = made_window(slices), made_queries(queries)
    past = Service("past", "m", T0 - 10**10, T0 - TAIL_NS, (), 500, 500)
    future = Service("future", "m", w.end_ns + LEAD_NS, w.end_ns + 10**10, (w.end_ns + 10**9,), 500, 500)
    without = settled(w, *qs, by=policy(name), floor_w=floor_w)
    among = settled(w, *qs, past, future, by=policy(name), floor_w=floor_w)
    charges = by_query(among)
    assert charges.pop("past") == charges.pop("future") == (0, 0, 0)
    if qs:
        assert charges == by_query(without)
        assert (among.idle_uj, among.unattributed_uj) == (without.idle_uj, without.unattributed_uj)


@LAW
@given(SLICES, QUERIES, NAMES, FLOORS, st.integers(-(10**18), 10**18))
def test_shifting_all_clocks_changes_nothing(
    slices: list[tuple[int, int]], queries: list[tuple[int, int, list[float], int | None, int | None]],
    name: str, floor_w: int | None, shift_ns: int,
) -> None:  # fmt: skip
    """Only differences of times count."""
    w, qs = made_window(slices), made_queries(queries)
    moved = from_slices([replace(s, start_ns=s.start_ns + shift_ns, end_ns=s.end_ns + shift_ns) for s in w.slices])
    services = [
        replace(q, start_ns=q.start_ns + shift_ns, end_ns=q.end_ns + shift_ns,
                chunks_ns=tuple(c + shift_ns for c in q.chunks_ns))
        for q in qs
    ]  # fmt: skip
    assert by_query(settled(w, *qs, by=policy(name), floor_w=floor_w)) == by_query(
        settled(moved, *services, by=policy(name), floor_w=floor_w)
    )


@LAW
@given(SLICES, QUERIES, FLOORS, st.integers(-40, 40))
def test_the_unit_of_weights_does_not_matter(
    slices: list[tuple[int, int]], queries: list[tuple[int, int, list[float], int | None, int | None]],
    floor_w: int | None, power: int,
) -> None:  # fmt: skip
    """All weights times a power of two (exact in floats): the same charges."""
    w, qs = made_window(slices), made_queries(queries)
    plain = settled(w, *qs, floor_w=floor_w)
    assert plain == settled(w, *qs, by=Bent(2.0**power), floor_w=floor_w)


@LAW
@given(SLICES, QUERIES, FLOORS, st.integers(1, 500), st.booleans())
def test_one_more_token_never_lowers_ones_own_part(
    slices: list[tuple[int, int]], queries: list[tuple[int, int, list[float], int | None, int | None]],
    floor_w: int | None, more: int, of_prompt: bool,
) -> None:  # fmt: skip
    """Policy `tokens`: with known counts all round, a query's active part does not fall when its own count grows."""
    w = made_window(slices)
    qs = [replace(q, prompt_tokens=q.prompt_tokens or 1, completion_tokens=q.completion_tokens or 1)
          for q in made_queries(queries)]  # fmt: skip
    if not qs:
        return
    first = qs[0]
    grown = (
        replace(first, prompt_tokens=(first.prompt_tokens or 0) + more)
        if of_prompt
        else replace(first, completion_tokens=(first.completion_tokens or 0) + more)
    )
    before = active(settled(w, *qs, by=TokenShare(), floor_w=floor_w))[first.query_id]
    after = active(settled(w, grown, *qs[1:], by=TokenShare(), floor_w=floor_w))[first.query_id]
    assert after >= before - max(1, (w.energy_uj or 0) >> 38)


@LAW
@given(SLICES, QUERIES)
def test_overlaps_are_the_intersections(
    slices: list[tuple[int, int]], queries: list[tuple[int, int, list[float], int | None, int | None]]
) -> None:
    """Where anyone is in flight in a slice, each entry is the length of the intersection, counted in integers."""
    w, qs = made_window(slices), made_queries(queries)
    if not qs:
        return
    found = overlaps(w, qs)
    for c, row in zip(w.slices, found.tolist(), strict=True):
        inner = [max(0, min(c.end_ns, max(q.end_ns, q.start_ns + 1)) - max(c.start_ns, q.start_ns)) for q in qs]
        outer = [
            max(0, min(c.end_ns, max(q.end_ns, q.start_ns + 1) + 100 * MS) - max(c.start_ns, q.start_ns - 20 * MS))
            for q in qs
        ]
        assert row == (inner if any(inner) else outer)
