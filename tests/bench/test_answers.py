"""Answers, however the network cuts them."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from energyd.bench.answers import Answer

VLLM = (
    b'data: {"model":"m","choices":[{"delta":{"role":"assistant","content":""}}],"usage":null}\n\n'
    b'data: {"model":"m","choices":[{"delta":{"content":"\xc3\xa9"}}]}\n\n'
    b": keep-alive\n\n"
    b'data: {"model":"m","choices":[{"delta":{"content":"b"}}]}\r\n\r\n'
    b'data: {"model":"m","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}\n\ndata: [DONE]\n\n'
)


def read(data: bytes, *, stream: bool) -> Answer:
    """The answer in one piece."""
    found = Answer(stream=stream)
    found.feed(data)
    found.end()
    return found


@given(st.lists(st.integers(0, len(VLLM)), max_size=12))
def test_a_stream_reads_the_same_wherever_it_is_split(cuts: list[int]) -> None:
    """Splits inside events, inside UTF-8 and between CR and LF change nothing."""
    places = [0, *sorted(cuts), len(VLLM)]
    answer = Answer(stream=True)
    for start, end in pairwise(places):
        answer.feed(VLLM[start:end])
    answer.end()
    assert (answer.prompt_tokens, answer.tokens, answer.chunks, answer.served) == (5, 3, 2, "m")
    assert (answer.tokens_source, answer.error) == ("response", None)


def test_usage_on_the_last_content_chunk_counts() -> None:
    """Transformers serve sends usage with the finish reason, no `[DONE]`, and no blank line need follow."""
    answer = read(
        b'data: {"model":"m@main","choices":[{"text":"a","finish_reason":"length"}],"usage":{"completion_tokens":10}}',
        stream=True,
    )
    assert (answer.tokens, answer.tokens_source, answer.prompt_tokens) == (10, "response", None)


def test_without_usage_chunks_are_counted_and_marked() -> None:
    """A count of chunks is an estimate and says so."""
    answer = read(b'data: {"choices":[{"text":"a"}]}\n\ndata: {"choices":[{"text":"b"}]}\n\n', stream=True)
    assert (answer.tokens, answer.tokens_source) == (2, "estimated")


def test_reasoning_chunks_are_tokens_too() -> None:
    """Servers stream reasoning under another key."""
    assert read(b'data: {"choices":[{"delta":{"reasoning_content":"hm"}}]}\n\n', stream=True).tokens == 1


def test_an_error_after_a_200_is_seen() -> None:
    """A stream that breaks off with an error event is a failure; the server's words are not kept."""
    answer = read(b'data: {"choices":[{"text":"a"}]}\n\ndata: {"error": "out of memory at prompt X"}\n\n', stream=True)
    assert answer.error == "the server reported an error inside a 200 answer"


def test_an_empty_stream_is_a_failure() -> None:
    """200 and nothing else is no answer."""
    assert read(b"data: [DONE]\n\n", stream=True).error == "the stream held no tokens"


def test_a_plain_answer_is_read_at_its_end() -> None:
    """Usage and model come from the one object; without usage the count is unknown, not 0."""
    whole = b'{"model":"m","choices":[{"text":"a"}],"usage":{"prompt_tokens":4,"completion_tokens":10,"x":1}}'
    answer = Answer(stream=False)
    answer.feed(whole[:30])
    answer.feed(whole[30:])
    answer.end()
    assert (answer.prompt_tokens, answer.tokens, answer.served, answer.error) == (4, 10, "m", None)
    bare = read(b'{"choices":[]}', stream=False)
    assert (bare.tokens, bare.tokens_source) == (None, "absent")


def test_what_is_not_json_is_a_failure() -> None:
    """An HTML page behind a 200 does not pass for an answer."""
    assert read(b"<html>", stream=False).error == "the answer is not JSON"
    assert read(b"[1]", stream=False).error == "the answer is not a JSON object"


def test_strange_counts_are_unknown() -> None:
    """Negative numbers, texts and booleans are no counts."""
    answer = read(b'{"usage":{"prompt_tokens":-1,"completion_tokens":true}}', stream=False)
    assert (answer.prompt_tokens, answer.tokens) == (None, None)
