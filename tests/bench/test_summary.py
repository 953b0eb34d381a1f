"""Statistics by hand-made rows."""

import math
from dataclasses import replace
from typing import Any

import pytest

from energyd.bench.load import Row
from energyd.bench.summary import Energy, Gap, Setup, energy, gaps, hardware, is_ratable, mean_mw, summarise
from energyd.bench.tasks import find
from energyd.daemon.wire import EnergyAnswer, GpuEnergy

S = 1_000_000_000
WH = 3_600_000_000
RUN_KEYS = {
    "n", "failed", "gpu_run_wh_per_1000", "serving_wh_per_1000", "active_wh_per_1000", "rel_u", "source", "hardware",
    "engine", "p50_s", "p95_s", "idle_w", "not_official_because",
}  # fmt: skip


def row(
    idx: int, *, error: str | None = None, tokens: int | None = 10, source: str = "response", lasts: int = S
) -> Row:
    """Sample `idx` begins at second `idx`."""
    start = idx * S
    return Row(
        idx,
        "measured",
        start,
        start + lasts // 2,
        start + lasts,
        error is None,
        200,
        error,
        "q",
        7,
        tokens,
        source,
        "m",
    )


SETUP = Setup(
    task=find("text_generation"),
    batch_size=1,
    max_new_tokens=10,
    precision="fp16",
    engine="vllm 1",
    hardware="NVIDIA H100 80GB HBM3",
    dataset_is_sample=False,
    dataset_verified=True,
    interrupted=False,
)
FOUND = Energy(
    gpu_run_uj=20 * WH, u_uj=WH / 5, source="nvml-counter", hardware="NVIDIA H100 80GB HBM3", gpus=1, settled=True,
    active_uj=5 * WH, standing_uj=10 * WH, queries=1_000, queries_with_energy=1_000, idle_mw=120_500,
)  # fmt: skip
ROWS = [row(i) for i in range(1_000)]


def told(rows: list[Row] = ROWS, found: Energy | None = FOUND, setup: Setup = SETUP) -> dict[str, Any]:
    """The summary."""
    return summarise(rows, found, setup, Gap(None, None))


def test_it_has_every_key_that_rating_reads() -> None:
    """With and without energy, with and without rows."""
    assert set(told()) >= RUN_KEYS
    assert set(told([], None)) == set(told())


def test_energies_by_basis() -> None:
    """20 Wh over 1,000 good queries are 20 Wh per 1,000; serving is active plus standing; ± in both forms."""
    s = told()
    assert (s["gpu_run_wh_per_1000"], s["serving_wh_per_1000"], s["active_wh_per_1000"]) == (20.0, 15.0, 5.0)
    assert (s["wh_per_query"], s["idle_w"], s["source"]) == (0.02, 120.5, "nvml-counter")
    assert (s["rel_u"], s["abs_u_wh"]) == (pytest.approx(0.01), pytest.approx(0.2))
    assert s["j_per_token"] == pytest.approx(20 * 3_600 / 10_000)


def test_failed_queries_leave_the_count_and_keep_their_energy() -> None:
    """Eight of 1,000 failed: the energy is divided by 992, and the failures are listed."""
    rows = [row(i, error="HTTP 500" if i < 8 else None) for i in range(1_000)]
    s = told(rows)
    assert (s["n"], s["failed"], s["sent"]) == (992, 8, 1_000)
    assert s["gpu_run_wh_per_1000"] == pytest.approx(20 / 992 * 1_000)
    assert s["failures"][0] == {"idx": 0, "http_status": 200, "error": "HTTP 500"}
    assert is_ratable(rows)


def test_more_than_one_percent_failed_is_not_ratable() -> None:
    """Eleven of 1,000 are too many; the reason says so."""
    rows = [row(i, error="HTTP 500" if i < 11 else None) for i in range(1_000)]
    assert not is_ratable(rows)
    assert "11 of 1000 requests failed (more than 1 %): not ratable" in told(rows)["not_official_because"]


def test_what_the_user_cut_off_did_not_fail() -> None:
    """Interrupted requests leave the count, but are no failures; without any answer nothing is ratable."""
    rows = [row(0), row(1, error="interrupted")]
    s = told(rows)
    assert (s["n"], s["failed"], s["failures"]) == (1, 0, [])
    assert is_ratable(rows)
    assert not is_ratable(rows[1:])
    assert "no request succeeded: not ratable" in told(rows[1:])["not_official_because"]


def test_queries_without_a_figure_count_like_the_others() -> None:
    """Half of the queries have a figure: the sum is doubled, not divided by all."""
    s = told(found=replace(FOUND, active_uj=2 * WH, standing_uj=0, queries=1_000, queries_with_energy=500))
    assert s["active_wh_per_1000"] == pytest.approx(4.0)


def test_unknown_is_none_and_never_zero() -> None:
    """No meter, no proxy, no usage: each leaves its figures unknown."""
    s = told(found=None)
    assert all(s[key] is None for key in ("source", "gpu_run_wh_per_1000", "idle_w", "rel_u", "j_per_token"))
    s = told(found=replace(FOUND, active_uj=None, standing_uj=None, queries=0, queries_with_energy=0, idle_mw=None))
    assert (s["serving_wh_per_1000"], s["active_wh_per_1000"], s["idle_w"]) == (None, None, None)
    s = told([row(0), row(1, tokens=None, source="absent")])
    assert (s["completion_tokens"], s["tokens_per_s"], s["j_per_token"]) == (None, None, None)
    s = told([row(0, error="timed out")])
    assert (s["p50_s"], s["gpu_run_wh_per_1000"], s["failed"]) == (None, None, 1)


def test_latency_counts_good_answers_only() -> None:
    """The quantiles interpolate as numpy does; a failed request's time is not among them."""
    s = told([row(0, lasts=S), row(1, lasts=3 * S), row(2, lasts=99 * S, error="timed out")])
    assert (s["p50_s"], s["mean_s"], s["first_byte_p50_s"]) == (2.0, 2.0, 1.0)
    assert s["p95_s"] == pytest.approx(2.9)


def test_rates_are_over_the_whole_span() -> None:
    """1,000 queries of 10 tokens in 1,000 s."""
    s = told()
    assert (s["span_s"], s["queries_per_s"], s["tokens_per_s"]) == (1_000.0, 1.0, 10.0)


def test_what_is_like_the_official_setup_lacks_only_the_path() -> None:
    """H100-80GB, standard data, batch 1, FP16: what remains is the server over HTTP."""
    assert told()["not_official_because"] == ["a server over HTTP (vllm 1), not transformers in process"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hardware": "NVIDIA H200"}, "hardware is NVIDIA H200, not one H100-80GB"),
        ({"hardware": "2x NVIDIA H100 80GB HBM3"}, "hardware is 2x NVIDIA H100 80GB HBM3, not one H100-80GB"),
        ({"dataset_is_sample": True}, "sample dataset of energyd, not the standard one"),
        ({"dataset_verified": False}, "dataset not verified to be AIEnergyScore/text_generation"),
        ({"batch_size": 32}, "batch 32, not 1"),
        ({"max_new_tokens": 20}, "20 new tokens, not 10"),
        ({"precision": None}, "precision not stated, not fp16"),
        ({"interrupted": True}, "interrupted"),
    ],
)
def test_each_difference_from_the_official_setup_is_named(change: dict[str, Any], reason: str) -> None:
    """One phrase for each."""
    assert reason in told(setup=replace(SETUP, **change))["not_official_because"]


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (None, "no energy was measured"),
        (replace(FOUND, source="estimate"), "energy source is estimate"),
        (replace(FOUND, gpus=2), "2 GPUs counted, not one"),
        (replace(FOUND, settled=False), "figures were provisional when the run ended"),
    ],
)
def test_each_weakness_of_the_energy_is_named(found: Energy | None, reason: str) -> None:
    """Measured, estimated and missing never mix."""
    assert reason in told(found=found)["not_official_because"]


def test_estimated_and_other_counts_are_not_ten_tokens() -> None:
    """A count that the server did not report, or another one, is named."""
    rows = [row(0), row(1, tokens=9), row(2, source="estimated")]
    assert "2 answers not known to have exactly 10 tokens" in told(rows)["not_official_because"]


def test_the_clients_own_pauses() -> None:
    """Groups of two: from the last end of one group to the first start of the next."""
    rows = [row(0), row(1, lasts=S), row(3), row(4, lasts=2 * S)]
    for idx, r in enumerate(rows):
        rows[idx] = replace(r, idx=idx)
    found = gaps(rows, 2)
    assert found.mean_s == 1.0
    assert found.share == pytest.approx(1 / 6)
    assert gaps(rows[:1], 1) == Gap(None, None)
    assert gaps([], 1) == Gap(None, None)


def gpu(index: int, energy_uj: int, u_uj: int) -> GpuEnergy:
    """One GPU of an answer."""
    return GpuEnergy(f"GPU-{index}", index, "NVIDIA H200", "nvml-counter", energy_uj, u_uj, None)


def test_only_the_chosen_gpus_count() -> None:
    """By index or UUID; all of them by default, their uncertainties adding as squares."""
    answer = EnergyAnswer(True, True, (gpu(0, 100, 3), gpu(1, 50, 4)))
    both, one = energy(answer, (), None), energy(answer, ("GPU-1",), None)
    assert both is not None
    assert (both.gpu_run_uj, both.u_uj, both.hardware, both.gpus) == (150, 5.0, "2x NVIDIA H200", 2)
    assert one is not None
    assert (one.gpu_run_uj, one.hardware, one.gpus) == (50, "NVIDIA H200", 1)
    assert energy(answer, ("7",), None) is None


def test_idle_watts_need_a_complete_span() -> None:
    """100 J over one second are 100 W; a meter that has not read past the span tells nothing."""
    answer = EnergyAnswer(True, True, (gpu(0, 100_000_000, 0),))
    assert mean_mw(answer, (), S) == 100_000
    assert mean_mw(EnergyAnswer(True, False, answer.gpus), (), S) is None
    assert mean_mw(EnergyAnswer(True, True, ()), (), S) is None


def test_hardware_names_count_like_gpus() -> None:
    """Two alike are counted, one stands alone."""
    assert hardware(["A", "B", "A"]) == "2x A, B"


def test_uncertainty_of_nothing_is_unknown() -> None:
    """A GPU that reports no energy has no relative uncertainty."""
    assert told(found=replace(FOUND, gpu_run_uj=0, u_uj=math.inf))["rel_u"] is None
