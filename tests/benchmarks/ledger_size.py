"""What the ledger costs: a quarter of an hour of 8 GPUs and 10,000 queries an hour, booked for real, scaled to a day.

Run: python tests/benchmarks/ledger_size.py [--gpus 8] [--queries-per-hour 10000] [--minutes 15]

Prints rows and MB a day by table (from SQLite's own `dbstat`), and the seconds of CPU that settling took per second metered.
The windows carry 50 slices each, as an H200's do; a query lasts about 4 s, streams 100 chunks, and runs on one GPU.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from energyd.daemon.attribution import policy
from energyd.daemon.ledger import Ledger
from energyd.daemon.meter import Meter
from energyd.daemon.records import Counter, Gpu, Reading, Samples, Source
from energyd.daemon.settlement import Books, Limits
from energyd.daemon.units import NS_PER_MS, NS_PER_S
from energyd.daemon.wire import Batch, Close, Event, Hello, Open, Progress, Server

T0 = 1_800_000_000 * NS_PER_S
SLOT_NS = 20 * NS_PER_MS


def main() -> None:
    """Fill a ledger and print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--queries-per-hour", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=15)
    arguments = parser.parse_args()
    seconds = int(arguments.minutes * 60)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "size.db"
        with Ledger.open(path) as ledger:
            cpu_s = fill(ledger, arguments.gpus, arguments.queries_per_hour, seconds)
            per_day = 86_400 / seconds
            sizes = {
                table: {"rows_a_day": round(_rows(ledger, table) * per_day), "mb_a_day": round(size * per_day / 1e6, 1)}
                for table, size in _sizes(ledger).items()
            }
        whole = path.stat().st_size
    result = {
        "gpus": arguments.gpus, "queries_per_hour": arguments.queries_per_hour, "seconds_booked": seconds,
        "cpu_s_per_second_metered": round(cpu_s / seconds, 5), "mb_a_day": round(whole * per_day / 1e6, 1), "tables": sizes,
    }  # fmt: skip
    print(json.dumps(result, indent=1))


def fill(ledger: Ledger, gpus: int, queries_per_hour: int, seconds: int) -> float:
    """Book `seconds` of `gpus` GPUs; returns the CPU seconds that ledger and settlement took."""
    rng = random.Random(1)
    books = Books(
        ledger, host_id="h", boot_id="b", policy=policy("time"), rival=policy("tokens"), offset_ns=0, now_ns=T0,
        limits=Limits(greeting_ns=0),
    )  # fmt: skip
    ledger.register_host("h", "h", T0)
    found = [Gpu(f"GPU-{i}", i, "NVIDIA H200", "580", Source.NVML_COUNTER, 700_000) for i in range(gpus)]
    meters = {g.uuid: Meter(g.uuid, g.source, books.add_gpu(g, 100_000)) for g in found}
    servers = tuple(Server(f"s{i}", "u", (f"GPU-{i}",)) for i in range(gpus))
    books.hello(Hello("w", "b", 0, 0, 0, servers), T0)
    events = _traffic(rng, gpus, queries_per_hour, seconds)
    counters = dict.fromkeys(meters, 0)
    sequence, at, cpu_s = 1, 0, 0.0
    for second in range(seconds + 5):
        now_ns = T0 + second * NS_PER_S
        taken: list[Event] = []
        while at < len(events) and events[at][0] < now_ns:
            taken.append(events[at][1])
            at += 1
        readings = {uuid: _reading(rng, now_ns, counters, uuid) for uuid in meters}
        start_s = time.process_time()
        books.take(Batch("w", sequence, tuple(taken), now_ns), now_ns)
        books.add_windows([w for uuid, m in meters.items() for w in m.feed(readings[uuid])])
        books.advance(now_ns)
        cpu_s += time.process_time() - start_s
        sequence += len(taken)
    return cpu_s


def _reading(rng: random.Random, now_ns: int, counters: dict[str, int], uuid: str) -> Reading:
    stamps = tuple(now_ns - NS_PER_S + (i + 1) * SLOT_NS for i in range(50))
    powers = tuple(rng.randrange(120_000, 600_000) for _ in stamps)
    counters[uuid] += sum(powers) // 50
    return Reading(Samples(stamps, powers), Counter(now_ns, now_ns + 3 * NS_PER_MS, counters[uuid]))


def _traffic(rng: random.Random, gpus: int, queries_per_hour: int, seconds: int) -> list[tuple[int, Event]]:
    events: list[tuple[int, Event]] = []
    for n in range(queries_per_hour * seconds // 3600):
        start_ns = T0 + rng.randrange(seconds * NS_PER_S)
        end_ns = start_ns + round(rng.lognormvariate(1.3, 0.5) * NS_PER_S)
        name = f"{n:032x}"
        step_us = (end_ns - start_ns) // 101_000
        events.append((start_ns, Open(name, start_ns, f"s{rng.randrange(gpus)}", tenant=f"t{rng.randrange(20)}")))
        events.append((end_ns - 1, Progress(name, start_ns, (step_us,) * 100)))
        close = Close(
            query_id=name, end_ns=end_ns, status="ok", http_status=200, first_byte_ns=start_ns + 10**8, requested="llama-8b",
            served="llama-8b", task="text_generation", stream=True, prompt_tokens=300, completion_tokens=100,
            usage_source="response", upload_bytes=1200,
        )  # fmt: skip
        events.append((end_ns, close))
    return sorted(events, key=lambda e: e[0])


def _sizes(ledger: Ledger) -> dict[str, int]:
    """Bytes by table, indexes included; tables that hardly grow are left out."""
    sql = "SELECT m.tbl_name AS 'table', SUM(s.pgsize) AS bytes FROM dbstat s JOIN sqlite_master m ON m.name = s.name GROUP BY 1"
    return {str(r["table"]): int(r["bytes"]) for r in ledger.db.query(sql) if r["bytes"] > 8192}


def _rows(ledger: Ledger, table: str) -> int:
    return int(ledger.db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])


if __name__ == "__main__":
    main()
