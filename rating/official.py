"""What sets a figure apart from an official one. Pure.

Official is: the GPU energy of a whole run on an H100-80GB, measured, batch size 1, transformers in process, with the
standard dataset, protocol and precision. The bench knows the last ones and says so in the run; what can be seen
in the stored run itself is checked here as well, so that no run passes for official because nobody looked.
"""

from collections.abc import Sequence

from energyd.daemon.records import Basis, Source

from .cohort import Setup

HARDWARE = "H100-80GB"
ESTIMATED = frozenset({Source.ESTIMATE.value, Source.EMULATED.value})
"""Sources that measured nothing: refused unless asked for, and then marked. Published editions hold none."""
REFUSED = "source {source}, not a measurement: rated only with --include-estimates"


def is_official_hardware(name: str) -> bool:
    """Whether a device name as the driver tells it is the method's own; an H100 NVL has 94 GB and is not."""
    told = name.upper().replace(" ", "").replace("-", "")
    return "H100" in told and ("80GB" in told or "PCIE" in told)


def is_estimated(source: str | None) -> bool:
    """Whether any part of a source (several GPUs: joined by '+') measured nothing. False where no source is stated."""
    return source is not None and any(part in ESTIMATED for part in source.split("+"))


def deviations(setup: Setup, told: Sequence[str] = ()) -> tuple[str, ...]:
    """Why a figure is not official: the reasons `told` by the bench, then what the set-up shows beyond them.

    Fields of `setup` that are None say nothing. Empty: nothing speaks against it.
    """
    mentioned = " ".join(told).lower()
    found = list(told)
    if setup.hardware and not is_official_hardware(setup.hardware) and not _any_of(mentioned, "hardware", "h100"):
        found.append(f"hardware {setup.hardware}, not {HARDWARE}")
    if is_estimated(setup.source) and str(setup.source) not in mentioned:
        found.append(f"source {setup.source}, not a measurement")
    if setup.basis and setup.basis != Basis.GPU_RUN:
        found.append(f"basis {setup.basis}, not {Basis.GPU_RUN.value}")
    if setup.batch_size and setup.batch_size != "1" and "batch" not in mentioned:
        found.append(f"batch size {setup.batch_size}, not 1")
    if (
        setup.engine
        and not setup.engine.lower().startswith("transformers")
        and not _any_of(mentioned, "engine", "process")
    ):
        found.append(f"engine {setup.engine}, not transformers in process")
    return tuple(found)


def _any_of(text: str, *words: str) -> bool:
    return any(word in text for word in words)
