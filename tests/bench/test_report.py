"""The report for people."""

from dataclasses import replace
from typing import Any

from energyd.bench.datasets import Loaded, Prompt
from energyd.bench.order import Order, Outcome
from energyd.bench.report import text
from energyd.bench.summary import Gap, summarise
from energyd.bench.tasks import find

from .test_summary import FOUND, ROWS, SETUP, WH

ORDER = Order(
    url="http://h", model="m", task=find("text_generation"), dataset=Loaded("d", "0", (Prompt("x"),), 0, is_sample=False),
    samples=1_000, batch_size=1, warmup=0, idle_s=0, max_new_tokens=None, stream=True, api=None, server=None, model_class=None,
    precision=None, engine=None, hardware=None, gpus=(), request_limit_s=1, settle_limit_s=1, headers={},
)  # fmt: skip


def shown(found: Any) -> str:
    """The report of 1,000 good queries with this energy."""
    told = summarise(ROWS, found, SETUP, Gap(None, None))
    record: dict[str, object] = {"model_class": "B", "model_class_source": "given"}
    return text(Outcome("r1", "complete", "http://h", record, told, stored=True), ORDER)


def test_every_basis_is_named_with_its_meaning() -> None:
    """The three figures stand side by side, the first with its uncertainty, and the class beside the hardware."""
    report = shown(FOUND)
    assert "gpu_run   20 ± 0.2   (whole GPU over the run)" in report
    assert "serving   15   (active plus idle watts while served)" in report
    assert "active    5   (what the queries caused)" in report
    assert "source nvml-counter · class B" in report


def test_mostly_idle_figures_are_said_to_be_so() -> None:
    """A quarter caused by the queries: the rest is named for what it is."""
    assert "only 25 % of gpu_run was caused by the queries" in shown(FOUND)
    assert "was caused by the queries:" not in shown(replace(FOUND, active_uj=15 * WH, standing_uj=0))


def test_the_sensors_gain_is_named_for_measured_figures_only() -> None:
    """±5 % belongs to the GPU's sensor; an estimate has no such bound."""
    assert "absolute figures add the sensor's ±5 %" in shown(FOUND)
    assert "±5 %" not in shown(replace(FOUND, source="estimate"))


def test_a_run_too_short_for_its_windows_says_so() -> None:
    """The queries' own energies cannot really exceed that of the whole GPU."""
    assert "serving exceeds gpu_run" in shown(replace(FOUND, standing_uj=17 * WH))
    assert "serving exceeds gpu_run" not in shown(FOUND)


def test_unknown_figures_are_words() -> None:
    """No zero, no dash that could be read as one."""
    report = shown(replace(FOUND, active_uj=None, standing_uj=None, idle_mw=None))
    assert "serving   unknown" in report
    assert "idle         unknown W" in report
