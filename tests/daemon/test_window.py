"""The energy of a window: right within its error bar, on recorded work of an H200 and on a sensor made of formulas."""

import gzip
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from energyd.daemon.anchors import place
from energyd.daemon.cli import main
from energyd.daemon.errors import UsageError
from energyd.daemon.records import Counter, Samples
from energyd.daemon.trace import read_trace
from energyd.daemon.units import NS_PER_MS, NS_PER_S
from energyd.daemon.window import GAIN_REL_U, Recording, WindowEnergy, recording, window_energy
from tests.benchmarks.meter import errors, measured, plain_uj, rms, series, trend_free

DATA = Path(__file__).parent.parent / "data"
BURSTS, METROLOGY = DATA / "h200_bursts.json.gz", DATA / "h200_metrology.json.gz"
HELD_OUT = DATA / "h200_bursts_held_out.json.gz"
T0 = 1_800_000_000 * NS_PER_S
IDLE_W = 120.0


def made(
    power_w: Callable[[float], float], duration_s: float, *, offset_s: float = 0.030
) -> tuple[list[Counter], Samples]:
    """What an H200's sensor would have read of `power_w(s)`: 4 ms late, behind 12.5 ms, steps of 100 ms, jittered stamps.

    The counter is read once a second, `offset_s` after a step.
    """
    rng = np.random.default_rng(1)
    step_s = 0.001
    late = [power_w(i * step_s - 0.004) for i in range(round(duration_s / step_s))]
    seen_w, level = [], late[0]
    for power in late:
        level += (power - level) * (1 - math.exp(-step_s / 0.0125))
        seen_w.append(level)
    gained_j = np.concatenate([[0.0], np.cumsum(np.array(seen_w) * step_s)])
    stamps = [0.020 * k + float(rng.exponential(0.001)) for k in range(1, round(duration_s / 0.020) - 1)]
    samples = Samples(
        tuple(T0 + round(t * NS_PER_S) for t in stamps), tuple(round(1000 * seen_w[round(t / step_s)]) for t in stamps)
    )
    counters = []
    for second in range(round(duration_s)):
        at_ns = T0 + round((second + offset_s) * NS_PER_S)
        value_mj = round(1000 * gained_j[round(second / step_s)])
        counters.append(Counter(at_ns - NS_PER_MS, at_ns + NS_PER_MS, 5_000_000 + value_mj))
    return counters, samples


def pulse(start_s: float, end_s: float, high_w: float = 700.0) -> Callable[[float], float]:
    """Idle, and a burst every two seconds: the load must come and go for the counter's steps to be found."""
    return lambda t: high_w if start_s <= t % 2.0 < end_s else IDLE_W


def burst_energy(start_s: float, end_s: float, nth: int = 10) -> tuple[WindowEnergy, float]:
    """The figure for the nth burst of a made recording, and the true energy, J."""
    counters, samples = made(pulse(start_s, end_s), 40.0)
    at_s = 2.0 * nth
    energy = window_energy(recording(counters, samples), ns(at_s + start_s), ns(at_s + end_s))
    return energy, 700.0 * (end_s - start_s)


def ns(at_s: float) -> int:
    """Seconds of a made recording as unix ns."""
    return T0 + round(at_s * NS_PER_S)


@cache
def steady() -> Recording:
    """Idle for 10 s, 600 W for 20 s, idle for 10 s."""
    return recording(*made(lambda t: 600.0 if 10 <= t < 30 else IDLE_W, 40.0))


@pytest.mark.parametrize(
    ("path", "label", "limit", "trend_free_limit"),
    [
        (BURSTS, "iso28", 0.06, 0.06),
        (BURSTS, "iso118", 0.03, 0.013),
        (BURSTS, "iso494", 0.008, 0.004),
        (BURSTS, "iso2000", 0.002, 0.002),
        (BURSTS, "row28", 0.06, 0.025),
        (BURSTS, "row118", 0.03, 0.01),
        (BURSTS, "row494", 0.014, 0.004),
        (METROLOGY, "fixed160", 0.10, 0.10),
        (METROLOGY, "fixed640", 0.03, 0.02),
        (METROLOGY, "fixed2560", 0.008, 0.004),
    ],
)
def test_recorded_work_is_measured(path: Path, label: str, limit: float, trend_free_limit: float) -> None:
    """RMS error on an H200 with one counter reading a second, against the series' mean and less the trend in duration."""
    one = next(s for s in series(path) if s.label == label)
    bursts = one.bursts[:: -(-len(one.bursts) // 40)]
    off = errors([w.energy_uj for w in measured(path, bursts)], [one.truth_uj(b) for b in bursts])
    assert rms(off) <= limit
    assert rms(trend_free(off, [b - a for a, b, _ in bursts])) <= trend_free_limit


def test_stated_uncertainty_covers_the_truth() -> None:
    """Pooled over sizes the truth lies inside two standard deviations 95 times in 100, and none of them is far too wide."""
    inside, count = 0, 0
    for path in (BURSTS, METROLOGY):
        for one in (s for s in series(path) if s.label.startswith(("iso", "fixed", "row28"))):
            bursts = one.bursts[:: -(-len(one.bursts) // 40)]
            ours = measured(path, bursts)
            off = errors([w.energy_uj for w in ours], [one.truth_uj(b) for b in bursts])
            stated = np.array([w.rel_u for w in ours])
            assert np.median(stated) <= 2.5 * rms(off), one.label
            inside, count = inside + int((abs(off) <= 2 * stated).sum()), count + len(bursts)
    assert count >= 200
    assert inside / count >= 0.95


def test_a_recording_that_nothing_was_fitted_to() -> None:
    """Taken after every constant was set: errors stay small, no bias shows, and the stated uncertainty covers the truth.

    Pooled over all sizes, isolated, back to back and alternating.
    """
    inside, count = 0, 0
    limits = {"iso28": 0.06, "iso118": 0.03, "iso494": 0.01, "iso2000": 0.002, "row118": 0.035}
    for one in series(HELD_OUT):
        bursts = one.bursts[:: -(-len(one.bursts) // 40)]
        ours = measured(HELD_OUT, bursts)
        off = errors([w.energy_uj for w in ours], [one.truth_uj(b) for b in bursts])
        inside += int((abs(off) <= 2 * np.array([w.rel_u for w in ours])).sum())
        count += len(bursts)
        assert rms(off) <= limits.get(one.label, 1.0), one.label
        assert abs(off.mean()) <= 0.03, one.label
    assert count >= 200
    assert inside / count >= 0.95


def test_ten_times_better_than_the_plain_difference() -> None:
    """At 118 ms the plain difference of the counter, though read at each step, errs more than ten times as much."""
    one = next(s for s in series(METROLOGY) if s.label == "fixed640")
    truths = [one.truth_uj(b) for b in one.bursts]
    counters = read_trace(METROLOGY, thin_ns=0).anchors[0]
    plain = errors([plain_uj(counters, a, b) for a, b, _ in one.bursts], truths)
    ours = errors([w.energy_uj for w in measured(METROLOGY, one.bursts)], truths)
    assert rms(plain) > 10 * rms(ours)


def test_no_burst_reads_zero() -> None:
    """Bursts of 6 ms, which a counter difference reads as 0 J, all have an energy above idle."""
    one = next(s for s in series(BURSTS) if s.label == "iso7")
    assert all(w.net_uj > 0 for w in measured(BURSTS, one.bursts))


@pytest.mark.parametrize(("start_s", "end_s"), [(0.500, 0.530), (0.507, 0.625), (0.950, 1.100), (0.313, 0.813)])
def test_isolated_burst_of_a_known_sensor(start_s: float, end_s: float) -> None:
    """A made burst comes out within two standard deviations and 5 %, also when the counter was read in its middle."""
    energy, truth_j = burst_energy(start_s, end_s)
    assert energy.method == "isolated"
    assert abs(energy.energy_uj / 1e6 - truth_j) <= min(2 * energy.rel_u * energy.energy_uj / 1e6, 0.05 * truth_j)


def test_energy_is_floor_times_duration_and_net() -> None:
    """The figure is the idle level over the window and what was drawn above it, to a µJ of rounding."""
    energy, _ = burst_energy(0.5, 0.6)
    assert abs(energy.energy_uj - energy.net_uj - energy.floor_mw * 100) <= 100
    assert abs(energy.floor_mw - 120_000) < 500


def test_absolute_uncertainty_holds_the_sensors_gain() -> None:
    """The absolute uncertainty is the comparative one and 5 % of the energy, in quadrature."""
    energy, _ = burst_energy(0.5, 0.6)
    assert energy.abs_uj == pytest.approx(math.hypot(energy.rel_u, GAIN_REL_U) * energy.energy_uj, rel=1e-6)


def test_steady_load_is_cut_anywhere() -> None:
    """In a steady load a window gets power times duration, whatever its length and place."""
    for start_s, length_s in ((15.003, 0.030), (16.41, 0.2), (17.77, 1.0), (13.33, 9.2)):
        energy = window_energy(steady(), ns(start_s), ns(start_s + length_s))
        assert energy.energy_uj / 1e6 == pytest.approx(600 * length_s, rel=0.01)
        assert energy.method == "shape"


def test_windows_side_by_side_sum_to_the_whole() -> None:
    """What a window gets, its two halves get together, within their error bars."""
    cuts = [14.2, 17.3, 20.9]
    whole = window_energy(steady(), ns(cuts[0]), ns(cuts[2]))
    halves = [window_energy(steady(), ns(a), ns(b)) for a, b in ((cuts[0], cuts[1]), (cuts[1], cuts[2]))]
    allowed_uj = 2 * math.hypot(*(w.rel_u * w.energy_uj for w in (whole, *halves)))
    assert abs(whole.energy_uj - sum(w.energy_uj for w in halves)) <= allowed_uj


def test_a_long_window_is_the_counters() -> None:
    """20 s of load with idle around it: the counter's difference, to a part in a thousand."""
    energy = window_energy(steady(), ns(10), ns(30))
    assert energy.energy_uj / 1e6 == pytest.approx(600 * 20, rel=1e-3)
    assert energy.method == "isolated"
    assert energy.rel_u < 2e-3


def test_a_long_window_where_the_counter_was_seldom_read() -> None:
    """Readings 10 s apart within 20 s of load, and none in reach of its ends: samples fill in, the figure stays right."""
    counters, samples = made(lambda t: 600.0 if 10 <= t < 30 else IDLE_W, 40.0)
    readings = recording([counters[i] for i in (1, 15, 25, 38)], samples)
    energy = window_energy(readings, ns(10), ns(30))
    assert abs(energy.energy_uj / 1e6 - 600 * 20) <= 2 * energy.rel_u * energy.energy_uj / 1e6
    assert energy.rel_u > window_energy(steady(), ns(10), ns(30)).rel_u


def test_windows_that_tile_a_recording_sum_to_the_counter() -> None:
    """A minute of real serving in pieces of 1.7 s: their sum is the whole window's, to a part in a thousand."""
    trace = read_trace(DATA / "h200_vllm_llama8b_eager.json.gz")
    readings = recording(trace.anchors[0], trace.samples[0])
    cuts = range(trace.anchors[0][3].before_ns, trace.anchors[0][70].before_ns, 1_700 * NS_PER_MS)
    pieces = [window_energy(readings, a, b).energy_uj for a, b in pairwise(cuts)]
    whole = window_energy(readings, cuts[0], cuts[-1])
    assert sum(pieces) == pytest.approx(whole.energy_uj, rel=1e-3)


def test_serving_for_minutes_agrees_with_the_counter() -> None:
    """Windows between readings of a real serving run get what the counter gained, within half a step at full power."""
    trace = read_trace(DATA / "h200_vllm_llama8b_eager.json.gz")
    counters = trace.anchors[0]
    readings = recording(counters, trace.samples[0])
    for low, high in ((10, 70), (30, 40), (80, 140)):
        gained_uj = (counters[high].counter_mj - counters[low].counter_mj) * 1000
        energy = window_energy(readings, counters[low].before_ns, counters[high].before_ns)
        assert abs(energy.energy_uj - gained_uj) <= 700 * 0.1 * 1e6


def test_idle_has_no_net() -> None:
    """A second of idle is floor times duration; what is above it is nothing within the error bar."""
    energy = window_energy(steady(), ns(4.2), ns(5.2))
    assert abs(energy.net_uj) <= 2 * energy.rel_u * energy.energy_uj
    assert energy.energy_uj / 1e6 == pytest.approx(IDLE_W, rel=0.01)


def test_without_samples_the_counter_is_interpolated() -> None:
    """A counter alone gives a figure, with an error bar that says how little it knows."""
    counters, samples = made(pulse(0.3, 0.5), 40.0)
    with_samples = window_energy(recording(counters, samples), ns(20.3), ns(20.5))
    alone = window_energy(recording(counters, Samples((), ())), ns(20.3), ns(20.5))
    assert alone.method == "counter"
    assert alone.rel_u > 10 * with_samples.rel_u
    assert abs(alone.energy_uj - with_samples.energy_uj) <= 3 * alone.rel_u * alone.energy_uj


def test_a_hole_in_the_samples_widens_the_error_bar() -> None:
    """Samples lost around an edge in a changing load cost certainty, and the figure stays within it."""
    counters, samples = made(pulse(0.3, 1.1), 40.0)
    kept = [i for i, t in enumerate(samples.end_ns) if not ns(20.9) < t < ns(21.4)]
    holed = Samples(tuple(samples.end_ns[i] for i in kept), tuple(samples.power_mw[i] for i in kept))
    whole = window_energy(recording(counters, samples), ns(20.3), ns(21.1))
    poor = window_energy(recording(counters, holed), ns(20.3), ns(21.1))
    assert poor.rel_u > whole.rel_u
    assert abs(poor.energy_uj - whole.energy_uj) <= 2 * poor.rel_u * poor.energy_uj


def test_a_restart_of_the_counter_in_the_window_is_refused() -> None:
    """The counter fell within the window: what flowed is not known, and no figure is made up."""
    counters, samples = made(pulse(0.3, 0.5), 40.0)
    fallen = counters[:20] + [replace(c, counter_mj=c.counter_mj - 5_000_000) for c in counters[20:]]
    readings = recording(fallen, samples)
    with pytest.raises(UsageError, match="restarted"):
        window_energy(readings, ns(18.2), ns(21.7))
    assert window_energy(readings, ns(10.3), ns(10.5)).method == "isolated"


@pytest.mark.parametrize(("start_s", "end_s"), [(20.30, 20.50), (18.30, 18.50)])
def test_a_restart_near_the_window_does_not_reach_it(start_s: float, end_s: float) -> None:
    """The readings on the far side of a restart say nothing: a window close to it is right without them."""
    counters, samples = made(pulse(0.3, 0.5), 40.0)
    for at in (19, 20, 21):
        fallen = counters[:at] + [replace(c, counter_mj=c.counter_mj - 5_000_000) for c in counters[at:]]
        if counters[at - 1].before_ns < ns(end_s) and counters[at].before_ns > ns(start_s - 0.1):
            continue
        energy = window_energy(recording(fallen, samples), ns(start_s), ns(end_s))
        assert abs(energy.energy_uj / 1e6 - 140.0) <= 2 * energy.rel_u * energy.energy_uj / 1e6


@pytest.mark.parametrize(
    ("start_s", "end_s", "why"),
    [(5, 5, "not after its start"), (6, 5, "not after"), (-3, 2, "not within"), (39, 99, "not within")],
)
def test_windows_that_are_none_are_refused(start_s: float, end_s: float, why: str) -> None:
    """Empty, backward and outlying windows get one line that says what is wrong."""
    with pytest.raises(UsageError, match=why):
        window_energy(steady(), ns(start_s), ns(end_s))


def test_one_reading_is_not_enough() -> None:
    """A difference needs two readings."""
    with pytest.raises(UsageError, match="two readings"):
        recording([Counter(1, 2, 3)], Samples((), ()))


@settings(max_examples=25, deadline=None)
@given(start_s=st.floats(0.1, 38.5), length_s=st.floats(0.001, 30.0))
def test_any_window_has_a_figure_and_an_error_bar(start_s: float, length_s: float) -> None:
    """Wherever it lies: finite, never negative, right within four standard deviations and the idle's doubt."""
    end_s = min(start_s + length_s, 39.0)
    energy = window_energy(steady(), ns(start_s), ns(end_s))
    busy_s = max(0.0, min(end_s, 30.0) - max(start_s, 10.0))
    truth_j = 600.0 * busy_s + IDLE_W * (end_s - start_s - busy_s)
    assert energy.energy_uj >= 0
    assert 0 < energy.rel_u < math.inf
    assert abs(energy.energy_uj / 1e6 - truth_j) <= 4 * energy.rel_u * energy.energy_uj / 1e6 + 0.3


@pytest.mark.parametrize("offset_s", [0.005, 0.030, 0.080])
def test_anchors_are_found_at_the_counters_steps(offset_s: float) -> None:
    """Readings some time after a step are placed at that step, within 8 ms (half the sensor's lag); a step is 100 ms."""
    counters, samples = made(pulse(0.31, 1.04), 40.0, offset_s=offset_s)
    stamp_s = np.array([(t - T0) / 1e9 for t in samples.end_ns])
    placed = place(counters, T0, 100 * NS_PER_MS, stamp_s, np.array(samples.power_mw, dtype=float))
    assert placed.u_s <= 0.01
    assert np.abs(placed.at_s[2:-2] - np.arange(2, 38)).max() <= 0.008


def test_a_load_that_never_changes_teaches_no_phase() -> None:
    """Nothing tells the steps apart: anchors stand half a step back, and say so."""
    counters, samples = made(lambda _: 300.0, 40.0)
    stamp_s = np.array([(t - T0) / 1e9 for t in samples.end_ns])
    placed = place(counters, T0, 100 * NS_PER_MS, stamp_s, np.array(samples.power_mw, dtype=float))
    assert placed.u_s == pytest.approx(0.1 / math.sqrt(12))
    assert placed.at_s[5] == pytest.approx(5.030 - 0.050)


def ask(trace: Path, lines: str, *arguments: str) -> Result:
    """`energyd window` on these lines."""
    done = CliRunner().invoke(main, ["window", "--trace", str(trace), *arguments], input=lines, prog_name="energyd")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.mark.parametrize("path", [BURSTS, METROLOGY])
def test_verb_prints_one_object_a_window(path: Path) -> None:
    """One JSON object for each line, in order, from anchors or thinned edges, without requests."""
    bursts = [b for s in series(path)[-2:] for b in s.bursts[:3]]
    done = ask(path, "".join(f"{a} {b}\n\n" for a, b, _ in bursts), "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 0
    assert [r["energy_uj"] for r in rows] == [w.energy_uj for w in measured(path, bursts)]
    assert all({"energy_uj", "net_uj", "rel_u", "abs_uj", "method"} <= r.keys() for r in rows)


def test_verb_prints_text_for_people() -> None:
    """Without --json: joules, both error bars, what was above idle."""
    start_ns, end_ns, _ = series(BURSTS)[0].bursts[0]
    said = ask(BURSTS, f"{start_ns} {end_ns}\n").stdout
    assert " J ± " in said
    assert "above idle" in said


@pytest.mark.parametrize(
    "line", ["1 x", "1", "1 2 3", "-1 5", "1.5 2", "１ 2", "1e9 2e9", "9" * 300, "\x00", "12 5", "1 2"]
)
def test_verb_names_the_line_that_is_wrong(line: str) -> None:
    """What is no window, or not in the recording, ends in one line with its number and exit code 2."""
    start_ns, end_ns, _ = series(BURSTS)[0].bursts[0]
    done = ask(BURSTS, f"{start_ns} {end_ns}\n{line}\n", "--json")
    assert done.exit_code == 2
    assert len(done.stdout.splitlines()) == 1
    assert len(done.stderr.splitlines()) == 1
    assert "line 2" in done.stderr


def test_verb_refuses_a_binary_input() -> None:
    """Bytes that are no text are refused like any other line."""
    done = CliRunner().invoke(
        main, ["window", "--trace", str(BURSTS)], input=b"\xff\xfe\x00" * 500, prog_name="energyd"
    )
    assert done.exit_code == 2
    assert "line 1" in done.stderr


def test_verb_asks_which_gpu_is_meant(tmp_path: Path) -> None:
    """A trace of several GPUs needs --gpu; it takes an index or a UUID, and refuses others."""
    counters, samples = made(pulse(0.3, 0.5), 12.0)
    trace = {
        "anchors": [[c.before_ns, c.after_ns, c.counter_mj * g, f"GPU-{g}"] for g in (1, 2) for c in counters],
        "samples": [
            [t // 1000, p * g, f"GPU-{g}"]
            for g in (1, 2)
            for t, p in zip(samples.end_ns, samples.power_mw, strict=True)
        ],
    }
    path = tmp_path / "two.json.gz"
    path.write_bytes(gzip.compress(json.dumps(trace).encode()))
    line = f"{ns(4.3)} {ns(4.5)}\n"
    assert "choose one with --gpu" in ask(path, line).stderr
    one, two = (json.loads(ask(path, line, "--json", "--gpu", g).stdout)["energy_uj"] for g in ("0", "GPU-2"))
    assert two == pytest.approx(2 * one, rel=0.02)
    assert "no GPU '7'" in ask(path, line, "--gpu", "7").stderr
