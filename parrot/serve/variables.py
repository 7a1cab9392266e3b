"""Semantic variables: named values of a session that calls read and write, each filled once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from parrot.protocol.api import Criteria
from parrot.protocol.errors import ErrorInfo
from parrot.serve.events import Content

if TYPE_CHECKING:
    from parrot.serve.graph import Task


class Variable(msgspec.Struct, eq=False):
    """One semantic variable. `producer` writes it, `consumers` wait for it; `getters` are the requests of pending gets."""

    id: str
    name: str
    state: str = "empty"
    content: Content | None = None
    error: ErrorInfo | None = None
    producer: Task | None = None
    consumers: list[Task] | None = None
    getters: list[int] | None = None
    criteria: Criteria | None = None  # of its latest get

    @property
    def settled(self) -> bool:
        """Ready or failed: no event changes it any more."""
        return self.state == "ready" or self.state == "failed"

