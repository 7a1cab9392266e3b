"""What the model says: from a function that the user gives, from a journal, or synthetic text of a sampled length.

An output depends on its call alone (its instance, its place in it, its prompt), never on when it runs or where, so that
policies are compared on the same outputs. Lengths are bounded where they are used (`sessions`), not here.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from hashlib import blake2b
from itertools import islice
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np

from parrot.configuration import ConfigurationError
from parrot.protocol.api import SamplingConfig
from parrot.tokenizer import SYNTHETIC, synthetic_text
from sim.http_client import MODEL
from sim.network import stream
from sim.programs.source import load_function

DEFAULT = "synthetic"
MEAN_TOKENS = 128.0
CV = 1.0
_WORD = re.compile(r"\S+")


class Wanted(Protocol):
    """An output that the model is about to write. `instance`, `session`, `call` and `place` say which it is: the place of the
    session among its instance's, the call's in the session, the output's in the call."""

    instance: int
    session: int
    call: int
    place: int
    sampling: SamplingConfig
    tokenizer: str

    @property
    def name(self) -> str:
        """The semantic function's."""

    @property
    def output(self) -> str:
        """The output's parameter."""

    @property
    def prompt(self) -> str:
        """All text in front of it, as the model reads it."""

    @property
    def inputs(self) -> dict[str, str]:
        """The texts of the call's inputs by parameter, and of its outputs that are written already."""


#: Gives the text of an output.
Outputs = Callable[[Wanted], str]


class OutputError(ConfigurationError):
    """An outputs function that failed, or gave what is no text. The run ends."""


def open_outputs(spec: str | None, seed: int) -> Outputs:
    """The outputs that `--outputs` names: `synthetic[:mean=TOKENS,cv=CV]`, `journal:PATH`, FILE.py:FUNCTION or MODULE:FUNCTION.

    Raises ConfigurationError.
    """
    kind, _, rest = (spec or DEFAULT).partition(":")
    if kind == "synthetic":
        return Synthetic(seed, **_parameters(spec or DEFAULT, rest))
    if kind == "journal":
        from sim.programs.journal import JournalOutputs  # SQLite, only when it is needed

        return JournalOutputs(rest)
    return Given(spec or DEFAULT, seed)


def _parameters(spec: str, text: str) -> dict[str, float]:
    given: dict[str, float] = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name not in ("mean", "cv") or not 0.0 <= number < math.inf or (name == "mean" and number < 1.0):
            raise ConfigurationError(f"--outputs {spec}: {item!r}: expected mean=TOKENS (1 or more) or cv=NUMBER (0 or more)")
        given[name] = number
    return given


class Synthetic:
    """Words of no meaning. Lengths are lognormal with the given mean (tokens) and coefficient of variation, at least 1, and cut
    at max_gen_length; `output_length` stands above. The draw of an output is that of its place, under every policy."""

    def __init__(self, seed: int, mean: float = MEAN_TOKENS, cv: float = CV) -> None:
        self._seed = seed
        self._sigma = math.sqrt(math.log1p(cv * cv))
        self._mu = math.log(mean) - self._sigma**2 / 2

    def __call__(self, wanted: Wanted) -> str:
        key = f"{self._seed}/{wanted.instance}/{wanted.session}/{wanted.call}/{wanted.place}"
        tokens = wanted.sampling.output_length
        if tokens is None:
            number = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")
            normal = _STANDARD.inv_cdf((number + 0.5) / 2.0**64)
            tokens = max(1, round(math.exp(self._mu + self._sigma * normal)))
        return text_of_length(key, min(tokens, wanted.sampling.max_gen_length), wanted.tokenizer)


_STANDARD = NormalDist()


def text_of_length(key: str, tokens: int, tokenizer: str) -> str:
    """A text of so many tokens (about so many under a model's own tokenizer); equal keys give equal texts."""
    return synthetic_text(key, tokens) if tokenizer == SYNTHETIC else MODEL.words(key, tokens)


#: What an outputs function may ask for, by the names of its parameters.
_OFFERED: Mapping[str, Callable[[Wanted], Any]] = {
    "name": lambda wanted: wanted.name,
    "prompt": lambda wanted: wanted.prompt,
    "inputs": lambda wanted: wanted.inputs,
    "output": lambda wanted: wanted.output,
    "instance": lambda wanted: wanted.instance,
    "max_gen_length": lambda wanted: wanted.sampling.max_gen_length,
}


class Given:
    """The outputs of a user's function. It is called with what its parameters name; `rng` is a generator of the output's own.
    It returns the text, or a number of tokens, which are then synthetic."""

    def __init__(self, spec: str, seed: int) -> None:
        self._spec = spec
        self._seed = seed
        self._function = load_function(spec, "--outputs")
        self._asks = self._parameters_of(self._function)

    def _parameters_of(self, function: Callable[..., Any]) -> list[str]:
        known = [*_OFFERED, "rng"]
        asked = []
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                return known
            if parameter.name in known and parameter.kind is not parameter.POSITIONAL_ONLY:
                asked.append(parameter.name)
            elif parameter.default is parameter.empty:
                raise ConfigurationError(
                    f"--outputs {self._spec}: parameter {parameter.name!r} is none of {', '.join(known)}, which are offered"
                )
        return asked

    def __call__(self, wanted: Wanted) -> str:
        key = f"outputs/{wanted.instance}/{wanted.session}/{wanted.call}/{wanted.place}"
        given = {name: _OFFERED[name](wanted) for name in self._asks if name != "rng"}
        if "rng" in self._asks:
            given["rng"] = stream(self._seed, key)
        where = f"--outputs {self._spec}: for output {wanted.output!r} of {wanted.name!r} (instance {wanted.instance})"
        try:
            said = self._function(**given)
        except Exception as error:
            raise OutputError(f"{where} it raised {type(error).__name__}: {error}") from error
        if isinstance(said, str):
            return said
        if isinstance(said, int | np.integer) and not isinstance(said, bool) and said >= 0:
            return text_of_length(key, min(int(said), wanted.sampling.max_gen_length), wanted.tokenizer)
        raise OutputError(f"{where} it returned {said!r}; expected a text, or a number of tokens")


def cut(text: str, tokens: int, tokenizer: Any) -> str:
    """The first `tokens` tokens of `text`."""
    if tokenizer.name != SYNTHETIC:
        return str(tokenizer.decode(tokenizer.encode(text)[:tokens]))
    words = [match.end() for match in islice(_WORD.finditer(text), tokens)]
    return text[: words[-1]] if words else ""
