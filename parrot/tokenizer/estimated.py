"""The tokenizer `estimated`: counts tokens where the model's own tokenizer cannot be had, four bytes of UTF-8 to a token.

Its ids mean nothing, so an engine with it takes text. That the counts are an estimate is said by its name, which an engine
registers with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from parrot.protocol.errors import ParrotError
from parrot.tokenizer.base import Message

ESTIMATED = "estimated"

#: The rule of thumb that OpenAI gives for English text ("What are tokens and how to count them", help.openai.com).
BYTES_PER_TOKEN = 4


class EstimatedTokenizer:
    """See the module."""

    name = ESTIMATED
    vocab_size = 1
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        return [0] * -(-len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN)

    def decode(self, ids: Sequence[int]) -> str:
        raise ParrotError("bad_request", "the tokenizer 'estimated' only counts: its ids stand for no text")

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        raise ParrotError("bad_request", "the tokenizer 'estimated' only counts: it has no chat template")
