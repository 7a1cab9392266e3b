"""Which sessions there are: the open ones, which of them have been idle for too long, and how the last ones have ended.

It decides who is let in: whether one more session may be open, and whether a request may speak for one. What a session is
doing is nothing to it, and it never ends one by itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from parrot.protocol.errors import ParrotError
from parrot.serve.config import ServeCoreConfig
from parrot.serve.events import Constant, Content
from parrot.serve.rates import DrainRate
from parrot.serve.sessions import Session
from parrot.serve.states import SESSION
from parrot.serve.tenants import Tenant

#: How many ended sessions are remembered at least, so that a late call is told 410 and not 404.
REMEMBERED_SESSIONS = 65536


class SessionRegistry:
    """`sessions`: the open ones by id, in the order in which they were opened; to be read only. `idle` is to be told of each
    access to a session, and when its work or its gets begin or end."""

    def __init__(self, config: ServeCoreConfig) -> None:
        self._most = config.max_sessions_num
        self._life_span_s = config.session_life_span
        self.sessions: dict[int, Session] = {}
        self.idle = IdleSessions(config.session_life_span)
        self.ended = EndedSessions(REMEMBERED_SESSIONS)
        self._opened: OrderedDict[str, tuple[int, float]] = OrderedDict()  # Idempotency-Key -> (session id, until)
        self._sequence = 0
        self._ends = DrainRate()

    # ------------------------------------------------------------------------------------------- of those that are open

    def find(self, session_id: int) -> Session:
        """The open session of that id. Raises not_found, session_closed, session_expired."""
        session = self.sessions.get(session_id)
        if session is None:
            raise self._gone(session_id)
        return session

    def enter(self, session_id: int, auth: str | None, now: float) -> Session:
        """That session for who may speak for it, its idle time begun anew. Raises what `find` does; unauthorized, forbidden."""
        session = self.sessions.get(session_id)
        if session is None:
            raise self._gone(session_id)
        if auth is None:
            raise ParrotError("unauthorized", f"session {session_id}: session_auth is missing")
        if auth != session.auth:
            raise ParrotError("forbidden", f"session {session_id}: session_auth is wrong")
        self.idle.touch(session, now)
        return session

    def _gone(self, session_id: int) -> ParrotError:
        ended = self.ended.state_of(session_id)
        if ended is None:
            return ParrotError("not_found", f"there is no session {session_id}", session_id=session_id)
        return ParrotError(f"session_{ended}", f"session {session_id} is {ended}", session_id=session_id)

    def contents(self) -> Iterator[Content]:
        """All contents that open sessions name, with repetitions."""
        for session in self.sessions.values():
            for variable in session.all_variables:
                if variable.content is not None:
                    yield variable.content
            for call in session.calls:
                for segment in call.segments:
                    if type(segment) is Constant:
                        yield segment.content

    # ------------------------------------------------------------------------------------------- beginning and end

    def opened_under(self, key: str, now: float) -> int | None:
        """The id of the session that was opened under this Idempotency-Key, if that is not too long ago."""
        while self._opened and next(iter(self._opened.values()))[1] <= now:
            self._opened.popitem(last=False)
        known = self._opened.get(key)
        return None if known is None else known[0]

    def check_free(self, session_id: int) -> None:
        """Raises conflict when a session has that id."""
        if session_id in self.sessions:
            raise ParrotError("conflict", f"session id {session_id} is in use")

    def check_room(self, now: float) -> None:
        """Raises too_many_sessions when one more would be."""
        count, most = len(self.sessions), self._most
        if 2 * count >= most:  # it may come to a refusal, which says how fast sessions end
            ended = self._sequence - count
            self._ends.note(now, ended)
            if count >= most:
                raise ParrotError(
                    "too_many_sessions",
                    f"{count} sessions are open; max_sessions_num is {most}",
                    retry_after_s=self._ends.wait_s(now, ended, count - most + 1),
                )

    def open(
        self, session_id: int, auth: str, tenant: str, account: Tenant, ephemeral: bool, key: str | None, now: float
    ) -> Session:
        """Makes a session. `key`: the Idempotency-Key under which it was asked for."""
        self._sequence += 1
        session = Session(session_id, auth, tenant, account, self._sequence, now, ephemeral)
        self.sessions[session_id] = session
        self.idle.touch(session, now)
        if key is not None:
            self._opened[key] = (session_id, now + self._life_span_s)
        return session

    def end(self, session: Session, by: str) -> None:
        """The session is over, `by` a move of the table SESSION: it is found no more, and remembered as what it has become."""
        session.state = SESSION[session.state, by]
        self.idle.remove(session)
        del self.sessions[session.id]
        self.ended.add(session.id, session.state)

    def prolong_keys(self, now: float) -> None:
        """Idempotency-Keys hold from now on as long as if their sessions had been opened just now."""
        until = now + self._life_span_s
        for key, (session_id, _) in self._opened.items():
            self._opened[key] = (session_id, until)


class IdleSessions:
    """Which sessions expire when: the idle ones, and no others, in a line by their last access."""

    def __init__(self, life_span_s: float) -> None:
        self._life_span_s = life_span_s
        self._oldest: Session | None = None
        self._newest: Session | None = None

    def touch(self, session: Session, now: float) -> None:
        """The session was accessed, or its work has begun or ended."""
        session.last_access_s = now
        if session.active > 0 or session.waiting_gets > 0:
            self.remove(session)
        elif session is not self._newest:
            self.remove(session)
            newest = self._newest
            session.idle = True
            session.older = newest
            if newest is None:
                self._oldest = session
            else:
                newest.newer = session
            self._newest = session

    def remove(self, session: Session) -> None:
        """The session has ended, or is not idle."""
        if not session.idle:
            return
        older, newer = session.older, session.newer
        if older is None:
            self._oldest = newer
        else:
            older.newer = newer
        if newer is None:
            self._newest = older
        else:
            newer.older = older
        session.idle = False
        session.older = session.newer = None

    def next_deadline(self) -> float | None:
        """When the first of them expires."""
        oldest = self._oldest
        return None if oldest is None else oldest.last_access_s + self._life_span_s

    def expired(self, now: float) -> list[Session]:
        """Those whose life span is over, taken out; of those that were last accessed at once, the first opened first."""
        found: list[Session] = []
        while (session := self._oldest) is not None and session.last_access_s + self._life_span_s <= now:
            self.remove(session)
            found.append(session)
        found.sort(key=_last_access)
        return found


def _last_access(session: Session) -> tuple[float, int]:
    return session.last_access_s, session.sequence


class EndedSessions:
    """Which sessions have ended, and how: the last ones, at least so many as `kept` says and at most twice as many."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._late: dict[int, str] = {}
        self._early: dict[int, str] = {}  # all before those

    def add(self, session_id: int, state: str) -> None:
        self._late[session_id] = state
        if len(self._late) == self._kept:
            self._early, self._late = self._late, {}

    def state_of(self, session_id: int) -> str | None:
        """`closed` or `expired`; None when nothing is known of it."""
        found = self._late.get(session_id)
        return found if found is not None else self._early.get(session_id)

    def items(self) -> list[tuple[int, str]]:
        """(session id, state), in the order of their end."""
        return [*self._early.items(), *self._late.items()]
