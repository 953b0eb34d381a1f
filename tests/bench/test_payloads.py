"""Requests in each server's own words."""

import json

from energyd.bench.datasets import Prompt
from energyd.bench.payloads import Api, Dialect, Generation, ServerKind, body, dialects, warmup

TEN = Generation(10, fixed=True)
TALK = Prompt(
    "be brief\nhi there", ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hi there"})
)


def fields(
    kind: ServerKind, api: Api = Api.COMPLETIONS, *, stream: bool = True, exact: bool = True
) -> dict[str, object]:
    """The body of one request."""
    found: dict[str, object] = json.loads(body(Prompt("hello"), "m", Dialect(kind, api, stream, exact), TEN))
    return found


def test_vllm_is_told_to_make_exactly_ten_tokens() -> None:
    """`min_tokens` and `ignore_eos` keep the answer from ending early; usage is asked for in the stream."""
    assert fields(ServerKind.VLLM) == {
        "model": "m",
        "prompt": "hello",
        "max_tokens": 10,
        "min_tokens": 10,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_transformers_gets_no_field_that_it_does_not_know() -> None:
    """Transformers serve answers 422 to vLLM's fields; its own `generation_config` fixes the count."""
    found = fields(ServerKind.TRANSFORMERS)
    assert set(found) == {"model", "prompt", "max_tokens", "temperature", "stream", "generation_config"}
    config = json.loads(str(found["generation_config"]))
    assert (config["min_new_tokens"], config["max_new_tokens"], config["do_sample"]) == (10, 10, False)


def test_an_unknown_server_gets_plain_fields() -> None:
    """Nothing beyond the OpenAI API; without streaming no stream options."""
    found = fields(ServerKind.OPENAI, stream=False, exact=False)
    assert set(found) == {"model", "prompt", "max_tokens", "temperature", "stream"}


def test_chat_wraps_text_and_keeps_conversations() -> None:
    """Text becomes one user message; a conversation is sent as it is, or as its bare text to completions."""
    chat = Dialect(ServerKind.OPENAI, Api.CHAT, stream=False, exact=False)
    assert json.loads(body(Prompt("hello"), "m", chat, TEN))["messages"] == [{"role": "user", "content": "hello"}]
    assert json.loads(body(TALK, "m", chat, TEN))["messages"][0] == {"role": "system", "content": "be brief"}
    plain = Dialect(ServerKind.OPENAI, Api.COMPLETIONS, stream=False, exact=False)
    assert json.loads(body(TALK, "m", plain, TEN))["prompt"] == "be brief\nhi there"


def test_exact_ways_come_first_and_only_where_they_exist() -> None:
    """A way that fixes the count is tried before one that does not, within each endpoint."""
    both = (Api.COMPLETIONS, Api.CHAT)
    assert [(w.api, w.exact) for w in dialects(ServerKind.VLLM, both, TEN, stream=True)] == [
        (Api.COMPLETIONS, True),
        (Api.COMPLETIONS, False),
        (Api.CHAT, True),
        (Api.CHAT, False),
    ]
    assert [w.exact for w in dialects(ServerKind.OPENAI, both, TEN, stream=True)] == [False, False]
    free = Generation(8192, fixed=False)
    assert not any(w.exact for w in dialects(ServerKind.VLLM, both, free, stream=True))


def test_a_warmup_has_the_words_of_the_sample_but_not_its_beginning() -> None:
    """As much work as the sample, no help from a prefix cache."""
    assert warmup(Prompt("one two  three")).text == "three two one"
    turned = warmup(TALK)
    assert turned.messages is not None
    assert [m["content"] for m in turned.messages] == ["brief be", "there hi"]
    assert [m["role"] for m in turned.messages] == ["system", "user"]
