"""A session at the core: the calls of the public API v1, with their types, blocking and async."""

from __future__ import annotations

import base64
import marshal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import CodeType
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from parrot.frontend.link import Link
from parrot.frontend.wire import Request, request
from parrot.protocol.api import (
    CallAnswer,
    CreateVariableRequest,
    Criteria,
    GetVariableRequest,
    OpenSessionRequest,
    ParameterSpec,
    SemanticCallRequest,
    SessionAnswer,
    SessionReference,
    SessionReport,
    SetVariableRequest,
    VariableInfo,
)
from parrot.protocol.errors import ParrotError


class _Created(msgspec.Struct, frozen=True):
    var_id: str


class _Content(msgspec.Struct, frozen=True):
    content: str


class _Variables(msgspec.Struct, frozen=True):
    vars: list[VariableInfo]


T = TypeVar("T")
_FINISHED = frozenset({"not_found", "session_closed", "session_expired"})


class Session:
    """An open session. `first_submit_s`, `last_get_s`: the client's clock (time.perf_counter), null while they have not
    come; between them lies the program's job completion time."""

    def __init__(self, link: Link, answer: SessionAnswer) -> None:
        self.link = link
        self.id = answer.session_id
        self._auth = answer.session_auth
        self.is_open = True
        self.first_submit_s: float | None = None
        self.last_get_s: float | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, link: Link, api_key: str | None = None, apps: Any = None) -> Session:
        """Opens a session. Raises ParrotError."""
        return cls(link, _decode(link.send(_open(api_key, apps)), SessionAnswer))

    @classmethod
    async def aopen(cls, link: Link, api_key: str | None = None, apps: Any = None) -> Session:
        return cls(link, _decode(await link.asend(_open(api_key, apps)), SessionAnswer))

    # ---------------------------------------------------------------------------------------------- calls

    def submit(self, call: Callable[[int, str], SemanticCallRequest]) -> CallAnswer:
        """Submits the call that `call(session id, auth)` makes; does not wait for the model."""
        return _decode(self.link.send(self._submit(call)), CallAnswer)

    async def asubmit(self, call: Callable[[int, str], SemanticCallRequest]) -> CallAnswer:
        return _decode(await self.link.asend(self._submit(call)), CallAnswer)

    def submit_native(self, func_name: str, parameters: Sequence[ParameterSpec], code: CodeType, **options: Any) -> CallAnswer:
        """Submits a Python function. Raises `not_implemented` from a core that runs none."""
        return _decode(self.link.send(self._native(func_name, parameters, code, options)), CallAnswer)

    async def asubmit_native(
        self, func_name: str, parameters: Sequence[ParameterSpec], code: CodeType, **options: Any
    ) -> CallAnswer:
        return _decode(await self.link.asend(self._native(func_name, parameters, code, options)), CallAnswer)

    # ------------------------------------------------------------------------------------------ variables

    def create_variable(self, name: str) -> str:
        """A new empty variable's id."""
        return _decode(self.link.send(self._create(name)), _Created).var_id

    async def acreate_variable(self, name: str) -> str:
        return _decode(await self.link.asend(self._create(name)), _Created).var_id

    def set_variable(self, var_id: str, content: str) -> None:
        """Gives a variable its content. Raises `conflict` when it has one, or a producer."""
        self.link.send(self._set(var_id, content))

    async def aset_variable(self, var_id: str, content: str) -> None:
        await self.link.asend(self._set(var_id, content))

    def get_variable(self, var_id: str, criteria: Criteria, timeout_s: float | None = None) -> str:
        """Waits for a variable's content. Raises its producer's failure; `timeout`, which cancels nothing."""
        content = _decode(self.link.send(self._get(var_id, criteria, timeout_s)), _Content).content
        return self._got(content)

    async def aget_variable(self, var_id: str, criteria: Criteria, timeout_s: float | None = None) -> str:
        content = _decode(await self.link.asend(self._get(var_id, criteria, timeout_s)), _Content).content
        return self._got(content)

    def stream_variable(self, var_id: str, criteria: Criteria) -> Iterator[str]:
        """A variable's text as it is generated."""
        yield from self.link.stream(lambda had: self._get(var_id, criteria, None, stream_from=had))
        self._got("")

    async def astream_variable(self, var_id: str, criteria: Criteria) -> AsyncIterator[str]:
        async for delta in self.link.astream(lambda had: self._get(var_id, criteria, None, stream_from=had)):
            yield delta
        self._got("")

    def variables(self) -> list[VariableInfo]:
        """All variables of the session."""
        return _decode(self.link.send(request("GET", "/v1/semantic_var", self._reference())), _Variables).vars

    # -------------------------------------------------------------------------------------------- the session

    def report(self) -> SessionReport:
        """The session's state, with the life of each of its calls."""
        return _decode(self.link.send(self._report()), SessionReport)

    async def areport(self) -> SessionReport:
        return _decode(await self.link.asend(self._report()), SessionReport)

    def close(self) -> None:
        """Ends the session; one that has ended already is no error."""
        if self.is_open:
            self.is_open = False
            try:
                self.link.send(self._delete())
            except ParrotError as error:
                _check_ended(error)

    async def aclose(self) -> None:
        if self.is_open:
            self.is_open = False
            try:
                await self.link.asend(self._delete())
            except ParrotError as error:
                _check_ended(error)

    # ---------------------------------------------------------------------------------- requests, built purely

    def _submit(self, call: Callable[[int, str], SemanticCallRequest]) -> Request:
        self._check_open()
        built = request("POST", "/v1/semantic_call", call(self.id, self._auth))
        self._mark_submit()
        return built

    def _native(self, func_name: str, parameters: Sequence[ParameterSpec], code: CodeType, options: dict[str, Any]) -> Request:
        self._check_open()
        self._mark_submit()
        body = {
            "session_id": self.id,
            "session_auth": self._auth,
            "func_name": func_name,
            "parameters": list(parameters),
            "func_code": base64.b64encode(marshal.dumps(code)).decode("ascii"),
            **options,
        }
        return request("POST", "/v1/py_native_call", body)

    def _create(self, name: str) -> Request:
        self._check_open()
        return request("POST", "/v1/semantic_var", CreateVariableRequest(self.id, self._auth, name))

    def _set(self, var_id: str, content: str) -> Request:
        self._check_open()
        return request("POST", _variable_path(var_id), SetVariableRequest(self.id, content, self._auth))

    def _get(self, var_id: str, criteria: Criteria, timeout_s: float | None, stream_from: int | None = None) -> Request:
        self._check_open()
        body = GetVariableRequest(self.id, self._auth, criteria.value, timeout_s, stream_from is not None, stream_from or 0)
        return request("GET", _variable_path(var_id), body, timeout_s=None)

    def _report(self) -> Request:
        self._check_open()
        return request("GET", f"/v1/session/{self.id}?" + urlencode({"session_auth": self._auth, "calls": "true"}))

    def _delete(self) -> Request:
        return request("DELETE", f"/v1/session/{self.id}", self._reference(), urgent=True)

    def _reference(self) -> SessionReference:
        return SessionReference(self.id, self._auth)

    def _mark_submit(self) -> None:
        with self._lock:
            if self.first_submit_s is None:
                self.first_submit_s = time.perf_counter()

    def _got(self, content: str) -> str:
        with self._lock:
            self.last_get_s = time.perf_counter()
        return content

    def _check_open(self) -> None:
        if not self.is_open:
            raise ParrotError("session_closed", f"session {self.id} was closed by this program", session_id=self.id)


def _open(api_key: str | None, apps: Any) -> Request:
    return request("POST", "/v1/session", OpenSessionRequest(api_key, apps))


def _variable_path(var_id: str) -> str:
    return f"/v1/semantic_var/{quote(var_id, safe='')}"


def _check_ended(error: ParrotError) -> None:
    if error.code not in _FINISHED:
        raise error


def _decode(body: bytes, kind: type[T]) -> T:
    """`body` as `kind`. Raises `internal` when it is anything else: then what answers is no Parrot core."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise ParrotError("internal", f"the core's answer is no {kind.__name__}: {error}; got {body[:200]!r}") from error
