"""How much did the GPUs draw over a span, and what of it did a run's queries get? For the bench."""

import math
from collections.abc import Sequence

from .ledger import Ledger
from .records import Gpu, Slice, Window, WindowKind
from .settlement import Books
from .wire import EnergyAnswer, GpuEnergy

_KNOWN = (WindowKind.METERED, WindowKind.OUTAGE)


def span_energy_uj(windows: Sequence[Window], start_ns: int, end_ns: int) -> tuple[int, int]:
    """Energy over [start, end) and one standard deviation, µJ; slices that reach over an edge count by their share.

    The counter is exact over whole windows, also over those in which the daemon was away; the uncertainty is that of the
    two windows at the edges, which is large where such a window has no shape. Energy that nobody knows (gap, reset) is
    not in it: see `known_throughout`.
    """
    energy, part = 0, 0.0
    edges = [0, 0]
    for w in windows:
        if w.energy_uj is None or w.kind not in _KNOWN:
            continue
        for c in w.slices or (Slice(w.start_ns, w.end_ns, w.energy_uj),):
            inside_ns = min(c.end_ns, end_ns) - max(c.start_ns, start_ns)
            if inside_ns == c.end_ns - c.start_ns:
                energy += c.energy_uj
            elif inside_ns > 0:
                part += c.energy_uj * inside_ns / (c.end_ns - c.start_ns)
        u_uj = w.u_uj if len(w.slices) > 1 else max(w.u_uj, round(w.energy_uj / math.sqrt(12)))
        if w.start_ns <= start_ns < w.end_ns:
            edges[0] = w.u_uj if w.start_ns == start_ns else u_uj
        if w.start_ns < end_ns <= w.end_ns:
            edges[1] = w.u_uj if w.end_ns == end_ns else u_uj
    return energy + round(part), round(math.hypot(*edges))


def known_throughout(windows: Sequence[Window], start_ns: int, end_ns: int) -> bool:
    """Whether these windows (all that touch the span, by time) cover [start, end) and no energy in it is unknown."""
    return (
        bool(windows)
        and min(w.start_ns for w in windows) <= start_ns
        and windows[-1].end_ns >= end_ns
        and all(w.kind in _KNOWN for w in windows)
    )


def energy_answer(
    ledger: Ledger, books: Books, gpus: Sequence[Gpu], start_ns: int, end_ns: int, run_id: str | None
) -> EnergyAnswer:
    """The answer to a `wire.EnergyQuestion`, times in ledger time; with a run, only the GPUs of its servers count."""
    served_by = books.gpus_of_servers(ledger.run_servers(run_id)) if run_id else None
    chosen = [g for g in gpus if not served_by or g.uuid in served_by]
    complete, parts = bool(chosen), []
    for gpu in chosen:
        windows = ledger.windows_between(gpu.uuid, start_ns, end_ns)
        complete &= known_throughout(windows, start_ns, end_ns)
        energy_uj, u_uj = span_energy_uj(windows, start_ns, end_ns)
        parts.append(
            GpuEnergy(gpu.uuid, gpu.index, gpu.name, str(gpu.source), energy_uj, u_uj, books.idle_floor_mw(gpu.uuid))
        )
    settled = books.settled_until_ns(g.uuid for g in chosen) >= end_ns
    if run_id is None:
        return EnergyAnswer(settled=settled, complete=complete, gpus=tuple(parts))
    row = ledger.run_energy(run_id)
    return EnergyAnswer(
        settled=settled and row["final"] >= row["joined"],
        complete=complete,
        gpus=tuple(parts),
        queries=row["queries"],
        queries_with_energy=row["with_energy"],
        active_uj=row["active_uj"],
        standing_uj=row["standing_uj"],
        prompt_tokens=row["prompt_tokens"],
        completion_tokens=row["completion_tokens"],
    )
