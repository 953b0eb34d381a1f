"""`energyd rate` as a user calls it, on real files and a real ledger."""

import json
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import Result

from energyd.daemon.ledger import Ledger
from energyd.daemon.paths import socket_path
from energyd.daemon.records import Run
from energyd.daemon.wire import PATH_RATINGS

HEADER = "edition,task,model_class,model,gpu_energy_wh_per_1000"
Rate = Callable[..., Result]
RunFactory = Callable[..., Run]
LedgerFactory = Callable[[Sequence[Run]], Path]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A small CSV with two editions and two tasks."""
    path = tmp_path / "f.csv"
    path.write_text(
        f"{HEADER}\n2025-02,asr,,a,1\n2025-02,asr,,b,2\n2025-12,text-generation,A,c,4.2\n2025-12,text_generation,A,d,90\n"
    )
    return path


def _stored(path: Path) -> list[dict[str, Any]]:
    with Ledger.open(path, readonly=True) as ledger:
        return list(ledger.db["ratings"].rows)


def test_runs_are_rated_against_the_newest_edition(rate: Rate, run_of: RunFactory, ledger_of: LedgerFactory) -> None:
    """Without options the ledger's runs get stars of the newest edition that has their cohort."""
    path = ledger_of([run_of("a", 17.38), run_of("b", 3.0, task="asr")])
    result = rate("--db", path, "--format", "json")
    assert result.exit_code == 0
    assert [(r["edition"], r["model"], r["stars"]) for r in json.loads(result.stdout)["rows"]] == [
        ("2025-12", "a", 5),
        ("2025-02", "b", 5),
    ]


def test_an_edition_can_be_chosen(rate: Rate, run_of: RunFactory, ledger_of: LedgerFactory) -> None:
    """17.38 Wh are 3 stars among the models of February 2025."""
    result = rate("--db", ledger_of([run_of("a", 17.38)]), "--edition", "2025-02", "--format", "json")
    assert json.loads(result.stdout)["rows"][0]["stars"] == 3


def test_a_run_without_a_class_says_what_to_give(rate: Rate, run_of: RunFactory, ledger_of: LedgerFactory) -> None:
    """The reason names both flags, and the flag then helps."""
    path = ledger_of([run_of("a", 17.38, provenance={"model_class": None})])
    assert "give `--model-class a=A` here or `--model-class A` to `energyd bench`" in rate("--db", path).stdout
    assert "★★★★★" in rate("--db", path, "--model-class", "a=A").stdout


def test_the_rating_is_kept_in_the_ledger(rate: Rate, run_of: RunFactory, ledger_of: LedgerFactory) -> None:
    """Stars that were given are stored, one record an edition; --no-store leaves that out."""
    path = ledger_of([run_of("a", 17.38), run_of("b", 3.0, task="asr")])
    rate("--db", path, "--no-store")
    assert _stored(path) == []
    assert rate("--db", path).stderr == ""
    kept = _stored(path)
    assert [(r["edition"], r["method"], r["basis"]) for r in kept] == [
        ("2025-02", "range", "gpu_run"),
        ("2025-12", "range", "gpu_run"),
    ]
    assert json.loads(kept[1]["rows"])[0]["stars"] == 5


@contextmanager
def _daemon(path: Path, status: int) -> Iterator[list[dict[str, Any]]]:
    """A daemon that takes ratings on its socket, or refuses them with `status`."""
    taken: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == PATH_RATINGS:
                taken.append(msgspec.msgpack.decode(body))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"several\nlines\n" if status != 200 else b"")

        def log_message(self, *_: object) -> None:
            """Nothing to say on stderr."""

        def address_string(self) -> str:
            return "local"

    with socketserver.UnixStreamServer(str(socket_path(path)), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield taken
        finally:
            server.shutdown()
            thread.join()


def test_a_running_daemon_gets_the_rating(rate: Rate, run_of: RunFactory, ledger_of: LedgerFactory) -> None:
    """While the daemon runs only it writes: the rating goes to its socket, and the ledger is left alone."""
    path = ledger_of([run_of("a", 17.38)])
    with _daemon(path, 200) as taken:
        result = rate("--db", path)
    assert (result.exit_code, result.stderr, _stored(path)) == (0, "", [])
    assert [(r["edition"], r["basis"], r["rows"][0]["model"]) for r in taken] == [("2025-12", "gpu_run", "a")]


def test_a_dead_daemons_socket_is_no_obstacle(rate: Rate, run_of: RunFactory, ledger_of: LedgerFactory) -> None:
    """A socket that nobody listens on any more means that the ledger may be written directly."""
    path = ledger_of([run_of("a", 17.38)])
    with _daemon(path, 200):
        pass
    assert rate("--db", path).stderr == ""
    assert len(_stored(path)) == 1


def test_a_refused_rating_is_a_warning_only(rate: Rate, run_of: RunFactory, ledger_of: LedgerFactory) -> None:
    """The stars are printed and the exit code stays 0; one line says that they were not kept."""
    path = ledger_of([run_of("a", 17.38)])
    with _daemon(path, 500):
        result = rate("--db", path)
    assert result.exit_code == 0
    assert "★★★★★" in result.stdout
    assert result.stderr.count("\n") == 1
    assert f"the rating was not kept in the ledger: the daemon at {socket_path(path)} answered 500" in result.stderr


def test_a_csv_of_mixed_set_ups_warns_beside_it(rate: Rate, run_of: RunFactory, ledger_of: LedgerFactory) -> None:
    """The CSV stays clean; what differs between its figures is told on stderr."""
    result = rate("--db", ledger_of([run_of("a"), run_of("b", batch_size=32)]), "--format", "csv")
    assert result.stdout.startswith("edition,task,")
    assert "2025-12 text_generation class A: warning: these figures differ in batch size (1, 32)" in result.stderr


def test_runs_among_themselves(rate: Rate, run_of: RunFactory, ledger_of: LedgerFactory) -> None:
    """The demo's table: estimates of runs without a class, compared with each other."""
    runs = [run_of(m, wh, source="estimate", provenance={"model_class": None}) for m, wh in (("a", 1.0), ("b", 2.0))]
    result = rate("--db", ledger_of(runs), "--among-runs", "--include-estimates")
    assert result.exit_code == 0
    assert "★★★★★ estimate, not official" in result.stdout
    assert "★☆☆☆☆ estimate, not official" in result.stdout


def test_a_file_is_rated_within_itself(rate: Rate, table: Path) -> None:
    """Each edition and task is its own cohort."""
    rows = json.loads(rate("--input", table, "--format", "json").stdout)["rows"]
    assert [r["stars"] for r in rows] == [5, 1, 5, 1]


def test_a_file_is_rated_against_frozen_bands(rate: Rate, table: Path) -> None:
    """--frozen takes the shipped bands of each row's edition, or of the one that is named."""
    own = json.loads(rate("--input", table, "--frozen", "--format", "json").stdout)["rows"]
    assert [r["stars"] for r in own] == [5, 5, 5, 1]
    named = json.loads(rate("--input", table, "--frozen", "--edition", "2025-12", "--format", "json").stdout)["rows"]
    assert [r["reason"] for r in named] == ["edition 2025-12 has no cohort asr"] * 2 + [None] * 2


def test_rows_can_be_chosen_by_edition_and_task(rate: Rate, table: Path) -> None:
    """--edition and --task (either spelling) leave only their rows."""
    by_edition = json.loads(rate("--input", table, "--edition", "2025-02", "--format", "json").stdout)["rows"]
    by_task = json.loads(rate("--input", table, "--task", "text-generation", "--format", "json").stdout)["rows"]
    assert [[r["model"] for r in by_edition], [r["model"] for r in by_task]] == [["a", "b"], ["c", "d"]]


def test_a_file_from_standard_input(rate: Rate, table: Path) -> None:
    """'-' reads the CSV from a pipe."""
    assert (
        rate("--input", "-", "--format", "csv", input=table.read_bytes()).stdout.splitlines()[1]
        == "2025-02,asr,,a,1,5,1"
    )


def test_the_output_goes_to_a_file(rate: Rate, table: Path, tmp_path: Path) -> None:
    """--output writes the file, byte by byte what would have been printed, and says so on stderr."""
    out = tmp_path / "out.csv"
    result = rate("--input", table, "--format", "csv", "--output", out)
    assert (result.stdout, out.read_text()) == ("", rate("--input", table, "--format", "csv").stdout)
    assert str(out) in result.stderr


def test_the_editions_are_listed(rate: Rate) -> None:
    """--editions shows both, with their bands."""
    text = rate("--editions").stdout
    assert "2025-12  AI Energy Score, December 2025" in text
    assert "0.05540   35.67" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--db", "{tmp}/none.db"], "no ledger at {tmp}/none.db; name it with --db, or measure one: `energyd start"),
        (["--db", "{tmp}/empty.db"], "no runs in {tmp}/empty.db; measure one: `energyd start --upstream URL`"),
        (
            ["--db", "{tmp}/one.db", "--task", "asr"],
            "no runs of task asr in {tmp}/one.db; tasks there: text_generation",
        ),
        (
            ["--db", "{tmp}/one.db", "--edition", "1999-01"],
            "no edition '1999-01' ships with energyd; there are 2025-12, 2025-02",
        ),
        (["--db", "{tmp}/one.db", "--model-class", "x=A"], "no model 'x' here; models: a"),
        (["--db", "{tmp}/one.db", "--frozen"], "--frozen belongs to --input"),
        (["--db", "{tmp}/one.db", "--among-runs", "--edition", "2025-12"], "--among-runs rates against no edition"),
        (["--db", "{tmp}/f.csv"], "{tmp}/f.csv"),
        (["--input", "{tmp}/none.csv"], "cannot read {tmp}/none.csv: No such file or directory"),
        (["--input", "{tmp}"], "cannot read {tmp}: Is a directory"),
        (["--input", "{tmp}/f.csv", "--task", "poetry"], "no row of task poetry; tasks there: asr, text_generation"),
        (
            ["--input", "{tmp}/f.csv", "--edition", "1999-01"],
            "no row of edition '1999-01'; editions there: 2025-02, 2025-12",
        ),
        (["--input", "{tmp}/f.csv", "--frozen", "--edition", "x"], "no edition 'x' ships"),
        (["--input", "{tmp}/f.csv", "--all"], "--all belongs to the runs of a ledger"),
        (["--input", "{tmp}/f.csv", "--basis", "active"], "--basis belongs to the runs of a ledger"),
        (["--input", "{tmp}/f.csv", "--output", "{tmp}/no/where"], "cannot write {tmp}/no/where: No such file"),
        (["--input", "{tmp}/bad.csv"], "{tmp}/bad.csv, line 2, column gpu_energy_wh_per_1000: 'x' is not a number"),
    ],
)
@pytest.mark.usefixtures("table")
def test_bad_input_is_one_clear_line(
    *, rate: Rate, run_of: RunFactory, ledger_of: LedgerFactory, tmp_path: Path, arguments: list[str], message: str
) -> None:
    """What is wrong, where, and what to do: one line on stderr, exit code 2, nothing on stdout."""
    ledger_of([]).rename(tmp_path / "empty.db")
    ledger_of([run_of("a")]).rename(tmp_path / "one.db")
    (tmp_path / "bad.csv").write_text(f"{HEADER}\ne,asr,,m,x\n")
    result = rate(*(a.format(tmp=tmp_path) for a in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("energyd: ")
    assert result.stderr.count("\n") == 1
    assert message.format(tmp=tmp_path) in result.stderr


def test_a_csv_does_not_depend_on_the_terminals_encoding(table: Path) -> None:
    """CSV is UTF-8 whatever the terminal is; the table falls back to ASCII."""
    table.write_text(table.read_text(encoding="utf-8") + "2025-12,text_generation,A,modèle-√,50\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    printed = {
        form: subprocess.run(
            [
                sys.executable,
                "-c",
                "from energyd.daemon.cli import main; main()",
                "rate",
                "--input",
                str(table),
                "--format",
                form,
            ],
            env=environment,
            capture_output=True,
            check=True,
        ).stdout
        for form in ("csv", "table")
    }
    assert "modèle-√" in printed["csv"].decode("utf-8")
    assert b"***.. " in printed["table"]
