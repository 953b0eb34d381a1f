"""Datasets as JSON Lines: one sample a line, `{"text": …}`, `{"prompt": …}` or OpenAI's `{"messages": […]}`.

A broken line stops the bench before anything is sent: a silently shorter dataset would be rated as if it were whole.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from energyd.daemon.errors import DataError

from .tasks import Task

_TEXT_KEYS = ("text", "prompt")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One sample: plain `text`, or a conversation `messages` (None: it is plain text). Never stored, never logged."""

    text: str
    messages: tuple[Mapping[str, Any], ...] | None = None

    def __repr__(self) -> str:
        """Length only: a repr ends up in tracebacks and logs, where no prompt may be."""
        return f"Prompt({len(self.text)} characters)"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A dataset in memory. `sha256` is of the file's bytes; `empty` samples were dropped before selection."""

    name: str
    sha256: str
    prompts: tuple[Prompt, ...]
    empty: int
    is_sample: bool


def load(path: Path) -> Loaded:
    """Read a JSONL file; raises DataError that names the file and the line, and never quotes the line."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise DataError(f"cannot read the dataset {path}: {e.strerror}; give a JSONL file with --data") from e
    return _loaded(path.name, str(path), raw, is_sample=path.name.endswith(".sample.jsonl"))


def load_sample(task: Task) -> Loaded:
    """The sample of our own writing that ships for `task`; raises DataError if there is none. Never official."""
    if task.dataset.sample is None:
        raise DataError(
            f"no sample ships for {task.task_id}; export {task.dataset.dataset_id} as JSONL and give it with --data"
        )
    with as_file(files("energyd.bench") / "data" / task.dataset.sample) as path:
        return _loaded(task.dataset.sample, str(path), path.read_bytes(), is_sample=True)


def _loaded(name: str, where: str, raw: bytes, *, is_sample: bool) -> Loaded:
    found = list(_prompts(raw, where))
    kept = tuple(p for p in found if p is not None)
    if not kept:
        raise DataError(f'{where} holds no sample; each line must be an object like {{"text": "…"}}')
    return Loaded(name, hashlib.sha256(raw).hexdigest(), kept, len(found) - len(kept), is_sample)


def _prompts(raw: bytes, where: str) -> Iterator[Prompt | None]:
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            yield _prompt(line, f"{where}, line {number}")


def _prompt(line: bytes, where: str) -> Prompt | None:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as e:
        raise DataError(f"{where}: not UTF-8 text (byte {e.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as e:
        raise DataError(f"{where}: not JSON ({e.msg}, column {e.colno}); write one JSON object a line") from None
    except (ValueError, RecursionError):
        # a number of thousands of digits, or thousands of nested brackets: JSON in form, but nothing a sample may hold
        raise DataError(f"{where}: not a sample (a number too long or brackets too deep)") from None
    if not isinstance(row, dict):
        raise DataError(f'{where}: {_kind(row)} instead of an object; write {{"text": "…"}}')
    if "messages" in row:
        return _conversation(row["messages"], where)
    for key in _TEXT_KEYS:
        if key in row:
            if not isinstance(row[key], str):
                raise DataError(f"{where}: {key!r} is {_kind(row[key])}, not text")
            return Prompt(row[key]) if row[key].strip() else None
    raise DataError(
        f"{where}: no 'text', 'prompt' or 'messages' in it; rename the column that holds the prompt to 'text'"
    )


def _conversation(messages: object, where: str) -> Prompt | None:
    if not isinstance(messages, list):
        raise DataError(f"{where}: 'messages' is {_kind(messages)}, not a list")
    texts: list[str] = []
    for place, message in enumerate(messages, start=1):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
            raise DataError(f"{where}: message {place} has no 'role'")
        content = message.get("content")
        if not isinstance(content, str):
            raise DataError(f"{where}: message {place}: 'content' is {_kind(content)}, not text")
        texts.append(content)
    if not any(t.strip() for t in texts):
        return None
    return Prompt("\n".join(texts), tuple(messages))


def _kind(value: object) -> str:
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "text")
