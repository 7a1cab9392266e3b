"""What an output is to a client of OpenAI's routes: what was said, which tools are called, and why it ended.

An output is one text, in which an engine, or a model itself, writes tool calls (`parrot.protocol.tool_calls`). It decides how
much of an unfinished one may be shown: never the beginning of a call.
"""

from __future__ import annotations

import secrets

from parrot.protocol.openai_answers import Outcome, finish_reason
from parrot.protocol.tool_calls import SEPARATOR, read_tagged, safe_length, split_calls


class Visible:
    """What may be shown of an output that is still being generated. `tagged`: the model may call tools in tags; `separated`:
    the engine may add calls behind a separator."""

    def __init__(self, tagged: bool, separated: bool) -> None:
        self._tagged = tagged
        self._separated = separated
        self._parts: list[str] = []
        self._held = ""  # what came and was not shown
        self.shown = 0  #: characters

    @property
    def whole(self) -> str:
        """All that came, shown or not."""
        return "".join(self._parts)

    def add(self, text: str) -> str:
        """More of the output. What may be shown now."""
        self._parts.append(text)
        if not (self._tagged or self._separated):
            self.shown += len(text)
            return text
        self._held += text
        end = safe_length(self._held) if self._tagged else len(self._held)
        if self._separated and 0 <= (found := self._held.find(SEPARATOR)) < end:
            end = found
        now, self._held = self._held[:end], self._held[end:]
        self.shown += end
        return now


def outcome_of(text: str, reason: str, tagged: bool) -> Outcome:
    """The finished output `text`. `reason`: the engine's word for its end."""
    if reason == "tool_calls":
        said, calls = split_calls(text)
        return Outcome(said, "tool_calls", calls)
    if tagged:
        said, calls = read_tagged(text, f"call_{secrets.token_hex(8)}_")
        if calls:
            return Outcome(said, "tool_calls", calls)
    return Outcome(text, finish_reason(reason))
