"""Turns texts into pieces with ids under every live tokenizer, short ones at once, long ones in a thread.

It decides where tokenization runs and which tokenizers count as live. It never blocks the event loop for long, and never
lets a text reach the core without a length under a tokenizer that the core has an engine for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Protocol

from parrot.protocol.errors import ParrotError
from parrot.serve.texts import Ids, Piece, Texts, content_key, generated_key, pack_ids

SYNTHETIC = "synthetic"
#: Characters that are tokenized on the event loop: at some 0.5 µs each, about a millisecond.
INLINE_CHARACTERS = 2_000
INLINE_CHARACTERS_SYNTHETIC = 8_000


class Tokenizer(Protocol):
    """What this needs of a tokenizer. `encode` adds no special tokens."""

    @property
    def bos_id(self) -> int | None: ...

    def encode(self, text: str) -> Sequence[int]: ...


class _Live:
    """A loaded tokenizer. Not every library's may be used by two threads at once, hence the lock."""

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.lock = Lock()
        self.inline_characters = INLINE_CHARACTERS_SYNTHETIC if name == SYNTHETIC else INLINE_CHARACTERS

    def encode(self, text: str) -> list[int]:
        with self.lock:
            return list(self.tokenizer.encode(text))


class Tokenization:
    """The live tokenizers and the threads that run them. `load` raises when a tokenizer cannot be had."""

    def __init__(self, texts: Texts, load: Callable[[str], Tokenizer], threads: int = 2) -> None:
        self._texts = texts
        self._load = load
        self._live: dict[str, _Live] = {}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")

    def close(self) -> None:
        """Ends the threads; work that has not begun is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def bos_id(self, name: str) -> int | None:
        """The id that stands at the head of a chain under this live tokenizer, if it has one."""
        return self._live[name].tokenizer.bos_id

    def tokenizer(self, name: str) -> Tokenizer:
        """This live tokenizer. A thread may be encoding with it: to be used for what is short."""
        return self._live[name].tokenizer

    def encode(self, name: str, text: str) -> list[int]:
        """The ids of `text` under this live tokenizer, at once: for what is short, or rare."""
        return self._live[name].encode(text)

    async def pieces(self, texts: Sequence[str], given: Mapping[int, tuple[str, Sequence[int]]] | None = None) -> list[Piece]:
        """`texts` with ids under every tokenizer that is live when this returns. `given`: of some of them, by place, the
        tokenizer and the ids that a client gave, which are kept."""
        pieces = []
        for place, text in enumerate(texts):
            if given and place in given:
                pieces.append(await self.output(given[place][0], text, given[place][1]))
                continue
            key = content_key(text)
            pieces.append(self._texts.find(key) or Piece(key, text))
        await self._complete(pieces)
        return pieces

    async def output(self, tokenizer: str, text: str, ids: Sequence[int]) -> Piece:
        """Generated text. It keeps the engine's ids: they become part of its key where the tokenizer's own differ."""
        own = Piece(content_key(text), text)
        if tokenizer in self._live:
            await self._encode([(own, self._live[tokenizer])])
        packed = pack_ids(ids)
        piece = own
        if tokenizer not in own.ids or own.ids[tokenizer] != packed:
            piece = Piece(generated_key(text, tokenizer, ids), text, tokenizer)
            piece.ids[tokenizer] = packed
        piece = self._texts.find(piece.key) or piece
        await self._complete([piece])
        return piece

    async def learn(self, name: str) -> None:
        """Makes `name` live: from here on every piece has ids under it, the stored ones included.

        Raises ParrotError `bad_request`, which names the tokenizer, when it cannot be loaded.
        """
        if name in self._live:
            return
        loop = asyncio.get_running_loop()
        try:
            live = _Live(name, await loop.run_in_executor(self._pool, self._load, name))
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ParrotError(
                "bad_request", f"tokenizer {name!r} cannot be loaded by the core: {reason}", tokenizer=name
            ) from error
        # Texts that arrive while this runs come into the store without these ids: go on until none is left.
        while missing := self._texts.without(name):
            await self._encode([(piece, live) for piece in missing])
        self._live.setdefault(name, live)

    async def _complete(self, pieces: Sequence[Piece]) -> None:
        """Loops, because a tokenizer may become live while a thread works; ends with no await behind the last check."""
        while missing := [(piece, live) for live in self._live.values() for piece in pieces if live.name not in piece.ids]:
            await self._encode(missing)

    async def _encode(self, work: Sequence[tuple[Piece, _Live]]) -> None:
        if _is_small(work):
            for piece, live in work:
                piece.ids[live.name] = pack_ids(live.encode(piece.text))
            return
        loop = asyncio.get_running_loop()
        for (piece, live), ids in zip(work, await loop.run_in_executor(self._pool, _encode_all, work), strict=True):
            piece.ids[live.name] = ids


def _encode_all(work: Sequence[tuple[Piece, _Live]]) -> list[Ids]:
    return [pack_ids(live.encode(piece.text)) for piece, live in work]


def _is_small(work: Sequence[tuple[Piece, _Live]]) -> bool:
    """Whether this is quickly done here. A tokenizer that a thread is using is not waited for."""
    share = sum(len(piece.text) / live.inline_characters for piece, live in work)
    return share <= 1.0 and not any(live.lock.locked() for _, live in work)
