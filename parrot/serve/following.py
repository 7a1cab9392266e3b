"""Follows an output while it is generated: its text, as it comes, for somebody who reads it.

It decides when text may be handed on: never before a later attempt, or a later life, is bound to say the same. It never
collects for a reader: whoever is slow finds more text, in larger pieces, the next time.
"""

from __future__ import annotations

import asyncio

from parrot.protocol.errors import ParrotError
from parrot.serve.shell import Shell
from parrot.serve.streams import OutputStream
from parrot.serve.texts import Texts
from parrot.sse import PIECE_CHARACTERS


def text_of(texts: Texts, key: str) -> str:
    """The text of a variable's content. Raises `session_closed` when its session has ended meanwhile."""
    try:
        return texts.text(key)
    except KeyError:
        raise ParrotError("session_closed", "the session ended while its variable was read") from None


class Follower:
    """One reader of an output. `content`: answered with the output's content key; `sent`: characters that the reader has.

    `ephemeral`: the reader ends with this life of the core, so that nothing need be in the journal before it is shown.
    (No asynchronous generator: one that is closed while it waits cannot be ended in order.)
    """

    def __init__(
        self,
        shell: Shell,
        texts: Texts,
        session_id: int,
        var_id: str,
        stream: OutputStream,
        content: asyncio.Future[str],
        sent: int = 0,
        ephemeral: bool = False,
    ) -> None:
        self._shell = shell
        self._texts = texts
        self._session_id = session_id
        self._var_id = var_id
        self._stream = stream
        self._content = content
        self._sent = sent
        self._ephemeral = ephemeral
        self._whole: str | None = None
        content.add_done_callback(lambda _: stream.wake())

    async def piece(self) -> str | None:
        """The next piece of the text, when there is one; None at its end. Raises ParrotError: the output failed."""
        stream = self._stream
        while not self._content.done():
            if len(stream.text) > self._sent:
                piece = self._take(stream.text)
                if self._ephemeral:
                    stream.shown = True
                else:
                    await self._shell.show(self._session_id, self._var_id, stream)
                return piece
            await _changed(stream)
        if self._whole is None:
            self._whole = text_of(self._texts, self._content.result())
            if not self._whole.startswith(stream.text):
                raise ParrotError("internal", "the output differs from what was streamed; get it again")
        return self._take(self._whole) or None

    def _take(self, text: str) -> str:
        piece = text[self._sent : self._sent + PIECE_CHARACTERS]
        self._sent += len(piece)
        return piece


async def _changed(stream: OutputStream) -> None:
    """Waits for more text, or for the end of it."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    stream.on_change(lambda: None if future.done() else future.set_result(None))
    await future
