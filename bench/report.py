"""The report of a run for people, and its JSON form (pure)."""

from collections.abc import Iterable, Mapping
from typing import Any

from .order import Order, Outcome
from .tasks import Task

_BASES = (
    ("gpu_run", "whole GPU over the run"),
    ("serving", "active plus idle watts while served"),
    ("active", "what the queries caused"),
)

_MOSTLY = 0.5
"""Below this active share of the whole-GPU figure the report says that the rest is idle power."""

_ABOVE = 1.05
"""The queries' own energies can exceed the run's only by what lies in the windows at its two edges."""


def as_json(outcome: Outcome, order: Order) -> dict[str, Any]:
    """One object: the run as it is stored, without prompts."""
    return {
        "run_id": outcome.run_id,
        "status": outcome.status,
        "stored": outcome.stored,
        "task": order.task.task_id,
        "model": order.model,
        "batch_size": order.batch_size,
        "url": outcome.url,
        "provenance": outcome.provenance,
        "summary": outcome.summary,
    }


def text(outcome: Outcome, order: Order) -> str:
    """The report: energy by basis first, then time, then what keeps it from being official."""
    s = outcome.summary
    lines = [
        f"{order.task.title} · {order.model} · batch {order.batch_size} · {s['n']} queries"
        + (f" · {s['failed']} FAILED" if s["failed"] else "")
        + (f" · {outcome.status.upper()}" if outcome.status != "complete" else ""),
        " · ".join(
            [s["hardware"] or "hardware unknown", s["engine"], f"source {s['source'] or 'none'}", *_class(outcome)]
        ),
        "",
        *_energy(s),
        "",
        f"  latency      {_quantiles(s, '')}   mean {_s(s['mean_s'])}",
        f"  first byte   {_quantiles(s, 'first_byte_')}",
        f"  rate         {_n(s['queries_per_s'])} queries/s   {_n(s['tokens_per_s'])} tokens/s",
        f"  tokens       {_count(s['completion_tokens'])} (counted by: {s['tokens_source'] or 'nobody'})",
        f"  client gap   {_s(s['client_gap_s'])} between groups, {_percent(s['client_gap_share'])} of the run",
        *_failures(s),
        *_reasons(s["not_official_because"]),
        "",
        f"run {outcome.run_id}" + ("" if outcome.stored else " (not stored)"),
    ]
    return "\n".join(lines)


def task_table(tasks: Iterable[Task]) -> str:
    """The tasks, one a line."""
    rows = [("task", "protocol", "dataset", "queries", "new tokens", "precision", "bench")]
    for t in tasks:
        tokens = "-" if t.max_new_tokens is None else str(t.max_new_tokens)
        ready = "ready" if t.implemented else "not yet"
        rows.append((t.task_id, t.protocol, t.dataset.dataset_id, str(t.dataset.count), tokens, t.precision, ready))
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def task_json(task: Task) -> dict[str, Any]:
    """One task as JSON."""
    return {
        "task": task.task_id,
        "title": task.title,
        "pipeline": task.pipeline,
        "implemented": task.implemented,
        "protocol": task.protocol,
        "precision": task.precision,
        "has_classes": task.has_classes,
        "default_model": task.default_model,
        "phases": list(task.phases),
        "apis": list(task.apis),
        "dataset": task.dataset.dataset_id,
        "columns": list(task.dataset.columns),
        "count": task.dataset.count,
        "sample": task.dataset.sample,
        "parameters": dict(task.parameters),
    }


def _energy(s: Mapping[str, Any]) -> list[str]:
    if s["source"] is None:
        return ["  energy       not measured"]
    mark = "   PROVISIONAL" if s["provisional"] else ""
    lines = [f"  Wh per 1,000 queries{mark}"]
    for basis, meaning in _BASES:
        value = s[f"{basis}_wh_per_1000"]
        error = f" ± {s['abs_u_wh']:.2g}" if basis == "gpu_run" and value is not None else ""
        lines.append(f"    {basis:<9} {_n(value)}{error}   ({meaning})")
    lines += [
        *_cautions(s),
        "",
        f"  idle         {_n(s['idle_w'])} W",
        f"  per token    {_n(s['j_per_token'])} J, of it caused {_n(s['active_j_per_token'])} J",
    ]
    return lines


def _cautions(s: Mapping[str, Any]) -> list[str]:
    """What a reader would otherwise take the figures for."""
    lines = []
    whole, active = s["gpu_run_wh_per_1000"], s["active_wh_per_1000"]
    if whole and active is not None and active < _MOSTLY * whole:
        share = _percent(active / whole)
        lines.append(
            f"    only {share} of gpu_run was caused by the queries: the rest is idle power during this path's latency"
        )
    if whole and s["serving_wh_per_1000"] is not None and s["serving_wh_per_1000"] > _ABOVE * whole:
        lines.append(
            f"    serving exceeds gpu_run: in a run of {_s(s['span_s'])} the edges of the 1 s windows weigh; take more samples"
        )
    if str(s["source"]).startswith("nvml"):
        lines.append(
            "    ± is one standard deviation for comparisons on this GPU; absolute figures add the sensor's ±5 %"
        )
    return lines


def _class(outcome: Outcome) -> list[str]:
    found, source = outcome.provenance["model_class"], outcome.provenance["model_class_source"]
    guessed = " (guessed from the name, see --model-class)" if source == "name" else ""
    return [f"class {found}{guessed}"] if found else []


def _quantiles(s: Mapping[str, Any], name: str) -> str:
    return "   ".join(f"{q} {_s(s[f'{name}{q}_s'])}" for q in ("p50", "p95", "p99"))


def _failures(s: Mapping[str, Any]) -> list[str]:
    if not s["failed"]:
        return []
    lines = ["", f"  {s['failed']} of {s['sent']} requests failed; their energy is part of gpu_run:"]
    lines += [f"    sample {f['idx']}: {f['error']}" for f in s["failures"][:5]]
    return lines


def _reasons(reasons: Iterable[str]) -> list[str]:
    found = list(reasons)
    return ["", "  not official:", *(f"    - {r}" for r in found)] if found else []


def _count(value: int | None) -> str:
    return "unknown" if value is None else str(value)


def _n(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _s(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g} s"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.2g} %"
