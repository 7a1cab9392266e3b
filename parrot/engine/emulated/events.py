"""What an emulated engine tells: what happened to its tasks, and, to an observer, its iterations. Plain data."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal, NamedTuple

from mypy_extensions import mypyc_attr

from parrot.latency import BatchShape

Kind = Literal["started", "first_token", "progressed", "finished", "rejected", "failed"]


@mypyc_attr(acyclic=True)
class EmulatedEvent:
    """Something that happened to a task at `at` (seconds, the exact edge).

    kind          | what else it carries
    started       | cached_tokens
    first_token   |
    progressed    | tokens: new ones; only for tasks submitted with stream=True
    finished      | output_tokens, prompt_tokens, cached_tokens, decode_s, max_gap_s
    rejected      | code engine_rejected, message: there is no room now
    failed        | code, message: it cannot run here like this

    `evicted`: contexts that the engine gave up by itself before this event; each is told once.
    """

    __slots__ = (
        "at", "cached_tokens", "code", "decode_s", "evicted", "key", "kind", "max_gap_s", "message", "output_tokens",
        "prompt_tokens", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        kind: Kind,
        key: Hashable,
        at: float,
        cached_tokens: int = 0,
        tokens: int = 0,
        output_tokens: int = 0,
        prompt_tokens: int = 0,
        decode_s: float = 0.0,
        max_gap_s: float = 0.0,
        code: str = "",
        message: str = "",
        evicted: tuple[int, ...] = (),
    ) -> None:
        self.kind = kind
        self.key = key
        self.at = at
        self.cached_tokens = cached_tokens
        self.tokens = tokens
        self.output_tokens = output_tokens
        self.prompt_tokens = prompt_tokens
        self.decode_s = decode_s
        self.max_gap_s = max_gap_s
        self.code = code
        self.message = message
        self.evicted = evicted

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EmulatedEvent) and self.fields() == other.fields()

    def __hash__(self) -> int:
        return hash(self.fields())

    def __repr__(self) -> str:
        return f"EmulatedEvent{self.fields()}"

    def fields(self) -> tuple[object, ...]:
        """All that it says, in the order of its arguments."""
        return (
            self.kind, self.key, self.at, self.cached_tokens, self.tokens, self.output_tokens, self.prompt_tokens,
            self.decode_s, self.max_gap_s, self.code, self.message, self.evicted,
        )  # fmt: skip


class Iterations(NamedTuple):
    """What an observer is told: iterations of the same tasks from `start` to `end`, the first of which had `shape`."""

    start: float
    end: float
    iterations: int
    shape: BatchShape
    keys: tuple[Hashable, ...]
