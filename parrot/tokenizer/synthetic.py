"""The tokenizer `synthetic`: one word is one token, word `w123` is id 123, exact both ways, without a vocabulary.

For engines that emulate or have dummy weights, and for workloads that are only lengths and keys.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from parrot.tokenizer.base import Message

SYNTHETIC = "synthetic"

_WORD = re.compile(r"w(0|[1-9][0-9]{0,9})")
_VOCABULARY = 2**31
#: Other words are hashed above this, so that they never meet an id that `synthetic_text` draws.
_FOREIGN = 2**30


class SyntheticTokenizer:
    """See the module. A word that is not `w` and a number gets an id from its hash, the same in every process."""

    name = SYNTHETIC
    vocab_size = _VOCABULARY
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        return [_id_of(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join([f"w{i}" for i in ids])

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """One word for each role, then its content; there is no model to please."""
        turns = [f"{message['role']}: {message['content']}" for message in messages]
        return "\n".join([*turns, "assistant: "] if add_generation_prompt else turns)


def _id_of(word: str) -> int:
    match = _WORD.fullmatch(word)
    if match and (number := int(match[1])) < _VOCABULARY:
        return number
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return _FOREIGN + int.from_bytes(digest, "little") % (_VOCABULARY - _FOREIGN)


def synthetic_text(key: str, n_tokens: int) -> str:
    """A text of exactly `n_tokens` tokens drawn from `key`: equal keys give equal texts, a longer one begins as a shorter."""
    if n_tokens < 0:
        raise ValueError(f"a text cannot have {n_tokens} tokens")
    draws = hashlib.shake_128(key.encode()).digest(2 * n_tokens)
    return " ".join([f"w{i}" for i in struct.unpack(f"<{n_tokens}H", draws)])
