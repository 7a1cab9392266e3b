"""The tokenizers of simulated engines, by which texts have a length: a model's own where it can be had. Nobody reads the ids
that they give; only their number counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from parrot.engine.launch import bos_tokens, tokenizer_or_synthetic
from parrot.tokenizer import SYNTHETIC, Tokenizer
from sim.engine_models import EngineModel


def with_tokenizers(engines: Iterable[EngineModel]) -> tuple[list[EngineModel], dict[str, Tokenizer]]:
    """The engines with tokenizers that can be had (`synthetic` in the place of others, which is said), and these by name."""
    tokenizers: dict[str, Tokenizer] = {}
    wanted: dict[str, Tokenizer] = {}
    fitted = []
    for model in engines:
        name = model.description.tokenizer
        tokenizer = wanted.get(name) or wanted.setdefault(name, tokenizer_or_synthetic(name))
        tokenizers[tokenizer.name] = tokenizer
        description = msgspec.structs.replace(
            model.description, tokenizer=tokenizer.name, bos_tokens=bos_tokens(tokenizer), accepts_output_length=True
        )
        fitted.append(model._replace(description=description))
    return fitted, tokenizers


class Counted:
    """A tokenizer of which only the number of tokens matters: a simulated engine is sent no ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bos_id = tokenizer.bos_id
        self._tokenizer = tokenizer

    def encode(self, text: str) -> Sequence[int]:
        synthetic = self._tokenizer.name == SYNTHETIC
        return range(len(text.split()) if synthetic else len(self._tokenizer.encode(text)))
