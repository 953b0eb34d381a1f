"""What a reader must know beside the stars: notes of a cohort, warnings of a rating. Pure.

A star is relative to the best and the worst of its cohort, so what those two are matters as much as the figure itself.
"""

from collections.abc import Callable, Iterable, Sequence

from .cohort import Cohort, Grade, Setup
from .figures import significant

FEW = 5
"""Below this many models not all stars can be given."""
_CROWDED = 0.8
"""Share of the other models with 5 stars from which on the worst one is called an outlier."""
_COMPARED: tuple[tuple[str, Callable[[Setup], str | None]], ...] = (
    ("basis", lambda s: s.basis),
    ("source", lambda s: s.source),
    ("hardware", lambda s: s.hardware),
    ("engine", lambda s: s.engine),
    ("precision", lambda s: s.precision),
    ("protocol", lambda s: s.protocol),
    ("dataset", lambda s: s.dataset),
    ("batch size", lambda s: s.batch_size),
)
_NAMES_MAX = 3


def cohort_notes(cohort: Cohort) -> tuple[str, ...]:
    """Notes of one cohort, the most important first."""
    return (
        *warnings(cohort.grades),
        *_not_official(cohort.grades),
        *_guessed(cohort.grades),
        *_clamped(cohort),
        *_spread(cohort),
        *_unsure(cohort.grades),
        *_standing(cohort.grades),
        *_zeros(cohort.grades),
    )


def warnings(grades: Sequence[Grade]) -> tuple[str, ...]:
    """A line that names what differs between the set-ups of rated figures; none if nothing does."""
    rated = [g.entry.setup for g in grades if g.stars is not None]
    differing = []
    for name, read in _COMPARED:
        values = sorted({read(setup) or "not stated" for setup in rated})
        if len(values) > 1:
            differing.append(f"{name} ({', '.join(values)})")
    return (f"warning: these figures differ in {'; '.join(differing)}: compare with care",) if differing else ()


def _not_official(grades: Sequence[Grade]) -> Iterable[str]:
    """What all share is said once, what sets some apart by their names."""
    reasons = [g.entry.setup.not_official for g in grades]
    shared = [r for r in reasons[0] if all(r in other for other in reasons)] if len(grades) > 1 else []
    if shared:
        yield f"not official (every figure here): {'; '.join(shared)}"
    by_reason: dict[tuple[str, ...], list[Grade]] = {}
    for grade in grades:
        if own := tuple(r for r in grade.entry.setup.not_official if r not in shared):
            by_reason.setdefault(own, []).append(grade)
    for own, members in by_reason.items():
        yield f"not official ({_names(members, grades)}): {'; '.join(own)}"


def _guessed(grades: Sequence[Grade]) -> Iterable[str]:
    if guessed := [g for g in grades if g.entry.setup.class_guessed]:
        yield f"class guessed from the name ({_names(guessed, grades)}): state it with --model-class MODEL=CLASS"


def _clamped(cohort: Cohort) -> Iterable[str]:
    if cohort.bands is None:
        return
    for grade in cohort.grades:
        if grade.clamped is not None:
            end, edge = ("best", cohort.bands.best) if grade.clamped == "below" else ("worst", cohort.bands.worst)
            yield (
                f"clamped ({_label(grade, cohort.grades)}): {_figure(grade)} lies {grade.clamped} the edition's {end}, "
                f"{significant(edge)}; its {grade.stars} stars say no more than that"
            )


def _spread(cohort: Cohort) -> Iterable[str]:
    counts, n = _star_counts(cohort)
    if cohort.bands is None or not n:
        return
    whose = "in the published cohort" if cohort.frozen else "here"
    others = n - 1
    if n >= 3 and counts[4] == 1 and counts[0] >= _CROWDED * others:
        culprit = f"the worst model {whose}" if cohort.frozen else _label(cohort.grades[-1], cohort.grades)
        yield (
            f"outlier: {culprit} ({significant(cohort.bands.worst)}) alone sets the width of the bands and "
            f"gives {counts[0]} of the other {others} models 5 stars; look at rank and ratio instead"
        )
    elif n < FEW:
        yield f"only {n} models {whose}: the best is always 5 stars, the worst always 1"


def _star_counts(cohort: Cohort) -> tuple[Sequence[int], int]:
    if cohort.frozen:
        return cohort.frozen.star_counts, cohort.frozen.n
    return [sum(g.stars == s for g in cohort.grades) for s in (5, 4, 3, 2, 1)], len(cohort.grades)


def _unsure(grades: Sequence[Grade]) -> Iterable[str]:
    for grade in grades:
        if grade.stars_within_u and grade.stars_within_u[0] != grade.stars_within_u[1]:
            low, high = grade.stars_within_u
            yield f"unsure ({_label(grade, grades)}): within ± one standard deviation it is {low} to {high} stars"


def _standing(grades: Sequence[Grade]) -> Iterable[str]:
    """Whole-GPU figures of small models at batch 1 measure the host's latency times the GPU's idle power."""
    mostly = []
    for grade in grades:
        whole, active = grade.entry.energy_wh_per_1000, grade.entry.setup.active_wh_per_1000
        if grade.entry.setup.basis == "gpu_run" and whole and active is not None and active < 0.5 * whole:
            mostly.append(grade)
    if mostly:
        yield (
            f"mostly idle watts x latency ({_names(mostly, grades)}): less than half of the figure was caused by the "
            "queries; another host with the same GPU can differ by 2x. See the active column"
        )


def _zeros(grades: Sequence[Grade]) -> Iterable[str]:
    if zeros := [g for g in grades if g.entry.energy_wh_per_1000 == 0]:
        yield f"zero ({_names(zeros, grades)}): 0 Wh is what a meter reports that could not read the GPU"


def _names(some: Sequence[Grade], grades: Sequence[Grade]) -> str:
    names = [_label(g, grades) for g in some]
    more = len(names) - _NAMES_MAX
    return ", ".join(names[:_NAMES_MAX]) + (f" and {more} more" if more > 0 else "")


def _label(grade: Grade, grades: Sequence[Grade]) -> str:
    """The model, with its rank where the cohort has several figures of it."""
    name = grade.entry.model
    return f"{name} [rank {grade.rank}]" if sum(g.entry.model == name for g in grades) > 1 else name


def _figure(grade: Grade) -> str:
    return "?" if grade.entry.energy_wh_per_1000 is None else significant(grade.entry.energy_wh_per_1000)
