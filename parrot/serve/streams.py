"""The text of outputs while it is being generated: it flows from engines to getters here and never enters the core.

It decides what an attempt must go on from: what a getter was shown is never taken back, so that a task placed again
continues behind it. Text that nobody has seen is forgotten with its attempt. It never waits: who wants to know of more
text leaves a callback.
"""

from __future__ import annotations

from collections.abc import Callable

from parrot.protocol.engine import GenerateSpec, TokenLogprob


class OutputStream:
    """One output's text so far."""

    def __init__(self) -> None:
        self.text = ""
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []  #: one a token, where the output's sampling asks for them
        self.told_logprobs = 0  #: how many of them are of tokens whose text is in `text`
        self.tokenizer: str | None = None  #: whose ids these are; None: whoever goes on, as after a restart
        self.shown = False  #: some of it went to a getter
        self.watchers = 0
        self.final = False  #: its variable is settled, or its session over: the journal has no use for pieces of it
        #: how much of `ids` and `text` is in the journal, or on its way there
        self.stored_ids = 0
        self.stored_text = 0
        self._on_change: list[Callable[[], None]] = []

    def add(self, ids: tuple[int, ...], text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        """The engine generated these."""
        self.ids.extend(ids)
        if logprobs:
            self.logprobs.extend(logprobs)
        if text:
            self.text += text
            self.told_logprobs = len(self.logprobs)
            self.wake()

    def wake(self) -> None:
        """Calls those who wait for a change."""
        waiting, self._on_change = self._on_change, []
        for callback in waiting:
            callback()

    def on_change(self, callback: Callable[[], None]) -> None:
        """Calls back once: when there is more text, or at `wake`."""
        self._on_change.append(callback)

    def take_unstored(self) -> tuple[list[int], str]:
        """What is not in the journal yet; it counts as being on its way from now on."""
        ids, text = self.ids[self.stored_ids :], self.text[self.stored_text :]
        self.stored_ids, self.stored_text = len(self.ids), len(self.text)
        return ids, text


class OutputStreams:
    """Streams by session and variable. A stream lives while a task writes it, a getter reads it, or it was shown."""

    def __init__(self) -> None:
        self._sessions: dict[int, dict[str, OutputStream]] = {}

    def begin(self, session_id: int, var_id: str) -> OutputStream:
        """A new attempt writes this output: behind what was shown, else from the start."""
        stream = self._sessions.setdefault(session_id, {}).setdefault(var_id, OutputStream())
        if not stream.shown:
            stream.text = ""
            stream.ids.clear()
            stream.logprobs.clear()
        return stream

    def watch(self, session_id: int, var_id: str) -> OutputStream:
        """A getter reads this output. Each `watch` is ended by one `leave`."""
        stream = self._sessions.setdefault(session_id, {}).setdefault(var_id, OutputStream())
        stream.watchers += 1
        return stream

    def restore(self, session_id: int, var_id: str, ids: list[int], text: str) -> None:
        """An earlier life has shown this much of an output that is still to be finished."""
        stream = OutputStream()
        stream.ids, stream.text, stream.shown = list(ids), text, True
        stream.stored_ids, stream.stored_text = len(ids), len(text)
        self._sessions.setdefault(session_id, {})[var_id] = stream

    def leave(self, session_id: int, var_id: str, stream: OutputStream) -> None:
        """The getter is gone. A stream that no attempt has written goes with it."""
        stream.watchers -= 1
        if not stream.watchers and not stream.ids and not stream.text and self._find(session_id, var_id) is stream:
            self.finish(session_id, var_id)

    def finish(self, session_id: int, var_id: str) -> None:
        """The output has its content: the store answers from now on. Getters keep the object that they hold."""
        streams = self._sessions.get(session_id, {})
        stream = streams.pop(var_id, None)
        if stream is not None:
            stream.final = True
        if not streams:
            self._sessions.pop(session_id, None)

    def fail(self, session_id: int, var_id: str) -> None:
        """An attempt ended without a result; only what was shown, or is watched, is kept for the next."""
        stream = self._find(session_id, var_id)
        if stream is not None and not stream.shown and not stream.watchers:
            self.finish(session_id, var_id)

    def end(self, session_id: int) -> None:
        """The session is over."""
        for stream in self._sessions.pop(session_id, {}).values():
            stream.final = True

    def __len__(self) -> int:
        return sum(map(len, self._sessions.values()))

    def _find(self, session_id: int, var_id: str) -> OutputStream | None:
        return self._sessions.get(session_id, {}).get(var_id)


def continued(generate: GenerateSpec, stream: OutputStream) -> GenerateSpec:
    """`generate`, made to go on behind what was shown of `stream`."""
    if not stream.ids and not stream.text:
        return generate
    return GenerateSpec(generate.context_id, generate.sampling, tuple(stream.ids), stream.text)
