"""How much did the GPUs draw over a span, and what of it did a run's queries get? For the bench."""

from collections.abc import Sequence

from .ledger import Ledger
from .records import Gpu, Window, WindowKind
from .settlement import Books
from .wire import EnergyAnswer, GpuEnergy


def span_energy_uj(windows: Sequence[Window], start_ns: int, end_ns: int) -> tuple[int, int]:
    """Energy over [start, end) and one standard deviation, µJ; slices that reach over an edge count by their share.

    The counter is exact over whole windows; the uncertainty is that of the two windows at the edges.
    """
    energy = 0.0
    edges = [0, 0]
    for w in windows:
        if w.kind is not WindowKind.METERED:
            continue
        for c in w.slices:
            inside_ns = min(c.end_ns, end_ns) - max(c.start_ns, start_ns)
            if inside_ns > 0:
                energy += c.energy_uj * inside_ns / (c.end_ns - c.start_ns)
        if w.start_ns <= start_ns < w.end_ns:
            edges[0] = w.u_uj
        if w.start_ns < end_ns <= w.end_ns:
            edges[1] = w.u_uj
    return round(energy), round((edges[0] ** 2 + edges[1] ** 2) ** 0.5)


def energy_answer(
    ledger: Ledger, books: Books, gpus: Sequence[Gpu], start_ns: int, end_ns: int, run_id: str | None
) -> EnergyAnswer:
    """The answer to a `wire.EnergyQuestion`, times in ledger time; with a run, only the GPUs of its servers count."""
    served_by = books.gpus_of_servers(ledger.run_servers(run_id)) if run_id else None
    chosen = [g for g in gpus if not served_by or g.uuid in served_by]
    complete, parts = bool(chosen), []
    for gpu in chosen:
        windows = ledger.windows_between(gpu.uuid, start_ns, end_ns)
        complete &= bool(windows) and windows[-1].end_ns >= end_ns
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
