"""One request to the core and when to send it again: pure decisions, shared by the blocking and the asyncio client.

A lost connection, and a 429 or 503 that names a Retry-After, are tried again with back-off: bounded, and counted. Any
other refusal is the program's to see, at once. Repeating is safe because every POST carries an idempotency key.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable
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
    """One HTTP request. `timeout_s` None: it may wait without limit. `urgent`: it is given up sooner than others."""

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
    """No answer, or only a part of one, came. `unheard`: nobody took the request (refused, or silent to the timeout)."""

    def __init__(self, reason: str, *, unheard: bool = False) -> None:
        super().__init__(reason)
        self.unheard = unheard


def not_believed(address: str, error: Exception) -> ParrotError:
    """Whoever answers at `address` shows a certificate that cannot be verified: an error that waiting does not heal."""
    reason = getattr(error, "verify_message", "") or str(error)
    return ParrotError(
        "unavailable", f"the certificate of {address} is not believed: {reason}; is ca_file the file of its authority?"
    )


@dataclass(frozen=True)
class RetryPolicy:
    """For how long, and after how many seconds, a request is sent again.

    A lost connection is tried again until the core has shown no sign of life for `patience_s`, long enough for it to be
    restarted; `first_contact_s` where it never has, `closing_s` for the closing of a session. Waits double from
    `first_wait_s` to `max_wait_s`, less up to a half drawn at random, so that a thousand clients do not come back in one
    instant. The first repetition after a lost connection is at once: a server may always close an idle one.
    """

    patience_s: float = 60.0
    first_contact_s: float = 5.0
    closing_s: float = 10.0
    busy_retries: int = 30
    first_wait_s: float = 0.1
    max_wait_s: float = 2.0


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

    def __init__(
        self,
        policy: RetryPolicy,
        stat: Stat,
        address: str,
        *,
        urgent: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._stat = stat
        self._address = address
        self._urgent = urgent
        self._clock = clock
        self._lost = 0  # in a row
        self._sent = 1
        self._busy = 0
        self._begun_s = self._alive_s = clock()  # this attempt's begin; until when the core is known to have lived
        stat.add(requests=1)

    def heard(self) -> None:
        """A part of the answer came: what is lost from now on is lost anew."""
        self._alive_s = self._clock()
        self._lost = 0

    def lost(self, error: LostConnection) -> float:
        """Seconds to wait after a lost connection. Raises `unavailable` when the core has been silent for too long."""
        self._stat.add(lost_connections=1)
        now_s = self._clock()
        if not error.unheard and now_s - self._begun_s > self._policy.max_wait_s:
            self._alive_s = now_s  # somebody held the request until the connection broke
            self._lost = 0
        wait_s = 0.0 if self._lost == 0 and not error.unheard else self._back_off(self._lost)
        patience_s = self._patience_s()
        if now_s + wait_s - self._alive_s > patience_s:
            raise ParrotError(
                "unavailable",
                f"no answer from the core at {self._address} for {patience_s:g} s: {error} (sent {self._sent} times); "
                "is it running?",
                address=self._address,
            ) from error
        self._lost += 1
        return self._again_after(wait_s)

    def busy(self, answer: Answer) -> float | None:
        """Seconds to wait if `answer` says to come again later, else None: it is final."""
        self._stat.add(answers=1)
        self.heard()
        if answer.status not in (429, 503) or answer.retry_after is None:
            return None
        if self._busy >= self._policy.busy_retries or error_of(answer).code in _FINAL_CODES:
            return None
        self._stat.add(busy_answers=1)
        wait_s = max(_seconds(answer.retry_after), self._back_off(self._busy))
        self._busy += 1
        return self._again_after(wait_s)

    def _patience_s(self) -> float:
        policy = self._policy
        patience_s = policy.patience_s if self._stat.answers else min(policy.patience_s, policy.first_contact_s)
        return min(patience_s, policy.closing_s) if self._urgent else patience_s

    def _back_off(self, count: int) -> float:
        longest_s = min(self._policy.first_wait_s * 2.0 ** min(count, 32), self._policy.max_wait_s)
        return longest_s * random.uniform(0.5, 1.0)

    def _again_after(self, wait_s: float) -> float:
        self._stat.add(retries=1, waited_s=wait_s)
        self._sent += 1
        self._begun_s = self._clock() + wait_s
        return wait_s


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
    """A line of a stream. Raises the ParrotError that it carries; an empty one is nothing.

    Half a line is a lost connection, and so is the word of a core that is shutting down: the next one goes on.
    """
    if not line.strip():
        return StreamLine()
    try:
        event = _stream_line.decode(line)
    except msgspec.DecodeError as error:
        raise LostConnection(f"the stream broke off in the middle of a line: {line[:80]!r}") from error
    if event.error is not None:
        if event.error.code == "unavailable":
            raise LostConnection(event.error.message)
        raise ParrotError.of(event.error)
    return event
