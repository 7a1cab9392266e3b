"""Text to token ids and back, for the core's shell, the engines and workloads: by a model's own tokenizer, or synthetic.

The base install needs nothing more for `synthetic`; a model's tokenizer needs the extra `[engine]`, imported when the
first one is loaded.
"""

from __future__ import annotations

from parrot.tokenizer.base import Message, Tokenizer
from parrot.tokenizer.estimated import ESTIMATED, EstimatedTokenizer
from parrot.tokenizer.stream import Delta, Detokenizer, find_stop
from parrot.tokenizer.synthetic import SYNTHETIC, SyntheticTokenizer, synthetic_text

__all__ = [
    "ESTIMATED",
    "SYNTHETIC",
    "Delta",
    "Detokenizer",
    "EstimatedTokenizer",
    "Message",
    "SyntheticTokenizer",
    "Tokenizer",
    "find_stop",
    "load_tokenizer",
    "synthetic_text",
]

_loaded: dict[str, Tokenizer] = {}


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of the model `name` (see `parrot.model_files.resolve_model`), `synthetic` or `estimated`.

    Loaded once a process. Raises ConfigurationError, in one line, when it cannot be had.
    """
    if name not in _loaded:
        if name == SYNTHETIC:
            _loaded[name] = SyntheticTokenizer()
        elif name == ESTIMATED:
            _loaded[name] = EstimatedTokenizer()
        else:
            from parrot.tokenizer.pretrained import PretrainedTokenizer

            _loaded[name] = PretrainedTokenizer.load(name)
    return _loaded[name]
