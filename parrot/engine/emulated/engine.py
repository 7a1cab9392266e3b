"""An engine that only passes time. (surface; the body follows)"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal, NamedTuple


class EmulatedEvent(NamedTuple):
    """Something that happened to a task at `at` (seconds, the exact edge).

    kind          | what else it carries
    started       | cached_tokens
    first_token   |
    progressed    | tokens (new ones; only for tasks submitted with stream=True)
    finished      | output_tokens, prompt_tokens, cached_tokens, decode_s, max_gap_s
    rejected      | code engine_rejected, message: no room now
    failed        | code, message: it cannot run here (so)

    `evicted`: contexts that the engine gave up by itself before this event, each told once.
    """

    kind: Literal["started", "first_token", "progressed", "finished", "rejected", "failed"]
    key: Hashable
    at: float
    cached_tokens: int = 0
    tokens: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    decode_s: float = 0.0
    max_gap_s: float = 0.0
    code: str = ""
    message: str = ""
    evicted: tuple[int, ...] = ()
