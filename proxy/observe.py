"""What the bytes of a request and its response tell: model, task, token usage, times of streamed chunks.

Pure and incremental: bytes in, facts out, no clock, no I/O. Nothing of a prompt or an answer leaves this module, and
what it holds is bounded: a 64 KiB prefix of a request, 1 MiB of a plain response (then its head and tail only), one SSE
event of at most about 1 MiB.
"""

import re
import zlib
from typing import Any, Final

import msgspec

_PREFIX_BYTES: Final = 64 * 1024
_TAIL_BYTES: Final = 64 * 1024
_WHOLE_BYTES: Final = 1024 * 1024
_MAX_COUNT: Final = 1 << 53
"""A token count beyond this is nonsense and would not fit a database integer."""
_GZIP_OR_ZLIB: Final = 47
"""zlib `wbits`: recognise gzip and zlib headers by themselves."""

_TASKS: Final = {
    "/v1/chat/completions": "text_generation",
    "/v1/completions": "text_generation",
    "/v1/responses": "text_generation",
    "/v1/messages": "text_generation",
    "/v1/embeddings": "sentence_similarity",
    "/v1/audio/transcriptions": "asr",
    "/v1/audio/translations": "asr",
}
_NOT_QUERIES: Final = frozenset(
    [
        "/tokenize",
        "/detokenize",
        "/sleep",
        "/wake_up",
        "/ping",
        "/load_model",
        "/reset",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/collective_rpc",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/messages/count_tokens",
        "/start_profile",
        "/stop_profile",
    ]
)
"""POSTs that make no model work for a client: they are forwarded, but they are no queries."""
_MODEL_IN_PATH: Final = re.compile(r"(?:/[\w-]+)?/models/([^/]+(?:/[^/]+)?)(?:/pipeline/([a-z-]+))?")
_PIPELINES: Final = {
    "feature-extraction": "sentence_similarity",
    "automatic-speech-recognition": "asr",
    "image-to-text": "image_captioning",
    "text-to-image": "image_generation",
    "text-generation": "text_generation",
    "sentence-similarity": "sentence_similarity",
    "summarization": "summarization",
    "question-answering": "question_answering",
    "text-classification": "text_classification",
    "image-classification": "image_classification",
    "object-detection": "object_detection",
}

# A string is consumed whole, also one that the prefix cut off: its quotes must never be read as structure. Possessive
# quantifiers (`++`, `*+`) keep a hostile body from making the scan quadratic.
_TOKEN: Final = re.compile(rb'("(?:[^"\\]++|\\.)*+(?:"|\\?\Z))(\s*+:)?|[{}\[\]]', re.DOTALL)
_STRING: Final = re.compile(rb'\s*+("(?:[^"\\]++|\\.)*+")', re.DOTALL)
_TRUE: Final = re.compile(rb"\s*+true\b")
_USAGE_AT_TAIL: Final = re.compile(rb'"usage"\s*+:\s*+(\{[^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+\})')


def is_query(method: str, path: str) -> bool:
    """Whether a request makes a model work: a POST that is not one of the servers' control calls."""
    return method == "POST" and path not in _NOT_QUERIES


def task_of(path: str) -> str | None:
    """The task that a path implies (canonical id), None if it implies none."""
    if found := _TASKS.get(path.removesuffix("/batch")):
        return found
    named = _MODEL_IN_PATH.fullmatch(path)
    return _PIPELINES.get(named.group(2) or "") if named else None


def model_in_path(path: str) -> str | None:
    """The model of a path like `/models/{id}` or `/models/{id}/pipeline/{task}`, None for any other path."""
    named = _MODEL_IN_PATH.fullmatch(path)
    return named.group(1) if named and not path.startswith("/v1/") else None


def scan_object(prefix: bytes) -> tuple[str | None, bool]:
    """Top-level `model` (a string) and `stream` (true) of a JSON object of which `prefix` is the beginning.

    Nested keys and text inside strings do not count; of duplicates the last one counts, as in JSON parsers. None, False
    if they are missing, of another type, or lie beyond the prefix.
    """
    model: str | None = None
    stream = False
    depth = 0
    for token in _TOKEN.finditer(prefix):
        string = token.group(1)
        if string is None:
            depth += 1 if token.group() in b"{[" else -1
        elif depth == 1 and token.group(2):
            if string == b'"model"':
                found = _STRING.match(prefix, token.end())
                model = _json_text(found.group(1)) if found else None
            elif string == b'"stream"':
                stream = _TRUE.match(prefix, token.end()) is not None
    return model, stream


class RequestWatch:
    """Sees a request's body pass by. `upload_bytes`: its size so far."""

    def __init__(self, path: str, content_type: str = "", content_encoding: str = "") -> None:
        self._path = path
        self._content_type = content_type
        self._encoded = content_encoding.lower() not in {"", "identity"}
        self._prefix = bytearray()
        self._tail = b""
        self._facts: tuple[str | None, bool] | None = None
        self.upload_bytes = 0

    def feed(self, data: bytes) -> None:
        """The next bytes of the body, as they were forwarded."""
        self.upload_bytes += len(data)
        if (room := _PREFIX_BYTES - len(self._prefix)) > 0:
            self._prefix += data[:room]
            self._facts = None
        if self.upload_bytes > _PREFIX_BYTES and self._content_type.startswith("multipart/form-data"):
            self._tail = (self._tail + data)[-4096:]  # the form field may follow a large file
            self._facts = None

    @property
    def model(self) -> str | None:
        """The model that the client asked for; None if the part of the request that was kept does not tell."""
        return self._scanned()[0] or model_in_path(self._path)

    @property
    def stream(self) -> bool:
        """Whether the client asked for a stream; False also if that is unknown."""
        return self._scanned()[1]

    def _scanned(self) -> tuple[str | None, bool]:
        if self._facts is None:
            if self._content_type.startswith("multipart/form-data"):
                self._facts = self._form()
            else:
                prefix = _inflated(bytes(self._prefix), _PREFIX_BYTES) if self._encoded else bytes(self._prefix)
                self._facts = scan_object(prefix) if prefix and prefix.lstrip()[:1] == b"{" else (None, False)
        return self._facts

    def _form(self) -> tuple[str | None, bool]:
        body = bytes(self._prefix) + b"\r\n\r\n" + self._tail
        model = _form_field(b"model", body)
        return model, (_form_field(b"stream", body) or "").lower() in {"true", "1"}


class ResponseWatch:
    """Sees a response's body pass by.

    `prompt_tokens`, `completion_tokens`: what the server reported last (None: not reported). `chunks`: number of
    content chunks streamed so far. `model`: as the server named it. Only identity, gzip and deflate bodies are read.
    """

    def __init__(self, content_type: str, content_encoding: str = "") -> None:
        self.streamed = content_type.split(";", maxsplit=1)[0].strip().lower() == "text/event-stream"
        self.model: str | None = None
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.chunks = 0
        coding = content_encoding.strip().lower()
        self._inflate: Any = None
        self._blind = coding not in {"", "identity", "gzip", "x-gzip", "deflate"}
        if not self._blind and coding not in {"", "identity"}:
            self._inflate = zlib.decompressobj(_GZIP_OR_ZLIB)
        self._lines = _Lines()
        self._data: list[bytes] = []
        self._held = 0
        self._whole = bytearray()
        self._tail = b""

    @property
    def reported(self) -> bool:
        """Whether the server reported any token count."""
        return self.prompt_tokens is not None or self.completion_tokens is not None

    def feed(self, data: bytes) -> int:
        """The next bytes of the body, as they were forwarded; returns how many content chunks ended in them."""
        if self._inflate is not None and not self._blind:
            data = self._inflated(data)
        if self._blind:
            return 0
        if self.streamed:
            before = self.chunks
            for line in self._lines.split(data):
                self._line(line)
            return self.chunks - before
        if len(self._whole) + len(data) <= _WHOLE_BYTES and not self._tail:
            self._whole += data
        else:
            if not self._tail:
                self._tail = bytes(self._whole[-_TAIL_BYTES:])
                del self._whole[_PREFIX_BYTES:]
            self._tail = (self._tail + data)[-_TAIL_BYTES:]
        return 0

    def finish(self) -> int:
        """The body is over (complete or not); returns the content chunks of an event that no blank line ended."""
        before = self.chunks
        if self.streamed and not self._blind:
            for line in self._lines.rest():
                self._line(line)
            self._line(b"")
        elif self._tail:
            self.model = scan_object(bytes(self._whole))[0]
            for found in _USAGE_AT_TAIL.finditer(self._tail):
                self._take(_Event(usage=_json_object(found.group(1))))
        elif self._whole.lstrip()[:1] == b"{" and (event := _event(bytes(self._whole))):
            self._take(event)
        self._whole.clear()
        self._tail = b""
        return self.chunks - before

    def _inflated(self, data: bytes) -> bytes:
        try:
            plain: bytes = self._inflate.decompress(data, 4 * _WHOLE_BYTES)
        except zlib.error:
            self._blind = True
            return b""
        self._blind = bool(self._inflate.unconsumed_tail)  # a bomb, or far more than any event: give up reading
        return plain

    def _line(self, line: bytes) -> None:
        if line.startswith(b"data:"):
            self._held += len(line)
            if self._held <= _WHOLE_BYTES or not self._data:
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
        elif not line and self._data:
            data = b"\n".join(self._data)
            self._data.clear()
            self._held = 0
            self._dispatch(data)

    def _dispatch(self, data: bytes) -> None:
        if not data or data == b"[DONE]":
            return
        if (event := _event(data)) is None:
            self.chunks += 1  # raw text, as `transformers serve` streams transcriptions, or an event too large to read
            return
        self._take(event)
        if _has_content(event):
            self.chunks += 1

    def _take(self, event: "_Event") -> None:
        for part in (event, event.response, event.message):
            model, usage = (part.model, part.usage) if isinstance(part, _Event) else _pair(part)
            if isinstance(model, str) and model:
                self.model = model
            if isinstance(usage, dict):
                self._count(usage)

    def _count(self, usage: dict[str, Any]) -> None:
        prompt = _whole_number(usage, "prompt_tokens", "input_tokens")
        if prompt is not None:
            # Anthropic's `input_tokens` leaves out what the cache served; the others count it in.
            cached = ("cache_read_input_tokens", "cache_creation_input_tokens")
            self.prompt_tokens = prompt + sum(_whole_number(usage, name) or 0 for name in cached)
        completion = _whole_number(usage, "completion_tokens", "output_tokens")
        if completion is not None:
            self.completion_tokens = completion


class _Event(msgspec.Struct):
    """The fields that matter of a response or an SSE event, of any type: servers are trusted with nothing."""

    type: Any = None
    model: Any = None
    usage: Any = None
    choices: Any = None
    response: Any = None
    message: Any = None


class _Lines:
    """Splits a byte stream into lines at LF, CRLF or CR, wherever the reads cut it."""

    def __init__(self) -> None:
        self._partial = bytearray()
        self._after_cr = False

    def split(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes."""
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if not data:
            return []
        lines = data.splitlines(keepends=True)
        last = lines[-1]
        open_ended = last[-1:] not in {b"\n", b"\r"}
        self._after_cr = last[-1:] == b"\r"
        if open_ended:
            lines.pop()
        if lines and self._partial:
            lines[0] = bytes(self._partial) + lines[0]
            self._partial.clear()
        if open_ended and len(self._partial) < _WHOLE_BYTES:  # a longer line is cut: it will not parse, and is counted
            self._partial += last
        return [line.rstrip(b"\r\n") for line in lines]

    def rest(self) -> list[bytes]:
        """What no line end completed, if there is any."""
        return [bytes(self._partial)] if self._partial else []


_DECODER: Final = msgspec.json.Decoder(_Event)


def _event(data: bytes) -> _Event | None:
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _has_content(event: _Event) -> bool:
    if isinstance(event.choices, list):
        return any(_choice_has_content(choice) for choice in event.choices)
    return isinstance(event.type, str) and (event.type.endswith(".delta") or event.type == "content_block_delta")


def _choice_has_content(choice: object) -> bool:
    """Whether a choice shows a step of the engine: any text or delta, also empty (half a character, the end token).

    The opening chunk that only says `role: assistant` shows none.
    """
    if not isinstance(choice, dict):
        return False
    if isinstance(choice.get("text"), str):
        return True
    delta = choice.get("delta")
    if isinstance(delta, str):
        return True
    if not isinstance(delta, dict):
        return False
    return "role" not in delta or any(found for key, found in delta.items() if key != "role")


def _pair(part: object) -> tuple[object, object]:
    return (part.get("model"), part.get("usage")) if isinstance(part, dict) else (None, None)


def _whole_number(usage: dict[str, Any], *names: str) -> int | None:
    for name in names:
        found = usage.get(name)
        if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < _MAX_COUNT:
            return found
    return None


def _json_text(quoted: bytes) -> str | None:
    try:
        return msgspec.json.decode(quoted, type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _json_object(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _inflated(data: bytes, limit: int) -> bytes:
    try:
        return zlib.decompressobj(_GZIP_OR_ZLIB).decompress(data, limit)
    except zlib.error:
        return b""


def _form_field(name: bytes, body: bytes) -> str | None:
    pattern = (
        rb'\r\ncontent-disposition: *form-data; *name="?'
        + name
        + rb'"?[^\r\n]*\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,1024})\r\n--'
    )
    found = re.search(pattern, body, re.IGNORECASE)
    return found.group(1).decode(errors="replace") if found else None
