"""NVIDIA GPUs through NVML: the energy counter is the truth, the driver's own 20 ms power samples give it a shape.

The only file that imports pynvml. One poll costs about 5 ms of CPU on an H200: 0.6 ms for the samples, 4.5 ms for the
counter, so it is meant to be called about once a second and GPU, each GPU from a thread of its own.

What a failed call means (`nvml.h`), and what the loop is told:

| code | told |
|---|---|
| 15 GPU_IS_LOST, 16 RESET_REQUIRED | LostGpu: this GPU; looked for again by UUID at later polls, with back-off |
| 1 UNINITIALIZED, 9 DRIVER_NOT_LOADED, 18 LIB_RM_VERSION_MISMATCH | LostGpu: all GPUs, the driver was reloaded |
| 4 NO_PERMISSION, 6 NOT_FOUND, 17 OPERATING_SYSTEM | RetryReading, over a fresh NVML session: a device node went away |
| 3 NOT_SUPPORTED, 10, 11, 21, 27, 999 and all others | RetryReading: the counter goes on meanwhile, nothing is lost |

A value is never repeated: a poll whose counter fails gives no counter.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pynvml

from energyd.daemon.clock import TimeSource
from energyd.daemon.errors import LostGpu, NoGpuError, RetryReading, UsageError
from energyd.daemon.records import Counter, Gpu, Reading, Samples, Source
from energyd.daemon.units import NS_PER_MS, NS_PER_S, NS_PER_US

_DRIVER_GONE: Final = frozenset({1, 9, 18})
_GPU_GONE: Final = frozenset({15, 16})
_NODE_GONE: Final = frozenset({4, 6, 17})
_NOT_FOUND: Final = 6
_CHOICES: Final = (
    "install the NVIDIA driver, or choose --sensor estimate --estimate-watts W, or --sensor replay --trace FILE"
)
_VALUE_FIELDS: Final = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
"""Members of the sample's union, in the order of nvmlValueType_t."""
_STEP_NS: Final = 10 * NS_PER_MS
"""The wall clock moved against ledger time by more than this between two polls: a step, not slewing."""
_AHEAD_NS: Final = 50 * NS_PER_MS
"""A stamp may lie this far in the future by jitter; more means that it is from before a step of the wall clock."""
_PROBES: Final = 3
"""NOT_SUPPORTED can be transient under fast polling: ask this often before believing it."""
_BACKOFF_NS: Final = (NS_PER_S, 60 * NS_PER_S)
_DRAIN_S: Final = 0.5
"""How long readings are held back for one that hangs, when a new session must be opened: less than a poll."""
_ANSWER_S: Final = 2.0
"""How long a reading waits for a new session to be open."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a GPU's driver offers, probed once at open."""

    counter: bool
    samples: bool
    power: bool
    persistence: bool
    """Persistence mode is on: the driver stays loaded, and the counter with it, while nobody uses the GPU."""


@dataclass(slots=True)
class _Device:
    """What the sensor remembers of one GPU; touched by that GPU's thread, `lost` and `stale` by all."""

    gpu: Gpu
    handle: Any
    capabilities: Capabilities
    seen_us: int = 0
    end_ns: int = 0
    offset_ns: int | None = None
    lost: str | None = None
    """Why it was lost; None while it is there."""
    told: bool = False
    """The loop has heard of the loss: another GPU's thread may have found it first, and this epoch must close too."""
    stale: bool = False
    """Its handle is suspect: open a new session before the next reading."""
    retry_ns: int = 0
    wait_ns: int = _BACKOFF_NS[0]


class NvmlSensor:
    """Reads the GPUs of this host; made by `NvmlSensor.open`. Safe to call from one thread per GPU."""

    def __init__(self, clock: TimeSource, devices: Sequence[_Device], wall_ns: Callable[[], int]) -> None:
        self._clock = clock
        self._wall_ns = wall_ns
        self._devices = {d.gpu.uuid: d for d in devices}
        self._gate = _Gate()
        self._open = True

    @classmethod
    def open(
        cls, clock: TimeSource, indices: Sequence[int] | None = None, wall_ns: Callable[[], int] = time.time_ns
    ) -> "NvmlSensor":
        """Load NVML and find the GPUs (`indices`: only these, None: all).

        `wall_ns`: the clock of the driver's sample stamps. Raises NoGpuError, with the choices, if there is no library,
        driver, permission, GPU or energy counter, and UsageError for an index that no GPU has.
        """
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as e:
            raise NoGpuError(f"no GPU can be metered: {_init_failure(e)}; {_CHOICES}") from e
        try:
            return cls(clock, _found(indices), wall_ns)
        except pynvml.NVMLError as e:
            _shutdown()
            raise NoGpuError(f"no GPU can be metered: {_text(e)}{_missing_nodes(e.value)}; {_CHOICES}") from e
        except (NoGpuError, UsageError):
            _shutdown()
            raise

    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs found at open, in driver order."""
        return tuple(d.gpu for d in self._devices.values())

    def capabilities(self, gpu: Gpu) -> Capabilities:
        """What the driver offers for this GPU, as probed at open."""
        return self._devices[gpu.uuid].capabilities

    def read(self, gpu: Gpu) -> Reading:
        """New samples since the last call (None if unsupported or failed just now), then the counter.

        A GPU that is lost is looked for by UUID with back-off: LostGpu until it is back, then readings again.
        """
        device = self._devices[gpu.uuid]
        if device.lost and not device.told:
            device.told = True
            raise LostGpu(f"{device.lost}; looking for it again")
        if device.lost or device.stale:
            self._recover(device)
        cursor = device.seen_us, device.end_ns
        try:
            with self._gate.shared():
                samples = self._samples(device) if device.capabilities.samples else None
                before_ns = self._clock.now_ns()
                counter_mj = int(pynvml.nvmlDeviceGetTotalEnergyConsumption(device.handle))
                counter = Counter(before_ns, self._clock.now_ns(), counter_mj)
        except pynvml.NVMLError as e:
            device.seen_us, device.end_ns = cursor  # the driver's ring still has them for the next read
            raise self._failure(device, e) from e
        device.retry_ns, device.wait_ns = 0, _BACKOFF_NS[0]
        return Reading(samples, counter)

    def compute_pids(self, gpu: Gpu) -> frozenset[int] | None:
        """Processes with a compute context on the GPU; None if the driver does not tell or the GPU is away."""
        device = self._devices[gpu.uuid]
        if device.lost:
            return None
        try:
            with self._gate.shared():
                processes = pynvml.nvmlDeviceGetComputeRunningProcesses_v3(device.handle)
        except (pynvml.NVMLError, RetryReading):
            return None
        return frozenset(int(p.pid) for p in processes)

    def close(self) -> None:
        """End the NVML session; a second call does nothing."""
        if self._open:
            self._open = False
            _shutdown()

    def _samples(self, device: _Device) -> Samples | None:
        """The driver's samples since the last poll; None if this call failed though the GPU is there."""
        offset_ns, now_ns = self._offset()
        stepped = device.offset_ns is not None and abs(offset_ns - device.offset_ns) > _STEP_NS
        try:
            kind, raw = pynvml.nvmlDeviceGetSamples(
                device.handle, pynvml.NVML_TOTAL_POWER_SAMPLES, 0 if stepped else device.seen_us
            )
        except pynvml.NVMLError as e:
            if e.value == _NOT_FOUND:  # NVML's word for "none since then"
                return Samples((), ())
            if e.value in _DRIVER_GONE | _GPU_GONE:
                raise
            return None
        if not 0 <= kind < len(_VALUE_FIELDS):
            return None  # a type that this NVML header did not know: no guess at its bytes
        stamped = [(int(s.timeStamp), round(getattr(s.sampleValue, _VALUE_FIELDS[kind]))) for s in raw]
        if not stepped:
            stamped.sort()  # nothing promises that a ring comes unrolled
        new = placed(stamped, offset_ns=offset_ns, after_ns=device.end_ns, now_ns=now_ns)
        device.offset_ns = offset_ns
        if stamped:
            device.seen_us = stamped[-1][0]
        if new.end_ns:
            device.end_ns = new.end_ns[-1]
        return new

    def _offset(self) -> tuple[int, int]:
        """Ledger time minus wall clock, and ledger time, ns; the narrowest of three, as we can be preempted between."""
        best = min(
            (
                (before := self._clock.now_ns(), wall := self._wall_ns(), after := self._clock.now_ns())
                for _ in range(3)
            ),
            key=lambda t: t[2] - t[0],
        )
        before, wall, after = best
        return (before + after) // 2 - wall, after

    def _failure(self, device: _Device, e: pynvml.NVMLError) -> LostGpu | RetryReading:
        """What the loop must do about a failed reading."""
        about = f"GPU {device.gpu.index} ({device.gpu.name}): {_text(e)}"
        if e.value in _DRIVER_GONE:
            for d in self._devices.values():
                d.lost = d.lost or about
        if e.value in _GPU_GONE:
            device.lost = device.lost or about
        if device.lost:
            device.told = True
            return LostGpu(f"{about}; looking for it again")
        if e.value in _NODE_GONE:
            device.stale = True
            return RetryReading(f"{about}{_missing_nodes(e.value)}; trying a fresh session")
        return RetryReading(f"{about}; trying again")

    def _recover(self, device: _Device) -> None:
        """Open a fresh session and find the GPU by UUID, or raise what `lost` or `stale` means; once a back-off."""
        error = LostGpu if device.lost else RetryReading
        now_ns = self._clock.now_ns()
        if now_ns < device.retry_ns:
            raise error(f"{device.lost or 'GPU ' + str(device.gpu.index)}; looking for it again in a moment")
        device.retry_ns = now_ns + device.wait_ns
        device.wait_ns = min(2 * device.wait_ns, _BACKOFF_NS[1])
        try:
            with self._gate.alone():
                _shutdown()
                pynvml.nvmlInit()
                for d in self._devices.values():
                    with suppress(pynvml.NVMLError):  # its own thread will find out
                        d.handle = _handle(d.gpu.uuid)
                device.handle = _handle(device.gpu.uuid)
        except pynvml.NVMLError as e:
            raise error(f"GPU {device.gpu.index} ({device.gpu.name}) is still away: {_text(e)}") from e
        except RetryReading as e:
            raise error(f"GPU {device.gpu.index} ({device.gpu.name}) cannot be looked for yet: {e}") from e
        device.lost, device.told, device.stale = None, False, False
        device.seen_us, device.offset_ns = 0, None


class _Gate:
    """Lets readings pass together, but a new NVML session only alone: shutting down under a call would break it.

    Nobody waits long: a call that hangs in the driver must block nothing but itself.
    """

    def __init__(self, drain_s: float = _DRAIN_S, answer_s: float = _ANSWER_S) -> None:
        self._drain_s = drain_s
        self._answer_s = answer_s
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Pass with others; raises RetryReading if a new session is being opened and does not come to an end."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._alone, self._answer_s):
                raise RetryReading("NVML is being opened again by another thread and does not answer")
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Pass alone; raises RetryReading if some other call does not return."""
        with self._changed:
            if self._alone:
                raise RetryReading("another thread is opening NVML again")
            self._alone = True  # from here on nobody enters, or busy readers would keep us out for ever
            drained = self._changed.wait_for(lambda: not self._inside, self._drain_s)
        try:
            if not drained:
                raise RetryReading("another NVML call hangs, and opening a new session would break it")
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


def placed(stamped: Sequence[tuple[int, int]], *, offset_ns: int, after_ns: int, now_ns: int) -> Samples:
    """Driver samples (stamp in µs of the wall clock, mW), oldest first, on ledger time, but those up to `after_ns`.

    Walks from the newest back: if the wall clock stepped while the ring filled, older stamps are of another clock and
    land in the future or among newer ones; those are left out, the newer ones are right.
    """
    kept: list[tuple[int, int]] = []
    limit_ns = now_ns + _AHEAD_NS
    for stamp_us, power_mw in reversed(stamped):
        end_ns = stamp_us * NS_PER_US + offset_ns
        if after_ns < end_ns < limit_ns:
            kept.append((end_ns, power_mw))
            limit_ns = end_ns
    kept.reverse()
    return Samples(tuple(end_ns for end_ns, _ in kept), tuple(power_mw for _, power_mw in kept))


def _found(indices: Sequence[int] | None) -> list[_Device]:
    count = pynvml.nvmlDeviceGetCount()
    if not count:
        raise NoGpuError(f"no GPU can be metered: the NVIDIA driver is loaded but shows no GPU; {_CHOICES}")
    wanted = range(count) if indices is None else sorted(set(indices))
    if absent := [i for i in wanted if not 0 <= i < count]:
        raise UsageError(f"there is no GPU {absent[0]}: this host has GPUs 0 to {count - 1}")
    driver = pynvml.nvmlSystemGetDriverVersion()
    devices = [_device(i, driver) for i in wanted]
    for d in devices:
        if not d.capabilities.counter:
            others = "; name the other GPUs to meter them alone" if count > 1 else ""
            power = "power, but no" if d.capabilities.power else "neither power nor an"
            raise NoGpuError(
                f"GPU {d.gpu.index} ({d.gpu.name}) cannot be metered: its driver offers {power} energy counter "
                f"(it takes a Volta GPU or newer, and no vGPU guest){others}; {_CHOICES}"
            )
    return devices


def _device(index: int, driver: str) -> _Device:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
    emulated = "emulat" in name.lower() or uuid.startswith("GPU-EMU")
    mig = _optional(pynvml.nvmlDeviceGetMigMode, handle)
    limit_mw = _optional(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    if limit_mw is None:
        limit_mw = _optional(pynvml.nvmlDeviceGetPowerManagementLimit, handle)
    gpu = Gpu(
        uuid=uuid,
        index=index,
        name=f"{name} (MIG)" if mig and mig[0] else name,
        driver=driver,
        source=Source.EMULATED if emulated else Source.NVML_COUNTER,
        power_limit_mw=limit_mw,
    )
    capabilities = Capabilities(
        counter=_offers(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle),
        samples=_offers(pynvml.nvmlDeviceGetSamples, handle, pynvml.NVML_TOTAL_POWER_SAMPLES, 0),
        power=_offers(pynvml.nvmlDeviceGetPowerUsage, handle),
        persistence=bool(_optional(pynvml.nvmlDeviceGetPersistenceMode, handle)),
    )
    return _Device(gpu, handle, capabilities)


def _offers(call: Callable[..., Any], *args: Any) -> bool:
    """Whether the driver knows the call: any other failure is of the moment, and the readings will tell."""
    for _ in range(_PROBES):
        try:
            call(*args)
        except pynvml.NVMLError as e:
            if e.value not in {pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND}:
                return True
        else:
            return True
    return False


def _optional(call: Callable[[Any], Any], handle: Any) -> Any:
    """What the call returns; None if it fails."""
    try:
        return call(handle)
    except pynvml.NVMLError:
        return None


def _handle(uuid: str) -> Any:
    return pynvml.nvmlDeviceGetHandleByUUID(uuid)


def _shutdown() -> None:
    with suppress(pynvml.NVMLError):  # there may be no session to end
        pynvml.nvmlShutdown()


def _text(e: pynvml.NVMLError) -> str:
    return f"{e} (NVML code {e.value})"


def _init_failure(e: pynvml.NVMLError) -> str:
    if e.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return "the NVIDIA driver's library libnvidia-ml.so.1 was not found"
    if e.value == pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return f"the NVIDIA driver is not loaded{_missing_nodes(e.value)}"
    if e.value == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return "the NVIDIA library and kernel module are of different versions; reboot or reload the module"
    return f"{_text(e)}{_missing_nodes(e.value)}"


def _missing_nodes(code: int, dev: Path = Path("/dev")) -> str:
    """Which device nodes are missing, for failures that a container without them shows; else empty."""
    if code not in _NODE_GONE | {pynvml.NVML_ERROR_DRIVER_NOT_LOADED, pynvml.NVML_ERROR_UNKNOWN}:
        return ""
    missing = [str(dev / node) for node in ("nvidiactl", "nvidia0") if not (dev / node).exists()]
    return f", missing here: {', '.join(missing)}" if missing else ""
