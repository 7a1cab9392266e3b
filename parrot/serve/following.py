"""Follows an output while it is generated: its text, as it comes, for somebody who reads it.

It decides when text may be handed on: never before a later attempt, or a later life, is bound to say the same. It never
collects for a reader: whoever is slow finds more text, in larger pieces, the next time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

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


async def follow(
    shell: Shell,
    texts: Texts,
    session_id: int,
    var_id: str,
    stream: OutputStream,
    content: asyncio.Future[str],
    sent: int = 0,
    ephemeral: bool = False,
) -> AsyncGenerator[str, None]:
    """The text of an output from character `sent` on, in pieces, to its end. `content`: answered with its content key.

    `ephemeral`: the reader ends with this life of the core, so that nothing need be in the journal before it is shown.
    Raises ParrotError, at any point: the output failed.
    """
    content.add_done_callback(lambda _: stream.wake())
    while not content.done():
        if len(stream.text) > sent:
            delta = stream.text[sent : sent + PIECE_CHARACTERS]
            if ephemeral:
                stream.shown = True
            else:
                await shell.show(session_id, var_id, stream)
            sent += len(delta)
            yield delta
        else:
            await _changed(stream)
    whole = text_of(texts, content.result())
    if not whole.startswith(stream.text):
        raise ParrotError("internal", "the output differs from what was streamed; get it again")
    while len(whole) > sent:
        delta = whole[sent : sent + PIECE_CHARACTERS]
        sent += len(delta)
        yield delta


async def _changed(stream: OutputStream) -> None:
    """Waits for more text, or for the end of it."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    stream.on_change(lambda: None if future.done() else future.set_result(None))
    await future
