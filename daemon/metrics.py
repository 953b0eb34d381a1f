"""Prometheus metrics, from whole microjoules: J appear only in the lines that export them.

The identity that every scrape must show, per GPU and in all::

    energyd_gpu_energy_joules_total = Σ energyd_model_energy_joules_total (active, standing)
        + energyd_idle_energy_joules_total + Σ energyd_unattributed_energy_joules_total + energyd_unsettled_joules

Energy counters go on across restarts: they are read back from the ledger. Model names come from clients, so their number
is capped; what comes after is `other`.
"""

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .ledger_views import AccountTotal, Row
from .records import Gpu, Settlement, Window
from .units import joules, seconds, watt_hours, watts

MAX_MODELS = 200
_REQUEST_JOULES = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000)
_REQUEST_SECONDS = (0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1_000)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Health:
    """The state of the meter and the books that metrics show beside the energies; None: unknown."""

    power_mw: Mapping[str, int | None]
    idle_floor_mw: Mapping[str, int | None]
    read_age_ns: Mapping[str, int]
    readings_failed: Mapping[str, int]
    unsettled_uj: Mapping[str, int]
    oldest_unsettled_age_ns: int | None
    open_queries: int
    workers: int
    late_queries: int
    dropped_events: int
    ledger_failures: int
    wall_step_ns: int


class Totals:
    """Whole-µJ totals behind the metrics; written by the ledger's thread, read by a scrape."""

    def __init__(self, gpus: Iterable[Gpu]) -> None:
        self._lock = threading.Lock()
        self.gpus = {g.uuid: g for g in gpus}
        self._metered: dict[str, int] = dict.fromkeys(self.gpus, 0)
        self._model: dict[tuple[str, str], int] = defaultdict(int)
        self._idle: dict[str, int] = dict.fromkeys(self.gpus, 0)
        self._unattributed: dict[tuple[str, str], int] = defaultdict(int)
        self._requests: dict[tuple[str, str, str, str], int] = defaultdict(int)
        self._tokens: dict[tuple[str, str], int] = defaultdict(int)
        self._usage_missing: dict[str, int] = defaultdict(int)
        self._models: set[str] = set()
        self.registry = CollectorRegistry()
        self.request_joules = Histogram(
            "energyd_request_energy_joules", "Serving energy (active + standing) of a finished query.",
            ["model", "task"], buckets=_REQUEST_JOULES, registry=self.registry,
        )  # fmt: skip
        self.request_seconds = Histogram(
            "energyd_request_duration_seconds", "Time from the request's arrival at the proxy to its last byte.",
            ["model", "task"], buckets=_REQUEST_SECONDS, registry=self.registry,
        )  # fmt: skip

    def model(self, name: str | None) -> str:
        """The label for a model: its name, or `other` once there are too many."""
        label = name or "other"
        if label not in self._models:
            if len(self._models) >= MAX_MODELS:
                return "other"
            self._models.add(label)
        return label

    def load(self, accounts: Iterable[AccountTotal], unsettled_uj: Mapping[str, int], queries: Iterable[Row]) -> None:
        """Begin with what the ledger holds; GPUs that are not metered now are left out."""
        with self._lock:
            for a in accounts:
                if a.uuid not in self.gpus:
                    continue
                self._metered[a.uuid] += a.energy_uj
                if a.account in ("active", "standing"):
                    self._model[self.model(a.model), a.account] += a.energy_uj
                elif a.account == "idle":
                    self._idle[a.uuid] += a.energy_uj
                else:
                    self._unattributed[a.uuid, a.account.partition(":")[2]] += a.energy_uj
            for uuid, energy_uj in unsettled_uj.items():
                self._metered[uuid] += energy_uj
            for row in queries:
                self._count(row)

    def metered(self, windows: Iterable[Window]) -> None:
        """Windows were stored."""
        with self._lock:
            for w in windows:
                self._metered[w.gpu] += w.energy_uj or 0

    def settled(self, settlement: Settlement, models: Mapping[str, str]) -> None:
        """A window was booked; `models`: the model of each charged query."""
        with self._lock:
            self._idle[settlement.gpu] += settlement.idle_uj
            for reason, energy_uj in settlement.unattributed_uj.items():
                self._unattributed[settlement.gpu, str(reason)] += energy_uj
            for charge in settlement.charges:
                label = self.model(models.get(charge.query_id))
                self._model[label, "active"] += charge.active_uj
                self._model[label, "standing"] += charge.standing_uj

    def finished(self, row: Row) -> None:
        """A query is final; `row` as `Views.query` gives it."""
        with self._lock:
            self._count({**row, "queries": 1, "tokens_unknown": int(row["completion_tokens"] is None)})
        labels = self.model(row["model"]), row["task"] or "unknown"
        self.request_seconds.labels(*labels).observe(seconds(row["ended_ns"] - row["started_ns"]))
        if row["active_uj"] is not None:
            self.request_joules.labels(*labels).observe(joules(row["active_uj"] + row["standing_uj"]))

    def _count(self, row: Row) -> None:
        model, code = self.model(row["model"]), str(row["http_status"] or "none")
        self._requests[model, row["task"] or "unknown", str(row["status"]), code] += row["queries"]
        self._tokens[model, "prompt"] += row["prompt_tokens"] or 0
        self._tokens[model, "completion"] += row["completion_tokens"] or 0
        self._usage_missing[model] += row["tokens_unknown"]

    def families(self, health: Health) -> Iterator[Metric]:
        """All metric families at one instant; the identity of the module docstring holds within one call."""
        with self._lock:
            yield from self._energy_families()
            yield from self._query_families()
        yield from self._health_families(health)

    def _energy_families(self) -> Iterator[Metric]:
        gpu = CounterMetricFamily(
            "energyd_gpu_energy_joules",
            "Energy the GPU's counter said, booked or not: equals model + idle + unattributed + unsettled.",
            labels=["gpu", "uuid", "source"],
        )
        model = CounterMetricFamily(
            "energyd_model_energy_joules", "Settled energy of queries by model: active (caused) and standing (idle watts"
            " while served).", labels=["model", "kind"],
        )  # fmt: skip
        idle = CounterMetricFamily(
            "energyd_idle_energy_joules", "Settled energy while nobody was served.", labels=["gpu"]
        )
        stray = CounterMetricFamily(
            "energyd_unattributed_energy_joules", "Settled energy that belongs to no query and is not idle.",
            labels=["gpu", "reason"],
        )  # fmt: skip
        unsettled = GaugeMetricFamily(
            "energyd_unsettled_joules", "Metered energy whose queries are still running or just ended.", labels=[]
        )
        indices = {u: str(g.index) for u, g in self.gpus.items()}
        for uuid, energy_uj in self._metered.items():
            gpu.add_metric([indices[uuid], uuid, str(self.gpus[uuid].source)], joules(energy_uj))
            idle.add_metric([indices[uuid]], joules(self._idle[uuid]))
        for (name, kind), energy_uj in sorted(self._model.items()):
            model.add_metric([name, kind], joules(energy_uj))
        for (uuid, reason), energy_uj in sorted(self._unattributed.items()):
            stray.add_metric([indices[uuid], reason], joules(energy_uj))
        booked_uj = sum(self._idle.values()) + sum(self._model.values()) + sum(self._unattributed.values())
        unsettled.add_metric([], joules(sum(self._metered.values()) - booked_uj))
        yield from (gpu, model, idle, stray, unsettled)

    def _query_families(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "energyd_requests", "Finished queries.", labels=["model", "task", "status", "code"]
        )
        tokens = CounterMetricFamily(
            "energyd_tokens", "Tokens of finished queries, where known.", labels=["model", "type"]
        )
        missing = CounterMetricFamily(
            "energyd_usage_missing", "Finished queries whose completion tokens nobody reported.", labels=["model"]
        )
        for key, count in sorted(self._requests.items()):
            requests.add_metric(list(key), count)
        for (name, kind), count in sorted(self._tokens.items()):
            tokens.add_metric([name, kind], count)
        for name, count in sorted(self._usage_missing.items()):
            missing.add_metric([name], count)
        yield from (requests, tokens, missing)

    def _health_families(self, health: Health) -> Iterator[Metric]:
        power = GaugeMetricFamily("energyd_gpu_power_watts", "Latest 20 ms power sample.", labels=["gpu", "uuid"])
        floor = GaugeMetricFamily("energyd_gpu_idle_floor_watts", "Recent idle power.", labels=["gpu"])
        age = GaugeMetricFamily("energyd_meter_read_age_seconds", "Since the last good reading.", labels=["gpu"])
        failed = CounterMetricFamily("energyd_meter_read_failures", "Readings that failed.", labels=["gpu"])
        for uuid, g in self.gpus.items():
            for family, power_mw in ((power, health.power_mw.get(uuid)), (floor, health.idle_floor_mw.get(uuid))):
                if power_mw is not None:
                    labels = [str(g.index), uuid] if family is power else [str(g.index)]
                    family.add_metric(labels, watts(power_mw))
            age.add_metric([str(g.index)], seconds(health.read_age_ns.get(uuid, 0)))
            failed.add_metric([str(g.index)], health.readings_failed.get(uuid, 0))
        yield from (power, floor, age, failed)
        oldest = 0 if health.oldest_unsettled_age_ns is None else health.oldest_unsettled_age_ns
        plain: tuple[tuple[str, str, float], ...] = (
            ("energyd_unsettled_age_seconds", "Age of the oldest window that is not settled.", seconds(oldest)),
            ("energyd_queries_in_flight", "Queries being served now.", health.open_queries),
            ("energyd_proxy_workers", "Proxy workers that settlement waits for.", health.workers),
            (
                "energyd_clock_step_seconds",
                "How far the wall clock has moved from ledger time.",
                seconds(health.wall_step_ns),
            ),
        )
        for name, text, value in plain:
            yield GaugeMetricFamily(name, text, value=value)
        counts = (
            ("energyd_late_queries", "Queries reported after their time was settled.", health.late_queries),
            ("energyd_proxy_events_dropped", "Events lost to a full outbox or spool.", health.dropped_events),
            ("energyd_ledger_failures", "Writes that the ledger refused (disk full, for one).", health.ledger_failures),
        )
        for name, text, value in counts:
            yield CounterMetricFamily(name, text, value=value)
        info = GaugeMetricFamily("energyd_build_info", "Always 1; the version is a label.", labels=["version"])
        info.add_metric([version("energyd")], 1)
        yield info

    def page(self, health: Health) -> bytes:
        """The text of `/metrics`."""
        scrape = CollectorRegistry()
        scrape.register(_Fixed(self.families(health)))
        return generate_latest(scrape) + generate_latest(self.registry)


class _Fixed(Collector):
    """Families that were made a moment ago."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def per_model(rows: Iterable[Row]) -> list[dict[str, object]]:
    """Finished queries summed by model, with Wh per 1,000 queries by basis (None: no query has an energy)."""
    sums: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    keys = ("queries", "prompt_tokens", "completion_tokens", "energy_unknown", "active_uj", "standing_uj")
    for row in rows:
        for key in keys:
            sums[row["model"] or "other"][key] += row[key]
    result: list[dict[str, object]] = []
    for name, s in sorted(sums.items()):
        known = s["queries"] - s["energy_unknown"]
        result.append(
            {
                "model": name,
                **s,
                "active_wh_per_1000": watt_hours(s["active_uj"]) / known * 1000 if known else None,
                "serving_wh_per_1000": watt_hours(s["active_uj"] + s["standing_uj"]) / known * 1000 if known else None,
            }
        )
    return result
