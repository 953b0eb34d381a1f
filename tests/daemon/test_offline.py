"""Booking the H200 recording: every request has an energy, every joule an account, for either policy."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energyd.daemon.ledger import Ledger
from energyd.daemon.ledger_intake import chunk_times
from energyd.daemon.offline import _deltas_us, default_db, rival_of, settle_trace
from energyd.daemon.records import Counter, Gpu, Samples, Source
from energyd.daemon.trace import Trace, TracedRequest, read_trace

RECORDING = Path(__file__).parents[1] / "data" / "h200_vllm_llama8b_eager.json.gz"
S = 1_000_000_000
LAW = settings(deadline=None, derandomize=True)
"""No timing decides, and the same code passes or fails every time."""


@dataclass(frozen=True)
class Booked:
    """The recording in the books under one policy."""

    ledger: Ledger
    queries: dict[str, dict[str, Any]]

    def accounts(self) -> dict[str, int]:
        """µJ by account, as the daily totals have them."""
        return {t.account: t.energy_uj for t in self.ledger.account_totals()}

    def serving_uj(self, query_id: str) -> int:
        """Active and standing µJ of a query."""
        q = self.queries[query_id]
        return int(q["active_energy_uj"] + q["standing_energy_uj"])


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    """The recording as it was written, read without our code."""
    found: dict[str, Any] = json.loads(gzip.decompress(RECORDING.read_bytes()))
    return found


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Booked]]:
    """The recording settled under both policies."""
    folder = tmp_path_factory.mktemp("offline")
    trace = read_trace(RECORDING)
    found = {}
    for policy in ("time", "tokens"):
        ledger = Ledger.open(folder / f"{policy}.db")
        settle_trace(trace, ledger, policy=policy)
        found[policy] = Booked(ledger, {q["query_id"]: q for q in ledger.export_queries()})
    yield found
    for booked in found.values():
        booked.ledger.close()


POLICY = pytest.mark.parametrize("policy", ["time", "tokens"])
Books = dict[str, Booked]


@POLICY
def test_ids_are_the_places_in_the_file(books: Books, raw: dict[str, Any], policy: str) -> None:
    """1,544 requests, not sorted by time: id 0000 to 1543 in the order of the file, times and counts as recorded."""
    queries = books[policy].queries
    assert sorted(queries) == [f"{i:04d}" for i in range(1544)]
    for i, request in enumerate(raw["requests"]):
        q = queries[f"{i:04d}"]
        assert (q["started_ns"], q["ended_ns"]) == (request["t0"], request["t1"])
        assert q["prompt_tokens"] == request["prompt_tokens"]
        assert q["completion_tokens"] == request["completion_tokens"]
        assert (q["model"], q["status"], q["http_status"], q["source"]) == ("default", "ok", 200, "recording")


@POLICY
def test_every_request_has_an_energy(books: Books, policy: str) -> None:
    """No NULL, nothing below 0, and each of them was served, so more than 0; a stated uncertainty beside each."""
    for q in books[policy].queries.values():
        assert q["active_energy_uj"] >= 0
        assert q["standing_energy_uj"] > 0
        assert q["rel_u"] >= 0.003
    assert books[policy].ledger.quality()["final"] == 1544


@POLICY
def test_the_accounts_sum_to_the_counter(books: Books, raw: dict[str, Any], policy: str) -> None:
    """75,098,717 − 12,917,671 mJ = 62,181,046,000 µJ: by account, by window and over the queries, residual 0."""
    counter_uj = (raw["anchors"][-1][2] - raw["anchors"][0][2]) * 1000
    assert counter_uj == 62_181_046_000
    booked = books[policy]
    accounts = booked.accounts()
    assert sum(accounts.values()) == counter_uj
    assert accounts["active"] + accounts["standing"] == sum(map(booked.serving_uj, booked.queries))
    header, residual = booked.ledger.db.execute(
        "SELECT SUM(energy_uj), SUM(ABS(energy_uj - active_uj - standing_uj - idle_uj - unattributed_uj)) FROM settlements"
    ).fetchone()
    assert (header, residual) == (counter_uj, 0)
    assert [m.unsettled_uj for m in booked.ledger.meter_totals()] == [0]


def test_policies_differ_in_shares_only(books: Books) -> None:
    """Each account holds the same under both; each query's standing too; only active moves between queries."""
    one, other = books["time"], books["tokens"]
    assert one.accounts() == other.accounts()
    assert {q: v["standing_energy_uj"] for q, v in one.queries.items()} == {
        q: v["standing_energy_uj"] for q, v in other.queries.items()
    }
    moved = sum(abs(v["active_energy_uj"] - other.queries[q]["active_energy_uj"]) for q, v in one.queries.items())
    assert moved > 0.1 * one.accounts()["active"]


def drawn_uj(raw: dict[str, Any], start_ns: int, end_ns: int) -> float:
    """What the raw samples integrate to over [start, end), each the mean of the slot before its stamp; µJ."""
    energy = 0.0
    for (before_us, _), (end_us, power_mw) in pairwise(raw["samples"]):
        inside_ns = min(end_us * 1000, end_ns) - max(before_us * 1000, start_ns)
        if inside_ns > 0:
            energy += power_mw * inside_ns / 1e6
    return energy


@pytest.mark.parametrize(("policy", "within"), [("time", 0.025), ("tokens", 0.15)])
def test_a_query_alone_gets_what_the_gpu_drew(books: Books, raw: dict[str, Any], policy: str, within: float) -> None:
    """Phase seqA, one request at a time: each within 2.5 % of the GPU's energy over its span, all ten within 1 %.

    By tokens it is 15 %: a window of a second that holds the end of one request and the start of the next is shared by
    their tokens in it, wherever in the window the energy flowed.
    """
    alone = [(f"{i:04d}", r) for i, r in enumerate(raw["requests"]) if r["phase"] == "seqA"]
    assert len(alone) == 10
    drawn = [drawn_uj(raw, r["t0"], r["t1"]) for _, r in alone]
    for (query_id, _), energy in zip(alone, drawn, strict=True):
        assert books[policy].serving_uj(query_id) == pytest.approx(energy, rel=within)
    assert sum(books[policy].serving_uj(q) for q, _ in alone) == pytest.approx(sum(drawn), rel=0.01)


@POLICY
@pytest.mark.parametrize("phase", ["A8", "A32", "A128", "B1", "B4", "B16", "mix", "mixns", "varied", "poisson"])
def test_a_busy_phase_goes_to_its_queries(books: Books, raw: dict[str, Any], policy: str, phase: str) -> None:
    """From the first request of a phase to its last answer (and the decay after it) its queries hold what was drawn."""
    own = [(f"{i:04d}", r) for i, r in enumerate(raw["requests"]) if r["phase"] == phase]
    start_ns, end_ns = min(r["t0"] for _, r in own), max(r["t1"] for _, r in own)
    booked = sum(books[policy].serving_uj(q) for q, _ in own)
    assert booked == pytest.approx(drawn_uj(raw, start_ns, end_ns), rel=0.03)


@POLICY
def test_little_is_unattributed(books: Books, policy: str) -> None:
    """Nothing else ran on this GPU: less than half a percent belongs to nobody, and idle is 80 to 140 W of idle time."""
    accounts = books[policy].accounts()
    assert sum(v for k, v in accounts.items() if k.startswith("unattributed")) < 0.005 * 62_181_046_000
    floors = (
        books[policy].ledger.db.execute("SELECT MIN(idle_floor_mw), MAX(idle_floor_mw) FROM settlements").fetchone()
    )
    assert 80_000 < floors[0] <= floors[1] < 140_000


def test_settling_is_repeatable(books: Books, tmp_path: Path) -> None:
    """The same trace into another ledger: the same figures in every column of every query."""
    with Ledger.open(tmp_path / "again.db") as ledger:
        settle_trace(read_trace(RECORDING), ledger, policy="time")
        assert {q["query_id"]: q for q in ledger.export_queries()} == books["time"].queries


# -- small traces -----------------------------------------------------------------------------------------------------


def anchors(*readings: tuple[float, int]) -> tuple[Counter, ...]:
    """Counter reads at (s, mJ); with the step of 100 ms the anchor lies 50 ms before."""
    return tuple(Counter(round(s * S), round(s * S), mj) for s, mj in readings)


def steady(seconds: int, power_w: int, from_mj: int = 0) -> tuple[Counter, ...]:
    """An anchor a second at constant power, the first at 1 s."""
    return anchors(*((1 + i, from_mj + i * power_w * 1000) for i in range(seconds + 1)))


def request(index: int, start_s: float, end_s: float, http_status: int | None = 200) -> TracedRequest:
    """A request that did not stream."""
    return TracedRequest(index, round(start_s * S), round(end_s * S), (), False, http_status, 10, 20)


def trace(*gpus: tuple[Counter, ...], requests: tuple[TracedRequest, ...] = ()) -> Trace:
    """A trace of GPUs without samples."""
    found = tuple(Gpu(f"recording-{i}", i, "GPU", "1", Source.RECORDING) for i in range(len(gpus)))
    return Trace({}, found, gpus, tuple(Samples((), ()) for _ in gpus), (), requests)


def settle(path: Path, what: Trace) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Queries and accounts of a small trace."""
    with Ledger.open(path / "small.db") as ledger:
        settle_trace(what, ledger, policy="time")
        accounts: dict[str, int] = {}
        for total in ledger.account_totals():
            accounts[total.account] = accounts.get(total.account, 0) + total.energy_uj
        return {q["query_id"]: q for q in ledger.export_queries()}, accounts


def test_a_trace_without_requests_is_idle(tmp_path: Path) -> None:
    """Ten seconds at 120 W and nobody asked: 1,200 J idle."""
    assert settle(tmp_path, trace(steady(10, 120))) == ({}, {"idle": 1_200_000_000})


def test_a_request_outside_the_metered_time_has_no_energy(tmp_path: Path) -> None:
    """Before the first anchor or after the last nothing was measured: NULL, not 0, and no other account grows."""
    outside = (request(0, 0.1, 0.4), request(1, 12.5, 13.0), request(2, 4.0, 5.0))
    queries, accounts = settle(tmp_path, trace(steady(10, 120), requests=outside))
    assert [queries[f"000{i}"]["active_energy_uj"] is None for i in range(3)] == [True, True, False]
    assert [queries[f"000{i}"]["source"] for i in range(3)] == [None, None, "recording"]
    assert sum(accounts.values()) == 1_200_000_000


def test_a_request_beyond_the_end_has_what_was_metered(tmp_path: Path) -> None:
    """The meter stopped half way through it: it holds the metered part, and the books still balance."""
    queries, accounts = settle(tmp_path, trace(steady(10, 300), requests=(request(0, 8.95, 30.0),)))
    assert queries["0000"]["active_energy_uj"] + queries["0000"]["standing_energy_uj"] == 600_000_000
    assert (queries["0000"]["source"], queries["0000"]["rel_u"] is None) == ("recording", False)
    assert sum(accounts.values()) == 3_000_000_000


def test_failed_requests_are_charged_too(tmp_path: Path) -> None:
    """A 500 used the GPU as well: it has an energy, and its status says that it failed."""
    requests = (request(0, 4, 5, 500), request(1, 6, 7, None))
    queries, _ = settle(tmp_path, trace(steady(10, 300), requests=requests))
    assert (queries["0000"]["status"], queries["0000"]["http_status"]) == ("failed", 500)
    assert queries["0000"]["active_energy_uj"] is not None
    assert (queries["0001"]["status"], queries["0001"]["http_status"]) == ("ok", None)


def test_a_reset_in_the_recording_is_booked_once(tmp_path: Path) -> None:
    """The counter fell to 40 J: 300 J before, 40 J of the new epoch unattributed, 200 J after it; the gap has none."""
    counters = anchors((1, 9_000_000), (2, 9_300_000), (3, 40_000), (4, 240_000))
    queries, accounts = settle(tmp_path, trace(counters, requests=(request(0, 0.9, 4.0),)))
    assert accounts["unattributed:outage"] == 40_000_000
    assert sum(accounts.values()) == 540_000_000
    assert queries["0000"]["active_energy_uj"] + queries["0000"]["standing_energy_uj"] == 500_000_000


def test_every_gpu_is_booked(tmp_path: Path) -> None:
    """Two GPUs under one server: a query holds its part of both, and each GPU balances by itself."""
    two = trace(steady(10, 300), steady(10, 100, from_mj=5_000), requests=(request(0, 0.9, 11.0),))
    queries, accounts = settle(tmp_path, two)
    assert queries["0000"]["active_energy_uj"] + queries["0000"]["standing_energy_uj"] == 4_000_000_000
    assert sum(accounts.values()) == 4_000_000_000


def test_ids_grow_with_the_file(tmp_path: Path) -> None:
    """Beyond 10,000 requests ids are as wide as the count needs, so they still sort in the order of the file."""
    many = tuple(replace(request(i, 2 + i / 10_000, 2.5 + i / 10_000), index=i) for i in range(10_001))
    queries, _ = settle(tmp_path, trace(steady(2, 100), requests=many[:3] + many[3:]))
    assert list(queries) == [f"{i:05d}" for i in range(10_001)]


def test_each_policy_has_the_other_as_rival() -> None:
    """The uncertainty of the split compares two different policies."""
    assert (rival_of("time"), rival_of("tokens")) == ("tokens", "time")


def test_the_default_ledger_lies_in_the_working_folder() -> None:
    """A trace's books never go beside the trace (it may be read-only) nor into the host's own ledger."""
    assert default_db(Path("/data/h200.json.gz")) == Path("h200.db")


@LAW
@given(st.integers(0, 2**61), st.lists(st.integers(0, 10**10), max_size=60))
def test_delta_coding_never_strays(start_ns: int, gaps: list[int]) -> None:
    """Chunk times come back within 1 µs, never late and still ascending, however many there are."""
    times = tuple(start_ns + sum(gaps[: i + 1]) for i in range(len(gaps)))
    back = chunk_times(start_ns, _deltas_us(start_ns, times))
    assert all(0 <= true - coded < 1_000 for true, coded in zip(times, back, strict=True))
    assert back == sorted(back)
