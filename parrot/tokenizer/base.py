"""What a tokenizer is to the rest of the system. Decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Message = Mapping[str, Any]  #: {"role": ..., "content": ...}, and what else the model's template reads


class Tokenizer(Protocol):
    """Text to ids and back. Safe to use from several threads at once.

    `bos_id`: what stands at the head of a sequence, None when the model's own tokenizer would put nothing there.
    `eos_ids`: the tokens that end an output.
    """

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    @property
    def chat_template(self) -> str | None:
        """The source of the model's chat template; None: it has none, or none that is written down."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; none is added, special tokens written in the text are recognised."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens written out; bytes that are no UTF-8 become U+FFFD."""

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as the model was trained to read it. Raises ParrotError `bad_request` when there is no template.

        `tools`: as OpenAI's API has them, for a template that knows any."""
