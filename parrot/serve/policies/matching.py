"""Engines by a score of what a task costs there, the cheapest first, without looking at all of them.

Such a score grows with an engine's load and with the tokens that it would have to compute anew. An engine that holds nothing of
the prompt is beaten by any less loaded one that does not either, so an index by load has the best of them at its head; what
remains is to compare it with the engines that hold some of the prompt. Of these few are scored one by one. Where many hold
a prefix (a system prompt that all share), one of them comes early in the index.

Prompts are taken for equally long on all engines when bounds are computed, which holds under one tokenizer; scores are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heappop, heappush, heapreplace
from typing import Any

from parrot.serve.contexts import Context
from parrot.serve.engine_index import EngineIndex
from parrot.serve.engines import Engine
from parrot.serve.graph import Task
from parrot.serve.policies.base import cached_tokens, prompt_tokens

FEW = 16  #: engines that hold a prefix which are looked at one by one

Score = Any  #: a number, or a tuple of numbers: the less the better


def levels_of(task: Task) -> list[dict[int, Context]]:
    """Of each leading part of the prompt that any engine holds, longest first, the contexts by engine id (of all lanes). Who
    holds a prefix holds its prefixes, so each is part of the next."""
    levels: list[dict[int, Context]] = []
    for node in task.path or ():
        contexts = node.contexts
        if not contexts:
            break
        levels.append(contexts)
    levels.reverse()
    return levels


def by_match(task: Task, index: EngineIndex, ids: list[int] | None = None) -> Iterator[tuple[Engine, int]]:
    """(engine, cached tokens) of the lane's engines (of those with these `ids`) that hold some of the prompt: longest match
    first, equal ones as `index` has them."""
    longer: dict[int, Context] = {}
    for holders in levels_of(task):
        if len(holders) > len(longer):
            for engine in index.among(holders if ids is None else [i for i in ids if i in holders]):
                if engine.id not in longer:
                    yield engine, cached_tokens(task, engine)
        longer = holders


def by_score(
    task: Task,
    index: EngineIndex,
    score: Callable[[Engine, int], Score],
    floor: Callable[[Engine, int], Score],
    ids: list[int] | None = None,
) -> Iterator[tuple[Engine, int, Score]]:
    """(engine, cached tokens, score) of the engines of `index` (of those with these `ids`), the least score first, ties by id.

    `score(engine, new)`: for `new` tokens to be computed there. `floor(engine, new)`: no more than the score of that engine or
    of any that stands behind it in the index, if it has to compute at least `new` tokens; where it is tight, about one
    engine a part of the prompt is scored, and O(E) where it is not.
    """
    first = index.first()
    if first is None:
        return
    found: list[tuple[Score, int, Engine, int]] = []  # scored

    def look_at(engine: Engine) -> None:
        cached = cached_tokens(task, engine)
        heappush(found, (score(engine, max(0, prompt_tokens(task, engine) - cached)), engine.id, engine, cached))

    # One line for each part of the prompt: who holds just this part, the least loaded first. The line with the least floor is
    # looked into further until something that was found there, or elsewhere, costs no more than that.
    lines: list[tuple[Score, int, int, Engine, Iterator[Engine]]] = []
    news: list[int] = []

    def add_line(engines: Iterator[Engine], new: int) -> None:
        news.append(new)
        for engine in engines:
            heappush(lines, (floor(engine, new), engine.id, len(news) - 1, engine, engines))
            return

    if ids is not None:
        for engine in index.among(ids):
            look_at(engine)
    levels, prompt = levels_of(task) if ids is None else [], prompt_tokens(task, first)
    longer: dict[int, Context] = {}
    for depth, holders in enumerate(levels):
        if len(holders) > len(longer):
            if len(holders) <= FEW:
                for engine in index.among(holders):
                    if engine.id not in longer:
                        look_at(engine)
            else:
                some = next(iter(holders))
                cached = sum(level[some].tokens for level in levels[depth:])
                add_line(_others(index.among(holders), longer), max(0, prompt - cached))
        longer = holders
    if ids is None:
        add_line(index.without(longer), prompt)
    while lines:
        least, engine_id, line, engine, engines = lines[0]
        while found and (found[0][0], found[0][1]) < (least, engine_id):
            best_score, _, best, cached = heappop(found)
            yield best, cached, best_score
        look_at(engine)
        following = next(engines, None)
        if following is None:
            heappop(lines)
        else:
            heapreplace(lines, (floor(following, news[line]), following.id, line, following, engines))
    while found:
        best_score, _, best, cached = heappop(found)
        yield best, cached, best_score


def _others(engines: Iterator[Engine], known: dict[int, Context]) -> Iterator[Engine]:
    """Those that are not among the known."""
    for engine in engines:
        if engine.id not in known:
            yield engine
