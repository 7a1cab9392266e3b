"""One request to the core and when to send it again: pure decisions, shared by the blocking and the asyncio client.

A lost connection, and a 429 or 503 that names a Retry-After, are tried again with back-off: bounded, and counted. Any
other refusal is the program's to see, at once. Repeating is safe because every POST carries an idempotency key.
"""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field
from typing import Any

import msgspec

from parrot.protocol.errors import ErrorBody, ErrorInfo, ParrotError

#: Seconds that a request other than a get may take before its connection counts as lost.
REQUEST_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 10.0

#: Codes of work that failed for good: they may come with status 503, but the same request gets the same answer.
_FINAL_CODES = frozenset({"no_engine", "engine_failed", "engine_rejected"})


class Request(msgspec.Struct, frozen=True):
    """One HTTP request. `timeout_s` None: it may wait without limit. `urgent`: a lost connection is retried only once."""

    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = {}
    timeout_s: float | None = REQUEST_TIMEOUT_S
    urgent: bool = False


def request(
    method: str, path: str, body: Any = None, *, timeout_s: float | None = REQUEST_TIMEOUT_S, urgent: bool = False
) -> Request:
    """A request whose body is `body` as JSON (None: no body). A POST gets an idempotency key of its own."""
    headers = {"Accept": "application/json"}
    if body is not None:
        headers["Content-Type"] = "application/json"
    if method == "POST":
        headers["Idempotency-Key"] = secrets.token_hex(16)
    return Request(method, path, b"" if body is None else msgspec.json.encode(body), headers, timeout_s, urgent)


class Answer(msgspec.Struct, frozen=True):
    """Status and body of an answer; `retry_after` is the header as it came."""

    status: int
    body: bytes
    retry_after: str | None = None


class LostConnection(Exception):
    """No answer, or only a part of one, came. `refused`: nobody listens at that address."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


@dataclass(frozen=True)
class RetryPolicy:
    """How often, and after how many seconds, a request is sent again.

    Waits double from `first_wait_s` to `max_wait_s`; the first repetition after a lost connection is at once, because
    a server may always close an idle one. A core that never answered is given up after `first_contact_retries`.
    """

    lost_retries: int = 8
    first_contact_retries: int = 3
    busy_retries: int = 30
    first_wait_s: float = 0.1
    max_wait_s: float = 5.0


@dataclass
class Stat:
    """What a virtual machine's requests met. `waited_s`: seconds between attempts, over all requests."""

    requests: int = 0
    answers: int = 0
    retries: int = 0
    lost_connections: int = 0
    busy_answers: int = 0
    waited_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **counts: float) -> None:
        """Adds to the named counters; safe in a program of many threads."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)


class Attempts:
    """The attempts of one request: says how many seconds to wait before the next, or gives up."""

    def __init__(self, policy: RetryPolicy, stat: Stat, address: str, *, urgent: bool = False) -> None:
        self._policy = policy
        self._stat = stat
        self._address = address
        self._urgent = urgent
        self._lost = 0
        self._busy = 0
        stat.add(requests=1)

    def lost(self, error: LostConnection) -> float:
        """Seconds to wait after a lost connection. Raises `unavailable` when enough have been lost."""
        self._stat.add(lost_connections=1)
        policy = self._policy
        limit = policy.lost_retries
        if self._urgent:
            limit = min(limit, 1)
        elif not self._stat.answers:
            limit = min(limit, policy.first_contact_retries)
        if self._lost >= limit:
            raise ParrotError(
                "unavailable",
                f"no answer from the core at {self._address}: {error} (sent {self._lost + 1} times); is it running?",
                address=self._address,
            ) from error
        wait = 0.0 if self._lost == 0 and not error.refused else self._back_off(self._lost)
        self._lost += 1
        return self._counted(wait)

    def busy(self, answer: Answer) -> float | None:
        """Seconds to wait if `answer` says to come again later, else None: it is final."""
        self._stat.add(answers=1)
        self._lost = 0
        if answer.status not in (429, 503) or answer.retry_after is None:
            return None
        if self._busy >= self._policy.busy_retries or error_of(answer).code in _FINAL_CODES:
            return None
        self._stat.add(busy_answers=1)
        wait = max(_seconds(answer.retry_after), self._back_off(self._busy))
        self._busy += 1
        return self._counted(wait)

    def _back_off(self, count: int) -> float:
        return min(self._policy.first_wait_s * 2.0 ** min(count, 32), self._policy.max_wait_s)

    def _counted(self, wait: float) -> float:
        self._stat.add(retries=1, waited_s=wait)
        return wait


def _seconds(retry_after: str) -> float:
    """Retry-After in seconds; a date, or nonsense, leaves it to the back-off. Never more than a minute."""
    try:
        return min(max(float(retry_after), 0.0), 60.0)
    except ValueError:
        return 0.0


def error_of(answer: Answer) -> ErrorInfo:
    """The error that a 4xx or 5xx answer carries, whoever sent it."""
    try:
        return msgspec.json.decode(answer.body, type=ErrorBody).error
    except msgspec.DecodeError:
        text = answer.body[:200].decode("utf-8", "replace")
        return ErrorInfo("internal", f"the answer has status {answer.status} and no Parrot error: {text!r}")


def checked(answer: Answer) -> bytes:
    """The body of a good answer. Raises the ParrotError of any other."""
    if 200 <= answer.status < 300:
        return answer.body
    raise ParrotError.of(error_of(answer))


class StreamLine(msgspec.Struct, frozen=True):
    """One line of a streaming get: text, the end, or the error that ended it."""

    delta: str = ""
    done: bool = False
    error: ErrorInfo | None = None


_stream_line = msgspec.json.Decoder(StreamLine)


def read_line(line: bytes) -> StreamLine:
    """A line of a stream. Raises the ParrotError that it carries; half a line is a lost connection, an empty one nothing."""
    if not line.strip():
        return StreamLine()
    try:
        event = _stream_line.decode(line)
    except msgspec.DecodeError as error:
        raise LostConnection(f"the stream broke off in the middle of a line: {line[:80]!r}") from error
    if event.error is not None:
        raise ParrotError.of(event.error)
    return event
