"""The identity of every scrape, counters that never fall, and model names that cannot explode."""

import functools
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from energyd.daemon.ledger_views import AccountTotal
from energyd.daemon.metrics import MAX_MODELS, Health, Totals, per_model
from energyd.daemon.records import Charge, Settlement, Source, Unattributed, Window, WindowKind
from tests.faults.rig import Daemon, Worker, asked, audited, daemon, gpu_named, wait_for

HEALTH = Health({}, {}, {}, {}, {}, None, 0, 0, 0, 0, 0, 0)
LIFE_LONG = ("energyd_request_", "energyd_meter_read_failures", "energyd_ledger_failures")
"""Histograms and failures begin anew with the process, as Prometheus expects of any counter."""

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(page: str) -> tuple[Samples, dict[str, str]]:
    """Values by name and labels, and the type of each family."""
    values: Samples = {}
    kinds = {}
    for family in text_string_to_metric_families(page):
        kinds[family.name] = family.type
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in values, key
            values[key] = sample.value
    return values, kinds


def total(values: Samples, name: str) -> float:
    """Sum over the labels."""
    return sum(value for (found, _), value in values.items() if found == name)


def has_settled(process: Daemon, worker: Worker) -> bool:
    """Whether the newest query is final."""
    worker.say()
    return not process.json("/v1/queries?limit=1")[0]["provisional"]


def check_identity(values: Samples) -> None:
    """GPU = models + idle + unattributed + unsettled, within float rounding."""
    booked = (
        total(values, "energyd_model_energy_joules_total")
        + total(values, "energyd_idle_energy_joules_total")
        + total(values, "energyd_unattributed_energy_joules_total")
    )
    assert total(values, "energyd_gpu_energy_joules_total") == pytest.approx(
        booked + total(values, "energyd_unsettled_joules"), rel=1e-12, abs=1e-6
    )


def counters(values: Samples, kinds: dict[str, str]) -> Samples:
    """Everything that may only rise, over restarts too."""
    return {
        key: value
        for key, value in values.items()
        if kinds.get(key[0].removesuffix("_total")) == "counter" and not key[0].startswith(LIFE_LONG)
    }


def test_the_identity_holds_in_every_scrape_and_counters_never_fall(tmp_path: Path) -> None:
    """Scraped under traffic, over a kill -9 and a restart: Σ accounts + unsettled = GPU, and nothing goes back."""
    db = tmp_path / "e.db"
    worker = Worker(db)
    before: Samples = {}
    scrapes = 0
    for round_ in range(2):
        with daemon(db) as process:
            worker.hello()
            until = time.monotonic() + 2.5
            while time.monotonic() < until:
                worker.say(*asked(0.1, served=f"m{scrapes % 3}", http_status=200 if scrapes % 5 else 404)[1])
                values, kinds = parsed(process.get("/metrics")[1])
                check_identity(values)
                now = counters(values, kinds)
                assert {key for key, value in before.items() if now.get(key, 0) < value} == set()
                before = now
                scrapes += 1
                time.sleep(0.1)
            settled = functools.partial(has_settled, process, worker)
            wait_for(settled)
            values, kinds = parsed(process.get("/metrics")[1])
            assert total(values, "energyd_requests_total") > 5
            unsettled = process.json("/v1/status")["unsettled_uj"] / 1e6
            assert total(values, "energyd_unsettled_joules") == pytest.approx(
                unsettled, abs=2_000
            )  # a window or two later
            models = {dict(labels)["model"] for (name, labels), _ in values.items() if name == "energyd_requests_total"}
            assert models == {"m0", "m1", "m2", "other"}
            if round_ == 0:
                process.kill()
            else:
                assert process.stop() == 0
    assert scrapes > 10
    totals = audited(db)
    last = total(before, "energyd_gpu_energy_joules_total")
    assert 0 < last * 1e6 <= totals["counter"] + 1


def test_what_the_ledger_holds_is_where_the_counters_begin() -> None:
    """Totals read back from the ledger show the same page as the totals that wrote it."""
    gpu = gpu_named()
    live = Totals([gpu])
    window = Window("GPU-a", 0, 0, 0, 10, 0, 900, 900_000, 1, WindowKind.METERED, Source.EMULATED)
    live.metered([window, window])
    booked = Settlement(
        "GPU-a", 0, 0, 900_000, 100_000, {Unattributed.LOAD: 200_000}, (Charge("q", 500_000, 100_000),), "time", None, 1
    )
    live.settled(booked, {"q": "m"})
    loaded = Totals([gpu])
    accounts = [
        AccountTotal("GPU-a", "active", "m", 500_000), AccountTotal("GPU-a", "standing", "m", 100_000),
        AccountTotal("GPU-a", "idle", None, 100_000), AccountTotal("GPU-a", "unattributed:load", None, 200_000),
        AccountTotal("GPU-gone", "idle", None, 77),
    ]  # fmt: skip
    loaded.load(accounts, {"GPU-a": 900_000}, [])
    pages = [parsed(t.page(HEALTH).decode())[0] for t in (live, loaded)]
    assert pages[0] == pages[1]
    check_identity(pages[0])
    assert total(pages[0], "energyd_unsettled_joules") == pytest.approx(0.9)


def test_at_most_200_models_have_a_name() -> None:
    """The model after the 200th is `other`: in energies, requests, tokens and histograms."""
    totals = Totals([gpu_named()])
    for i in range(MAX_MODELS + 50):
        charge = Charge("q", 10, 5)
        totals.settled(Settlement("GPU-a", 0, i, 15, 0, {}, (charge,), "time", None, 1), {"q": f"m{i}"})
        row = {
            "model": f"m{i}", "task": "t", "status": "ok", "http_status": 200, "prompt_tokens": 1, "completion_tokens": None,
            "started_ns": 0, "ended_ns": 10**9, "active_uj": 10, "standing_uj": 5,
        }  # fmt: skip
        totals.finished(row)
    values, _ = parsed(totals.page(HEALTH).decode())
    for name in (
        "energyd_model_energy_joules_total", "energyd_requests_total", "energyd_tokens_total", "energyd_usage_missing_total",
        "energyd_request_energy_joules_count",
    ):  # fmt: skip
        models = {dict(labels)["model"] for found, labels in values if found == name}
        assert len(models) == MAX_MODELS + 1, name
        assert "other" in models
    assert total(values, "energyd_requests_total") == MAX_MODELS + 50
    other = {k: v for k, v in values.items() if k[0] == "energyd_requests_total" and ("model", "other") in k[1]}
    assert list(other.values()) == [50]


def test_a_name_cannot_break_the_page() -> None:
    """Quotes, newlines and backslashes in a model's name come back as they went in."""
    totals = Totals([gpu_named()])
    name = 'a"b\\c\nd{}=,é'
    totals.settled(Settlement("GPU-a", 0, 0, 15, 0, {}, (Charge("q", 10, 5),), "time", None, 1), {"q": name})
    values, _ = parsed(totals.page(HEALTH).decode())
    assert {dict(labels)["model"] for n, labels in values if n == "energyd_model_energy_joules_total"} == {name}


def test_what_is_unknown_is_absent() -> None:
    """No power, no idle floor, no unsettled window: no sample with an invented 0 W."""
    totals = Totals([gpu_named()])
    values, _ = parsed(totals.page(HEALTH).decode())
    names = {name for name, _ in values}
    assert "energyd_gpu_power_watts" not in names
    assert "energyd_gpu_idle_floor_watts" not in names


def test_wh_per_1000_counts_only_queries_with_an_energy() -> None:
    """Queries without a figure are left out of the mean; a model without any has None."""
    row = {
        "model": "m", "queries": 4, "prompt_tokens": 1, "completion_tokens": 1, "energy_unknown": 2, "active_uj": 3_600_000,
        "standing_uj": 3_600_000,
    }  # fmt: skip
    blank = {**row, "model": None, "energy_unknown": 4, "active_uj": 0, "standing_uj": 0}
    m, other = per_model([row, blank])
    assert (m["active_wh_per_1000"], m["serving_wh_per_1000"]) == (pytest.approx(0.5), pytest.approx(1.0))
    assert (other["model"], other["serving_wh_per_1000"]) == ("other", None)
