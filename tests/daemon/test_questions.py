"""Energy over a span: exact over whole windows, honest at its edges and about what nobody knows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energyd.daemon.ledger import Ledger
from energyd.daemon.offline import WORKER, settle_trace
from energyd.daemon.questions import energy_answer, known_throughout, span_energy_uj
from energyd.daemon.records import Counter, Gpu, Samples, Slice, Source, Window, WindowKind
from energyd.daemon.settlement import Books
from energyd.daemon.trace import Trace, TracedRequest, read_trace
from energyd.daemon.wire import Batch, EnergyAnswer, Hello, Open, RunEnd, RunStart, Sample, Server

RECORDING = Path(__file__).parents[1] / "data" / "h200_vllm_llama8b_eager.json.gz"
MS = 1_000_000
S = 1_000_000_000
J = 1_000_000
LAW = settings(deadline=None, derandomize=True)
"""No timing decides, and the same code passes or fails every time."""


def window(
    from_ms: int, to_ms: int, energy_j: float | None, *shape_j: float, kind: WindowKind = WindowKind.METERED, u_j: float = 0
) -> Window:  # fmt: skip
    """A window whose slices, of equal length, hold `shape_j` (none given: no shape is stored)."""
    each_ns = (to_ms - from_ms) * MS // max(1, len(shape_j))
    start_ns = from_ms * MS
    return Window(
        gpu="gpu",
        epoch=0,
        seq=0,
        start_ns=start_ns,
        end_ns=to_ms * MS,
        counter_start_mj=0,
        counter_end_mj=0,
        energy_uj=None if energy_j is None else round(energy_j * J),
        u_uj=round(u_j * J),
        kind=kind,
        source=Source.RECORDING,
        slices=tuple(
            Slice(start_ns + i * each_ns, start_ns + (i + 1) * each_ns, round(e * J)) for i, e in enumerate(shape_j)
        ),
    )


def test_whole_windows_are_exact_and_edges_go_by_shape() -> None:
    """From the middle of one window to the middle of another: their slices inside, halves of those cut."""
    # ms      0 ... 500 ... 1000 ... 1500 ... 2000 ... 2500 ... 3000
    # J         10     90       200              40      60
    #              |--- 750 ..................... 2250 ---|
    windows = [window(0, 1000, 100, 10, 90), window(1000, 2000, 200, 200), window(2000, 3000, 100, 40, 60)]
    energy, _ = span_energy_uj(windows, 750 * MS, 2250 * MS)
    assert energy == (45 + 200 + 20) * J
    assert span_energy_uj(windows, 0, 3000 * MS)[0] == 400 * J
    assert span_energy_uj(windows, 500 * MS, 500 * MS)[0] == 0


def test_the_uncertainty_is_that_of_the_edges() -> None:
    """The windows at either end add up in squares: 3 and 4 J give 5 J; those between add nothing."""
    windows = [
        window(0, 1000, 100, 50, 50, u_j=3),
        window(1000, 2000, 100, 50, 50, u_j=70),
        window(2000, 3000, 100, 50, 50, u_j=4),
    ]
    assert span_energy_uj(windows, 100 * MS, 2900 * MS)[1] == 5 * J
    assert span_energy_uj(windows, 0, 3000 * MS)[1] == 5 * J


def test_the_energy_of_an_outage_counts() -> None:
    """The daemon was restarted in mid-run: what the counter says of the time between is part of the run."""
    windows = [
        window(0, 1000, 300, 150, 150),
        window(1000, 9000, 2400, kind=WindowKind.OUTAGE),
        window(9000, 10_000, 300, 150, 150),
    ]
    assert span_energy_uj(windows, 0, 10_000 * MS) == (3000 * J, 0)
    assert known_throughout(windows, 0, 10_000 * MS)


def test_an_edge_within_an_outage_is_very_uncertain() -> None:
    """Where in the outage its energy flowed is unknown: its share by time, ± its energy/√12."""
    outage = window(0, 8000, 2400, kind=WindowKind.OUTAGE, u_j=10)
    energy, u_uj = span_energy_uj([outage, window(8000, 9000, 300, 150, 150)], 4000 * MS, 9000 * MS)
    assert energy == 1500 * J
    assert u_uj == pytest.approx(2400 * J / 12**0.5, rel=1e-6)


def test_an_edge_within_a_window_of_one_slice_is_very_uncertain() -> None:
    """Counter without samples: the same holds for a metered window that is cut, not for one that ends there."""
    windows = [window(0, 1000, 300, 300, u_j=10), window(1000, 2000, 300, 300, u_j=10)]
    assert span_energy_uj(windows, 500 * MS, 2000 * MS)[1] == pytest.approx(J * (300**2 / 12 + 10**2) ** 0.5, rel=1e-6)
    assert span_energy_uj(windows, 0, 2000 * MS)[1] == pytest.approx(J * 200**0.5, rel=1e-6)


def test_a_window_whose_shape_was_dropped_still_counts() -> None:
    """Retention keeps the energy and forgets the shape: whole windows stay exact, a cut one goes by time."""
    windows = [window(0, 1000, 100), window(1000, 2000, 300)]
    assert span_energy_uj(windows, 0, 2000 * MS)[0] == 400 * J
    assert span_energy_uj(windows, 500 * MS, 2000 * MS)[0] == 350 * J


@pytest.mark.parametrize("kind", [WindowKind.GAP, WindowKind.RESET])
def test_unknown_energy_makes_a_span_incomplete(kind: WindowKind) -> None:
    """A counter that restarted in the span: what is missing is unknown, so the figure is never called complete."""
    lost = window(1000, 2000, None if kind is WindowKind.GAP else 5, kind=kind)
    windows = [window(0, 1000, 300, 300), lost, window(2000, 3000, 300, 300)]
    assert not known_throughout(windows, 0, 3000 * MS)
    assert known_throughout(windows[:1], 0, 1000 * MS)
    assert span_energy_uj(windows, 0, 3000 * MS)[0] == 600 * J


def test_a_span_must_be_covered() -> None:
    """Windows that begin after it or end before its end do not answer for it; none at all do not either."""
    windows = [window(1000, 2000, 1, 1), window(2000, 3000, 1, 1)]
    assert known_throughout(windows, 1000 * MS, 3000 * MS)
    assert not known_throughout(windows, 1000 * MS - 1, 3000 * MS)
    assert not known_throughout(windows, 1000 * MS, 3000 * MS + 1)
    assert not known_throughout([], 0, 1)


SHAPES = st.lists(st.lists(st.integers(0, 10**6), max_size=6), min_size=1, max_size=5)


@LAW
@given(SHAPES, st.lists(st.integers(-100, 5100), min_size=3, max_size=3).map(sorted))
def test_spans_add_up(shapes: list[list[int]], cuts: list[int]) -> None:
    """[a, b) and [b, c) sum to [a, c) within the rounding of either, and no span is negative."""
    windows = [window(1000 * i, 1000 * (i + 1), sum(s), *s) for i, s in enumerate(shapes)]
    a, b, c = (cut * MS for cut in cuts)
    left, right, whole = (span_energy_uj(windows, *span)[0] for span in ((a, b), (b, c), (a, c)))
    assert min(left, right, whole) >= 0
    assert abs(left + right - whole) <= 2
    assert whole <= sum(map(sum, shapes)) * J


# -- the answer over the recorded H200 --------------------------------------------------------------------------------


class Booked:
    """The recording in the books, with what is needed to ask."""

    def __init__(self, ledger: Ledger, trace: Trace) -> None:
        self.ledger = ledger
        self.trace = trace
        self.books: Books = settle_trace(trace, ledger, policy="time")
        windows = ledger.windows_between("recording-0", 0, 2**62)
        self.span = windows[0].start_ns, windows[-1].end_ns

    def ask(self, start_ns: int, end_ns: int, run_id: str | None = None) -> EnergyAnswer:
        """The answer for a span."""
        return energy_answer(self.ledger, self.books, self.trace.gpus, start_ns, end_ns, run_id)


@pytest.fixture(scope="module")
def booked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booked]:
    """The settled recording."""
    with Ledger.open(tmp_path_factory.mktemp("questions") / "books.db") as ledger:
        yield Booked(ledger, read_trace(RECORDING))


def test_the_whole_recording_is_the_counter(booked: Booked) -> None:
    """From the first anchor to the last: 62,181,046,000 µJ, settled and complete, without queries as none were asked for."""
    answer = booked.ask(*booked.span)
    (gpu,) = answer.gpus
    assert (gpu.energy_uj, gpu.source, gpu.name) == (62_181_046_000, "recording", "NVIDIA H200")
    assert (answer.settled, answer.complete, answer.queries, answer.active_uj) == (True, True, None, None)
    assert 0 < gpu.u_uj < 30 * J


def test_the_answer_says_what_it_does_not_know(booked: Booked) -> None:
    """Past the last anchor the meter has not read; before the first there was none: incomplete, both."""
    start_ns, end_ns = booked.span
    assert not booked.ask(start_ns, end_ns + S).complete
    assert not booked.ask(start_ns, end_ns + S).settled
    assert not booked.ask(start_ns - S, end_ns).complete
    assert not booked.ask(start_ns - 10 * S, start_ns - 5 * S).complete


def test_a_second_of_idle_is_idle(booked: Booked) -> None:
    """Half a second to 1.5 s into the recording nothing ran: 110 to 130 J, near the idle floor then."""
    (gpu,) = booked.ask(booked.span[0] + S // 2, booked.span[0] + 3 * S // 2).gpus
    assert 110 * J < gpu.energy_uj < 130 * J


def test_a_run_sums_its_measured_queries(booked: Booked) -> None:
    """Phase seqA as a run: its ten measured samples join their queries; a warm-up and a lost id count apart."""
    ids = [(f"{r.index:04d}", r) for r in booked.trace.requests if r.phase == "seqA"]
    span = ids[0][1].start_ns, ids[-1][1].end_ns
    booked.ledger.start_run("recording", RunStart("run", "text_generation", "m", 1, "http://x", {}), span[0])
    samples = [Sample(i, q, "measured", r.start_ns, r.end_ns, True, 200) for i, (q, r) in enumerate(ids)]
    samples += [Sample(0, "0000", "warmup", 1, 2, True, 200), Sample(10, None, "measured", 1, 2, True, 200)]
    booked.ledger.add_samples("run", samples)
    booked.ledger.end_run(RunEnd("run", "complete", *span, {}))
    answer = booked.ask(*span, "run")
    exported: dict[str, dict[str, Any]] = {q["query_id"]: q for q in booked.ledger.export_queries()}
    assert answer.active_uj == sum(exported[q]["active_energy_uj"] for q, _ in ids)
    assert answer.standing_uj == sum(exported[q]["standing_energy_uj"] for q, _ in ids)
    assert answer.completion_tokens == sum(r.completion_tokens or 0 for _, r in ids)
    assert (answer.queries, answer.queries_with_energy, answer.settled, answer.complete) == (11, 10, True, True)
    serving_uj = (answer.active_uj or 0) + (answer.standing_uj or 0)
    assert serving_uj == pytest.approx(answer.gpus[0].energy_uj, rel=0.01)


def test_an_unknown_run_has_no_queries(booked: Booked) -> None:
    """A run that nobody reported samples for: the GPUs' energy, and no query."""
    answer = booked.ask(*booked.span, "nobody's")
    assert (answer.queries, answer.active_uj, len(answer.gpus)) == (0, None, 1)


def test_a_run_counts_the_gpus_of_its_server_and_waits_for_its_queries(tmp_path: Path) -> None:
    """Two GPUs, a server on the second: only that one is in the answer; a query still open keeps it provisional."""
    gpus = tuple(Gpu(f"recording-{i}", i, "GPU", "1", Source.RECORDING) for i in range(2))
    counters = tuple(tuple(Counter(i * S, i * S, i * (1 + g) * 100_000) for i in range(1, 12)) for g in range(2))
    none = Samples((), ())
    done = TracedRequest(0, 4 * S, 6 * S, (), False, 200, 1, 1)
    with Ledger.open(tmp_path / "two.db") as ledger:
        books = settle_trace(Trace({}, gpus, counters, (none, none), (), (done,)), ledger, policy="time")
        books.hello(Hello("w", "recording", 0, 0, 0, (Server(WORKER, "http://x", ("1",)),)), 12 * S)
        ledger.start_run("recording", RunStart("run", "text_generation", "m", 1, "http://x", {}), 2 * S)
        ledger.add_samples("run", [Sample(0, "0000", "measured", 4 * S, 6 * S, True, 200)])
        answer = energy_answer(ledger, books, gpus, 2 * S, 10 * S, "run")
        assert [(g.uuid, g.energy_uj) for g in answer.gpus] == [("recording-1", 1600 * J)]
        assert (answer.settled, answer.complete) == (True, True)
        books.take(Batch("w", 1, (Open("open", 7 * S, WORKER),), 8 * S), 12 * S)
        ledger.add_samples("run", [Sample(1, "open", "measured", 7 * S, 8 * S, True, 200)])
        again = energy_answer(ledger, books, gpus, 2 * S, 10 * S, "run")
        assert (again.settled, again.complete, again.queries_with_energy) == (False, True, 1)
