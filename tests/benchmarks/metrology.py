"""Records known work on a real GPU: bursts of matrix products of several lengths, isolated and in a row, under the meter.

Run on a machine with an NVIDIA GPU, torch and energyd: python tests/benchmarks/metrology.py OUT.json.gz

The trace has the format that `energyd settle` reads (anchors about one a second, the driver's 20 ms samples), and `work`:
[label, start ns, end ns, matrix products]. Bursts of one label do the same work, so the counter over the whole series, less
the idle between, is the truth for each of them.
"""

import gzip
import json
import random
import sys
import threading
import time
from pathlib import Path

import torch

from energyd.daemon.clock import Clock
from energyd.daemon.sensors.nvml import NvmlSensor
from energyd.daemon.units import NS_PER_US

SIDE = 4096
ISOLATED = (
    ("iso7", 0.007, 24),
    ("iso28", 0.028, 30),
    ("iso118", 0.118, 30),
    ("iso494", 0.494, 20),
    ("iso2000", 2.0, 8),
)
IN_A_ROW = (("row28", 0.028, 200), ("row118", 0.118, 80), ("row494", 0.494, 16))
WAVES = (("wave100", 0.05, 40), ("wave300", 0.15, 20))


class Recorder(threading.Thread):
    """Reads GPU 0 once a second, as the daemon does."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(daemon=True)
        self.sensor = NvmlSensor.open(clock, [0])
        self.anchors: list[tuple[int, int, int]] = []
        self.samples: list[tuple[int, int]] = []
        self.done = threading.Event()

    def run(self) -> None:
        gpu = self.sensor.gpus()[0]
        due_s = time.monotonic()
        while not self.done.is_set():
            reading = self.sensor.read(gpu)
            if reading.samples:
                self.samples += zip(
                    (t // NS_PER_US for t in reading.samples.end_ns), reading.samples.power_mw, strict=True
                )
            if reading.counter:
                self.anchors.append((reading.counter.before_ns, reading.counter.after_ns, reading.counter.counter_mj))
            due_s += 1.0
            self.done.wait(max(0.0, due_s - time.monotonic()))


def main(out: Path) -> None:
    """Do the work, write the trace."""
    clock = Clock.start()
    left = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)

    def burst(products: int) -> tuple[int, int]:
        start_ns = clock.now_ns()
        for _ in range(products):
            torch.matmul(left, right)
        torch.cuda.synchronize()
        return start_ns, clock.now_ns()

    burst(2000)
    start_ns, end_ns = burst(5000)
    per_s = 5000 / ((end_ns - start_ns) / 1e9)
    recorder, work, marks, rng = Recorder(clock), [], [], random.Random(1)
    recorder.start()
    marks.append(("idle", clock.now_ns()))
    time.sleep(8)
    plan = (
        [(name, s, n, lambda: 0.8 + 0.6 * rng.random()) for name, s, n in ISOLATED]
        + [(name, s, n, lambda: 0.0) for name, s, n in IN_A_ROW]
        + [(name, s, n, lambda s=s: s) for name, s, n in WAVES]
    )
    for name, seconds, count, gap in plan:
        time.sleep(2.5)
        marks.append((name, clock.now_ns()))
        for _ in range(count):
            products = max(1, round(per_s * seconds))
            work.append((name, *burst(products), products))
            time.sleep(gap())
    time.sleep(4)
    recorder.done.set()
    recorder.join()
    gpu = recorder.sensor.gpus()[0]
    trace = {
        "info": {"name": gpu.name, "driver": gpu.driver}, "marks": marks, "anchors": recorder.anchors,
        "samples": recorder.samples, "work": work,
    }  # fmt: skip
    out.write_bytes(gzip.compress(json.dumps(trace).encode()))
    print(f"{len(work)} bursts, {len(recorder.anchors)} anchors, {len(recorder.samples)} samples -> {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
