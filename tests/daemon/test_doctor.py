"""The judgement of `energyd doctor`, fact by fact, and its verb: what it prints and with which exit code."""

import json
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, Protocol

import pytest
from click.testing import CliRunner

from energyd.daemon.cli import main
from energyd.daemon.doctor import (
    Cost,
    Daemon,
    Finding,
    GpuFacts,
    HostFacts,
    Node,
    Ratio,
    Ring,
    Severity,
    Steps,
    examine,
    verdict,
)
from energyd.daemon.localclient import ask_status
from energyd.daemon.paths import socket_path
from energyd.daemon.records import Source
from energyd.daemon.units import NS_PER_MS, NS_PER_S
from tests.faults.rig import daemon

TRACE = Path(__file__).parent.parent / "data" / "h200_vllm_llama8b_eager.json.gz"
COUNTER_COST = Cost(3_500_000, 14_000_000, 4_500_000, 300)
SAMPLES_COST = Cost(590_000, 680_000, 600_000, 300)
RING = Ring(119, 2380 * NS_PER_MS, 20 * NS_PER_MS, 40 * NS_PER_MS, 15 * NS_PER_MS)
STEPS = Steps(100 * NS_PER_MS, 37 * NS_PER_MS, 2 * NS_PER_MS, 15)
WELL = GpuFacts(
    index=3, uuid="GPU-1", name="NVIDIA H100 80GB HBM3", driver="580", source=Source.NVML_COUNTER, power_limit_mw=700_000,
    persistence=True, processes=0, readings=300, probe_ns=6 * NS_PER_S, counters=300, counter_gain_mj=600_000,
    counter_cost=COUNTER_COST, samples_cost=SAMPLES_COST, steps=STEPS, ring=RING, ratio=Ratio(1.003, 0.001, 5 * NS_PER_S),
    mean_power_mw=100_000, floor_mw=81_000,
)  # fmt: skip
HOST = HostFacts(nodes=(Node("/dev/nvidiactl", usable=True),), wall_step_ns=2_000, daemon=None, gpus=(WELL,))


class Says(Protocol):
    """The control of the emulated driver (see conftest)."""

    def say(self, *lines: str) -> None: ...


def of_gpu(**changes: Any) -> tuple[Finding, ...]:
    """What is found of a GPU that is well but for these changes."""
    return examine(replace(HOST, gpus=(replace(WELL, **changes),)))


def of_host(**changes: Any) -> tuple[Finding, ...]:
    """What is found of a host that is well but for these changes."""
    return examine(replace(HOST, **changes))


def verb(*arguments: str) -> CompletedProcess[str]:
    """`energyd doctor` run in this process: what it wrote and its exit code."""
    done = CliRunner().invoke(main, ["doctor", *arguments], prog_name="energyd")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return CompletedProcess(list(arguments), done.exit_code, done.stdout, done.stderr)


def test_a_host_that_is_well_has_no_finding() -> None:
    """An H100 as measured, with everything in order, gives none: a doctor that always warns is not heard."""
    assert examine(HOST) == ()
    assert verdict(()) is None


@pytest.mark.parametrize(
    ("changes", "severity", "words"),
    [
        ({"hung": True, "counters": 0}, "problem", "did not return"),
        ({"lost": True, "failed": 1, "trouble": "bus"}, "problem", "went away during the probe: bus"),
        ({"failed": 3, "trouble": "busy"}, "warning", "3 of 300 readings failed: busy"),
        ({"failed": 31, "trouble": "busy"}, "problem", "31 of 300 readings failed"),
        ({"counters": 0, "ring": None}, "problem", "gave no value"),
        ({"counter_fell": True, "mean_power_mw": None}, "problem", "fell during the probe"),
        ({"counter_gain_mj": 0, "mean_power_mw": 0, "ratio": None}, "problem", "gained 0 mJ in 6.0 s"),
        ({"mean_power_mw": 900_000}, "problem", "900 W on average, its power limit is 700 W"),
        ({"steps": None}, "warning", "no regular steps"),
        ({"steps": replace(STEPS, period_ns=NS_PER_S)}, "warning", "moves only every 1000 ms"),
        ({"counter_cost": replace(COUNTER_COST, wall_p99_ns=80 * NS_PER_MS)}, "warning", "takes 80 ms"),
        ({"counter_cost": replace(COUNTER_COST, cpu_ns=40 * NS_PER_MS)}, "warning", "costs 4.1% of a core"),
        ({"ring": None, "ratio": None}, "warning", "no power samples"),
        ({"ring": replace(RING, span_ns=NS_PER_S)}, "warning", "reach back 1.00 s only"),
        ({"ring": replace(RING, gap_ns=100 * NS_PER_MS)}, "warning", "come every 100 ms"),
        ({"ring": replace(RING, widest_gap_ns=NS_PER_S)}, "warning", "hole of 1000 ms"),
        ({"ring": replace(RING, age_ns=-3 * NS_PER_S)}, "warning", "-3.00 s old"),
        ({"ring": replace(RING, age_ns=3 * NS_PER_S)}, "warning", "+3.00 s old"),
        ({"ratio": Ratio(0.9, 0.001, NS_PER_S)}, "warning", "add up to 90.0% of its counter"),
        ({"ratio": Ratio(0.25, 0.001, NS_PER_S)}, "problem", "add up to 25.0% of its counter"),
        ({"persistence": False}, "warning", "persistence mode is off"),
        ({"name": "NVIDIA H100 80GB HBM3 (MIG)"}, "warning", "MIG is on"),
        ({"name": "NVIDIA H200"}, "note", "NVIDIA H200 is not the official hardware"),
        ({"name": "NVIDIA GH200 480GB"}, "note", "its counter covers the module"),
        ({"source": Source.NVML_POWER}, "warning", "it has no energy counter"),
        ({"source": Source.ESTIMATE}, "warning", "of the source `estimate`"),
    ],
)
def test_each_trouble_of_a_gpu_is_found(changes: dict[str, Any], severity: str, words: str) -> None:
    """What spoils or worsens measurements is found with its severity, its place, and what it means."""
    found = [f for f in of_gpu(**changes) if words in f.what]
    assert [(f.severity, f.where) for f in found] == [(severity, "GPU 3")]
    assert found[0].meaning
    assert found[0].remedy or severity != "problem"


@pytest.mark.parametrize(
    ("changes", "severity", "words"),
    [
        ({"nodes": (Node("/dev/nvidia1", usable=False),)}, "warning", "may not use /dev/nvidia1"),
        ({"wall_step_ns": -2 * NS_PER_S}, "warning", "moved by -2.000 s"),
        ({"daemon": Daemon("9", 0, ())}, "note", "energyd 9 runs on this host"),
        ({"daemon": Daemon("9", 5 * NS_PER_S, ())}, "warning", "+5.000 s away from the daemon's ledger time"),
        ({"daemon": Daemon("9", 0, ("GPU 0: hung",))}, "problem", "the running daemon says: GPU 0: hung"),
    ],
)
def test_each_trouble_of_the_host_is_found(changes: dict[str, Any], severity: str, words: str) -> None:
    """Permissions, clocks and what a running daemon complains about are found."""
    assert [(f.severity, f.where) for f in of_host(**changes) if words in f.what] == [(severity, "host")]


def test_an_uncertain_ratio_is_no_finding() -> None:
    """A ratio is judged against its own uncertainty: 6 % off with an edge known to 4 % says nothing."""
    assert of_gpu(ratio=Ratio(1.06, 0.04, NS_PER_S)) == ()


def test_an_estimate_is_not_blamed_for_what_it_is_not() -> None:
    """An idle CPU draws 0 W by the estimate, without steps or ring: one finding, that it is an estimate."""
    found = of_gpu(source=Source.ESTIMATE, steps=None, mean_power_mw=0, counter_gain_mj=0, persistence=None,
                   ring=Ring(1, 0, 2_000_000, NS_PER_S, 0), ratio=None, name="CPU")  # fmt: skip
    assert [f.what for f in found] == ["its figures are of the source `estimate`"]


def test_the_worst_is_said_first() -> None:
    """Findings are sorted by severity, and the worst that asks for something is the verdict; a note asks for nothing."""
    found = of_gpu(name="NVIDIA H200", persistence=False, counters=0)
    assert [f.severity for f in found] == [Severity.PROBLEM, Severity.WARNING, Severity.NOTE]
    assert verdict(found) is Severity.PROBLEM
    assert verdict(found[1:]) is Severity.WARNING
    assert verdict(found[2:]) is None


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H100 PCIe", True),
        ("NVIDIA H100 NVL", False),
        ("NVIDIA H100 80GB HBM3 (MIG)", False),
        ("NVIDIA A100-SXM4-80GB", False),
    ],
)
def test_official_hardware_is_an_h100_with_80_gb(name: str, official: bool) -> None:
    """Only a whole, measured H100 with 80 GB compares with published figures."""
    assert replace(WELL, name=name).official_hardware is official
    assert not replace(WELL, name=name, source=Source.EMULATED).official_hardware


def test_every_fact_is_in_the_json() -> None:
    """`--json` holds every fact of host and GPU, what follows from them, and the findings; exit 0 without a problem."""
    done = verb("--sensor", "replay", "--trace", str(TRACE), "--seconds", "2", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["verdict"]) == (0, "warning")
    facts = set(GpuFacts.__dataclass_fields__)
    assert set(report["gpus"][0]) == facts | {"method", "core_share", "official_hardware"}
    assert "its figures are of the source `recording`" in [f["what"] for f in report["findings"]]
    assert set(report["host"]) == {"nodes", "wall_step_ns", "daemon"}


def test_people_get_a_table_for_each_gpu(nvml: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --json: one table a GPU with what was seen, then each finding once, with its meaning and remedy."""
    monkeypatch.setenv("ENERGYD_FAKE_NVML_GPUS", "2")
    done = verb("--seconds", "1")
    assert done.returncode == 0
    assert [done.stdout.count(f"GPU {i} energyd emulated GPU") for i in range(2)] == [1, 1]
    wanted = ("persistence mode", "every 20.0 ms", "samples / counter", "119 over 2.38 s", "means: ", "do: ", "350.0 W")
    assert [w for w in wanted if w not in done.stdout] == []
    assert done.stdout.count("WARNING GPU 0, GPU 1: its figures are of the source `emulated`") == 1


def test_a_problem_ends_with_exit_code_1(nvml: Says) -> None:
    """A GPU whose counter cannot be read spoils measurements: exit code 1, and the finding says so first."""
    nvml.say("fail nvmlDeviceGetTotalEnergyConsumption 999")
    done = verb("--seconds", "1")
    assert done.returncode == 1
    first = next(line for line in done.stdout.splitlines() if line.startswith(("PROBLEM", "WARNING", "NOTE")))
    assert first.startswith("PROBLEM GPU 0: ")
    assert "Unknown Error" in first


def test_nothing_to_look_at_ends_with_exit_code_2(nvml: Says) -> None:
    """No driver: exit code 2, one line of error with the choices, and with --json an object that says it."""
    nvml.say("fail nvmlInitWithFlags 9")
    done = verb("--json")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--sensor estimate" in done.stderr
    report = json.loads(done.stdout)
    assert (report["verdict"], report["gpus"]) == ("no GPU", [])
    assert "no GPU can be metered" in report["error"]


@pytest.mark.parametrize(
    "arguments", [["--sensor", "replay"], ["--gpu", "x"], ["--gpu", "9"], ["--estimate-watts", "-1"]]
)
def test_bad_input_is_one_line(nvml: Says, arguments: list[str]) -> None:
    """Each wrong input ends with exit code 2 and one line."""
    done = verb(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_a_running_daemon_is_seen_and_not_disturbed(nvml: Says, tmp_path: Path) -> None:
    """Beside a daemon doctor says that it runs; the daemon goes on metering and is as ready as before."""
    db = tmp_path / "e.db"
    with daemon(db, sensor=("--sensor", "estimate")) as running:
        done = verb("--seconds", "1", "--db", str(db), "--json")
        assert running.popen.poll() is None
        status = ask_status(socket_path(db))
    report = json.loads(done.stdout)
    assert report["host"]["daemon"]["troubles"] == []
    assert abs(report["host"]["daemon"]["wall_step_ns"]) < NS_PER_S
    assert [f["severity"] for f in report["findings"] if "runs on this host" in f["what"]] == ["note"]
    assert [g["state"] for g in status["gpus"]] == ["ok"]
