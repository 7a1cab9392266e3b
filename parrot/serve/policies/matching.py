"""Engines by a score of what a task costs there, the cheapest first, without looking at all of them.

Such a score grows with an engine's load and with the tokens that it would have to compute anew. An engine that holds nothing of
the prompt is beaten by any less loaded one that does not either, so an index by load has the best of them at its head; what
remains is to compare it with the engines that hold some of the prompt. Of these few are scored one by one. Where many hold
a prefix (a system prompt that all share), one of them comes early in the index.

Prompts are taken for equally long on all engines when bounds are computed, which holds under one tokenizer; scores are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from typing import Any

from parrot.serve.contexts import Context
from parrot.serve.engines import Engine, EngineIndex
from parrot.serve.graph import Task
from parrot.serve.policies.base import cached_tokens, prompt_tokens

FEW = 16  #: engines that hold a prefix which are looked at one by one

Score = Any  #: a number, or a tuple of numbers: the less the better


def levels_of(task: Task) -> list[dict[int, Context]]:
    """Of each leading part of the prompt that any engine holds, longest first, the contexts by engine id (of all lanes). Who
    holds a prefix holds its prefixes, so each is part of the next."""
    levels: list[dict[int, Context]] = []
    for node in task.path or ():
        if not node.contexts:
            break
        levels.append(node.contexts)
    levels.reverse()
    return levels


def by_match(task: Task, index: EngineIndex) -> Iterator[tuple[Engine, int]]:
    """(engine, cached tokens) of the lane's engines that hold some of the prompt: longest match first, equal ones as `index`
    has them."""
    lane = task.call.lane.engines
    longer: dict[int, Context] = {}
    for holders in levels_of(task):
        if len(holders) <= FEW:
            engines = [lane[engine_id] for engine_id in holders if engine_id in lane and engine_id not in longer]
            for engine in sorted(engines, key=lambda engine: (index.load(engine), engine.id)):
                yield engine, cached_tokens(task, engine)
        elif len(holders) > len(longer):
            for engine in index:
                if engine.id in holders and engine.id not in longer:
                    yield engine, cached_tokens(task, engine)
        longer = holders


def by_score(
    task: Task,
    index: EngineIndex,
    score: Callable[[Engine, int], Score],
    floor: Callable[[Engine, int], Score],
) -> Iterator[tuple[Engine, int, Score]]:
    """(engine, cached tokens, score) of all engines of `index`, the least score first, ties by id.

    `score(engine, new)`: for `new` tokens to be computed there. `floor(engine, new)`: no more than the score of that engine or
    of any that stands behind it in the index, if it has to compute at least `new` tokens. O(log E + FEW) for the first one
    where `floor` is tight, O(E) where it is not.
    """
    first = index.first()
    if first is None:
        return
    lane = task.call.lane.engines
    levels = levels_of(task)
    few: dict[int, Context] = {}
    least_new = prompt = prompt_tokens(task, first)
    for depth, holders in enumerate(levels):
        if len(holders) > FEW:
            some = next(iter(holders))
            least_new = max(0, prompt - sum(level[some].tokens for level in levels[depth:]))
            break
        few = holders
    found: list[tuple[Score, int, Engine, int]] = []
    for engine_id in few:
        engine = lane.get(engine_id)
        if engine is not None:
            cached = cached_tokens(task, engine)
            heappush(found, (score(engine, max(0, prompt_tokens(task, engine) - cached)), engine_id, engine, cached))
    holders = levels[-1] if levels else few
    for engine in index:
        if engine.id in few:
            continue
        if found:
            next_one = (floor(engine, least_new), engine.id)
            while found and (found[0][0], found[0][1]) < next_one:
                least, _, best, cached = heappop(found)
                yield best, cached, least
        cached = cached_tokens(task, engine) if engine.id in holders else 0
        heappush(found, (score(engine, max(0, prompt_tokens(task, engine) - cached)), engine.id, engine, cached))
    while found:
        least, _, best, cached = heappop(found)
        yield best, cached, least
