"""`energyd bench` and `energyd tasks` against real small servers."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from energyd.daemon.cli import main

from .conftest import SECRET, FakeDaemon, FakeServer, Loop, started, until


def bench(server: FakeServer, db: Path, data: Path, *more: str) -> Result:
    """Run the verb as a user would, without waiting for idle."""
    fixed = ["--url", server.url, "--model", "org/tiny-1B", "--db", str(db), "--data", str(data)]
    return CliRunner().invoke(main, ["bench", *fixed, "--idle-seconds", "0.05", *more])


def found(result: Result) -> dict[str, Any]:
    """The JSON of a run."""
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_a_run_is_stored_whole(server: FakeServer, daemon: FakeDaemon, db: Path, data: Path) -> None:
    """Every sample of warm-up and measurement reaches the daemon with its query's id, and the run is closed."""
    run = found(bench(server, db, data, "--samples", "12", "--warmup", "3", "--json"))
    assert run["status"] == "complete"
    assert run["stored"]
    phases = [phase for _, phase, _ in daemon.samples]
    assert (phases.count("warmup"), phases.count("measured")) == (3, 12)
    assert all(s.query_id for s in daemon.samples.values())
    assert [e.status for e in daemon.ends] == ["complete"]
    assert daemon.starts[0].task == "text_generation"
    assert daemon.ends[0].summary == run["summary"]


def test_the_figures_are_those_of_the_daemon(server: FakeServer, daemon: FakeDaemon, db: Path, data: Path) -> None:
    """A GPU of a constant 100 W: the whole-GPU figure is 100 W over the span, active half of it, idle 100 W."""
    s = found(bench(server, db, data, "--samples", "12", "--json"))["summary"]
    assert s["gpu_run_wh"] == pytest.approx(100 * s["span_s"] / 3_600, rel=1e-3)
    assert s["gpu_run_wh_per_1000"] == pytest.approx(s["gpu_run_wh"] / 12 * 1_000)
    assert s["active_wh_per_1000"] == pytest.approx(s["gpu_run_wh_per_1000"] / 2, rel=1e-3)
    assert s["serving_wh_per_1000"] == pytest.approx(s["gpu_run_wh_per_1000"] * 3 / 4, rel=1e-3)
    assert s["idle_w"] == pytest.approx(100, rel=1e-2)
    assert (s["hardware"], s["source"], s["provisional"]) == ("NVIDIA H200", "nvml-counter", False)
    assert (s["completion_tokens"], s["tokens_source"], s["queries_other_length"]) == (120, "response", 0)


def test_the_provenance_tells_how_to_repeat_it(server: FakeServer, daemon: FakeDaemon, db: Path, data: Path) -> None:
    """Dataset and its hash, protocol, server, parameters, class, versions: before the run starts."""
    run = found(bench(server, db, data, "--json", "--precision", "fp16"))
    p = run["provenance"]
    assert p == daemon.starts[0].provenance
    assert (p["protocol"], p["dataset"], p["precision"]) == ("aies-v1", "d.jsonl", "fp16")
    assert (p["model_class"], p["model_class_source"]) == ("A", "name")
    assert (p["server"], p["host"], p["drivers"]) == ("vllm 0.99.0", "host-1", ["580.0"])
    assert (p["parameters"]["max_tokens"], p["parameters"]["min_tokens"]) == (10, 10)
    assert len(p["dataset_sha256"]) == 64


def test_no_prompt_and_no_key_leaves_for_the_daemon(
    server: FakeServer, daemon: FakeDaemon, db: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marked prompts and a marked key reach the server, and appear nowhere in what is posted, printed or logged."""
    monkeypatch.setenv("MY_KEY", "MARKED-KEY")
    server.fail = lambda n: 500 if n == 11 else None
    result = bench(server, db, data, "--json", "--api-key-env", "MY_KEY")
    assert result.exit_code == 1
    assert any(SECRET in str(asked) for asked in server.seen)
    assert server.headers[-1]["Authorization"] == "Bearer MARKED-KEY"
    posted = b"".join(daemon.bodies).decode("latin-1") + result.output
    assert "HTTP 500" in posted
    for secret in (SECRET, "MARKED-KEY", "number 3 of the day", "day the of 3"):
        assert secret not in posted


def test_b_requests_are_in_flight_at_once(server: FakeServer, daemon: FakeDaemon, db: Path, data: Path) -> None:
    """At batch 4 the server sees four at once, never more."""
    server.delay_s = 0.05
    run = found(bench(server, db, data, "--batch-size", "4", "--warmup", "0", "--json"))
    assert (server.peak, run["batch_size"], run["summary"]["n"]) == (4, 4, 12)


def test_every_request_asks_for_its_id(server: FakeServer, daemon: FakeDaemon, db: Path, data: Path) -> None:
    """The proxy answers an id only to those who ask, so the bench asks each time."""
    found(bench(server, db, data, "--json"))
    assert {h.get("x-energyd-report") for h in server.headers} == {"1"}


def test_a_few_failures_are_counted_and_many_fail_the_run(
    server: FakeServer, daemon: FakeDaemon, db: Path, data: Path
) -> None:
    """One of twelve is more than 1 %: the run is stored as failed, the first failure is shown, the exit code is 1."""
    server.fail = lambda n: 503 if n == 5 else None
    result = bench(server, db, data, "--warmup", "0", "--batch-size", "2")
    assert result.exit_code == 1
    assert "measured sample 5 failed (HTTP 503)" in result.stderr
    assert "1 of 12 requests failed; their energy is part of gpu_run" in result.stdout
    assert [e.status for e in daemon.ends] == ["failed"]
    assert daemon.samples[daemon.starts[0].run_id, "measured", 5].error == "HTTP 503"


def test_past_the_proxy_only_the_whole_gpu_is_known(loop: Loop, daemon: FakeDaemon, db: Path, data: Path) -> None:
    """The warning says what is lost; the figures of the queries are unknown, not 0."""
    result = bench(started(loop, FakeServer(proxied=False)), db, data, "--json")
    assert "is not energyd's proxy" in result.stderr
    s = found(result)["summary"]
    assert s["gpu_run_wh_per_1000"] > 0
    assert (s["active_wh_per_1000"], s["serving_wh_per_1000"]) == (None, None)
    assert {x.query_id for x in daemon.samples.values()} == {None}


def test_without_a_daemon_the_way_out_is_named(server: FakeServer, db: Path, data: Path) -> None:
    """One line that names `energyd start` and --no-meter, and nothing is sent."""
    result = bench(server, db, data)
    assert result.exit_code == 2
    assert result.output.startswith("energyd: no energyd daemon answers at ")
    assert "energyd start" in result.output
    assert "--no-meter" in result.output
    assert server.seen == []


def test_no_meter_replays_without_energy(server: FakeServer, db: Path, data: Path) -> None:
    """Times are known, energy is unknown, nothing is stored."""
    run = found(bench(server, db, data, "--no-meter", "--json"))
    assert (run["stored"], run["summary"]["source"], run["summary"]["n"]) == (False, None, 12)
    assert run["summary"]["p50_s"] > 0
    assert "energy       not measured" in bench(server, db, data, "--no-meter").stdout


def test_a_daemon_that_is_away_in_mid_run_gets_all_rows_later(
    server: FakeServer, daemon: FakeDaemon, db: Path, data: Path
) -> None:
    """Rows wait while it answers 503 and are stored when it is back; the run is complete."""

    def away(n: int) -> None:
        daemon.away = n < 11

    server.fail = away
    run = found(bench(server, db, data, "--warmup", "0", "--json"))
    assert run["status"] == "complete"
    assert len(daemon.samples) == 12


def test_a_daemon_that_stays_away_leaves_the_times(
    server: FakeServer, daemon: FakeDaemon, db: Path, data: Path
) -> None:
    """The report still comes, says that there is no energy, and the exit code says that nothing was stored."""

    def gone(_: int) -> None:
        daemon.away = True

    server.fail = gone
    result = bench(server, db, data, "--warmup", "0", "--settle-timeout", "0.1")
    assert result.exit_code == 2
    assert "energy       not measured" in result.stdout
    assert "could not be closed in the ledger" in result.stderr


def test_the_bench_waits_until_the_energy_is_final(
    server: FakeServer, daemon: FakeDaemon, db: Path, data: Path
) -> None:
    """It asks again while the daemon says that the span is not settled."""
    daemon.settle_after = 1
    assert found(bench(server, db, data, "--json"))["summary"]["provisional"] is False
    assert daemon.asked == 3  # twice for the run, once for idle


def test_figures_that_do_not_settle_are_marked_provisional(
    server: FakeServer, daemon: FakeDaemon, db: Path, data: Path
) -> None:
    """After the limit they are taken as they are and say so."""
    daemon.settle_after = 1_000
    result = bench(server, db, data, "--settle-timeout", "0.1")
    assert "PROVISIONAL" in result.stdout
    assert "figures were provisional when the run ended" in result.stdout


def test_all_gpus_count_unless_one_is_named(server: FakeServer, daemon: FakeDaemon, db: Path, data: Path) -> None:
    """Two GPUs draw twice as much, with a warning; --gpu takes one, and an unknown one is refused."""
    daemon.gpus = 2
    both = bench(server, db, data, "--json")
    assert "all 2 metered GPUs are counted" in both.stderr
    s = found(both)["summary"]
    assert s["gpu_run_wh"] == pytest.approx(2 * 100 * s["span_s"] / 3_600, rel=1e-3)
    s = found(bench(server, db, data, "--gpu", "1", "--json"))["summary"]
    assert s["gpu_run_wh"] == pytest.approx(100 * s["span_s"] / 3_600, rel=1e-3)
    wrong = bench(server, db, data, "--gpu", "7")
    assert (wrong.exit_code, wrong.output) == (
        2,
        "energyd: the daemon meters no GPU '7'; it meters: 0 (NVIDIA H200), 1 (NVIDIA H200)\n",
    )


@pytest.mark.parametrize("style", ["vllm", "transformers", "plain"])
@pytest.mark.parametrize(
    ("stream", "api"), [(s, a) for s in ("--stream", "--no-stream") for a in ("completions", "chat")]
)
def test_every_server_is_replayed_each_way(
    loop: Loop, daemon: FakeDaemon, db: Path, data: Path, style: str, stream: str, api: str
) -> None:
    """Token counts come from the server, streamed or not, by chat or completions."""
    run = found(
        bench(started(loop, FakeServer(style=style)), db, data, stream, "--api", api, "--json", "--warmup", "0")
    )
    assert (run["summary"]["completion_tokens"], run["summary"]["tokens_source"]) == (120, "response")
    assert run["provenance"]["api"] == api


def test_ctrl_c_stores_what_was_measured(server: FakeServer, daemon: FakeDaemon, db: Path, data: Path) -> None:
    """The run ends as interrupted with its rows, a report comes, and the exit code is 130."""
    server.delay_s = 0.02

    def press() -> None:
        until(lambda: len(server.seen) >= 6)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    result = bench(server, db, data, "--warmup", "0")
    presser.join()
    assert result.exit_code == 130, result.output
    assert "INTERRUPTED" in result.stdout
    assert [e.status for e in daemon.ends] == ["interrupted"]
    assert 0 < len(daemon.samples) < 12


def test_ctrl_c_before_the_run_stores_nothing(server: FakeServer, daemon: FakeDaemon, db: Path, data: Path) -> None:
    """While the probe waits there is no run yet."""
    server.delay_s = 30

    def press() -> None:
        until(lambda: len(server.seen) >= 1)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    result = bench(server, db, data)
    presser.join()
    assert (result.exit_code, daemon.starts) == (130, [])
    assert "nothing was stored" in result.output


def test_more_samples_than_there_are_sends_all(server: FakeServer, daemon: FakeDaemon, db: Path, data: Path) -> None:
    """It says so, and the count is the true one."""
    result = bench(server, db, data, "--samples", "50", "--json")
    assert "d.jsonl holds 12 samples, not 50" in result.stderr
    assert found(result)["summary"]["n"] == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "asr"], "the task asr cannot be benched by this version yet; it can bench: text_generation"),
        (["--task", "poetry"], "there is no task 'poetry'"),
        (["--api-key-env", "NOT_SET_ANYWHERE"], "the environment variable NOT_SET_ANYWHERE is empty or not set"),
        (["--url", "localhost"], "--url is not an http(s) URL"),
        (["--data", "/no/such.jsonl"], "cannot read the dataset /no/such.jsonl"),
    ],
)
def test_wrong_input_is_one_line(server: FakeServer, db: Path, data: Path, options: list[str], words: str) -> None:
    """Exit code 2, no traceback."""
    result = bench(server, db, data, *options)
    assert result.exit_code == 2
    assert words in result.output
    assert result.output.count("\n") == 1


def test_the_sample_ships_and_is_not_official(server: FakeServer, daemon: FakeDaemon, db: Path) -> None:
    """Without --data the sample of our own is replayed, and the report says so."""
    fixed = ["--url", server.url, "--model", "m", "--db", str(db), "--samples", "5", "--idle-seconds", "0"]
    result = CliRunner().invoke(main, ["bench", *fixed])
    assert result.exit_code == 0, result.output
    assert "sample dataset of energyd, not the standard one" in result.stdout
    assert "idle         unknown W" in result.stdout


def test_tasks_are_listed_for_people_and_machines() -> None:
    """The same eleven either way."""
    listed = json.loads(CliRunner().invoke(main, ["tasks", "--json"]).stdout)
    table = CliRunner().invoke(main, ["tasks"]).stdout
    assert len(listed) == 11
    assert all(t["task"] in table for t in listed)


def test_help_shows_examples_and_exit_codes() -> None:
    """A user who is lost finds a line to copy."""
    shown = CliRunner().invoke(main, ["bench", "--help"]).stdout
    assert "energyd bench --url http://127.0.0.1:8088 --model my/model" in shown
    assert "Exit codes" in shown
