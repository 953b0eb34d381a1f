"""The records that flow through energyd; immutable, without behaviour beyond what their fields imply.

::

    Counter, Samples --meter--> Window(Slices) --settlement--> Settlement(Charges) --ledger--> Statement
                                Query -----------^

Times are ledger time (unix ns, see `clock`), energies integer µJ, powers integer mW. None means unknown, never 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Source(StrEnum):
    """Where an energy figure comes from; never mixed, carried into every table, file, label and answer."""

    NVML_COUNTER = "nvml-counter"
    NVML_POWER = "nvml-power"
    RECORDING = "recording"
    ESTIMATE = "estimate"
    EMULATED = "emulated"


class Basis(StrEnum):
    """What a figure in Wh covers.

    `GPU_RUN`: the whole GPU over the run, as the AI Energy Score does. `ACTIVE`: what the queries caused. `SERVING`:
    active plus the idle watts while they were served. `LOADED`: serving plus a share of idle.
    """

    GPU_RUN = "gpu_run"
    SERVING = "serving"
    ACTIVE = "active"
    LOADED = "loaded"


class WindowKind(StrEnum):
    """How a window came about."""

    METERED = "metered"
    OUTAGE = "outage"
    """The daemon was not reading: one interval, shaped by nothing."""
    RESET = "reset"
    """The counter restarted unseen: what its first value says flowed in the new epoch before we looked."""
    GAP = "gap"
    """The end of an epoch whose counter was lost: energy unknown (NULL), no joule invented."""


class QueryStatus(StrEnum):
    """How a query ended, beside its HTTP status. `OPEN` while it runs."""

    OPEN = "open"
    OK = "ok"
    FAILED = "failed"
    ABORTED = "aborted"
    """The client left."""
    PARTIAL = "partial"
    """Its end was never reported, or came after the horizon: counted with what was known."""
    LATE = "late"
    """It was reported after its windows had been settled: stored with the energy it has, or none."""


class Unattributed(StrEnum):
    """Why energy belongs to no query and is not idle either."""

    OUTAGE = "outage"
    FOREIGN = "foreign"
    LOAD = "load"
    BYPASS = "bypass"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One metered device. `uuid` is its key on a host; `index` is the driver's order, for people."""

    uuid: str
    index: int
    name: str
    driver: str
    source: Source
    power_limit_mw: int | None = None


@dataclass(frozen=True, slots=True)
class Counter:
    """One reading of a GPU's energy counter: `counter_mj` (mJ, NVML's own unit) read between two instants."""

    before_ns: int
    after_ns: int
    counter_mj: int


@dataclass(frozen=True, slots=True)
class Samples:
    """Power samples of the driver: `power_mw[i]` stands for the slot that ends at `end_ns[i]`; ascending (see `window`)."""

    end_ns: tuple[int, ...]
    power_mw: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """What one poll of one GPU returned: samples first, then the counter (None: that part failed or is missing)."""

    samples: Samples | None
    counter: Counter | None


@dataclass(frozen=True, slots=True)
class Slice:
    """Energy of one GPU over [start_ns, end_ns)."""

    start_ns: int
    end_ns: int
    energy_uj: int


@dataclass(frozen=True, slots=True)
class Window:
    """What the counter says about one GPU between two anchors; key (gpu, epoch, seq), never a time.

    `energy_uj` is None for a gap only. `slices` shape it in time: contiguous over the window, their sum is `energy_uj`
    exactly; empty for outage, reset and gap. `u_uj` is one standard deviation of `energy_uj` from the placing of the
    two anchors (comparative: the sensor's gain is not in it).
    """

    gpu: str
    epoch: int
    seq: int
    start_ns: int
    end_ns: int
    counter_start_mj: int
    counter_end_mj: int
    energy_uj: int | None
    u_uj: int
    kind: WindowKind
    source: Source
    slices: tuple[Slice, ...] = ()


@dataclass(frozen=True, slots=True)
class Service:
    """One query as attribution sees it: when it was served, and what is known of its work.

    `chunks_ns` are the times of the streamed chunks, ascending, empty if it did not stream. Token counts are None when
    unknown. `end_ns` is the last byte (or the last event seen, if the query was cut off).
    """

    query_id: str
    model: str
    start_ns: int
    end_ns: int
    chunks_ns: tuple[int, ...] = ()
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Charge:
    """Part of a window booked to a query.

    `active_uj`: it caused this. `standing_uj`: the GPU's idle watts while it was served. `spread_uj`: what the
    alternative policy would have charged on top (signed), from which the uncertainty of the split is derived.
    """

    query_id: str
    active_uj: int
    standing_uj: int
    spread_uj: int = 0


@dataclass(frozen=True, slots=True)
class Settlement:
    """A window divided among accounts: Σ charges + idle_uj + Σ unattributed_uj = energy_uj, exactly."""

    gpu: str
    epoch: int
    seq: int
    energy_uj: int
    idle_uj: int
    unattributed_uj: Mapping[Unattributed, int]
    charges: tuple[Charge, ...]
    policy: str
    coefficients_version: int | None
    idle_floor_mw: int | None

    @property
    def active_uj(self) -> int:
        """Σ active of the charges, µJ."""
        return sum(c.active_uj for c in self.charges)

    @property
    def standing_uj(self) -> int:
        """Σ standing of the charges, µJ."""
        return sum(c.standing_uj for c in self.charges)

    @property
    def residual_uj(self) -> int:
        """What the accounts leave over, µJ: 0, or the settlement is refused."""
        booked = self.active_uj + self.standing_uj + self.idle_uj + sum(self.unattributed_uj.values())
        return self.energy_uj - booked


@dataclass(frozen=True, slots=True)
class Run:
    """A bench run as the ledger holds it. `provenance` and `summary` are JSON objects without prompts.

    Keys of `summary` that rating reads (None: unknown): `n`, `failed`, `gpu_run_wh_per_1000`, `serving_wh_per_1000`,
    `active_wh_per_1000` (Wh per 1,000 queries by basis), `rel_u` (one standard deviation of the gpu_run figure, relative),
    `source`, `hardware`, `engine`, `p50_s`, `p95_s`, `idle_w`, `not_official_because` (list of reasons, empty: official).
    Keys of `provenance`: `model_class`, `precision`, `protocol`, `dataset`, `dataset_sha256`, `server`, `energyd_version`.
    """

    run_id: str
    task: str
    model: str
    batch_size: int
    url: str
    status: str
    started_ns: int
    ended_ns: int | None
    provenance: Mapping[str, object]
    summary: Mapping[str, object]
