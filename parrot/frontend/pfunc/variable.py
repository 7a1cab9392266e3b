"""Semantic variables as a program holds them: a name, a content that may come later, and the session that knows it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

from parrot.frontend.pfunc import environment
from parrot.frontend.session import Session
from parrot.protocol.api import Criteria, parse_criteria
from parrot.protocol.errors import ParrotError

THROUGHPUT = Criteria.THROUGHPUT


class Variable:
    """A semantic variable. It is registered when a session has it, ready when its content is here."""

    def __init__(self, name: str | None = None, content: object = None) -> None:
        """A new variable; with a content (`str()` of it) it is ready, and is sent where it is first used."""
        self.name = name or ""
        self._content = None if content is None else str(content)
        self._session: Session | None = None
        self._id: str | None = None

    @property
    def id(self) -> str | None:
        return self._id

    @property
    def content(self) -> str | None:
        """The content, if it is here already; `get` waits for it."""
        return self._content

    @property
    def is_registered(self) -> bool:
        return self._id is not None

    @property
    def is_ready(self) -> bool:
        return self._content is not None

    def __repr__(self) -> str:
        content = "" if self._content is None else f", content={self._content[:40]!r}"
        return f"Variable(name={self.name!r}, id={self._id!r}{content})"

    # ---------------------------------------------------------------------------------------------- set

    def set(self, content: object) -> None:
        """Gives the variable its content, `str()` of what is given; blocks for one exchange with the core.

        Raises `conflict` when it has one already, or a producer.
        """
        text = self._settable(content)
        session = self._session_for_set()
        if session is not None:
            self.register(session)
            session.set_variable(self._known_id(), text)
        self._content = text

    async def aset(self, content: object) -> None:
        """`set` in an async program."""
        text = self._settable(content)
        session = self._session_for_set()
        if session is not None:
            await self.aregister(session)
            await session.aset_variable(self._known_id(), text)
        self._content = text

    # ---------------------------------------------------------------------------------------------- get

    def get(self, criteria: Criteria | str = THROUGHPUT, timeout: float | None = None) -> Any:
        """Waits for the content and returns it. Inside a running event loop it returns an awaitable of it instead.

        `timeout` is in seconds; when it is over, `timeout` is raised and nothing is cancelled. A failed producer's error
        is raised as it is.
        """
        if _in_event_loop():
            return self.aget(criteria, timeout)
        if self._content is None:
            session, var_id = self._producer()
            self._content = session.get_variable(var_id, _parsed(criteria), timeout)
        return self._content

    async def aget(self, criteria: Criteria | str = THROUGHPUT, timeout: float | None = None) -> str:
        """`get` in an async program."""
        if self._content is None:
            session, var_id = self._producer()
            self._content = await session.aget_variable(var_id, _parsed(criteria), timeout)
        return self._content

    def stream(self, criteria: Criteria | str = Criteria.TTFT) -> Stream:
        """The content piece by piece as it is generated: `for delta in v.stream()`, or `async for`. Then it is ready."""
        return Stream(self, _parsed(criteria))

    # --------------------------------------------------------------------------------------- registration

    def register(self, session: Session) -> None:
        """Makes the variable known to `session`, empty, unless it is."""
        if self._id is None:
            self.bind(session, session.create_variable(self.name))

    async def aregister(self, session: Session) -> None:
        """`register` in an async program."""
        if self._id is None:
            self.bind(session, await session.acreate_variable(self.name))

    def bind(self, session: Session, var_id: str, name: str = "") -> None:
        """Says that `session` has this variable as `var_id`."""
        self._session, self._id = session, var_id
        self.name = self.name or name

    def belongs_to(self, session: Session) -> bool:
        return self._session is session

    # ------------------------------------------------------------------------------------------- inside

    def _settable(self, content: object) -> str:
        if self._content is not None:
            raise ParrotError("conflict", f"variable {self.name!r} has its content already", var_id=self._id)
        return str(content)

    def _session_for_set(self) -> Session | None:
        if self._session is not None:
            return self._session
        machine = environment.current()
        return machine.session if machine is not None and machine.session_registered else None

    def _known_id(self) -> str:
        assert self._id is not None
        return self._id

    def _producer(self) -> tuple[Session, str]:
        if self._session is None or self._id is None:
            raise ParrotError(
                "bad_request", f"variable {self.name!r} has no content and no session knows it: set it, or have a call write it"
            )
        return self._session, self._id

    def _stream_source(self, criteria: Criteria) -> Iterator[str]:
        session, var_id = self._producer()
        return session.stream_variable(var_id, criteria)

    def _astream_source(self, criteria: Criteria) -> AsyncIterator[str]:
        session, var_id = self._producer()
        return session.astream_variable(var_id, criteria)

    def _complete(self, content: str) -> None:
        self._content = content


class Stream:
    """The pieces of one variable's content, for `for` and for `async for`."""

    def __init__(self, variable: Variable, criteria: Criteria) -> None:
        self._variable = variable
        self._criteria = criteria

    def __iter__(self) -> Iterator[str]:
        variable = self._variable
        if variable.content is not None:
            yield variable.content
            return
        parts: list[str] = []
        for delta in variable._stream_source(self._criteria):
            parts.append(delta)
            yield delta
        variable._complete("".join(parts))

    async def __aiter__(self) -> AsyncIterator[str]:
        variable = self._variable
        if variable.content is not None:
            yield variable.content
            return
        parts: list[str] = []
        async for delta in variable._astream_source(self._criteria):
            parts.append(delta)
            yield delta
        variable._complete("".join(parts))


def variable(name: str | None = None, content: object = None) -> Variable:
    """A new semantic variable; `content` is rendered with `str()`."""
    return Variable(name, content)


def _parsed(criteria: Criteria | str) -> Criteria:
    return parse_criteria(criteria) or THROUGHPUT


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
