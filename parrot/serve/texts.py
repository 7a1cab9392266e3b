"""What content keys stand for: the text, and its token ids under each tokenizer that has been seen.

The core knows only keys and lengths; this store, which belongs to the shell, holds the rest. It decides one thing: how
long a text stays. A text belongs to the sessions that name it and goes with the last of them. It never tokenizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

import msgspec

from parrot.serve.events import Content


class Ids(NamedTuple):
    """Token ids as the JSON list that goes over the wire (a fifth of a Python list's memory), and their number."""

    json: bytes
    tokens: int


def pack_ids(ids: Iterable[int]) -> Ids:
    """`ids` in the store's form."""
    listed = list(ids)
    return Ids(msgspec.json.encode(listed), len(listed))


def content_key(text: str) -> str:
    """The key of given text, and of generated text whose ids are the tokenizer's own for it."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def generated_key(text: str, tokenizer: str, ids: Iterable[int]) -> str:
    """The key of generated text whose ids differ from the tokenizer's own: the ids are part of what it is."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, person=b"generated")
    digest.update(f"\0{tokenizer}\0{','.join(map(str, ids))}".encode())
    return digest.hexdigest()


class Piece:
    """A text on its way to the core or in the store."""

    __slots__ = ("generated_by", "holds", "ids", "key", "stored", "text")

    def __init__(self, key: str, text: str, generated_by: str = "") -> None:
        self.key = key
        self.text = text
        self.ids: dict[str, Ids] = {}  #: by tokenizer name
        self.generated_by = generated_by  #: the tokenizer under which its ids are not what it would make of the text
        self.holds = 0  #: sessions that name it
        self.stored = False  #: it is in the journal, or on its way there

    def content(self) -> Content:
        """What the core is told of it."""
        return Content(self.key, {name: ids.tokens for name, ids in self.ids.items()})

    def own_ids(self) -> dict[str, bytes]:
        """The ids that no tokenizer could find again, as JSON lists."""
        return {self.generated_by: self.ids[self.generated_by].json} if self.generated_by else {}


class Texts:
    """Pieces by key, owned by sessions."""

    def __init__(self) -> None:
        self._pieces: dict[str, Piece] = {}
        self._sessions: dict[int, dict[str, int]] = {}  # session -> key -> how many requests of it brought the key
        self._left: dict[str, None] = {}  # keys in the journal that no session names, to be told with the next end

    def __len__(self) -> int:
        return len(self._pieces)

    def open(self, session_id: int) -> None:
        """From now on this session may hold texts."""
        self._sessions.setdefault(session_id, {})

    def end(self, session_id: int) -> list[str]:
        """Drops what only this session named, and returns the keys that the journal has though nobody names them any more. An
        unknown session holds nothing."""
        self.abandon(session_id)
        dropped = list(self._left)
        self._left.clear()
        return dropped

    def abandon(self, session_id: int) -> None:
        """Takes back an `open`: the core refused the session. What only it named goes."""
        for key in self._sessions.pop(session_id, ()):
            stored = self._pieces[key].stored
            if self._drop(key) and stored:
                self._left[key] = None

    def find(self, key: str) -> Piece | None:
        """The stored piece of `key`."""
        return self._pieces.get(key)

    def hold(self, session_id: int, pieces: Iterable[Piece]) -> list[str]:
        """Stores `pieces` for the session and returns their keys, for `release`.

        For a session that is not open nothing is stored: the core is about to refuse what brought them.
        """
        held = self._sessions.get(session_id)
        if held is None:
            return []
        keys = []
        for piece in pieces:
            keys.append(piece.key)
            if piece.key in held:
                held[piece.key] += 1
                continue
            held[piece.key] = 1
            stored = self._pieces.setdefault(piece.key, piece)
            stored.holds += 1
            if piece.key in self._left:
                del self._left[piece.key]
                stored.stored = True
            if stored is not piece:
                stored.ids.update(piece.ids)
        return keys

    def release(self, session_id: int, keys: Iterable[str]) -> None:
        """Takes back one `hold`: the request that brought these keys was refused."""
        held = self._sessions.get(session_id)
        if held is None:
            return
        for key in keys:
            count = held.get(key, 0)
            if count > 1:
                held[key] = count - 1
            elif count:
                del held[key]
                stored = self._pieces[key].stored
                if self._drop(key) and stored:
                    self._left[key] = None  # whoever brought it into the journal has ended meanwhile

    def without(self, tokenizer: str) -> list[Piece]:
        """The stored pieces that have no ids under `tokenizer`."""
        return [piece for piece in self._pieces.values() if tokenizer not in piece.ids]

    def lengths(self, tokenizer: str) -> dict[str, int]:
        """Key -> tokens under `tokenizer`, for all that is stored."""
        return {key: piece.ids[tokenizer].tokens for key, piece in self._pieces.items() if tokenizer in piece.ids}

    def text(self, key: str) -> str:
        """The text of `key`. Raises KeyError when no live session names it."""
        return self._pieces[key].text

    def ids(self, keys: tuple[str, ...], tokenizer: str, head: int | None = None) -> msgspec.Raw:
        """The ids of `keys` one after the other, `head` (a BOS id) before them, as a JSON list. Raises KeyError."""
        if len(keys) == 1 and head is None:
            return msgspec.Raw(self._pieces[keys[0]].ids[tokenizer].json)
        parts = [] if head is None else [b"%d" % head]
        for key in keys:
            ids = self._pieces[key].ids[tokenizer]
            if ids.tokens:
                parts.append(ids.json[1:-1])
        return msgspec.Raw(b"[" + b",".join(parts) + b"]")

    def _drop(self, key: str) -> bool:
        piece = self._pieces[key]
        piece.holds -= 1
        if piece.holds:
            return False
        del self._pieces[key]
        piece.stored = False  # whoever still has it in hand may bring it again
        return True
