"""Facts from bytes: model, task, usage and content chunks, however the bytes are cut."""

import gzip
import json
import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from energyd.proxy.observe import (
    RequestWatch,
    ResponseWatch,
    is_query,
    model_in_path,
    scan_object,
    task_of,
)

SSE = "text/event-stream; charset=utf-8"
VLLM = (
    b'data: {"id":"c","object":"chat.completion.chunk","model":"served",'
    b'"choices":[{"index":0,"delta":{"role":"assistant","content":""}}],"usage":null}\n\n'
    b": keep-alive\n\n"
    b'data: {"model":"served","choices":[{"index":0,"delta":{"content":"a\\u00e9"},"finish_reason":null}],"usage":null}\n\n'
    b'data: {"model":"served","choices":[{"index":0,"delta":{"content":""},"finish_reason":null}]}\r\n\r\n'
    b'data: {"model":"served","choices":[{"index":0,"delta":{"content":"c"},"finish_reason":"length"}]}\n\n'
    b'data: {"model":"served","choices":[],"usage":{"prompt_tokens":11,"total_tokens":14,"completion_tokens":3}}\n\n'
    b"data: [DONE]\n\n"
)


def seen(content_type: str, *pieces: bytes, encoding: str = "") -> ResponseWatch:
    """A watch that has seen a whole response in these pieces."""
    watch = ResponseWatch(content_type, encoding)
    for piece in pieces:
        watch.feed(piece)
    watch.finish()
    return watch


def facts(watch: ResponseWatch) -> tuple[str | None, int | None, int | None, int]:
    """Model, prompt tokens, completion tokens, content chunks."""
    return watch.model, watch.prompt_tokens, watch.completion_tokens, watch.chunks


# Requests.


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"m","stream":true}', ("m", True)),
        (b' { "messages":[{"model":"no"}], "stream" : true , "model" : "m/x" }', ("m/x", True)),
        (b'{"a":{"model":"no","stream":true},"b":["model","x"],"model":"yes"}', ("yes", False)),
        (b'{"prompt":"\\"model\\":\\"no\\"","model":"yes"}', ("yes", False)),
        (b'{"prompt":"}{]\\\\","model":"yes"}', ("yes", False)),
        (b'{"model":"a\\"b\\u00e9\\\\"}', ('a"bé\\', False)),
        (b'{"model":"first","model":"last"}', ("last", False)),
        (b'{"model":null}', (None, False)),
        (b'{"model":7,"stream":"true"}', (None, False)),
        (b'{"model":{"model":"no"}}', (None, False)),
        (b'["model","m"]', (None, False)),
        (b'{"models":"no","xmodel":"no"}', (None, False)),
        (b'{"model":"\\ud800"}', (None, False)),
        (b"\xff\xfe", (None, False)),
        (b"", (None, False)),
    ],
)
def test_model_of_a_request(body: bytes, expected: tuple[str | None, bool]) -> None:
    """The top-level model and stream of a JSON body are found, and nothing that only looks like them."""
    watch = RequestWatch("/v1/chat/completions", "application/json")
    watch.feed(body)
    assert (watch.model, watch.stream) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["model", "stream"]), inner),
    max_leaves=12,
)


@given(st.dictionaries(st.text() | st.sampled_from(["model", "stream"]), JSON), st.booleans())
def test_scan_agrees_with_a_parser(value: dict[str, object], ascii_only: bool) -> None:
    """For any JSON object the scan finds what a full parser finds."""
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    model = value.get("model")
    assert scan_object(body) == (model if isinstance(model, str) else None, value.get("stream") is True)


@given(st.dictionaries(st.text(), JSON, max_size=4), st.data())
def test_a_cut_prefix_invents_nothing(value: dict[str, object], data: st.DataObject) -> None:
    """A body cut anywhere yields no model that is not its top-level model."""
    body = json.dumps({"prompt": json.dumps({"model": "inner"}), **value, "model": "m"}).encode()
    cut = data.draw(st.integers(0, len(body)))
    model = value.get("model")
    assert scan_object(body[:cut])[0] in {None, "m", model if isinstance(model, str) else None}


def test_model_beyond_the_prefix_is_unknown() -> None:
    """What lies beyond 64 KiB is not searched, and a huge body is not kept."""
    watch = RequestWatch("/v1/completions", "application/json")
    watch.feed(b'{"prompt":"' + b'\\"model\\":' * 20_000)
    watch.feed(b'","model":"m"}')
    assert watch.model is None
    assert watch.upload_bytes == 200_025
    assert len(watch._prefix) == 65_536


def test_a_hostile_prefix_is_scanned_in_one_pass() -> None:
    """Bodies made to defeat a backtracking scan take no longer than others."""
    for body in (
        b'{"' + b"\\" * 65_533,
        b'{"a":"' + b'\\"' * 32_000,
        b"{" * 65_536,
        b'{"model"' + b" " * 65_000,
        b'"' * 65_536,
    ):
        assert scan_object(body) == (None, False)


def test_compressed_request() -> None:
    """The model of a gzip body is found in the beginning of what it decompresses to."""
    watch = RequestWatch("/v1/completions", "application/json", "gzip")
    watch.feed(gzip.compress(b'{"model":"m","prompt":"' + random.Random(1).randbytes(300_000).hex().encode() + b'"}'))
    assert watch.model == "m"


@pytest.mark.parametrize("first", [True, False])
def test_multipart(first: bool) -> None:
    """The form field `model` of an audio upload is found before or after the file."""
    field = b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
    file = (
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\nContent-Type: audio/x\r\n\r\n'
        + b"\0" * 200_000
        + b"\r\n"
    )
    watch = RequestWatch("/v1/audio/transcriptions", "multipart/form-data; boundary=b")
    body = b"\r\n" + (field + file if first else file + field) + b"--B--\r\n"
    for start in range(0, len(body), 1000):
        watch.feed(body[start : start + 1000])
    assert watch.model == "whisper"


def test_paths() -> None:
    """Paths tell the task and, for task servers, the model."""
    assert task_of("/v1/chat/completions") == task_of("/v1/completions") == "text_generation"
    assert task_of("/v1/embeddings") == "sentence_similarity"
    assert task_of("/v1/audio/transcriptions") == "asr"
    assert task_of("/pooling") is None
    assert task_of("/models/a/b/pipeline/feature-extraction") == "sentence_similarity"
    assert model_in_path("/models/a/b") == "a/b"
    assert model_in_path("/v1/models/a") is None
    assert is_query("POST", "/v1/anything")
    assert not is_query("GET", "/v1/chat/completions")
    assert not is_query("POST", "/tokenize")


# Streams.


def test_vllm_stream() -> None:
    """Content chunks are counted, not the opening role, comments, usage or [DONE]; usage and model are the server's."""
    assert facts(seen(SSE, VLLM)) == ("served", 11, 3, 3)


def test_usage_split_at_every_byte() -> None:
    """Wherever two reads cut a stream, the facts are the same, and each chunk is told by the read that ends its event."""
    for cut in range(len(VLLM) + 1):
        watch = ResponseWatch(SSE)
        told = watch.feed(VLLM[:cut]) + watch.feed(VLLM[cut:])
        assert (told, watch.finish()) == (3, 0)
        assert facts(watch) == ("served", 11, 3, 3), cut


@given(st.data(), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_any_cuts_and_line_ends(data: st.DataObject, end: bytes) -> None:
    """Any number of cuts, and any line end that the standard allows, give the same facts."""
    body = VLLM.replace(b"\r\n", b"\n").replace(b"\n", end)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=30)))
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert facts(seen(SSE, *pieces)) == ("served", 11, 3, 3)


def test_transformers_serve_stream() -> None:
    """Usage on the last chunk, with choices, without [DONE] and without a final blank line."""
    body = (
        b'data: {"model":"m@main","choices":[{"delta":{"role":"assistant"},"index":0}]}\n\n'
        b'data: {"model":"m@main","choices":[{"delta":{"content":"x"},"index":0}]}\n\n'
        b'data:{"model":"m@main","choices":[{"delta":{},"finish_reason":"stop"}],'
        b'"usage":{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7}}'
    )
    assert facts(seen(SSE, body)) == ("m@main", 5, 2, 2)


def test_continuous_usage_is_cumulative() -> None:
    """Of usage in every chunk the last one counts, never the sum."""
    body = b"".join(
        b'data: {"choices":[{"text":"a"}],"usage":{"prompt_tokens":4,"completion_tokens":%d}}\n\n' % i
        for i in range(1, 6)
    )
    assert facts(seen(SSE, body)) == (None, 4, 5, 5)


def test_responses_api() -> None:
    """The Responses API: content in `.delta` events, usage in `response.completed`."""
    body = (
        b'event: response.created\ndata: {"type":"response.created","response":{"model":"m","usage":null}}\n\n'
        b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"x"}\n\n'
        b'event: response.completed\ndata: {"type":"response.completed",'
        b'"response":{"model":"m","usage":{"input_tokens":9,"output_tokens":1}}}\n\n'
    )
    assert facts(seen(SSE, body)) == ("m", 9, 1, 1)


def test_anthropic_messages() -> None:
    """Messages: usage in `message_start` and `message_delta`; what the cache served belongs to the prompt."""
    body = (
        b'event: message_start\ndata: {"type":"message_start","message":{"model":"m",'
        b'"usage":{"input_tokens":9,"cache_read_input_tokens":100,"output_tokens":1}}}\n\n'
        b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"x"}}\n\n'
        b'event: message_delta\ndata: {"type":"message_delta","delta":{},"usage":{"output_tokens":7}}\n\n'
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )
    assert facts(seen(SSE, body)) == ("m", 109, 7, 1)


def test_raw_text_events() -> None:
    """A transcription streamed as bare text counts its events."""
    assert seen(SSE, b"data: hello\n\ndata: world\n\ndata: [DONE]\n\n").chunks == 2


NOTHING = [b"null", b"7", b'"x"', b"[]", b"{}", b'{"prompt_tokens":null}', b'{"prompt_tokens":true}']
NOTHING += [
    b'{"prompt_tokens":-1,"completion_tokens":1.5}',
    b'{"prompt_tokens":1e400}',
    b'{"type":"duration","seconds":3}',
]


@pytest.mark.parametrize("usage", NOTHING)
def test_usage_that_says_nothing_is_absent(usage: bytes) -> None:
    """Absent or odd usage stays unknown: it is never zero."""
    watch = seen(SSE, b'data: {"choices":[{"text":"a"}],"usage":' + usage + b"}\n\n")
    assert (watch.prompt_tokens, watch.completion_tokens, watch.reported) == (None, None, False)
    watch = seen("application/json", b'{"model":"m","usage":' + usage + b"}")
    assert (watch.prompt_tokens, watch.completion_tokens, watch.reported) == (None, None, False)


@given(
    st.lists(
        st.binary(max_size=60) | st.sampled_from([b"data: ", b"\n\n", b"{", b'{"choices":[1,{"delta":3}]}', b"\r"])
    )
)
def test_garbage_never_raises(pieces: list[bytes]) -> None:
    """No bytes make the observer fail, in any kind of response."""
    for content_type in (SSE, "application/json"):
        for encoding in ("", "gzip", "br"):
            seen(content_type, *pieces, encoding=encoding)


def test_endless_line_is_bounded() -> None:
    """A line without end does not grow in memory, and the events after it are read."""
    watch = ResponseWatch(SSE)
    for _ in range(100):
        watch.feed(b"data: " + b"x" * 100_000)
    assert len(watch._lines._partial) < 1_200_000
    watch.feed(b"\n\n" + VLLM)
    assert (watch.prompt_tokens, watch.completion_tokens) == (11, 3)


def test_compressed_stream() -> None:
    """A gzip stream is read on the side, event by event; an unknown coding is left alone."""
    pack = zlib.compressobj(wbits=31)
    pieces = [pack.compress(VLLM) + pack.flush(zlib.Z_SYNC_FLUSH), pack.flush()]
    assert facts(seen(SSE, *pieces, encoding="gzip")) == ("served", 11, 3, 3)
    assert facts(seen(SSE, VLLM, encoding="br")) == (None, None, None, 0)


# Plain responses.


def test_plain_responses() -> None:
    """Usage and model of plain JSON, by OpenAI's and Anthropic's names; embeddings have no completion."""
    chat = b'{"id":"x","model":"m","choices":[{"message":{"content":"\\"usage\\":{}"}}],'
    chat += b'"usage":{"prompt_tokens":3,"completion_tokens":0}}'
    assert facts(seen("application/json", chat[:50], chat[50:])) == ("m", 3, 0, 0)
    embedding = b'{"model":"e","data":[{"embedding":[0.1]}],"usage":{"prompt_tokens":5,"total_tokens":5}}'
    assert facts(seen("application/json", embedding)) == ("e", 5, None, 0)
    message = b'{"type":"message","model":"c","usage":{"input_tokens":2,"output_tokens":4}}'
    assert facts(seen("application/json", message)) == ("c", 2, 4, 0)
    assert facts(seen("application/json", gzip.compress(chat), encoding="gzip")) == ("m", 3, 0, 0)
    assert facts(seen("text/plain", b"hello")) == (None, None, None, 0)


def test_large_plain_response() -> None:
    """Of a response over 1 MiB, head and tail are kept: the model stands in one, the usage in the other."""
    watch = ResponseWatch("application/json")
    watch.feed(b'{"id":"x","model":"e","data":[')
    for _ in range(50):
        watch.feed(b"0.25," * 20_000)
        assert len(watch._whole) + len(watch._tail) <= (1 << 20) + (1 << 17)
    watch.feed(b'0],"usage":{"prompt_tokens":5,"details":{"a":1},"total_tokens":5}}')
    watch.finish()
    assert facts(watch) == ("e", 5, None, 0)
