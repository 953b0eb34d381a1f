"""Statistics of a run (pure): energy per query by basis, latency, rates, and why the figures are not official.

On the whole GPU the energy of failed requests cannot be told from that of good ones, so `gpu_run` divides all of it by
the good queries, as upstream does; a run with more than 1 % failures is not ratable at all.
None means unknown, never 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np

from energyd.daemon.records import Source
from energyd.daemon.units import MW_PER_W, NS_PER_S, joules, mean_power_mw, seconds, watt_hours
from energyd.daemon.wire import EnergyAnswer, GpuEnergy

from .load import INTERRUPTED, Row
from .tasks import Task

MAX_FAILED_SHARE: Final = 0.01
"""Above this share of failed requests a run is not rated."""
_QUERIES: Final = 1_000
"""Energies are stated per 1,000 queries."""
_SHOWN_FAILURES: Final = 20
_OFFICIAL_HARDWARE: Final = ("H100", "80GB")


@dataclass(frozen=True, slots=True)
class Energy:
    """What the daemon answered, for the GPUs of the run. Energies in µJ, power in mW; None: unknown.

    `active_uj` and `standing_uj` are sums over `queries_with_energy` of the run's `queries` measured queries.
    """

    gpu_run_uj: int
    u_uj: float
    source: str
    hardware: str
    gpus: int
    settled: bool
    active_uj: int | None
    standing_uj: int | None
    queries: int | None
    queries_with_energy: int | None
    idle_mw: int | None


@dataclass(frozen=True, slots=True)
class Setup:
    """What of the set-up decides whether a figure is official."""

    task: Task
    batch_size: int
    max_new_tokens: int
    precision: str | None
    engine: str
    hardware: str | None
    dataset_is_sample: bool
    dataset_verified: bool
    interrupted: bool


def energy(answer: EnergyAnswer, chosen: Sequence[str], idle_mw: int | None) -> Energy | None:
    """The daemon's answer restricted to the `chosen` GPUs (UUID or index; empty: all); None without any GPU."""
    gpus = select(answer.gpus, chosen)
    if not gpus:
        return None
    return Energy(
        gpu_run_uj=sum(g.energy_uj for g in gpus),
        u_uj=math.sqrt(sum(g.u_uj**2 for g in gpus)),
        source="+".join(sorted({g.source for g in gpus})),
        hardware=hardware([g.name for g in gpus]),
        gpus=len(gpus),
        settled=answer.settled and answer.complete,
        active_uj=answer.active_uj,
        standing_uj=answer.standing_uj,
        queries=answer.queries,
        queries_with_energy=answer.queries_with_energy,
        idle_mw=idle_mw,
    )


def select(gpus: Sequence[GpuEnergy], chosen: Sequence[str]) -> list[GpuEnergy]:
    """The GPUs named by UUID or index; all of them if none is named."""
    return [g for g in gpus if not chosen or g.uuid in chosen or str(g.index) in chosen]


def mean_mw(answer: EnergyAnswer, chosen: Sequence[str], duration_ns: int) -> int | None:
    """Mean power (mW) of the chosen GPUs over a span; None if the meter has not read past it, or knows none."""
    gpus = select(answer.gpus, chosen)
    if not gpus or not answer.complete or duration_ns <= 0:
        return None
    return mean_power_mw(sum(g.energy_uj for g in gpus), duration_ns)


def hardware(names: Sequence[str]) -> str:
    """GPU names for people: `NVIDIA H200`, or `2x NVIDIA H200`."""
    counted = {name: names.count(name) for name in sorted(names)}
    return ", ".join(name if n == 1 else f"{n}x {name}" for name, n in counted.items())


def summarise(rows: Sequence[Row], found: Energy | None, setup: Setup, gap: "Gap") -> dict[str, Any]:
    """The summary of the measured `rows`, JSON-able; keys as `daemon.records.Run` lists them, and more."""
    good = [r for r in rows if r.ok]
    failed = _failed(rows)
    start_ns, end_ns = span(rows)
    tokens = _total([r.completion_tokens for r in good])
    return {
        "n": len(good),
        "sent": len(rows),
        "failed": failed,
        "failed_share": failed / len(rows) if rows else None,
        "failures": _failures(rows),
        "span_s": seconds(end_ns - start_ns) if rows else None,
        **_energies(found, len(good), tokens),
        **_quantiles([r.end_ns - r.start_ns for r in good], ""),
        **_quantiles([r.first_byte_ns - r.start_ns for r in good if r.first_byte_ns is not None], "first_byte_"),
        "queries_per_s": _rate(len(good), end_ns - start_ns),
        "prompt_tokens": _total([r.prompt_tokens for r in good]),
        "completion_tokens": tokens,
        "tokens_per_s": None if tokens is None else _rate(tokens, end_ns - start_ns),
        "tokens_source": "+".join(sorted({r.tokens_source for r in good})) or None,
        "queries_other_length": _other_length(good, setup),
        "client_gap_s": gap.mean_s,
        "client_gap_share": gap.share,
        "with_query_id": sum(r.query_id is not None for r in rows),
        "hardware": setup.hardware or (found.hardware if found else None),
        "engine": setup.engine,
        "not_official_because": not_official(rows, found, setup),
    }


@dataclass(frozen=True, slots=True)
class Gap:
    """The client's own pauses between groups: mean seconds, and share of the run (0 to 1); None with a single group."""

    mean_s: float | None
    share: float | None


def gaps(rows: Sequence[Row], batch_size: int) -> Gap:
    """Pauses between the last answer of a group and the first request of the next: what the client adds to a run."""
    ordered = sorted(rows, key=lambda r: r.idx)
    grouped = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    pauses = [
        max(0, min(r.start_ns for r in after) - max(r.end_ns for r in before)) for before, after in pairwise(grouped)
    ]
    start_ns, end_ns = span(rows)
    if not pauses or end_ns == start_ns:
        return Gap(None, None)
    return Gap(seconds(sum(pauses) / len(pauses)), sum(pauses) / (end_ns - start_ns))


def span(rows: Sequence[Row]) -> tuple[int, int]:
    """First request to last answer, monotonic ns; (0, 0) without rows."""
    return (min(r.start_ns for r in rows), max(r.end_ns for r in rows)) if rows else (0, 0)


def is_ratable(rows: Sequence[Row]) -> bool:
    """Whether enough requests succeeded for the run to stand."""
    return any(r.ok for r in rows) and _failed(rows) <= MAX_FAILED_SHARE * len(rows)


def not_official(rows: Sequence[Row], found: Energy | None, setup: Setup) -> list[str]:
    """Every difference from the official set-up, one phrase each; empty: none."""
    task = setup.task
    sent, other = len(rows), _other_length([r for r in rows if r.ok], setup)
    where = setup.hardware or (found.hardware if found else None)
    failed = _failed(rows)
    return [
        reason
        for reason, applies in (
            (f"hardware is {where or 'unknown'}, not one H100-80GB", not _official_hardware(where)),
            (f"a server over HTTP ({setup.engine}), not transformers in process", True),
            ("sample dataset of energyd, not the standard one", setup.dataset_is_sample),
            (
                f"dataset not verified to be {task.dataset.dataset_id}",
                not setup.dataset_is_sample and not setup.dataset_verified,
            ),
            (f"{sent} queries, not {task.dataset.count}", sent != task.dataset.count),
            (f"batch {setup.batch_size}, not 1", setup.batch_size != 1),
            (
                f"{setup.max_new_tokens} new tokens, not {task.max_new_tokens}",
                setup.max_new_tokens != task.max_new_tokens,
            ),
            (f"{other} answers not known to have exactly {setup.max_new_tokens} tokens", bool(other)),
            (f"precision {setup.precision or 'not stated'}, not {task.precision}", setup.precision != task.precision),
            ("no energy was measured", found is None),
            (
                f"energy source is {found.source if found else ''}",
                found is not None and found.source != Source.NVML_COUNTER,
            ),
            (f"{found.gpus if found else 0} GPUs counted, not one", found is not None and found.gpus != 1),
            ("figures were provisional when the run ended", found is not None and not found.settled),
            (f"{failed} of {sent} requests failed (more than 1 %): not ratable", failed > MAX_FAILED_SHARE * sent),
            ("no request succeeded: not ratable", not any(r.ok for r in rows)),
            ("interrupted", setup.interrupted),
        )
        if applies
    ]


def _energies(found: Energy | None, good: int, tokens: int | None) -> dict[str, Any]:
    none = {
        "source": None, "gpu_run_wh": None, "wh_per_query": None, "gpu_run_wh_per_1000": None,
        "serving_wh_per_1000": None, "active_wh_per_1000": None, "rel_u": None, "abs_u_wh": None, "idle_w": None,
        "j_per_token": None,
        "active_j_per_token": None, "gpus": None, "provisional": None, "queries_with_energy": None,
    }  # fmt: skip
    if found is None:
        return none
    active = _whole(found, found.active_uj)
    standing = _whole(found, found.standing_uj)
    serving = None if active is None or standing is None else active + standing
    return none | {
        "source": found.source,
        "gpu_run_wh": watt_hours(found.gpu_run_uj),
        "wh_per_query": watt_hours(found.gpu_run_uj) / good if good else None,
        "gpu_run_wh_per_1000": _per_1000(found.gpu_run_uj, good),
        "serving_wh_per_1000": _per_1000(serving, good),
        "active_wh_per_1000": _per_1000(active, good),
        "rel_u": found.u_uj / found.gpu_run_uj if found.gpu_run_uj else None,
        "abs_u_wh": _per_1000(found.u_uj, good),
        "idle_w": None if found.idle_mw is None else found.idle_mw / MW_PER_W,
        "j_per_token": joules(found.gpu_run_uj) / tokens if tokens else None,
        "active_j_per_token": joules(active) / tokens if tokens and active is not None else None,
        "gpus": found.gpus,
        "provisional": not found.settled,
        "queries_with_energy": found.queries_with_energy,
    }


def _whole(found: Energy, part_uj: int | None) -> float | None:
    """The sum over all of the run's queries, from those that have a figure: the others are taken to be like them."""
    if part_uj is None or not found.queries or not found.queries_with_energy:
        return None
    return part_uj * found.queries / found.queries_with_energy


def _per_1000(energy_uj: float | None, good: int) -> float | None:
    return None if energy_uj is None or not good else watt_hours(energy_uj) / good * _QUERIES


def _quantiles(durations_ns: Sequence[int], name: str) -> dict[str, float | None]:
    keys = {f"{name}p50_s": 50, f"{name}p95_s": 95, f"{name}p99_s": 99}
    if not durations_ns:
        return dict.fromkeys([*keys, f"{name}mean_s"])
    durations_s = np.asarray(durations_ns, dtype=np.float64) / NS_PER_S
    found = np.percentile(durations_s, list(keys.values()))
    quantiles: dict[str, float | None] = {key: float(value) for key, value in zip(keys, found, strict=True)}
    return quantiles | {f"{name}mean_s": float(durations_s.mean())}


def _total(counts: Sequence[int | None]) -> int | None:
    """The sum; None if any is unknown, since a partial sum would pass for the whole."""
    known = [c for c in counts if c is not None]
    return sum(known) if known and len(known) == len(counts) else None


def _other_length(good: Sequence[Row], setup: Setup) -> int | None:
    """How many answers are not reported to have the protocol's number of tokens; None where it fixes none."""
    if not setup.task.fixed_tokens:
        return None
    return sum(r.completion_tokens != setup.max_new_tokens or r.tokens_source != "response" for r in good)


def _failed(rows: Sequence[Row]) -> int:
    """Requests that failed; those that the user cut off did not fail."""
    return sum(not r.ok and r.error != INTERRUPTED for r in rows)


def _rate(count: int, duration_ns: int) -> float | None:
    return count / seconds(duration_ns) if duration_ns > 0 else None


def _failures(rows: Sequence[Row]) -> list[Mapping[str, Any]]:
    bad = [r for r in rows if not r.ok and r.error != INTERRUPTED]
    return [{"idx": r.idx, "http_status": r.http_status, "error": r.error} for r in bad[:_SHOWN_FAILURES]]


def _official_hardware(name: str | None) -> bool:
    if name is None or name[:1].isdigit():
        return False
    return all(part in name.upper().replace(" ", "").replace("-", "") for part in _OFFICIAL_HARDWARE)
