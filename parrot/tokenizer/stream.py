"""Turns tokens into text as they come, and finds the stop strings.

What is given out never has to be taken back: the bytes of an unfinished character and a possible beginning of a stop
string are held until the next tokens decide. The pieces, joined, are the final text. Of several stop strings the one that is
complete first counts, character by character, however the tokens are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from parrot.tokenizer.base import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def find_stop(text: str, stops: Sequence[str], begin: int = 0) -> int:
    """Where the stop string begins that is complete first, of those complete at once the longest; -1: none is.

    `begin`: up to there `text` was searched before.
    """
    ends: list[tuple[int, int]] = []
    for stop in stops:
        found = text.find(stop, max(0, begin - len(stop) + 1))
        if found >= 0:
            ends.append((found + len(stop), found))
    return min(ends)[1] if ends else -1


class Delta(NamedTuple):
    """`text`: what may be shown now. `stopped`: a stop string is complete, nothing more will come."""

    text: str
    stopped: bool = False


class Detokenizer:
    """The text of one output. `text` and `kept` are final once `finish` was called or a Delta said `stopped`."""

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] | None = None) -> None:
        """`stop`: a stop string, or several."""
        self._tokenizer = tokenizer
        self._stops = ((stop,) if stop else ()) if stop is None or isinstance(stop, str) else tuple(stop)
        self._ids: list[int] = []
        self._before = 0  # tokens from here on are decoded again, as the left neighbour of what comes
        self._read = 0  # tokens up to here are in `_decoded`
        self._decoded = ""  # all text so far, held back or not, the stop string included
        self._shown = 0  # characters given out
        self._ends: list[int] = []  # length of `_decoded` once token i was in it
        self._stopped = False

    @property
    def text(self) -> str:
        """What has been given out so far."""
        return self._decoded[: self._shown]

    def push(self, token_id: int) -> Delta:
        """Takes the next token."""
        self._ids.append(token_id)
        old = self._tokenizer.decode(self._ids[self._before : self._read])
        new = self._tokenizer.decode(self._ids[self._before :])
        if len(new) > len(old) and not new.endswith(_UNFINISHED):
            self._take(new[len(old) :])
        else:
            self._ends.append(len(self._decoded))
        return self._show()

    def finish(self) -> Delta:
        """No more tokens come: what was held back is given out."""
        if self._stopped:
            return Delta("", True)
        if self._read < len(self._ids):
            old = self._tokenizer.decode(self._ids[self._before : self._read])
            new = self._tokenizer.decode(self._ids[self._before :])
            self._ends.pop()
            self._take(new[len(old) :])
        delta = self._show()
        if delta.stopped:
            return delta
        held = self._decoded[self._shown :]
        self._shown = len(self._decoded)
        return Delta(delta.text + held)

    def kept(self) -> int:
        """The fewest tokens whose text covers the output: those of the stop string are not among them, one in which
        the stop string only begins is."""
        if not self._stopped:
            return len(self._ids)
        if self._shown == 0:
            return 0
        return next(n for n, end in enumerate(self._ends, 1) if end >= self._shown)

    def _take(self, text: str) -> None:
        self._decoded += text
        self._ends.append(len(self._decoded))
        self._before, self._read = self._read, len(self._ids)

    def _show(self) -> Delta:
        """Gives out all that no coming token can turn into a stop string."""
        begin = self._shown
        if not self._stops:
            self._shown = len(self._decoded)
            return Delta(self._decoded[begin:])
        found = find_stop(self._decoded, self._stops, begin)
        if found >= 0:
            self._stopped = True
            self._shown = found
            return Delta(self._decoded[begin:found], True)
        self._shown = len(self._decoded) - max(self._held(stop, begin) for stop in self._stops)
        return Delta(self._decoded[begin : self._shown])

    def _held(self, stop: str, begin: int) -> int:
        """How many characters at the end, none of them given out, may be the beginning of `stop`."""
        end = len(self._decoded)
        held = min(len(stop) - 1, end - begin)
        while held and not stop.startswith(self._decoded[end - held :]):
            held -= 1
        return held
