"""The tokenizers of a run: the synthetic one, and one that is unlike it in all that matters to a core.

`halves` has a token at the head of each chain, makes two tokens of a word, and shows no text for half a word, so that
generated ids may be other than the tokenizer's own for the same text.
"""

from __future__ import annotations

from collections.abc import Sequence

from parrot.tokenizer import SYNTHETIC, Tokenizer, load_tokenizer

HALVES = "halves"
_HALF = 2**16


class Halves:
    """Word `w123` is the tokens 0 and 65536 + 123, exact both ways; other words are as the synthetic tokenizer's."""

    name = HALVES
    vocab_size = 2**17
    bos_id: int | None = 2**17 - 1
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        return [half for i in load_tokenizer(SYNTHETIC).encode(text) for half in (i // _HALF, _HALF + i % _HALF)]

    def decode(self, ids: Sequence[int]) -> str:
        words = [i for i in ids if i != self.bos_id]
        return " ".join(f"w{high * _HALF + low - _HALF}" for high, low in zip(words[::2], words[1::2], strict=False))

    def apply_chat_template(
        self, messages: Sequence[object], add_generation_prompt: bool = True, tools: Sequence[object] | None = None
    ) -> str:
        """There is no model to please."""
        raise NotImplementedError


def load(name: str) -> Tokenizer:
    """The tokenizer called `name`, for cores and engines alike."""
    return Halves() if name == HALVES else load_tokenizer(name)
