"""An instance's account: what it asked of the core and when it was answered, seen from the client, as metrics want it.

The recorded carriers stand between `P` and whatever carries its requests, HTTP or virtual time, and change nothing. What they
see is the same in both worlds, so that one code measures both.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import unquote

import msgspec

from parrot.frontend.wire import Answer, Request
from parrot.protocol.api import CallAnswer, Criteria, SessionAnswer
from parrot.protocol.errors import ErrorInfo
from sim.workloads.program import Call, Get, Program

SESSIONS, VARIABLES, CALLS = "/v1/session", "/v1/semantic_var", "/v1/semantic_call"


class _Asked(msgspec.Struct, frozen=True):
    """What of a request's body is of interest here."""

    criteria: str | None = None
    func_name: str | None = None


_asked = msgspec.json.Decoder(_Asked).decode
_session_answer_of = msgspec.json.Decoder(SessionAnswer).decode
_call_answer_of = msgspec.json.Decoder(CallAnswer).decode


class Sent(NamedTuple):
    """A request that is under way. `get`: which of the account's gets it is, -1: none."""

    request: Request
    get: int = -1


class Account:
    """What one instance did. It has what `sim.recorder.Recorder` asks of a player. Times are seconds of the run."""

    def __init__(self, serial: int, name: str, application: str, arrival_s: float) -> None:
        self.serial = serial
        self.started_s = arrival_s
        self.ended_s: float | None = None
        self.error: ErrorInfo | None = None
        self.refusals = 0
        self.sessions: list[int] = []  #: in the order in which they were opened
        self._name = name
        self._application = application
        self._arrival_s = arrival_s
        self._begun = False
        self._outputs: dict[int, dict[str, tuple[int, int]]] = {}
        self._calls: list[str] = []
        self._vars: dict[str, str] = {}
        self._gets: list[Get] = []
        self._issued_s: dict[int, float] = {}  # gets by number, with the times of their requests and answers
        self._returned_s: dict[int, float] = {}

    # ------------------------------------------------------------------------------------------- what carriers tell

    def sent(self, request: Request, now: float) -> Sent:
        """A request goes out."""
        if not self._begun:
            self._begun, self.started_s = True, now
        if request.method != "GET" or not request.path.startswith(VARIABLES + "/"):
            return Sent(request)
        var_id = unquote(request.path.rpartition("/")[2])
        criteria = Criteria(_asked(request.body).criteria or Criteria.THROUGHPUT)
        number = len(self._gets)
        self._gets.append(Get(f"get{number}", self._vars.get(var_id, var_id), criteria))
        self._issued_s[number] = now
        return Sent(request, number)

    def answered(self, sent: Sent, status: int, body: bytes, now: float) -> int | None:
        """The whole answer has come. Returns the session that it opened, if it did."""
        self.refusals += status == 429
        if status != 200:
            return None
        if sent.get >= 0:
            self._returned_s[sent.get] = now
        elif sent.request.method == "POST" and sent.request.path == SESSIONS:
            session_id = _session_answer_of(body).session_id
            self.sessions.append(session_id)
            return session_id
        elif sent.request.path == CALLS:
            self._submitted(sent.request, body)
        return None

    def _submitted(self, request: Request, body: bytes) -> None:
        answer = _call_answer_of(body)
        known = self._outputs.setdefault(answer.session_id, {})
        place = 0
        for info in answer.param_info:
            if info.is_output:
                known[info.var_id] = (len(self._calls), place)
                place += 1
            self._vars[info.var_id] = info.var_name or info.parameter_name
        self._calls.append(_asked(request.body).func_name or "")

    def end(self, now: float, error: ErrorInfo | None = None) -> None:
        """The instance has ended, well or with `error`."""
        self.error = error
        self.ended_s = now if error is not None else max(self._returned_s.values(), default=now)

    # ------------------------------------------------------------------------------------------ what a recorder asks

    def outputs_of(self, session_id: int) -> Mapping[str, tuple[int, int]]:
        """Variable -> (call, output) of the instance, for a session of it."""
        return self._outputs.get(session_id, {})

    def issued_s(self, number: int) -> float | None:
        """When get `number` went out."""
        return self._issued_s.get(number)

    def returned_s(self, number: int) -> float | None:
        """When it was answered; None: it was not."""
        return self._returned_s.get(number)

    @property
    def program(self) -> Program:
        """The instance in the terms of a workload: what it called and fetched, with no more than names."""
        calls = tuple(Call((), name) for name in self._calls)
        return Program(self._name, self._arrival_s, calls, tuple(self._gets), application=self._application)


class _Told:
    """Tells an account of the answer that comes to one request."""

    def __init__(self, account: Account, request: Request, clock: Callable[[], float], opened: Callable[[int], None]) -> None:
        self._account = account
        self._clock = clock
        self._opened = opened
        self._sent = account.sent(request, clock())

    def whole(self, answer: Answer) -> Answer:
        session_id = self._account.answered(self._sent, answer.status, answer.body, self._clock())
        if session_id is not None:
            self._opened(session_id)
        return answer

    def streamed(self) -> None:
        self._account.answered(self._sent, 200, b"", self._clock())


class RecordedReply:
    """A blocking transport's reply, seen."""

    def __init__(self, inner: Any, told: _Told) -> None:
        self._inner = inner
        self._told = told
        self.status: int = inner.status

    def answer(self) -> Answer:
        return self._told.whole(self._inner.answer())

    def lines(self) -> Iterator[bytes]:
        yield from self._inner.lines()

    def drain(self) -> None:
        self._told.streamed()
        self._inner.drain()

    def __enter__(self) -> RecordedReply:
        self._inner.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._inner.__exit__(kind, error, trace)


class _Recorded:
    """A transport `inner`, with an account of what goes through it. `opened` is told each new session; `closing` sees the
    request that ends one before it goes out."""

    def __init__(
        self,
        inner: Any,
        account: Account,
        clock: Callable[[], float],
        opened: Callable[[int], None] = lambda _: None,
        closing: Callable[[Request], Any] | None = None,
    ) -> None:
        self._inner = inner
        self._account = account
        self._clock = clock
        self._opened = opened
        self._closing = closing


class RecordedBlocking(_Recorded):
    """A blocking transport, recorded."""

    def open(self, request: Request) -> RecordedReply:
        if self._closing is not None and request.method == "DELETE":
            self._closing(request)
        told = _Told(self._account, request, self._clock, self._opened)
        return RecordedReply(self._inner.open(request), told)

    def close(self) -> None:
        self._inner.close()


class RecordedLoopedReply:
    """An asynchronous transport's reply, seen."""

    def __init__(self, inner: Any, told: _Told) -> None:
        self._inner = inner
        self._told = told
        self.status: int = inner.status

    async def answer(self) -> Answer:
        return self._told.whole(await self._inner.answer())

    async def lines(self) -> AsyncIterator[bytes]:
        async for line in self._inner.lines():
            if b'"done"' in line:  # who has read the last line asks for no more
                self._told.streamed()
            yield line


class RecordedLooped(_Recorded):
    """An asynchronous transport, recorded. `closing` is awaited."""

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncIterator[RecordedLoopedReply]:
        if self._closing is not None and request.method == "DELETE":
            await self._closing(request)
        told = _Told(self._account, request, self._clock, self._opened)
        async with self._inner.open(request) as reply:
            yield RecordedLoopedReply(reply, told)

    async def close(self) -> None:
        await self._inner.close()
