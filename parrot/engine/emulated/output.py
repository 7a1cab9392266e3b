"""What an emulated engine says: synthetic tokens drawn from the task's name, so that another attempt says the same."""

from __future__ import annotations

import hashlib
import struct

from parrot.tokenizer import SYNTHETIC, Tokenizer

_FILLER = " The quick brown fox jumps over the lazy dog."


class SyntheticOutput:
    """Token ids and text for a tokenizer. A longer output begins as a shorter one of the same key."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._filler = None if tokenizer.name == SYNTHETIC else tuple(tokenizer.encode(_FILLER))

    def ids(self, key: str, n_tokens: int) -> tuple[int, ...]:
        """The first `n_tokens` ids of the output named `key`."""
        if self._filler is not None:
            return (self._filler * (n_tokens // len(self._filler) + 1))[:n_tokens]
        draws = hashlib.shake_128(key.encode()).digest(2 * n_tokens)
        return struct.unpack(f"<{n_tokens}H", draws)

    def text(self, ids: tuple[int, ...]) -> str:
        """The text of the first tokens of an output; it is a beginning of the text of more of them."""
        return self._decode(ids)
