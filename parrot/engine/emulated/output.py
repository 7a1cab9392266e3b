"""What an emulated engine says: synthetic tokens drawn from the prompt and the seed, of which a model's are a function too.

So another attempt, another engine, and another run of the same application say the same.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from parrot.protocol.api import SamplingConfig
from parrot.tokenizer import SYNTHETIC, Tokenizer, find_stop

_FILLER = " The quick brown fox jumps over the lazy dog."


class SyntheticOutput:
    """Token ids and text for a tokenizer. A longer output begins as a shorter one of the same key."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._filler = None if tokenizer.name == SYNTHETIC else tuple(tokenizer.encode(_FILLER))

    def key(self, prompt: Iterable[Sequence[int]], sampling: SamplingConfig) -> bytes:
        """Names the output of a prompt, whose tokens come in pieces. Greedy sampling knows no seed."""
        if self._filler is not None:
            return b""
        name = hashlib.blake2b(digest_size=16)
        for piece in prompt:
            name.update(repr([*piece])[1:-1].encode() + b", ")  # where pieces begin must not tell
        name.update(b"greedy" if sampling.temperature == 0.0 else b"seed %d" % (sampling.seed or 0))
        return name.digest()

    def ids(self, key: bytes, n_tokens: int) -> tuple[int, ...]:
        """The first `n_tokens` ids of the output named `key`."""
        if self._filler is not None:
            return (self._filler * (n_tokens // len(self._filler) + 1))[:n_tokens]
        draws = hashlib.shake_128(key).digest(2 * n_tokens)
        return struct.unpack(f"<{n_tokens}H", draws)

    def stopped(self, key: bytes, n_tokens: int, stops: Sequence[str]) -> tuple[int, int] | None:
        """What is left of the first `n_tokens` of an output before a stop string in them, in tokens (those whose text covers
        it) and characters; None: there is none."""
        ids = self.ids(key, n_tokens)
        characters = find_stop(self.text(ids), stops)
        if characters < 0:
            return None
        return bisect_left(range(n_tokens), characters, key=lambda count: len(self.text(ids[:count]))), characters

    def text(self, ids: tuple[int, ...]) -> str:
        """The text of the first tokens of an output; it is a beginning of the text of more of them."""
        return self._decode(ids)
