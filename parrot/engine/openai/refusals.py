"""What a failed request to a remote endpoint means: its code in our table, and whether and when it may be sent again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import openai

#: Statuses after which the same request may succeed.
PASSING = (408, 409, 429)

_LONGEST_MESSAGE = 500


class Refusal(NamedTuple):
    """`again`: it may be sent again; `retry_after_s`: not before that many seconds, where the endpoint said so."""

    code: str
    message: str
    again: bool
    retry_after_s: float | None = None


def refusal_of(error: Exception) -> Refusal:
    """What the client raised, from the request or in the middle of its stream."""
    if isinstance(error, openai.APIStatusError):
        return _of_status(error.status_code, error.body, error.message, error.response.headers)
    if isinstance(error, openai.APITimeoutError):
        return Refusal("engine_failed", "the endpoint did not answer in time", True)
    if isinstance(error, openai.APIConnectionError):
        reason = error.__cause__ or error
        return Refusal("engine_failed", f"the endpoint cannot be reached: {type(reason).__name__}: {_short(str(reason))}", True)
    if isinstance(error, openai.APIError):  # an error that came as an event of the stream
        if _code(error.body) == "content_filter":
            return Refusal("content_filtered", _filtered(error.message), False)
        return Refusal("engine_failed", f"the endpoint broke off: {_short(error.message)}", True)
    return Refusal("engine_failed", f"the stream broke: {type(error).__name__}: {_short(str(error))}", True)


def _of_status(status: int, body: Any, message: str, headers: Mapping[str, str]) -> Refusal:
    code = _code(body)
    told = f"the endpoint answered {status}: {_short(_message(body) or message)}"
    if code == "content_filter":
        return Refusal("content_filtered", _filtered(_message(body) or message), False)
    if code == "context_length_exceeded":
        return Refusal("task_too_large", told, False)
    if status in PASSING or status >= 500:
        busy = status == 429 and code != "insufficient_quota"
        return Refusal("engine_rejected" if busy else "engine_failed", told, True, retry_after_of(headers))
    return Refusal("remote_refused", told, False)


def retry_after_of(headers: Mapping[str, str], now_s: float | None = None) -> float | None:
    """Seconds that the headers ask to wait: `retry-after-ms`, or `retry-after` in seconds or as a date."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if not value:
            continue
        try:
            return max(0.0, float(value) * unit)
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - (time.time() if now_s is None else now_s))
        except (ValueError, TypeError):
            continue
    return None


def _error(body: Any) -> Mapping[str, Any]:
    if isinstance(body, Mapping):
        inner = body.get("error", body)
        if isinstance(inner, Mapping):
            return inner
    return {}


def _code(body: Any) -> str:
    error = _error(body)
    inner = error.get("innererror")
    if isinstance(inner, Mapping) and inner.get("code") == "ResponsibleAIPolicyViolation":
        return "content_filter"
    return str(error.get("code") or "")


def _message(body: Any) -> str:
    return str(_error(body).get("message") or "")


def _filtered(message: str) -> str:
    return f"the endpoint's content filter refused it: {_short(message)}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + " …"
