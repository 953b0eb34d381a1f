"""The whole main job on a GPU host, measured: serve, meter, bench at batch 1 and 32, kill the daemon, audit, rate.

Run on a machine with an NVIDIA GPU, vLLM and energyd installed::

    python tests/benchmarks/gpu_host.py --model DIR --name llama-8b --model-class A --output result.json

It starts `vllm` (unless --upstream names a running server) and `energyd start` in front of it, and prints one JSON object.
Everything in it comes from energyd's own verbs and from `/proc`; nothing is simulated.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ENERGYD = [sys.executable, "-m", "energyd.daemon.cli"]
TICKS = os.sysconf("SC_CLK_TCK")
SETTLE_S = 4.0


def main() -> None:
    """Run every step and print the result."""
    arguments = _arguments()
    work = Path(tempfile.mkdtemp(prefix="energyd-gpu-host-"))
    children: list[subprocess.Popen[bytes]] = []
    try:
        upstream = arguments.upstream or f"http://127.0.0.1:{arguments.port}"
        if not arguments.upstream:
            children.append(_serve(arguments, work))
            _wait(f"{upstream}/health", 400, children[0])
        result = measure(arguments, upstream, work, children)
    finally:
        for child in reversed(children):
            _stop(child)
    print(json.dumps(result, indent=1))
    if arguments.output:
        text = json.dumps(brief(result), indent=1)
        arguments.output.write_text(text + "\n")


def measure(
    arguments: argparse.Namespace, upstream: str, work: Path, children: list[subprocess.Popen[bytes]]
) -> dict[str, Any]:
    """Start energyd in front of `upstream` and take every figure."""
    db, proxy, admin = work / "energyd.db", "127.0.0.1:18088", "127.0.0.1:19709"
    command = [*ENERGYD, "start", "--upstream", upstream, "--listen", proxy, "--admin", admin, "--db", str(db)]
    children.append(subprocess.Popen([*command, *arguments.start]))
    _wait(f"http://{admin}/readyz", 60, children[-1])
    _wait(f"http://{proxy}/health", 60, children[-1])
    result: dict[str, Any] = {
        "command": "python tests/benchmarks/gpu_host.py",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    result["status"] = _json(f"http://{admin}/v1/status")
    time.sleep(SETTLE_S)  # imports and first pages are not the cost of metering
    result["memory_idle_mib"] = {name: _rss_mib(pid) for name, pid in _parts().items()}
    result["idle"] = _cost(partial(time.sleep, arguments.idle_seconds))
    result["runs"] = []
    for batch in arguments.batch:
        bench = [
            *ENERGYD, "bench", "--url", f"http://{proxy}", "--model", arguments.name, "--task", "text-generation", "--samples",
            str(arguments.samples), "--batch-size", str(batch), "--model-class", arguments.model_class, "--db", str(db), "--json",
        ]  # fmt: skip
        taken: dict[str, Any] = {}
        cost = _cost(partial(_run_into, taken, bench))
        result["runs"].append({"batch_size": batch, "report": taken, "cost": cost})
    result["killed_daemon"] = _kill_daemon(arguments, proxy, admin)
    result["metrics"] = _identity(f"http://{admin}/metrics")
    result["memory_mib"] = {name: _rss_mib(pid) for name, pid in _parts().items()}
    result["audit"] = _run_json([*ENERGYD, "audit", "--db", str(db), "--json"])
    result["rate"] = _run_json([*ENERGYD, "rate", "--db", str(db), "--format", "json"])
    return result


def brief(result: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping: no host, no paths."""
    gpu = result["status"]["gpus"][0]
    kept = (
        "n", "failed", "span_s", "gpu_run_wh_per_1000", "serving_wh_per_1000", "active_wh_per_1000", "rel_u", "idle_w",
        "j_per_token", "p50_s", "p95_s", "queries_per_s", "tokens_per_s", "client_gap_share", "engine", "source",
    )  # fmt: skip
    rated = (
        "edition",
        "task",
        "model_class",
        "model",
        "batch_size",
        "gpu_energy_wh_per_1000",
        "stars",
        "rank",
        "official",
    )
    audited = (
        "balanced", "residual_uj", "metered_energy_uj", "unsettled_energy_uj", "accounts_uj", "unattributed_share", "queries",
        "queries_with_energy", "queries_late", "queries_partial", "dropped_events", "sources",
    )  # fmt: skip
    return {
        "command": "python tests/benchmarks/gpu_host.py",
        "date": result["date"],
        "gpu": gpu["name"],
        "driver": gpu["driver"],
        "energyd": result["status"]["version"],
        "policy": result["status"]["policy"],
        "idle": result["idle"],
        "runs": [
            {"batch_size": r["batch_size"], **{k: r["report"]["summary"][k] for k in kept}, "cost": r["cost"]}
            for r in result["runs"]
        ],
        "killed_daemon": result["killed_daemon"],
        "metrics": result["metrics"],
        "memory_idle_mib": result["memory_idle_mib"],
        "memory_mib": result["memory_mib"],
        "audit": {k: result["audit"][k] for k in audited},
        "rate": [{k: row[k] for k in rated} for row in result["rate"]["rows"]],
    }


def _kill_daemon(arguments: argparse.Namespace, proxy: str, admin: str) -> dict[str, Any]:
    """`kill -9` the daemon under load: requests go on, the books close again, nothing is lost or doubled."""
    statuses: list[int] = []
    threads = [threading.Thread(target=_ask, args=(proxy, arguments.name, 200, statuses)) for _ in range(16)]
    before = _json(f"http://{admin}/v1/models")
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    killed = _parts()["daemon"]
    os.kill(killed, signal.SIGKILL)
    for thread in threads:
        thread.join()
    _wait(f"http://{admin}/readyz", 60, None)
    time.sleep(SETTLE_S)
    after = _json(f"http://{admin}/v1/models")
    counted = sum(m["queries"] for m in after) - sum(m["queries"] for m in before)
    return {
        "requests": len(threads), "answered_200": statuses.count(200), "queries_in_the_books": counted,
        "events": [e["kind"] for e in _json(f"http://{admin}/v1/events")],
    }  # fmt: skip


def _ask(proxy: str, model: str, tokens: int, statuses: list[int]) -> None:
    body = {"model": model, "prompt": "one two three", "max_tokens": tokens, "min_tokens": tokens, "stream": True}
    request = urllib.request.Request(
        f"http://{proxy}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        answer.read()
        statuses.append(answer.status)


def _identity(url: str) -> dict[str, float]:
    """The sums that must agree in every scrape, J."""
    sums: dict[str, float] = {}
    with urllib.request.urlopen(url, timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                sums[name.partition("{")[0]] = sums.get(name.partition("{")[0], 0.0) + float(value)
    accounts = (
        "model_energy_joules_total",
        "idle_energy_joules_total",
        "unattributed_energy_joules_total",
        "unsettled_joules",
    )
    parts = {a: sums.get(f"energyd_{a}", 0.0) for a in accounts}
    whole = sums["energyd_gpu_energy_joules_total"]
    return {"gpu_energy_joules_total": whole, **parts, "difference": round(whole - sum(parts.values()), 6)}


def _cost(job: Callable[[], None]) -> dict[str, Any]:
    """CPU share (of one core) of daemon and proxy while `job` runs."""
    before, start_s = {n: _cpu_s(p) for n, p in _parts().items()}, time.monotonic()
    job()
    elapsed_s = time.monotonic() - start_s
    after = {n: _cpu_s(p) for n, p in _parts().items()}
    shares = {n: round((after[n] - before[n]) / elapsed_s, 5) for n in before if n in after}
    return {"seconds": round(elapsed_s, 2), "cpu_share_of_one_core": shares}


def _parts() -> dict[str, int]:
    """Process ids of `energyd daemon` and `energyd proxy`; those of this benchmark, if others run on the host."""
    found: dict[str, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        for part in ("daemon", "proxy"):
            ours = any(b"energyd-gpu-host-" in w for w in words)
            if (
                ours
                and b"energyd.daemon.cli" in words
                and words[words.index(b"energyd.daemon.cli") + 1] == part.encode()
            ):
                found[part] = int(folder.name)
    return found


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return round(int(line.split()[1]) / 1024, 1)
    return 0.0


def _serve(arguments: argparse.Namespace, work: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(arguments.model), "--served-model-name",
        arguments.name, "--port", str(arguments.port), "--host", "127.0.0.1", "--load-format", "dummy", *arguments.vllm,
    ]  # fmt: skip
    log = (work / "vllm.log").open("wb")
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def _wait(url: str, seconds: float, process: subprocess.Popen[bytes] | None) -> None:
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        if process is not None and process.poll() is not None:
            raise SystemExit(f"the process behind {url} ended with {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"{url} did not answer within {seconds:.0f} s")


def _json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


def _run_json(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    if not done.stdout.strip():
        return {"exit": done.returncode, "error": done.stderr.strip()}
    found = json.loads(done.stdout)
    return found if isinstance(found, dict) else {"rows": found}


def _run_into(taken: dict[str, Any], command: list[str]) -> None:
    taken.update(_run_json(command))


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(60)
    except subprocess.TimeoutExpired:
        child.kill()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", type=Path, help="model folder that vLLM serves; weights may be missing (dummy load format)"
    )
    parser.add_argument("--name", default="llama-8b", help="served model name")
    parser.add_argument("--model-class", default="A")
    parser.add_argument("--upstream", help="URL of a running server instead of starting vLLM")
    parser.add_argument("--port", type=int, default=18000)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--idle-seconds", type=float, default=30)
    eager = "--enforce-eager --max-model-len 4096"
    parser.add_argument("--vllm", type=shlex.split, default=eager, help="more arguments for vLLM")
    parser.add_argument("--start", type=shlex.split, default="", help="more arguments for energyd start")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
