"""Synthetic applications: the shape of one program of each, and its parameters, all documented and with a default.

Decides shapes and lengths, never arrival times. Lengths are drawn from a log-normal distribution with the mean that the
parameter names and the relative standard deviation `spread` (0: always the mean). A text that programs of an application
share is keyed by the application, any other by the program.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, NamedTuple, Protocol

import msgspec
import numpy as np
from msgspec import Meta

from parrot.protocol.api import Criteria
from sim.workloads.program import After, Call, Get, Program, Read, Segment, Text, Write

Spread = Annotated[float, Meta(ge=0.0, le=5.0, description="relative standard deviation of lengths; 0: always the mean")]
Limit = Annotated[int, Meta(ge=1, description="max_gen_length of every output; no output is longer")]
Output = Annotated[int, Meta(ge=1, description="mean tokens of an output")]
Instruction = Annotated[int, Meta(ge=1, description="tokens of the instruction, which all programs share")]
System = Annotated[int, Meta(ge=1, description="tokens of the system prompt")]
Systems = Annotated[int, Meta(ge=1, description="how many system prompts there are; a program takes one of them")]


class ChainParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A document summarised chunk by chunk: each call reads the summary so far and the next chunk. The last one is fetched."""

    chunks: Annotated[int, Meta(ge=1, description="chunks of the document, a call each")] = 8
    chunk_tokens: Annotated[int, Meta(ge=1, description="mean tokens of a chunk")] = 512
    instruction_tokens: Instruction = 40
    output_tokens: Output = 50
    spread: Spread = 0.2
    max_gen_length: Limit = 256


class MapReduceParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every chunk of a document summarised on its own, then one call over all summaries, which is fetched."""

    chunks: Annotated[int, Meta(ge=1, description="chunks of the document, a call each")] = 8
    chunk_tokens: Annotated[int, Meta(ge=1, description="mean tokens of a chunk")] = 512
    instruction_tokens: Instruction = 40
    output_tokens: Output = 50
    reduce_tokens: Annotated[int, Meta(ge=1, description="mean tokens of the last call's output")] = 100
    spread: Spread = 0.2
    max_gen_length: Limit = 256


class ChatParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A conversation: a system prompt, and turns with time to think between an answer and the next question. Each turn's
    prompt is the whole history."""

    turns: Annotated[int, Meta(ge=1, description="questions, a call each")] = 4
    systems: Systems = 1
    system_tokens: System = 256
    user_tokens: Annotated[int, Meta(ge=1, description="mean tokens of a question")] = 48
    output_tokens: Output = 96
    think_s: Annotated[float, Meta(ge=0.0, description="mean time between an answer and the next question (exponential)")] = 5.0
    spread: Spread = 0.4
    max_gen_length: Limit = 512


class TreeOfThoughtParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A search: every kept thought is continued in several ways, each is given a score, and the best are kept once all
    scores of the level have been fetched. A last call answers from the best path."""

    levels: Annotated[int, Meta(ge=1, description="how deep the search goes")] = 3
    branches: Annotated[int, Meta(ge=1, description="thoughts that continue a kept one")] = 3
    keep: Annotated[int, Meta(ge=1, description="thoughts kept of a level")] = 2
    problem_tokens: Annotated[int, Meta(ge=1, description="mean tokens of the problem")] = 256
    instruction_tokens: Instruction = 120
    output_tokens: Output = 80
    score_tokens: Annotated[int, Meta(ge=1, description="mean tokens of a score")] = 8
    answer_tokens: Annotated[int, Meta(ge=1, description="mean tokens of the answer")] = 120
    spread: Spread = 0.3
    max_gen_length: Limit = 512


class MultiAgentParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Agents that work on one shared context: in each round every agent reads the context and all messages of the rounds
    before, and writes one. A last call sums up, and is fetched; nothing else is waited for."""

    agents: Annotated[int, Meta(ge=1, description="agents, each with a role that all programs share")] = 4
    rounds: Annotated[int, Meta(ge=1, description="messages of an agent")] = 2
    system_tokens: System = 128
    context_tokens: Annotated[int, Meta(ge=1, description="mean tokens of the shared context")] = 1024
    role_tokens: Annotated[int, Meta(ge=1, description="tokens of a role's instruction")] = 48
    output_tokens: Output = 120
    answer_tokens: Annotated[int, Meta(ge=1, description="mean tokens of the last call's output")] = 200
    spread: Spread = 0.3
    max_gen_length: Limit = 512


class AgentParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An agent with tools: each step reads the whole history and writes an action; the tool runs, and its result is added
    to the history before the next step. The last step answers."""

    steps: Annotated[int, Meta(ge=1, description="calls, of which the last one answers")] = 6
    systems: Systems = 1
    system_tokens: Annotated[int, Meta(ge=1, description="tokens of the system prompt with the tools' descriptions")] = 1024
    task_tokens: Annotated[int, Meta(ge=1, description="mean tokens of the task")] = 128
    output_tokens: Annotated[int, Meta(ge=1, description="mean tokens of an action")] = 64
    result_tokens: Annotated[int, Meta(ge=1, description="mean tokens of a tool's result")] = 256
    answer_tokens: Annotated[int, Meta(ge=1, description="mean tokens of the answer")] = 200
    tool_s: Annotated[float, Meta(ge=0.0, description="mean time that a tool runs (exponential)")] = 2.0
    spread: Spread = 0.5
    max_gen_length: Limit = 1024


class SharedPromptsParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One call: a system prompt, some of which are more popular than others, and a question."""

    systems: Systems = 50
    zipf: Annotated[float, Meta(ge=0.0, description="the n-th prompt is taken in proportion to n^-zipf; 0: all alike")] = 1.0
    system_tokens: System = 1024
    user_tokens: Annotated[int, Meta(ge=1, description="mean tokens of the question")] = 128
    output_tokens: Output = 128
    spread: Spread = 0.5
    max_gen_length: Limit = 1024


class Draw(NamedTuple):
    """The streams of one workload, and what the keys of its shared texts begin with."""

    lengths: np.random.Generator
    times: np.random.Generator
    choices: np.random.Generator
    label: str = ""

    def tokens(self, mean: int, spread: float, most: int | None = None) -> int:
        if spread == 0:
            value = mean
        else:
            variance = math.log1p(spread * spread)
            value = max(1, round(self.lengths.lognormal(math.log(mean) - variance / 2, math.sqrt(variance))))
        return value if most is None else min(value, most)

    def delay_s(self, mean_s: float) -> float:
        return float(self.times.exponential(mean_s))


class _Outputs(Protocol):
    """What every application's parameters have."""

    @property
    def spread(self) -> float: ...

    @property
    def max_gen_length(self) -> int: ...


def _write(var: str, mean: int, p: _Outputs, draw: Draw) -> Write:
    return Write(var, draw.tokens(mean, p.spread, p.max_gen_length), max_gen_length=p.max_gen_length)


def chain(name: str, arrival_s: float, p: ChainParameters, draw: Draw) -> Program:
    """One chain summary."""
    calls = []
    for i in range(p.chunks):
        segments: list[Segment] = [Text(f"{draw.label}chain/instruction", p.instruction_tokens)]
        if i:
            segments.append(Read(f"summary{i - 1}"))
        segments.append(Text(f"{name}/chunk{i}", draw.tokens(p.chunk_tokens, p.spread)))
        segments.append(_write(f"summary{i}", p.output_tokens, p, draw))
        calls.append(Call(segments=tuple(segments), name="summarise"))
    get = Get(id="last", var=f"summary{p.chunks - 1}", criteria=Criteria.LATENCY)
    return Program(id=name, arrival_s=arrival_s, calls=tuple(calls), gets=(get,), application="chain")


def map_reduce(name: str, arrival_s: float, p: MapReduceParameters, draw: Draw) -> Program:
    """One map-reduce summary."""
    calls = []
    for i in range(p.chunks):
        chunk = Text(f"{name}/chunk{i}", draw.tokens(p.chunk_tokens, p.spread))
        part = _write(f"part{i}", p.output_tokens, p, draw)
        calls.append(Call(segments=(Text(f"{draw.label}map_reduce/map", p.instruction_tokens), chunk, part), name="map"))
    parts = tuple(Read(f"part{i}") for i in range(p.chunks))
    summary = _write("summary", p.reduce_tokens, p, draw)
    calls.append(Call(segments=(Text(f"{draw.label}map_reduce/reduce", p.instruction_tokens), *parts, summary), name="reduce"))
    get = Get(id="last", var="summary", criteria=Criteria.LATENCY)
    return Program(id=name, arrival_s=arrival_s, calls=tuple(calls), gets=(get,), application="map_reduce")


def chat(name: str, arrival_s: float, p: ChatParameters, draw: Draw) -> Program:
    """One conversation."""
    history: list[Segment] = [Text(f"{draw.label}chat/system{draw.choices.integers(p.systems)}", p.system_tokens)]
    calls, gets = [], []
    for turn in range(p.turns):
        history.append(Text(f"{name}/user{turn}", draw.tokens(p.user_tokens, p.spread)))
        after = (After(f"turn{turn - 1}", draw.delay_s(p.think_s)),) if turn else ()
        answer = _write(f"answer{turn}", p.output_tokens, p, draw)
        calls.append(Call(segments=(*history, answer), name="turn", after=after))
        gets.append(Get(id=f"turn{turn}", var=f"answer{turn}", criteria=Criteria.LATENCY, after=after))
        history.append(Read(f"answer{turn}"))
    return Program(id=name, arrival_s=arrival_s, calls=tuple(calls), gets=tuple(gets), application="chat")


def tree_of_thought(name: str, arrival_s: float, p: TreeOfThoughtParameters, draw: Draw) -> Program:
    """One search."""
    problem = Text(f"{name}/problem", draw.tokens(p.problem_tokens, p.spread))
    propose, judge, conclude = (
        Text(f"{draw.label}tree_of_thought/{what}", p.instruction_tokens) for what in ("propose", "judge", "conclude")
    )
    calls, gets = [], []
    kept: list[tuple[Read, ...]] = [()]  # the paths of thoughts that are gone on with
    after: tuple[After, ...] = ()
    for level in range(p.levels):
        grown: list[tuple[Read, ...]] = []
        scored: list[After] = []
        for path in kept:
            for _ in range(p.branches):
                thought, score = f"thought{level}_{len(grown)}", f"score{level}_{len(grown)}"
                write = _write(thought, p.output_tokens, p, draw)
                calls.append(Call(segments=(propose, problem, *path, write), name="propose", after=after))
                grown.append((*path, Read(thought)))
                write = _write(score, p.score_tokens, p, draw)
                calls.append(Call(segments=(judge, problem, *grown[-1], write), name="judge", after=after))
                gets.append(Get(id=score, var=score, criteria=Criteria.LATENCY, after=after))
                scored.append(After(score))
        best = draw.choices.permutation(len(grown))[: p.keep].tolist()
        kept = [grown[place] for place in best]
        after = tuple(scored)
    answer = _write("answer", p.answer_tokens, p, draw)
    calls.append(Call(segments=(conclude, problem, *kept[0], answer), name="conclude", after=after))
    gets.append(Get(id="answer", var="answer", criteria=Criteria.LATENCY, after=after))
    return Program(id=name, arrival_s=arrival_s, calls=tuple(calls), gets=tuple(gets), application="tree_of_thought")


def multi_agent(name: str, arrival_s: float, p: MultiAgentParameters, draw: Draw) -> Program:
    """One discussion."""
    system = Text(f"{draw.label}multi_agent/system", p.system_tokens)
    shared: list[Segment] = [system, Text(f"{name}/context", draw.tokens(p.context_tokens, p.spread))]
    calls = []
    for turn in range(p.rounds):
        messages = []
        for agent in range(p.agents):
            role = Text(f"{draw.label}multi_agent/role{agent}", p.role_tokens)
            write = _write(f"message{turn}_{agent}", p.output_tokens, p, draw)
            calls.append(Call(segments=(*shared, role, write), name=f"agent{agent}"))
            messages.append(Read(write.var))
        shared += messages
    conclude = Text(f"{draw.label}multi_agent/conclude", p.role_tokens)
    calls.append(Call(segments=(*shared, conclude, _write("answer", p.answer_tokens, p, draw)), name="conclude"))
    get = Get(id="answer", var="answer", criteria=Criteria.LATENCY)
    return Program(id=name, arrival_s=arrival_s, calls=tuple(calls), gets=(get,), application="multi_agent")


def agent(name: str, arrival_s: float, p: AgentParameters, draw: Draw) -> Program:
    """One task of an agent with tools."""
    history: list[Segment] = [
        Text(f"{draw.label}agent/system{draw.choices.integers(p.systems)}", p.system_tokens),
        Text(f"{name}/task", draw.tokens(p.task_tokens, p.spread)),
    ]
    calls, gets = [], []
    for step in range(p.steps):
        if step:
            history.append(Text(f"{name}/result{step - 1}", draw.tokens(p.result_tokens, p.spread)))
        after = (After(f"step{step - 1}", draw.delay_s(p.tool_s)),) if step else ()
        is_last = step == p.steps - 1
        write = _write("answer" if is_last else f"action{step}", p.answer_tokens if is_last else p.output_tokens, p, draw)
        calls.append(Call(segments=(*history, write), name="answer" if is_last else "act", after=after))
        gets.append(Get(id=f"step{step}", var=write.var, criteria=Criteria.LATENCY, after=after))
        history.append(Read(write.var))
    return Program(id=name, arrival_s=arrival_s, calls=tuple(calls), gets=tuple(gets), application="agent")


def shared_prompts(name: str, arrival_s: float, p: SharedPromptsParameters, draw: Draw) -> Program:
    """One question."""
    number = int(np.searchsorted(_popularity(p.systems, p.zipf), draw.choices.random(), side="right"))
    system = Text(f"{draw.label}shared_prompts/system{min(number, p.systems - 1)}", p.system_tokens)
    user = Text(f"{name}/user", draw.tokens(p.user_tokens, p.spread))
    call = Call(segments=(system, user, _write("answer", p.output_tokens, p, draw)), name="ask")
    get = Get(id="answer", var="answer", criteria=Criteria.LATENCY)
    return Program(id=name, arrival_s=arrival_s, calls=(call,), gets=(get,), application="shared_prompts")


@lru_cache(maxsize=16)
def _popularity(systems: int, zipf: float) -> np.ndarray:
    """Cumulative shares of the prompts, the most popular one first."""
    weights = np.arange(1, systems + 1, dtype=float) ** -zipf
    return np.cumsum(weights / weights.sum())
