"""A model's own tokenizer. The first load converts it with transformers and keeps it; later ones take milliseconds.

What is kept is the `tokenizers` file and one JSON of facts (`facts.json`), so that a process which only tokenizes, as
the core's does, never imports transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from parrot.configuration import ConfigurationError
from parrot.model_files import ModelFiles, converted, import_transformers, resolve_model
from parrot.protocol.errors import ParrotError
from parrot.tokenizer.base import Message


class Facts(msgspec.Struct, frozen=True):
    """What a tokenizer's file does not say."""

    bos_id: int | None
    eos_ids: tuple[int, ...]
    chat_template: str | None
    special_tokens: dict[str, str]  #: bos_token, eos_token, ... as chat templates name them


class PretrainedTokenizer:
    """See the module."""

    def __init__(self, name: str, backend: Any, facts: Facts) -> None:
        self.name = name
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_id = facts.bos_id
        self.eos_ids = facts.eos_ids
        self.chat_template = facts.chat_template
        self._backend = backend
        self._facts = facts
        self._template: Any = None

    @classmethod
    def load(cls, name: str) -> PretrainedTokenizer:
        """Raises ConfigurationError when the model or a package is missing."""
        try:
            import tokenizers
        except ImportError:
            import_transformers()
            raise
        folder = _kept(name, resolve_model(name, "tokenizer"))
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.no_truncation()
        backend.no_padding()
        return cls(name, backend, msgspec.json.decode((folder / "facts.json").read_bytes(), type=Facts))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        if self._facts.chat_template is None:
            raise ParrotError("bad_request", f"the tokenizer of {self.name!r} has no chat template")
        import jinja2
        import jinja2.sandbox

        if self._template is None:
            environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
            )
            environment.globals["raise_exception"] = _refuse
            environment.filters["tojson"] = _to_json
            self._template = environment.from_string(self._facts.chat_template)
        try:
            given = {"tools": list(tools)} if tools else {}
            text: str = self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **given, **self._facts.special_tokens
            )
        except jinja2.TemplateError as error:
            raise ParrotError("bad_request", f"the chat template of {self.name!r} refused the conversation: {error}") from None
        return text


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    """As transformers has it: characters as they are, unlike Jinja's own, which is made for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise ParrotError("bad_request", f"the chat template refused the conversation: {message}")


def _kept(name: str, source: ModelFiles) -> Path:
    def build(folder: Path) -> None:
        transformers = import_transformers()
        extra = {"gguf_file": source.gguf} if source.gguf else {}
        try:
            original = transformers.AutoTokenizer.from_pretrained(str(source.directory), use_fast=True, **extra)
        except Exception as error:  # transformers raises all kinds for a file that it cannot read
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise ConfigurationError(f"the tokenizer of {name!r} at {source} cannot be loaded: {reason}") from error
        if not getattr(original, "is_fast", False):
            raise ConfigurationError(f"the tokenizer of {name!r} at {source} cannot be converted to a fast one")
        original.backend_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "facts.json").write_bytes(msgspec.json.encode(_facts(original, source)))

    return converted("tokenizers", source, build)


def _facts(original: Any, source: ModelFiles) -> Facts:
    with_specials = original("a").input_ids
    bos = original.bos_token_id
    eos = {original.eos_token_id} | _generation_eos(source)
    template = original.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    names = {k: str(v) for k, v in original.special_tokens_map.items() if k.endswith("_token") and v is not None}
    return Facts(
        bos_id=bos if bos is not None and with_specials[:1] == [bos] else None,
        eos_ids=tuple(sorted(i for i in eos if i is not None)),
        chat_template=template,
        special_tokens=names,
    )


def _generation_eos(source: ModelFiles) -> set[int]:
    """The end tokens of generation_config.json: instruction-tuned models often have more than their tokenizer names."""
    file = source.directory / "generation_config.json"
    if source.gguf or not file.is_file():
        return set()
    eos = msgspec.json.decode(file.read_bytes()).get("eos_token_id")
    return set(eos) if isinstance(eos, list) else {eos} if isinstance(eos, int) else set()
