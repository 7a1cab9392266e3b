"""The one table of errors: code, HTTP status, whether trying again can help. No other module invents a code.

Every refusal in the system is a `ParrotError` with a code of this table. On the wire it is
`{"error": {"code": ..., "message": ..., "details": {...}}}`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec


class ErrorKind(NamedTuple):
    """How an error code is answered over HTTP, and whether the same request may succeed later."""

    status: int
    retryable: bool


#: code -> (HTTP status, can a retry help)
ERRORS: dict[str, ErrorKind] = {
    # requests
    "bad_request": ErrorKind(400, False),  # body, query, header or field of the wrong form
    "bad_template": ErrorKind(400, False),  # template or parameters do not fit together
    "bad_sampling": ErrorKind(400, False),  # a sampling value out of range, or one that no engine honours
    "bad_criteria": ErrorKind(400, False),  # not one of latency, throughput, TTFT, TPOT
    "cyclic_dependency": ErrorKind(400, False),  # a call would wait for its own output
    "unauthorized": ErrorKind(401, False),  # no session_auth, no shared secret, no API key
    "invalid_api_key": ErrorKind(401, False),  # an API key that is nobody's
    "forbidden": ErrorKind(403, False),  # a wrong one
    "not_found": ErrorKind(404, False),  # path, session, variable, engine or context unknown
    "method_not_allowed": ErrorKind(405, False),
    "timeout": ErrorKind(408, True),  # a get's timeout; it cancels nothing
    "request_timeout": ErrorKind(408, True),  # a request that took too long to arrive, or to be answered
    "conflict": ErrorKind(409, False),  # a second set, a second producer, a context id in use
    "session_expired": ErrorKind(410, False),
    "session_closed": ErrorKind(410, False),
    "body_too_large": ErrorKind(413, False),
    "queue_full": ErrorKind(429, True),
    "too_many_sessions": ErrorKind(429, True),
    "too_many_engines": ErrorKind(429, True),
    "too_many_tasks": ErrorKind(429, True),  # above max_tasks_per_session
    "rate_limited": ErrorKind(429, True),  # above its tenant's requests_per_minute or tokens_per_minute
    # work that failed: what a get of a failed variable answers
    "task_too_large": ErrorKind(400, False),  # for every live engine of its model
    "no_engine": ErrorKind(503, True),  # none of its model was live for engine_wait_timeout
    "engine_failed": ErrorKind(502, True),  # max_attempts used up
    "generation_failed": ErrorKind(500, False),  # the engine says that another attempt would not help
    "content_filtered": ErrorKind(422, False),  # a remote endpoint's filter refused the prompt or cut the output
    "remote_refused": ErrorKind(502, False),  # a remote endpoint refused the request itself: its key, deployment, a value
    "engine_rejected": ErrorKind(503, True),  # the engine has no room now; the core tries elsewhere or later
    "context_missing": ErrorKind(409, True),  # the parent context is not (or no longer) on this engine
    "deadline_exceeded": ErrorKind(504, False),  # it was not ready when nobody could use it any more
    "input_failed": ErrorKind(424, False),  # an input variable's producer failed
    "cancelled": ErrorKind(409, False),  # its session was closed
    # the server
    "internal": ErrorKind(500, False),
    "not_implemented": ErrorKind(501, False),
    "unavailable": ErrorKind(503, True),  # shutting down, or the disk is full
}


class ErrorInfo(msgspec.Struct, frozen=True):
    """An error as data: what a failed variable holds and what the wire carries, its details even where there are none."""

    code: str
    message: str
    details: dict[str, Any] = {}

    @property
    def status(self) -> int:
        """The HTTP status of this error's code (500 for a code of a newer version)."""
        kind = ERRORS.get(self.code)
        return kind.status if kind else 500

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed when it is sent again."""
        kind = ERRORS.get(self.code)
        return bool(kind and kind.retryable)


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every answer with a 4xx or 5xx status."""

    error: ErrorInfo


class ParrotError(Exception):
    """A refusal: raised where bad input is found, answered at the edge, never a traceback to a client."""

    def __init__(self, code: str, message: str, /, **details: Any) -> None:
        if code not in ERRORS:
            raise ValueError(f"error code {code!r} is not in parrot.protocol.errors.ERRORS")
        super().__init__(message)
        self.info = ErrorInfo(code, message, details)

    @classmethod
    def of(cls, info: ErrorInfo) -> ParrotError:
        """The exception that carries `info`; an unknown code becomes `internal`, its name kept in the details."""
        if info.code in ERRORS:
            return cls(info.code, info.message, **info.details)
        return cls("internal", info.message, code=info.code, **info.details)

    @property
    def code(self) -> str:
        return self.info.code

    @property
    def status(self) -> int:
        return self.info.status
