"""Semantic variables: named values of a session that calls read and write, each filled once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parrot.protocol.api import Criteria
from parrot.protocol.errors import ErrorInfo
from parrot.serve.events import Content

if TYPE_CHECKING:
    from parrot.serve.graph import Task
    from parrot.serve.sessions import Session


class Variable:
    """One semantic variable. `producer` writes it; `consumers` read it, or have read it; `getters` are the requests of pending
    gets. `criteria`: the strictest that a get, or the call that makes it, has named: its performance objective."""

    __slots__ = ("consumers", "content", "criteria", "error", "getters", "id", "name", "producer", "session", "state")

    def __init__(self, session: Session, id: str, name: str) -> None:
        self.session = session
        self.id = id
        self.name = name
        self.state = "empty"
        self.content: Content | None = None
        self.error: ErrorInfo | None = None
        self.producer: Task | None = None
        self.consumers: list[Task] | None = None
        self.getters: tuple[int, ...] = ()
        self.criteria: Criteria | None = None

    @property
    def settled(self) -> bool:
        """Ready or failed: no event changes it any more."""
        return self.state == "ready" or self.state == "failed"
