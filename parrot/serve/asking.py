"""One request of OpenAI's routes as a program: a session, a call for each choice, a get for each of them, and the end.

The events are those of the Parrot API, and the core does with them what it always does. It decides how long such a program
lives: a session of its own as long as its client's connection, one that several requests share for its life span. Whoever goes
away leaves no work behind that nobody else can want.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from parrot.protocol.api import CallAnswer, Criteria, SamplingConfig, TaskReport
from parrot.protocol.errors import ParrotError
from parrot.serve.credentials import Credentials, hashed
from parrot.serve.effects import Reply
from parrot.serve.events import (
    CancelCall,
    CloseSession,
    DescribeSession,
    GetVariable,
    OpenSession,
    Output,
    Segment,
    SubmitCall,
)
from parrot.serve.following import Follower, text_of
from parrot.serve.identity import Identity
from parrot.serve.shell import Shell
from parrot.serve.streams import OutputStream, OutputStreams
from parrot.serve.texts import Piece, Texts

_log = logging.getLogger(__name__)
#: How many shared programs' sessions are known by name; the session of one that is forgotten expires by itself.
KEPT_PROGRAMS = 65536
_OVER = ("not_found", "session_closed", "session_expired")


class Wanted(NamedTuple):
    """A call to be made, for one choice."""

    segments: tuple[Segment, ...]
    pieces: Sequence[Piece]
    sampling: SamplingConfig
    output: str  #: its variable's name
    cache_prefix: bool


class Manner(NamedTuple):
    """How all calls of a request are made. `wait` false: they are only submitted; `keep`: their outputs are variables that
    others may want, so that they outlive the request."""

    model: str
    kind: str
    func_name: str
    criteria: Criteria | None
    deadline: float | None
    wait: bool = True
    keep: bool = False


class Choice:
    """One call that was submitted: its number, its output's variable, and what is being read of it."""

    __slots__ = ("content", "get", "name", "number", "stream", "var_id")

    def __init__(self, name: str) -> None:
        self.name = name
        self.number = -1  # once the core has accepted it
        self.var_id = ""
        self.get = 0  # the request of its get
        self.stream: OutputStream | None = None
        self.content: asyncio.Future[str] | None = None  # the get's answer


class Session(NamedTuple):
    """Where calls are made. `ephemeral`: it is this request's alone."""

    id: int
    auth: str | None
    ephemeral: bool = False


class Stores(NamedTuple):
    """What lies beside the core."""

    shell: Shell
    texts: Texts
    streams: OutputStreams
    credentials: Credentials


class Asking:
    """The calls of one request, from `begin` to `end`, which must come in any case."""

    def __init__(self, stores: Stores, session: Session, tenant: str, manner: Manner) -> None:
        self._shell, self._texts, self._streams, self._credentials = stores
        self.session = session
        self._tenant = tenant
        self._manner = manner
        self.choices: list[Choice] = []
        self._opened = False  # the core was asked to open the session, which is ours to close
        self._ended = False

    # ------------------------------------------------------------------------------------------------ what is asked

    async def begin(self, wanted: Sequence[Wanted]) -> None:
        """Submits all calls in one instant, with the session that they need. Raises ParrotError: the first refusal."""
        # Nothing waits between here and the events: no tokenizer can become live in between.
        asked: list[asyncio.Future[Any]] = []
        if self.session.ephemeral:
            asked.append(self._open())
        asked += [self._submit(each) for each in wanted]
        for future in asked:
            await future

    def _open(self) -> asyncio.Future[Any]:
        session_id, auth = self.session.id, self.session.auth
        assert auth is not None
        self._texts.open(session_id)
        self._opened = True

        def on_reply(reply: Reply) -> None:
            if reply.error is not None:
                self._opened = False
                self._texts.abandon(session_id)

        event = OpenSession(self._shell.number(), session_id, auth, self._tenant, ephemeral=True)
        try:
            return self._shell.ask(event, on_reply)
        except ParrotError:
            self._opened = False
            self._texts.abandon(session_id)
            raise

    def _submit(self, wanted: Wanted) -> asyncio.Future[Any]:
        session_id, manner = self.session.id, self._manner
        choice = Choice(wanted.output)
        self.choices.append(choice)
        event = SubmitCall(
            self._shell.number(),
            session_id,
            self.session.auth,
            (*wanted.segments, Output(wanted.output, wanted.sampling)),
            manner.func_name,
            (manner.model,),
            manner.kind,
            wanted.cache_prefix,
            manner.criteria,
            deadline=manner.deadline,
        )
        keys = self._texts.hold(session_id, wanted.pieces)

        def on_reply(reply: Reply) -> None:
            # At once: its text may begin to come with the next effect.
            if reply.error is not None:
                self._texts.release(session_id, keys)
                return
            answer: CallAnswer = reply.payload
            choice.number, choice.var_id = answer.request_id, answer.param_info[-1].var_id
            if self._ended:
                self._give_up(choice)
            elif manner.wait:
                self._get(choice)

        return self._shell.ask(event, on_reply)

    def _get(self, choice: Choice) -> None:
        choice.stream = self._streams.watch(self.session.id, choice.var_id)
        choice.get = self._shell.number()
        event = GetVariable(choice.get, self.session.id, self.session.auth, choice.var_id, self._manner.criteria)
        choice.content = self._shell.ask(event)

    # --------------------------------------------------------------------------------------------------- what is read

    def reader(self, choice: Choice) -> Follower:
        """Of the choice's text, as it comes."""
        assert choice.stream is not None
        assert choice.content is not None
        place = (self.session.id, choice.var_id, choice.stream, choice.content)
        return Follower(self._shell, self._texts, *place, ephemeral=self.session.ephemeral)

    async def text(self, choice: Choice) -> str:
        """The choice's whole text. Raises ParrotError: the output failed."""
        assert choice.content is not None
        return text_of(self._texts, await choice.content)

    async def reports(self) -> list[TaskReport]:
        """What became of each choice's task, in the order of the choices."""
        numbers = tuple(choice.number for choice in self.choices)
        event = DescribeSession(self._shell.number(), self.session.id, self.session.auth, True, numbers)
        future = self._shell.ask(event)
        self.end()  # in the same instant: nothing is needed of it any more
        report = await future
        return [call.tasks[-1] for call in report.reports]

    # ------------------------------------------------------------------------------------------------------- the end

    def end(self) -> None:
        """Nobody reads on. Work that nobody else can want is given up; a session of its own is closed. Twice is as once."""
        if self._ended:
            return
        self._ended = True
        unread = False
        for choice in self.choices:
            if choice.stream is not None:
                self._streams.leave(self.session.id, choice.var_id, choice.stream)
            if choice.content is not None and (not choice.content.done() or choice.content.cancelled()):
                unread = True
                self._shell.cancel_get(choice.get)
        try:
            if self.session.ephemeral and self._opened:
                self._shell.ask(CloseSession(self._shell.number(), self.session.id, self.session.auth))
        except ParrotError as error:  # shutting down: the next life closes it
            _log.debug("session %d is left as it is: %s", self.session.id, error)
        if unread:
            for choice in self.choices:
                if choice.number >= 0:
                    self._give_up(choice)

    def _give_up(self, choice: Choice) -> None:
        if self.session.ephemeral or self._manner.keep:
            return
        try:
            self._shell.ask(CancelCall(self._shell.number(), self.session.id, self.session.auth, choice.number))
        except ParrotError as error:
            _log.debug("call %d of session %d is left as it is: %s", choice.number, self.session.id, error)


class Programs:
    """Sessions that requests share by the name of their program (header X-Parrot-Program)."""

    def __init__(self, stores: Stores) -> None:
        self._shell, self._texts, _, self._credentials = stores
        self._sessions: OrderedDict[Identity, asyncio.Future[Session]] = OrderedDict()

    def own(self) -> Session:
        """A session for one request, not opened yet."""
        session_id = self._credentials.new_session_id()
        return Session(session_id, hashed(self._credentials.auth(session_id)), ephemeral=True)

    async def shared(self, identity: Identity) -> Session:
        """The program's session, opened by the first who asks. Raises ParrotError: it is refused."""
        known = self._sessions.get(identity)
        if known is not None:
            self._sessions.move_to_end(identity)
            return await asyncio.shield(known)
        opening: asyncio.Future[Session] = asyncio.get_running_loop().create_future()
        self._sessions[identity] = opening
        if len(self._sessions) > KEPT_PROGRAMS:
            self._sessions.popitem(last=False)
        try:
            session = await self._open(identity.tenant)
        except BaseException as error:
            self._sessions.pop(identity, None)
            opening.set_exception(error if isinstance(error, ParrotError) else ParrotError("unavailable", "it was interrupted"))
            opening.exception()  # retrieved: nobody need wait
            raise
        opening.set_result(session)
        return session

    async def _open(self, tenant: str) -> Session:
        session_id = self._credentials.new_session_id()
        auth = hashed(self._credentials.auth(session_id))
        assert auth is not None

        def on_reply(reply: Reply) -> None:
            if reply.error is None:
                self._texts.open(session_id)

        await self._shell.ask(OpenSession(self._shell.number(), session_id, auth, tenant), on_reply)
        return Session(session_id, auth)

    def forget(self, identity: Identity, session: Session, error: ParrotError) -> bool:
        """Whether `error` says that the program's session is over, so that it is to begin anew."""
        if error.code not in _OVER:
            return False
        known = self._sessions.get(identity)
        if known is not None and known.done() and not known.exception() and known.result() == session:
            del self._sessions[identity]
        return True
