"""The verbs `energyd bench` and `energyd tasks`."""

import asyncio
import json
import os
import signal
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import click

from energyd.daemon.errors import UsageError
from energyd.daemon.paths import ledger_path, socket_path

from . import report
from .datasets import Loaded, load, load_sample
from .meterclient import MeterClient
from .order import Order, Outcome
from .payloads import Api, ServerKind
from .progress import on_stderr
from .run import bench as run_bench
from .servers import root
from .tasks import Task, all_tasks, find

_EXIT_CODES: Mapping[str, int] = {"complete": 0, "failed": 1, "interrupted": 130}
_NOT_STORED = 2

_EPILOG = """\b
Examples:
  energyd bench --url http://127.0.0.1:8088 --model my/model
  energyd bench --url http://127.0.0.1:8088 --model my/model --data prompts.jsonl --samples 200 --batch-size 32
  energyd bench --url https://api.example.com/v1 --model m --api chat --api-key-env MY_KEY --no-meter --json

The URL should be that of energyd's proxy (`energyd start`): then each query's own energy is known, not only that of the
whole GPU over the run.

Exit codes: 0 complete, 1 more than 1 % of the requests failed, 2 wrong input or something missing, 130 interrupted."""


@click.command(epilog=_EPILOG)
@click.option("--url", required=True, help="The server, through energyd's proxy; with or without /v1.")
@click.option("--model", required=True, help="The model's name as the server knows it.")
@click.option("--task", "task_name", default="text-generation", show_default=True, help="See `energyd tasks`.")
@click.option(
    "--data",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSONL with 'text', 'prompt' or 'messages' a line.  [default: our own sample, never official]",
)
@click.option("--samples", type=click.IntRange(1), help="How many samples are measured.  [default: the task's, 1000]")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Requests in flight; the next group starts when all of a group have ended.",
)
@click.option(
    "--warmup", type=click.IntRange(0), default=10, show_default=True, help="Requests before the measured ones."
)
@click.option(
    "--idle-seconds",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="How long idle power is measured first.",
)
@click.option("--api", type=click.Choice([a.value for a in Api]), help="Endpoint.  [default: completions, else chat]")
@click.option(
    "--stream/--no-stream",
    default=True,
    show_default=True,
    help="Streamed answers show each engine step, which attribution needs.",
)
@click.option("--max-new-tokens", type=click.IntRange(1), help="Tokens of each answer.  [default: the protocol's, 10]")
@click.option(
    "--server",
    type=click.Choice(["auto", *(k.value for k in ServerKind)]),
    default="auto",
    show_default=True,
    help="What answers: decides how an exact number of tokens is asked for.",
)
@click.option(
    "--model-class",
    type=click.Choice(["A", "B", "C"], case_sensitive=False),
    help="Up to 20 B parameters, up to 66 B, above.  [default: guessed from the name]",
)
@click.option("--precision", help="What the weights are computed in, for example fp16.")
@click.option("--engine", help="What runs the model.  [default: the server found]")
@click.option("--hardware", help="What it runs on.  [default: the GPU that the daemon meters]")
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    help="Index or UUID of a GPU that the model runs on; repeat for several.  [default: all metered]",
)
@click.option(
    "--db", type=click.Path(path_type=Path, dir_okay=False), help="The daemon's ledger: its socket lies beside it."
)
@click.option("--no-meter", is_flag=True, help="Replay without a daemon: times only, energy unknown, nothing stored.")
@click.option(
    "--api-key-env", metavar="NAME", help="Environment variable that holds the server's key; it is never stored."
)
@click.option(
    "--request-timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds for one request.",
)
@click.option(
    "--settle-timeout",
    type=click.FloatRange(0),
    default=120.0,
    show_default=True,
    help="Seconds to wait until the energy is final.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_context
def bench(ctx: click.Context, /, **options: Any) -> None:
    """Replay a dataset to an endpoint and measure Wh per query."""
    order = _order(options)
    db: Path | None = None if options["no_meter"] else options["db"] or ledger_path()
    outcome = asyncio.run(_run(order, db))
    if options["as_json"]:
        click.echo(json.dumps(report.as_json(outcome, order), indent=2))
    else:
        click.echo(report.text(outcome, order))
    code = _EXIT_CODES[outcome.status]
    ctx.exit(_NOT_STORED if code == 0 and db is not None and not outcome.stored else code)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="A JSON list on stdout.")
def tasks(as_json: bool) -> None:
    """List the tasks of the AI Energy Score and what this version can bench."""
    found = all_tasks()
    click.echo(json.dumps([report.task_json(t) for t in found], indent=2) if as_json else report.task_table(found))


def _order(options: Mapping[str, Any]) -> Order:
    task = find(options["task_name"])
    if not task.implemented:
        ready = ", ".join(t.task_id for t in all_tasks() if t.implemented)
        raise UsageError(f"the task {task.task_id} cannot be benched by this version yet; it can bench: {ready}")
    root(options["url"])  # a wrong URL is told before the dataset is read
    return Order(
        url=options["url"],
        model=options["model"],
        task=task,
        dataset=_dataset(options["data"], task),
        samples=options["samples"] or task.dataset.count,
        batch_size=options["batch_size"],
        warmup=options["warmup"],
        idle_s=options["idle_seconds"],
        max_new_tokens=options["max_new_tokens"],
        stream=options["stream"],
        api=Api(options["api"]) if options["api"] else None,
        server=None if options["server"] == "auto" else ServerKind(options["server"]),
        model_class=options["model_class"].upper() if options["model_class"] else None,
        precision=options["precision"],
        engine=options["engine"],
        hardware=options["hardware"],
        gpus=options["gpus"],
        request_limit_s=options["request_timeout"],
        settle_limit_s=options["settle_timeout"],
        headers=_key(options["api_key_env"]),
    )


def _dataset(path: Path | None, task: Task) -> Loaded:
    return load_sample(task) if path is None else load(path)


def _key(name: str | None) -> dict[str, str]:
    if name is None:
        return {}
    if not (key := os.environ.get(name)):
        raise UsageError(f"--api-key-env: the environment variable {name} is empty or not set")
    return {"authorization": f"Bearer {key}"}


async def _run(order: Order, db: Path | None) -> Outcome:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)  # a second Ctrl-C ends at once

    loop.add_signal_handler(signal.SIGINT, interrupt)
    async with AsyncExitStack() as stack:
        meter = await stack.enter_async_context(MeterClient(socket_path(db))) if db else None
        progress = stack.enter_context(on_stderr())
        return await run_bench(order, meter, progress, stop)
