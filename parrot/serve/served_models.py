"""The models that are served, as OpenAI's routes need them: by name, with what a prompt for them is made with.

It decides which kind of engine a model's requests go to where both kinds serve it, and what becomes of a request for a model
whose engines are gone: it waits for one, as every call does, if the model was there before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

from parrot.protocol.engine import EngineDescription
from parrot.protocol.errors import ParrotError
from parrot.serve.engines import Engine
from parrot.serve.tokenization import Tokenization
from parrot.tokenizer.base import Tokenizer

TEXT, TOKEN_IDS = "text", "token_id"


class ServedModel(NamedTuple):
    """`kind`: the model_type of its calls. `bos_text`: what the engine itself puts before a prompt. `max_seq_len`: tokens, of
    its roomiest engine. `created`: when it was first seen, Unix time in seconds."""

    name: str
    kind: str
    tokenizer: Tokenizer
    bos_text: str
    max_seq_len: int
    created: int


class ServedModels:
    """The models of the core's engines. `engines`: those that are live, by id."""

    def __init__(self, engines: Callable[[], dict[int, Engine]], tokenization: Tokenization) -> None:
        self._engines = engines
        self._tokenization = tokenization
        self._seen: tuple[int, int] = (0, 0)  # how many engines there were, and the newest
        self._live: dict[str, ServedModel] = {}
        self._known: dict[str, ServedModel] = {}  # and those that were

    def live(self) -> list[ServedModel]:
        """One a name, in the order of registration."""
        self._look()
        return list(self._live.values())

    def find(self, name: str) -> ServedModel:
        """The model of that name. Raises `not_found`, and `unavailable` while there is no engine at all."""
        self._look()
        found = self._live.get(name) or self._known.get(name)
        if found is not None:
            return found
        if not self._live and not self._known:
            raise ParrotError("unavailable", "no engine has registered yet", retry_after_s=5.0)
        known = ", ".join(self._live) or "none"
        raise ParrotError(
            "not_found",
            f"The model '{name}' does not exist or you do not have access to it. Models here: {known}.",
            param="model",
            openai_code="model_not_found",
        )

    def _look(self) -> None:
        """Ids of engines only grow: number and newest tell whether any has come or gone."""
        engines = self._engines()
        seen = (len(engines), next(reversed(engines), 0))
        if seen == self._seen:
            return
        self._seen = seen
        kinds: dict[str, dict[str, list[EngineDescription]]] = {}
        for engine in engines.values():
            description = engine.description
            kind = TEXT if description.engine_type == "openai" else TOKEN_IDS
            kinds.setdefault(description.model, {}).setdefault(kind, []).append(description)
        self._live = {name: self._served(name, found) for name, found in kinds.items()}
        self._known.update(self._live)

    def _served(self, name: str, found: Mapping[str, list[EngineDescription]]) -> ServedModel:
        kind = TOKEN_IDS if TOKEN_IDS in found else TEXT  # there contexts are shared
        engines = found[kind]
        tokenizer = cast(Tokenizer, self._tokenization.tokenizer(engines[0].tokenizer))
        bos_id = tokenizer.bos_id
        bos_text = tokenizer.decode([bos_id]) if engines[0].bos_tokens and bos_id is not None else ""
        known = self._known.get(name)
        created = known.created if known is not None else int(time.time())
        return ServedModel(name, kind, tokenizer, bos_text, max(e.max_seq_len for e in engines), created)
