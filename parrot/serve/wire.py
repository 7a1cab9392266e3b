"""Reading requests and writing answers: bodies, query arguments, errors. What every route of the core's server shares.

It decides how a refusal looks to a client: an ErrorBody with the status of its code, never a traceback.
"""

from __future__ import annotations

import math
import re
from typing import Any, TypeVar, get_args
from urllib.parse import parse_qsl

import msgspec
from aiohttp import web

from parrot.protocol.errors import ErrorBody, ErrorInfo, ParrotError
from parrot.protocol.openai import OpenAIErrorBody
from parrot.protocol.openai_errors import refusal_of

T = TypeVar("T")

_JSON = {"Content-Type": "application/json"}
NDJSON = "application/x-ndjson"
_ENCODER = msgspec.json.Encoder()
_DECODERS: dict[Any, msgspec.json.Decoder[Any]] = {}
_MAX_KEY_LENGTH = 256
#: What a get of a failed variable answers with status 503: the same get will never be answered otherwise.
_FAILED_WORK = ("no_engine", "engine_rejected")


def answer(payload: Any, status: int = 200) -> web.Response:
    """`payload` as a JSON answer."""
    return web.Response(body=_ENCODER.encode(payload), status=status, headers=_JSON)


def refusal(error: ErrorInfo) -> web.Response:
    """An error as an answer. Where waiting helps (429, 503) it says how long, in seconds."""
    response = answer(ErrorBody(error), error.status)
    if error.code == "method_not_allowed":
        response.headers["Allow"] = ", ".join(error.details.get("allowed", ()))
    elif error.retryable and error.status in (429, 503) and error.code not in _FAILED_WORK:
        wait_s = error.details.get("retry_after_s", 1.0)
        response.headers["Retry-After"] = str(max(1, math.ceil(wait_s)) if isinstance(wait_s, int | float) else 1)
    elif error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    elif error.code == "request_timeout":
        response.force_close()
    return response


def openai_refusal(error: ErrorInfo) -> web.Response:
    """An error as an answer of OpenAI's routes."""
    refused = refusal_of(error)
    response = web.Response(body=_ENCODER.encode(OpenAIErrorBody(refused.error)), status=refused.status, headers=_JSON)
    response.headers.update(refused.headers)
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    elif error.code == "request_timeout":
        response.force_close()
    return response


def line(message: Any) -> bytes:
    """One line of NDJSON."""
    return _ENCODER.encode(message) + b"\n"


async def body_of(request: web.BaseRequest) -> bytes:
    """The request's body, b"" when it has none. Raises `body_too_large`, and `bad_request` for one that is badly encoded."""
    if not request.body_exists:
        return b""
    limit = request.client_max_size
    if (request.content_length or 0) > limit:
        raise ParrotError("body_too_large", f"the body has {request.content_length} bytes; the limit is {limit}", limit=limit)
    if request.headers.get("Expect", "").lower() == "100-continue":
        _invite_body(request)
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise ParrotError("body_too_large", f"the body has more than {limit} bytes, the limit", limit=limit) from None
    except web.RequestPayloadError as error:
        encoding = request.headers.get("Content-Encoding", "none")
        raise ParrotError("bad_request", f"the body cannot be read; its Content-Encoding is {encoding}") from error


def _invite_body(request: web.BaseRequest) -> None:
    """The low-level server leaves this to its handlers; clients wait for it before they send a large body."""
    transport = request.transport
    if transport is not None:
        transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def decoded(body: bytes, kind: type[T]) -> T:
    """The JSON `body` as a `kind`; an empty body is {}. Raises `bad_request`, which says what is wrong and where."""
    decoder = _DECODERS.get(kind)
    if decoder is None:
        decoder = _DECODERS[kind] = msgspec.json.Decoder(kind)
    try:
        decoded: T = decoder.decode(body or b"{}")
        return decoded
    except msgspec.ValidationError as error:
        raise _invalid(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ParrotError("bad_request", f"the body is no valid JSON: {error}") from None
    except RecursionError:
        raise ParrotError("bad_request", "the body is nested too deeply") from None


def arguments(query: str, body: bytes, kind: type[T], **path: Any) -> T:
    """The arguments of a GET or DELETE: the path's stand above the body's, the body's above the query's.

    Raises `bad_request`.
    """
    if not query and not path:
        return decoded(body, kind)
    given = decoded(body, dict)
    for name, value in parse_qsl(query, keep_blank_values=True):
        given.setdefault(name, value)
    given.update(path)
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), kind) from None


def idempotency_key(request: web.BaseRequest) -> str | None:
    """The header's value with the path that it was sent to: elsewhere the same key is another request's.

    Raises `bad_request` for one that is empty, overlong or not ASCII.
    """
    key = request.headers.get("Idempotency-Key")
    if key is not None and not (0 < len(key) <= _MAX_KEY_LENGTH and key.isascii()):
        message = f"Idempotency-Key has {len(key)} characters; 1 to {_MAX_KEY_LENGTH} of ASCII are accepted"
        raise ParrotError("bad_request", message)
    return None if key is None else f"{request.path}:{key}"


def _invalid(message: str, kind: Any) -> ParrotError:
    """msgspec's complaint in the client's terms."""
    where = "the request"
    if match := re.search(r" - at `\$(.*)`$", message):
        where, message = match[1].lstrip("."), message[: match.start()]
    code = "bad_sampling" if "sampling_config" in where else "bad_request"
    if match := re.match(r"Object contains unknown field `(.*)`", message):
        known = ", ".join(_fields(kind, where))
        return ParrotError(code, f"{where}: unknown field {match[1]!r}; expected are {known}", field=match[1])
    if match := re.match(r"Object missing required field `(.*)`", message):
        return ParrotError(code, f"{where}: field {match[1]!r} is missing", field=match[1])
    return ParrotError(code, f"{where}: {message[:1].lower()}{message[1:]}", field=where)


def _fields(kind: Any, where: str) -> list[str]:
    """The names that the struct at `where` in a `kind` may have."""
    for name in re.findall(r"[a-z_]+", where) if where != "the request" else ():
        hints = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
        kind = next(
            (part for part in (hints.get(name), *get_args(hints.get(name))) if _is_struct(part)),
            None,
        )
        if kind is None:
            return ["others"]
    return [field.encode_name for field in msgspec.structs.fields(kind)] if _is_struct(kind) else ["others"]


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
