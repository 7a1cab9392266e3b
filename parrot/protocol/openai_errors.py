"""An error of this project's table as OpenAI's clients know errors: status, body, and the headers that say when to retry.

The official clients send a request again after 408, 409, 429 and 5xx unless `x-should-retry` says no: where another try cannot
help, it does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from parrot.protocol.errors import ErrorInfo
from parrot.protocol.openai import OpenAIError

#: Our codes whose name in OpenAI's API is another, or whose status is.
_CODES = {
    "task_too_large": "context_length_exceeded",
    "content_filtered": "content_filter",
    "queue_full": "rate_limit_exceeded",
    "too_many_sessions": "rate_limit_exceeded",
    "too_many_tasks": "rate_limit_exceeded",
    "rate_limited": "rate_limit_exceeded",
}
_STATUSES = {"content_filtered": 400}


class Refusal(NamedTuple):
    status: int
    error: OpenAIError
    headers: dict[str, str]


def refusal_of(info: ErrorInfo) -> Refusal:
    """The answer that `info` gets on OpenAI's routes."""
    status = _STATUSES.get(info.code, info.status)
    details = info.details
    param = details.get("param") or details.get("field")
    code = details.get("openai_code") or _CODES.get(info.code, info.code)
    headers: dict[str, str] = {}
    if info.code == "method_not_allowed":
        headers["Allow"] = ", ".join(details.get("allowed", ()))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if info.retryable and status in (429, 503):
        wait_s = details.get("retry_after_s", 1.0)
        headers["Retry-After"] = str(max(1, math.ceil(wait_s)) if isinstance(wait_s, int | float) else 1)
    elif not info.retryable and (status >= 500 or status in (408, 409, 429)):
        headers["x-should-retry"] = "false"
    message = info.message
    if info.code == "task_too_large":  # clients that look into the text, and not at the code, look for these words
        message += "; it is longer than the model's context length"
    return Refusal(status, OpenAIError(message, _type(status), param if isinstance(param, str) else None, code), headers)


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    if status in (408, 504):
        return "timeout_error"
    return "server_error" if status >= 500 else "invalid_request_error"
