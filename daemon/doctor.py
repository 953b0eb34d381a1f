"""The judgement of `energyd doctor`: facts of a host in, findings out. Pure; `probe` takes the facts.

A finding says what was seen, what it means for the figures, and what to do. Three severities::

    problem   figures of this host would be wrong or missing: exit code 1
    warning   figures are right but worse than they could be, or something will bite later
    note      nothing to mend; worth knowing when figures are compared

Every limit below says what it was judged by. Measured ones are from an H200 with driver 580.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from .records import Source
from .units import MW_PER_W, NS_PER_MS, NS_PER_S, seconds, watts


class Severity(StrEnum):
    """How bad a finding is; see above."""

    PROBLEM = "problem"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call costs, ns: median and 99th percentile of its duration, median CPU time (None: not told), calls seen."""

    wall_ns: int
    wall_p99_ns: int
    cpu_ns: int | None
    calls: int


@dataclass(frozen=True, slots=True)
class Steps:
    """The grid on which the counter moves: each `period_ns`, give or take `scatter_ns` (rms), over `seen` steps.

    `phase_ns`: where in the period, rounded to whole ms and counted from unix 0, the first step of the probe fell.
    """

    period_ns: int
    phase_ns: int
    scatter_ns: int
    seen: int


@dataclass(frozen=True, slots=True)
class Ring:
    """The driver's power samples: how many it held and over which time, their median and widest distance, ns.

    `age_ns`: how far behind the read the newest one ended (median; negative: it claims to be of the future).
    """

    length: int
    span_ns: int
    gap_ns: int
    widest_gap_ns: int
    age_ns: int | None


@dataclass(frozen=True, slots=True)
class Ratio:
    """Energy by the samples over energy by the counter, with one standard deviation from the edges, over `over_ns`."""

    samples_to_counter: float
    u: float
    over_ns: int


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What was seen of one GPU. None: not told, or not found out.

    `readings` and `failed` count polls, `trouble` is the first failure's words. `lost`: it went away; `hung`: a driver
    call did not return. `counter_gain_mj` is what the counter gained over the probe, `floor_mw` the 10 % quantile of
    the samples (of the ring and the probe), `processes` the compute processes on it.
    """

    index: int
    uuid: str
    name: str
    driver: str
    source: Source
    power_limit_mw: int | None = None
    persistence: bool | None = None
    processes: int | None = None
    readings: int = 0
    failed: int = 0
    trouble: str | None = None
    lost: bool = False
    hung: bool = False
    probe_ns: int = 0
    counters: int = 0
    counter_gain_mj: int | None = None
    counter_fell: bool = False
    counter_cost: Cost | None = None
    samples_cost: Cost | None = None
    steps: Steps | None = None
    ring: Ring | None = None
    ratio: Ratio | None = None
    mean_power_mw: int | None = None
    floor_mw: int | None = None

    @property
    def method(self) -> str:
        """How this GPU would be metered."""
        if not self.counters:
            return "none: no energy counter answers"
        return "counter, shaped by samples" if self.ring else "counter alone"

    @property
    def core_share(self) -> float | None:
        """Share of one core that one poll a second costs; None if CPU time is not told."""
        costs = [c.cpu_ns for c in (self.counter_cost, self.samples_cost) if c is not None and c.cpu_ns is not None]
        return sum(costs) / NS_PER_S if costs else None

    @property
    def official_hardware(self) -> bool:
        """Whether it is the official hardware of the AI Energy Score, an H100 with 80 GB (an H100 NVL has 94)."""
        told = self.name.upper().replace(" ", "").replace("-", "")
        real = self.source in {Source.NVML_COUNTER, Source.NVML_POWER} and "MIG" not in told
        return real and "H100" in told and ("80GB" in told or "PCIE" in told)


@dataclass(frozen=True, slots=True)
class Node:
    """A device node of the driver: whether this user may read and write it."""

    path: str
    usable: bool


@dataclass(frozen=True, slots=True)
class Daemon:
    """A daemon that runs on this host: its version, how far the wall clock has moved from its ledger time, what is wrong."""

    version: str
    wall_step_ns: int
    troubles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What was seen of the host. `wall_step_ns`: how far the wall clock moved during the probe."""

    nodes: tuple[Node, ...]
    wall_step_ns: int
    daemon: Daemon | None
    gpus: tuple[GpuFacts, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth saying. `where`: `host` or `GPU <index>`; `remedy` is empty where there is nothing to do."""

    severity: Severity
    where: str
    what: str
    meaning: str
    remedy: str = ""


SLOW_READ_NS: Final = 50 * NS_PER_MS
"""A counter read took 14 ms at the 99th percentile on an H200; slower ones blur each anchor by as much."""
DEAR_SHARE: Final = 0.02
"""One poll a second costs 0.4 to 0.5 % of a core; four times that is worth a word."""
COARSE_STEP_NS: Final = 250 * NS_PER_MS
"""Steps are 20 to 100 ms by model; wider ones make short windows uncertain."""
COARSE_SAMPLES_NS: Final = 60 * NS_PER_MS
"""Samples come every 20 ms."""
HOLE_NS: Final = 200 * NS_PER_MS
"""What the meter takes for a hole in the samples."""
SHORT_RING_NS: Final = 1200 * NS_PER_MS
"""Samples are fetched once a second: a ring that reaches back less leaves holes (an H200's: 2.4 s)."""
RATIO_WARNS: Final = 0.03
"""Probes of 6 s at 40 places of a recorded H200 under serving scatter by 0.8 % (rms), of 2 s by 2.2 %; a sensor
that looks a quarter of the time is off by far more when the load changes. The stated u, three times, comes on top."""
RATIO_SPOILS: Final = 0.15
OLD_SAMPLE_NS: Final = 500 * NS_PER_MS
FUTURE_SAMPLE_NS: Final = 50 * NS_PER_MS
STEPPED_NS: Final = 10 * NS_PER_MS
DAEMON_STEPPED_NS: Final = NS_PER_S
OVER_LIMIT: Final = 1.2
FAILING_SHARE: Final = 0.1
_WATCH_MW: Final = 1 * MW_PER_W
"""A counter that gains less than 1 W is taken to stand still: no GPU idles that low."""


def examine(host: HostFacts) -> tuple[Finding, ...]:
    """All findings, the worst first; those of equal severity by place."""
    found = [*_of_host(host), *(f for gpu in host.gpus for f in _of_gpu(gpu))]
    order = list(Severity)
    return tuple(sorted(found, key=lambda f: order.index(f.severity)))


def verdict(findings: Sequence[Finding]) -> Severity | None:
    """The worst severity that asks for something; None if measurements are as good as this host allows."""
    found = {f.severity for f in findings} - {Severity.NOTE}
    return Severity.PROBLEM if Severity.PROBLEM in found else Severity.WARNING if found else None


def _of_host(host: HostFacts) -> Iterator[Finding]:
    shut = [node.path for node in host.nodes if not node.usable]
    if shut:
        yield Finding(
            Severity.WARNING, "host", f"this user may not use {', '.join(shut)}",
            "those GPUs cannot be metered by this user",
            "add the user to the group that owns them, or give the container the GPUs (`--gpus all`)",
        )  # fmt: skip
    if abs(host.wall_step_ns) > STEPPED_NS:
        yield Finding(
            Severity.WARNING, "host", f"the wall clock moved by {seconds(host.wall_step_ns):+.3f} s during the probe",
            "the driver stamps its samples with that clock: samples around the step are left out",
            "let NTP slew and not step (chrony: `makestep` only at boot)",
        )  # fmt: skip
    if host.daemon is None:
        return
    yield Finding(
        Severity.NOTE, "host", f"energyd {host.daemon.version} runs on this host",
        "the probe read beside it; both had to share the driver for those seconds, so costs may look high",
    )  # fmt: skip
    if abs(host.daemon.wall_step_ns) > DAEMON_STEPPED_NS:
        yield Finding(
            Severity.WARNING, "host",
            f"the wall clock is {seconds(host.daemon.wall_step_ns):+.3f} s away from the daemon's ledger time",
            "durations and energies are right; times in its tables are off by that much until the next boot",
            "check NTP",
        )  # fmt: skip
    for trouble in host.daemon.troubles:
        yield Finding(
            Severity.PROBLEM, "host", f"the running daemon says: {trouble}",
            "it has no fresh reading of that GPU", "see the daemon's log and the findings of that GPU",
        )  # fmt: skip


def _of_gpu(gpu: GpuFacts) -> Iterator[Finding]:
    def found(severity: Severity, what: str, meaning: str, remedy: str = "") -> Finding:
        return Finding(severity, f"GPU {gpu.index}", what, meaning, remedy)

    problem, warning, note = Severity.PROBLEM, Severity.WARNING, Severity.NOTE
    if gpu.hung:
        yield found(
            problem, "a call to the driver did not return", "nothing can be metered until it does",
            "look for Xid lines in the kernel's log; reset the GPU or reboot",
        )  # fmt: skip
        return
    if gpu.lost:
        yield found(
            problem, f"it went away during the probe: {gpu.trouble}",
            "its energy from then until it is back is unknown (a gap), or booked as an outage",
            "look for Xid lines in the kernel's log; reset the GPU or reboot",
        )  # fmt: skip
    elif gpu.failed:
        often = gpu.failed > FAILING_SHARE * gpu.readings
        yield found(
            problem if often else warning, f"{gpu.failed} of {gpu.readings} readings failed: {gpu.trouble}",
            "windows get longer; no energy is lost while the counter goes on" if not often else "too few readings are left",
            "look for Xid lines in the kernel's log and for other tools that poll the driver hard",
        )  # fmt: skip
    yield from (found(*finding) for finding in _of_counter(gpu))
    if gpu.counters:
        yield from (found(*finding) for finding in _of_samples(gpu))
    if gpu.source is Source.ESTIMATE or gpu.source is Source.EMULATED or gpu.source is Source.RECORDING:
        yield found(
            warning, f"its figures are of the source `{gpu.source}`", "nothing of this host is measured; ratings refuse it",
            "use --sensor nvml on a host with an NVIDIA GPU",
        )  # fmt: skip
        return
    if gpu.source is Source.NVML_POWER:
        yield found(
            warning, "it has no energy counter: its power readings are summed up",
            "what flows between two readings is guessed; figures carry the source `nvml-power`",
            "it takes a Volta GPU or newer and no vGPU guest",
        )  # fmt: skip
    if "GH200" in gpu.name:
        yield found(
            note, "its counter covers the module, the CPU in it as well",
            "figures hold more than those of a GPU alone and do not compare with them",
        )  # fmt: skip
    if gpu.persistence is False:
        yield found(
            warning, "persistence mode is off",
            "the driver may unload when nobody uses the GPU, and its energy counter restarts then: what flowed unseen is lost",
            "run nvidia-persistenced, or `nvidia-smi -pm 1`",
        )  # fmt: skip
    if "(MIG)" in gpu.name:
        yield found(
            warning, "MIG is on", "counter and samples are of the whole GPU: its instances cannot be metered apart",
            "meter the whole GPU, or switch MIG off",
        )  # fmt: skip
    if not gpu.official_hardware:
        yield found(
            note, f"{gpu.name} is not the official hardware (H100 80 GB)",
            "its runs are rated, marked not official, and not comparable with published figures",
        )  # fmt: skip


_Words = tuple[Severity, str, str, str]


def _of_counter(gpu: GpuFacts) -> Iterator[_Words]:
    if not gpu.counters:
        if not gpu.lost:
            yield (
                Severity.PROBLEM, "its energy counter gave no value", "nothing can be metered",
                "it takes a Volta GPU or newer and no vGPU guest; check the driver",
            )  # fmt: skip
        return
    power_mw = gpu.mean_power_mw
    if gpu.counter_fell:
        yield (
            Severity.PROBLEM, "its energy counter fell during the probe",
            "the driver was reloaded or the GPU reset: the energy between is partly unknown",
            "find out who resets it; switch persistence mode on",
        )  # fmt: skip
    elif gpu.source is not Source.ESTIMATE and power_mw is not None and power_mw < _WATCH_MW:
        yield (
            Severity.PROBLEM, f"its energy counter gained {gpu.counter_gain_mj} mJ in {seconds(gpu.probe_ns):.1f} s",
            "no GPU idles below 1 W: the counter stands still, and every figure would be 0",
            "update or reload the driver",
        )  # fmt: skip
    elif power_mw is not None and gpu.power_limit_mw and power_mw > OVER_LIMIT * gpu.power_limit_mw:
        yield (
            Severity.PROBLEM,
            f"its counter says {watts(power_mw):.0f} W on average, its power limit is {watts(gpu.power_limit_mw):.0f} W",
            "one of them is wrong; the counter may hold more than this GPU (GH200: the module)",
            "compare with `nvidia-smi --query-gpu=power.draw,enforced.power.limit --format=csv`",
        )  # fmt: skip
    elif gpu.source is not Source.ESTIMATE and gpu.steps is None:
        yield (
            Severity.WARNING, "no regular steps of its counter were found",
            "anchors are placed to half a step at best: short windows are uncertain", "try again with more --seconds",
        )  # fmt: skip
    if gpu.steps and gpu.steps.period_ns > COARSE_STEP_NS:
        yield (
            Severity.WARNING, f"its counter moves only every {gpu.steps.period_ns / NS_PER_MS:.0f} ms",
            "windows shorter than that rest on the samples alone", "",
        )  # fmt: skip
    if gpu.counter_cost and gpu.counter_cost.wall_p99_ns > SLOW_READ_NS:
        yield (
            Severity.WARNING, f"one in a hundred counter reads takes {gpu.counter_cost.wall_p99_ns / NS_PER_MS:.0f} ms",
            "each anchor is uncertain by as much", "look for other tools that poll the driver hard, and for a starved CPU",
        )  # fmt: skip
    if gpu.core_share is not None and gpu.core_share > DEAR_SHARE:
        yield (
            Severity.WARNING, f"one poll a second costs {gpu.core_share:.1%} of a core",
            "that is several times what an H200 needs", "look for other tools that poll the driver hard",
        )  # fmt: skip


def _of_samples(gpu: GpuFacts) -> Iterator[_Words]:
    ring = gpu.ring
    if ring is None:
        if gpu.source is not Source.ESTIMATE:
            yield (
                Severity.WARNING, "the driver gives no power samples",
                "totals are right; within a second, who drew what is guessed from time alone", "update the driver",
            )  # fmt: skip
        return
    if gpu.source is Source.ESTIMATE:  # one sample a read, by design
        return
    if ring.span_ns < SHORT_RING_NS:
        yield (
            Severity.WARNING, f"its samples reach back {seconds(ring.span_ns):.2f} s only",
            "fetched once a second they leave holes, filled from the counter", "",
        )  # fmt: skip
    if ring.gap_ns > COARSE_SAMPLES_NS:
        yield (
            Severity.WARNING, f"its samples come every {ring.gap_ns / NS_PER_MS:.0f} ms",
            "short queries are told apart less well than with 20 ms", "",
        )  # fmt: skip
    elif ring.widest_gap_ns > HOLE_NS:
        yield (
            Severity.WARNING, f"its samples have a hole of {ring.widest_gap_ns / NS_PER_MS:.0f} ms",
            "the hole is filled from the counter, without shape", "look for other tools that poll the driver hard",
        )  # fmt: skip
    if ring.age_ns is not None and not -FUTURE_SAMPLE_NS <= ring.age_ns <= OLD_SAMPLE_NS:
        yield (
            Severity.WARNING, f"its newest sample is {seconds(ring.age_ns):+.2f} s old when it is read",
            "sample stamps and the wall clock disagree: energy is placed beside its time", "check NTP; restart the daemon",
        )  # fmt: skip
    if gpu.ratio is None:
        return
    off = abs(gpu.ratio.samples_to_counter - 1)
    if off > RATIO_WARNS + 3 * gpu.ratio.u:
        yield (
            Severity.PROBLEM if off > RATIO_SPOILS else Severity.WARNING,
            f"its samples add up to {gpu.ratio.samples_to_counter:.1%} of its counter",
            "the samples do not cover all of the time (known of A100 and H100 drivers): totals are right, shares are not",
            "probe again under steady load with --seconds 30; if it stays, update the driver",
        )  # fmt: skip
