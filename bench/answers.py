"""What an answer says of itself: token counts, served model, errors (pure, incremental).

Counts come from the server's `usage`. Where it sends none, streamed content chunks are counted and marked `estimated`:
a chunk is usually, not always, one token. The text itself is looked at once, for emptiness, and dropped.
"""

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Answer:
    """Collects one answer. Counts are None until known; `error` says, without text, what went wrong inside a 200."""

    stream: bool
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    served: str | None = None
    error: str | None = None
    chunks: int = 0
    _pending: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body, split wherever the network split them."""
        self._pending += data
        if self.stream:
            *lines, rest = self._pending.split(b"\n")
            self._pending = bytearray(rest)
            for line in lines:
                self._line(bytes(line))

    def end(self) -> None:
        """The body is complete."""
        if self.stream:
            self._line(bytes(self._pending))
            if self.chunks == 0 and self.completion_tokens is None and self.error is None:
                self.error = "the stream held no tokens"
        else:
            self._object(bytes(self._pending))
        self._pending = bytearray()

    @property
    def tokens_source(self) -> str:
        """Where `tokens` comes from: `response`, `estimated` or `absent`."""
        if self.completion_tokens is not None:
            return "response"
        return "estimated" if self.chunks else "absent"

    @property
    def tokens(self) -> int | None:
        """Completion tokens: reported, else the content chunks counted, else None."""
        return self.completion_tokens if self.completion_tokens is not None else self.chunks or None

    def _line(self, line: bytes) -> None:
        line = line.strip()
        if line.startswith(b"data:"):
            payload = line[len(b"data:") :].strip()
            if payload and payload != b"[DONE]":
                self._object(payload)

    def _object(self, payload: bytes) -> None:
        try:
            found = json.loads(payload)
        except (ValueError, RecursionError):
            self.error = self.error or "the answer is not JSON"
            return
        if not isinstance(found, dict):
            self.error = self.error or "the answer is not a JSON object"
            return
        if found.get("error"):
            # servers report a failure in mid-stream this way, after a 200: unseen, it would count as a success
            self.error = self.error or "the server reported an error inside a 200 answer"
        if isinstance(found.get("model"), str):
            self.served = found["model"]
        self._usage(found.get("usage"))
        if self.stream and _has_content(found.get("choices")):
            self.chunks += 1

    def _usage(self, usage: Any) -> None:
        if isinstance(usage, dict):
            self.prompt_tokens = _count(usage.get("prompt_tokens"), self.prompt_tokens)
            self.completion_tokens = _count(usage.get("completion_tokens"), self.completion_tokens)


def _count(value: Any, before: int | None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else before


def _has_content(choices: Any) -> bool:
    if not isinstance(choices, list):
        return False
    for choice in choices:
        if isinstance(choice, dict):
            delta = choice.get("delta")
            if choice.get("text") or (isinstance(delta, dict) and any(delta.get(k) for k in _DELTA_KEYS)):
                return True
    return False


_DELTA_KEYS = ("content", "reasoning_content", "reasoning")
