"""From a sample to the request of a server kind (pure).

The protocol wants exactly ten new tokens, greedy. Each server is asked for that in its own words:

- `vllm`: `min_tokens` and `ignore_eos` beside `max_tokens`.
- `transformers`: answers 422 to fields that it does not know, but takes a whole `generation_config` as JSON text.
- `openai`: only `max_tokens`; an answer may then be shorter, which the run reports.

`dialects` lists what to try, best first; the probe keeps the first one that the server accepts.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from .datasets import Prompt


class ServerKind(StrEnum):
    """Which server answers."""

    VLLM = "vllm"
    TRANSFORMERS = "transformers"
    OPENAI = "openai"


class Api(StrEnum):
    """Which endpoint is asked."""

    COMPLETIONS = "completions"
    CHAT = "chat"

    @property
    def path(self) -> str:
        """The endpoint's path below the server's root."""
        return "/v1/chat/completions" if self is Api.CHAT else "/v1/completions"


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way to ask. `exact`: the server is told to make exactly `max_new_tokens`, not just at most that many."""

    kind: ServerKind
    api: Api
    stream: bool
    exact: bool


@dataclass(frozen=True, slots=True)
class Generation:
    """What is to be generated: `max_new_tokens` tokens (`fixed`: exactly so many), greedy."""

    max_new_tokens: int
    fixed: bool


def dialects(kind: ServerKind, apis: tuple[Api, ...], generation: Generation, *, stream: bool) -> Iterator[Dialect]:
    """Ways to ask a server of `kind`, best first: exact token counts before plain ones, within each API."""
    can_fix = generation.fixed and kind is not ServerKind.OPENAI
    for api in apis:
        for exact in (True, False) if can_fix else (False,):
            yield Dialect(kind, api, stream, exact)


def body(prompt: Prompt, model: str, dialect: Dialect, generation: Generation) -> bytes:
    """The JSON body of one request."""
    fields: dict[str, Any] = {"model": model, **_content(prompt, dialect.api), **parameters(dialect, generation)}
    return json.dumps(fields).encode()


def parameters(dialect: Dialect, generation: Generation) -> Mapping[str, Any]:
    """The fields of a request beside model and prompt: what the provenance of a run records."""
    count = generation.max_new_tokens
    fields: dict[str, Any] = {"max_tokens": count, "temperature": 0, "stream": dialect.stream}
    if dialect.stream and dialect.kind is not ServerKind.TRANSFORMERS:
        # transformers serve always sends usage in the last chunk; others only when asked
        fields["stream_options"] = {"include_usage": True}
    if dialect.exact and dialect.kind is ServerKind.VLLM:
        fields |= {"min_tokens": count, "ignore_eos": True}
    if dialect.exact and dialect.kind is ServerKind.TRANSFORMERS:
        config = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "num_beams": 1}
        fields["generation_config"] = json.dumps(config)
    return fields


def warmup(prompt: Prompt) -> Prompt:
    """The same words in reverse order: as long as the sample, yet of no use to a prefix cache.

    Upstream warms up on the samples themselves; with a server that caches prefixes the first measured queries would
    then cost less than they should.
    """
    if prompt.messages is None:
        return Prompt(_reversed(prompt.text))
    turned = tuple({**m, "content": _reversed(m["content"])} for m in prompt.messages)
    return Prompt(_reversed(prompt.text), turned)


def _reversed(text: str) -> str:
    return " ".join(reversed(text.split()))


def _content(prompt: Prompt, api: Api) -> dict[str, Any]:
    if api is Api.COMPLETIONS:
        return {"prompt": prompt.text}
    return {"messages": list(prompt.messages or ({"role": "user", "content": prompt.text},))}
