"""Conversation templates: how a model that was tuned to chat wants its prompt framed.

Applied to a function, what stands before an output is the user's message and the output the assistant's. `prompt` frames
messages that a program lists itself, a chat's history for one. Texts may hold placeholders.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

from parrot.protocol.errors import ParrotError
from parrot.protocol.template import Piece, Text

#: A role ("system", "user" or "assistant") and what it says.
Message = tuple[str, str]


class Conversation:
    """Base of all conversation templates: a system message, and `prompt`."""

    system_message: str | None = None

    def prompt(self, messages: Sequence[Message]) -> str:
        """The messages as the model wants to read them."""
        raise NotImplementedError

    def apply(self, pieces: Sequence[Piece]) -> str:
        """A function's template as a conversation. White space around each message goes."""
        messages: list[Message] = [("system", self.system_message)] if self.system_message else []
        said = ""
        for piece in pieces:
            if isinstance(piece, Text):
                said += piece.text
            elif not piece.is_output:
                said += "{{" + piece.name + "}}"
            else:
                if said.strip():
                    messages.append(("user", said.strip()))
                messages.append(("assistant", "{{" + piece.name + "}}"))
                said = ""
        if said.strip():
            messages.append(("user", said.strip()))
        return self.prompt(messages)


class ChatTemplate(Conversation):
    """A template given as data: what stands before and after the message of each role."""

    def __init__(
        self,
        *,
        system: tuple[str, str],
        user: tuple[str, str],
        assistant: tuple[str, str],
        system_message: str | None = None,
    ) -> None:
        self.system_message = system_message
        self._frames = {"system": system, "user": user, "assistant": assistant}

    def prompt(self, messages: Sequence[Message]) -> str:
        parts: list[str] = []
        for role, text in messages:
            if role not in self._frames:
                raise ParrotError("bad_template", f"role {role!r} is none of {', '.join(self._frames)}")
            before, after = self._frames[role]
            parts += (before, text, after)
        return "".join(parts)

    def with_system(self, message: str | None) -> ChatTemplate:
        """The same frames with another system message (None: without)."""
        return ChatTemplate(**self._frames, system_message=message)


class SeperatorStyle(enum.Enum):
    """One separator after every message, or `sep` after the system's and user's and `sep2` after the assistant's."""

    ADD_COLON_SINGLE = 1
    ADD_COLON_TWO = 2


class ConversationTemplate(ChatTemplate):
    """A template of the form `SYSTEM USER: ... ASSISTANT: ...`, after the roles' names."""

    def __init__(
        self,
        system_message: str,
        roles: Sequence[str],
        system_template: str = "{system_message}",
        seperator_style: SeperatorStyle = SeperatorStyle.ADD_COLON_SINGLE,
        sep: str = "\n",
        sep2: str | None = None,
    ) -> None:
        if len(roles) != 2:
            raise ParrotError("bad_template", f"roles {roles!r} are not two: the user's name and the assistant's")
        if seperator_style is SeperatorStyle.ADD_COLON_TWO and sep2 is None:
            raise ParrotError("bad_template", "seperator_style ADD_COLON_TWO needs sep2, which ends the assistant's messages")
        before, found, after = system_template.partition("{system_message}")
        if not found:
            raise ParrotError("bad_template", f"system_template {system_template!r} has no {{system_message}}")
        last = sep2 if seperator_style is SeperatorStyle.ADD_COLON_TWO and sep2 is not None else sep
        super().__init__(
            system=(before, after + sep),
            user=(f"{roles[0]}: ", sep),
            assistant=(f"{roles[1]}:", last),  # a model begins its answer with the space itself
            system_message=system_message,
        )


class TokenizerTemplate(Conversation):
    """A model's own chat template, as its tokenizer has it (needs transformers: the extra `engine`)."""

    def __init__(self, tokenizer: Any, system_message: str | None = None) -> None:
        """`tokenizer`: a name or folder for AutoTokenizer, or a tokenizer that is loaded already."""
        if isinstance(tokenizer, str):
            tokenizer = _load(tokenizer)
        if not getattr(tokenizer, "chat_template", None):
            raise ParrotError(
                "bad_template", f"tokenizer {getattr(tokenizer, 'name_or_path', tokenizer)!r} has no chat template"
            )
        self._tokenizer = tokenizer
        self.system_message = system_message

    def prompt(self, messages: Sequence[Message]) -> str:
        listed = [{"role": role, "content": text} for role, text in messages]
        try:
            text = str(self._tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=False))
        except Exception as error:  # whatever the model's own template raises
            raise ParrotError("bad_template", f"the model's chat template refuses these messages: {error}") from error
        bos = self._tokenizer.bos_token
        if bos and text.startswith(bos) and self._adds_bos():
            return text[len(bos) :]  # the engine puts it at the head of every chain
        return text

    def _adds_bos(self) -> bool:
        ids = self._tokenizer.encode("a")
        return bool(ids) and ids[0] == self._tokenizer.bos_token_id


def _load(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ParrotError(
            "bad_request", "a model's own chat template needs transformers: pip install 'parrot-testbed[engine]'"
        ) from error
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ParrotError("not_found", f"tokenizer {name!r} cannot be loaded: {reason}") from error


vicuna_template = ConversationTemplate(
    system_message=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    roles=("USER", "ASSISTANT"),
    seperator_style=SeperatorStyle.ADD_COLON_TWO,
    sep=" ",
    sep2="</s>",
)

chatml_template = ChatTemplate(
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
)
