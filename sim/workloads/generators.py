"""Synthetic applications: a chain summary, a map-reduce summary, a multi-turn chat. Every parameter has a documented default.

A generator decides shapes and lengths, never arrival times. Lengths are drawn from a log-normal distribution with the mean
that the parameter names and the relative standard deviation `spread` (0: always the mean).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from parrot.protocol.api import Criteria
from sim.workloads.arrivals import poisson, stream
from sim.workloads.program import After, Call, Get, Program, Read, Segment, Text, WorkloadError, Write

Count = Annotated[int, Meta(ge=1)]
Tokens = Annotated[int, Meta(ge=1)]
Spread = Annotated[float, Meta(ge=0.0, le=5.0)]

#: what `--rate` and `--count` are when they are not given
DEFAULT_RATE = 1.0
DEFAULT_COUNT = 100


class ChainParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A document summarised chunk by chunk: each call reads the summary so far and the next chunk. The last one is fetched."""

    chunks: Count = 8
    chunk_tokens: Tokens = 512
    instruction_tokens: Tokens = 40
    output_tokens: Tokens = 50
    spread: Spread = 0.2
    max_gen_length: Tokens = 256


class MapReduceParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every chunk of a document summarised on its own, then one call over all summaries, which is fetched."""

    chunks: Count = 8
    chunk_tokens: Tokens = 512
    instruction_tokens: Tokens = 40
    output_tokens: Tokens = 50
    reduce_tokens: Tokens = 100  #: mean output of the last call
    spread: Spread = 0.2
    max_gen_length: Tokens = 256


class ChatParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A conversation: a system prompt, one of `systems` that all conversations share, and turns with time to think between
    an answer and the next question (exponential). Each turn's prompt is the whole history."""

    turns: Count = 4
    systems: Count = 1
    system_tokens: Tokens = 256
    user_tokens: Tokens = 48
    output_tokens: Tokens = 96
    think_s: Annotated[float, Meta(ge=0.0)] = 5.0
    spread: Spread = 0.4
    max_gen_length: Tokens = 512


class _Draw(NamedTuple):
    """The streams of one workload."""

    lengths: np.random.Generator
    times: np.random.Generator
    choices: np.random.Generator

    def tokens(self, mean: int, spread: float, most: int | None = None) -> int:
        if spread == 0:
            value = mean
        else:
            variance = np.log1p(spread * spread)
            value = max(1, round(float(self.lengths.lognormal(np.log(mean) - variance / 2, np.sqrt(variance)))))
        return value if most is None else min(value, most)


def chain(name: str, arrival_s: float, p: ChainParameters, draw: _Draw) -> Program:
    """One chain summary."""
    calls = []
    for i in range(p.chunks):
        segments: list[Segment] = [Text("chain/instruction", p.instruction_tokens)]
        if i:
            segments.append(Read(f"summary{i - 1}"))
        segments.append(Text(f"{name}/chunk{i}", draw.tokens(p.chunk_tokens, p.spread)))
        segments.append(_write(f"summary{i}", p.output_tokens, p, draw))
        calls.append(Call(segments=tuple(segments), name="summarise"))
    get = Get(id="last", var=f"summary{p.chunks - 1}", criteria=Criteria.LATENCY)
    return Program(id=name, arrival_s=arrival_s, calls=tuple(calls), gets=(get,), application="chain")


def map_reduce(name: str, arrival_s: float, p: MapReduceParameters, draw: _Draw) -> Program:
    """One map-reduce summary."""
    calls = []
    for i in range(p.chunks):
        chunk = Text(f"{name}/chunk{i}", draw.tokens(p.chunk_tokens, p.spread))
        part = _write(f"part{i}", p.output_tokens, p, draw)
        calls.append(Call(segments=(Text("map_reduce/map", p.instruction_tokens), chunk, part), name="map"))
    parts = tuple(Read(f"part{i}") for i in range(p.chunks))
    summary = _write("summary", p.reduce_tokens, p, draw)
    calls.append(Call(segments=(Text("map_reduce/reduce", p.instruction_tokens), *parts, summary), name="reduce"))
    get = Get(id="last", var="summary", criteria=Criteria.LATENCY)
    return Program(id=name, arrival_s=arrival_s, calls=tuple(calls), gets=(get,), application="map_reduce")


def chat(name: str, arrival_s: float, p: ChatParameters, draw: _Draw) -> Program:
    """One conversation."""
    history: list[Segment] = [Text(f"chat/system{draw.choices.integers(p.systems)}", p.system_tokens)]
    calls, gets = [], []
    for turn in range(p.turns):
        history.append(Text(f"{name}/user{turn}", draw.tokens(p.user_tokens, p.spread)))
        after = (After(f"turn{turn - 1}", float(draw.times.exponential(p.think_s))),) if turn else ()
        answer = _write(f"answer{turn}", p.output_tokens, p, draw)
        calls.append(Call(segments=(*history, answer), name="turn", after=after))
        gets.append(Get(id=f"turn{turn}", var=f"answer{turn}", criteria=Criteria.LATENCY, after=after))
        history.append(Read(f"answer{turn}"))
    return Program(id=name, arrival_s=arrival_s, calls=tuple(calls), gets=tuple(gets), application="chat")


def _write(var: str, mean: int, p: ChainParameters | MapReduceParameters | ChatParameters, draw: _Draw) -> Write:
    return Write(var, draw.tokens(mean, p.spread, p.max_gen_length), max_gen_length=p.max_gen_length)


#: name -> (parameters, what builds one program)
GENERATORS: dict[str, tuple[type[Any], Callable[..., Program]]] = {
    "chain": (ChainParameters, chain),
    "map_reduce": (MapReduceParameters, map_reduce),
    "chat": (ChatParameters, chat),
}


def generate(name: str, options: Mapping[str, Any], *, rate: float | None, seed: int, count: int | None) -> Iterator[Program]:
    """`count` programs of the generator `name`, with Poisson arrivals at `rate` programs per second.

    Raises WorkloadError for an option that the generator has not, or a value that it cannot take.
    """
    kind, build = GENERATORS[name]
    try:
        parameters = msgspec.convert(dict(options), kind, strict=False)
    except msgspec.ValidationError as error:
        known = ", ".join(f"{f.encode_name}={f.default}" for f in msgspec.structs.fields(kind))
        raise WorkloadError(f"workload {name}: {error}; its parameters and defaults: {known}") from None
    arrivals = poisson(DEFAULT_RATE if rate is None else rate, stream(seed, "arrivals"))
    draw = _Draw(stream(seed, f"{name}.lengths"), stream(seed, f"{name}.times"), stream(seed, f"{name}.choices"))
    numbered = range(DEFAULT_COUNT if count is None else count)
    return (build(f"{name}{index}", next(arrivals), parameters, draw) for index in numbered)
