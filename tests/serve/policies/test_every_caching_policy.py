"""What operators ask of every router, held for the policies of the field; and that an index finds what a look at all would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from parrot.serve.engines import Engine
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, Placement, cached_tokens, prompt_tokens
from parrot.serve.queue import TaskQueue
from tests.serve.driver import Driver, text, value
from tests.serve.policies.support import ask, hot, reasons

FIELD = ("random", "power_of_two", "session_hash", "cache_aware", "weighted", "kv_cost", "lmetric", "preble_e2")


@pytest.mark.parametrize("policy", [*FIELD, "round_robin", "least_loaded"])
def test_a_hot_prefix_does_not_pile_all_work_on_one_engine(policy: str) -> None:
    d = Driver(policy, max_sessions_num=1000)
    for _ in range(4):
        d.engine()
    for number in range(200):
        hot(d, d.open(tenant="t"), number, prefix=500)
    counts = Counter(dispatch.engine_id for dispatch in d.dispatches)
    assert d.faults == []
    assert set(counts) == {1, 2, 3, 4}
    assert sum(counts.values()) == 200


@pytest.mark.parametrize("policy", FIELD)
def test_the_work_of_a_lost_engine_is_placed_again_at_once(policy: str) -> None:
    d = Driver(policy, max_sessions_num=1000)
    for _ in range(3):
        d.engine()
    for number in range(60):
        hot(d, d.open(), number)
    gone = d.dispatches[0].engine_id
    lost = [dispatch.task for dispatch in d.dispatches if dispatch.engine_id == gone]
    d.lose(gone)
    assert d.faults == []
    assert len(d.dispatches) == 60
    assert {dispatch.task for dispatch in d.dispatches if dispatch.attempt == 2} == set(lost)
    assert gone not in {dispatch.engine_id for dispatch in d.dispatches}


@pytest.mark.parametrize("policy", FIELD)
def test_every_placement_says_why(policy: str) -> None:
    d = Driver(policy)
    for _ in range(3):
        d.engine(tasks_capacity=2)
    session = d.open()
    for number in range(6):
        hot(d, session, number)
    for report in reasons(d):
        assert report.terms
        assert all(candidate.terms.keys() == report.candidates[0].terms.keys() for candidate in report.candidates)
        assert report.engine_id in {candidate.engine_id for candidate in report.candidates if candidate.fits}
        ids = [candidate.engine_id for candidate in report.candidates]
        assert len(ids) == len(set(ids))


# ------------------------------------------------------------------------------------------ the index and a look at all


def kv_cost(task: Task, engine: Engine, engines: list[Engine], policy: Any) -> Any:
    prompt = prompt_tokens(task, engine)
    return 1.5 * (engine.prefill_tokens + prompt - cached_tokens(task, engine)) + engine.prompt_tokens + prompt


def lmetric(task: Task, engine: Engine, engines: list[Engine], policy: Any) -> Any:
    prefill = engine.prefill_tokens + prompt_tokens(task, engine) - cached_tokens(task, engine)
    return prefill * len(engine.tasks), prefill


def weighted(task: Task, engine: Engine, engines: list[Engine], policy: Any) -> Any:
    least, most = min(len(e.tasks) for e in engines), max(len(e.tasks) for e in engines)
    queue = (most - len(engine.tasks)) / (most - least) if most > least else 1.0
    used = min(1.0, engine.reserved / engine.description.tokens_capacity)
    return -round(3 * cached_tokens(task, engine) / prompt_tokens(task, engine) + 2 * queue + 2 * (1 - used), 9)


def cache_aware(task: Task, engine: Engine, engines: list[Engine], policy: Any) -> Any:
    least, most = min(len(e.tasks) for e in engines), max(len(e.tasks) for e in engines)
    if most - least > 2 and most > 1.5 * least:
        return len(engine.tasks), engine.reserved
    cached = cached_tokens(task, engine)
    if cached > 0.3 * prompt_tokens(task, engine):
        return 0, -cached, len(engine.tasks), engine.reserved
    return 1, engine.cached_tokens, len(engine.tasks), 0


def preble_e2(task: Task, engine: Engine, engines: list[Engine], policy: Any) -> Any:
    prompt, cached = prompt_tokens(task, engine), cached_tokens(task, engine)
    terms = policy._terms(task, engine)
    if cached > prompt - cached:
        return 0, -cached, terms["load_s"]
    return 1, round(terms["cost_s"], 9), 0


@pytest.mark.parametrize(
    ("name", "score", "params"),
    [
        ("kv_cost", kv_cost, {"overlap_weight": 1.5}),
        ("lmetric", lmetric, {}),
        ("weighted", weighted, {}),
        ("cache_aware", cache_aware, {"balance_abs_threshold": 2}),
        ("preble_e2", preble_e2, {"balance_requests": 1 << 30, "decode_token_s": 0.001}),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("engines", "tasks_capacity"), [(5, 4), (70, 3), (70, 40)])
def test_the_engine_that_is_taken_is_the_best_of_all_that_have_room(
    name: str, score: Callable[..., Any], params: dict[str, Any], seed: int, engines: int, tasks_capacity: int
) -> None:
    d = Driver(name, {"params": params, "max_queue_size": 1000}, max_sessions_num=1000)
    policy: Any = d.core.scheduler.policy
    choose = policy.choose
    checked = 0

    def watched(task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        nonlocal checked
        all_of_them = cluster.engines(task.call.lane)
        fitting = [engine for engine in all_of_them if cluster.fits(task, engine)]
        best = min(fitting, key=lambda e: (score(task, e, all_of_them, policy), e.id), default=None)
        placements = list(choose(task, queue, cluster))
        assert [placement.engine for placement in placements] == ([] if best is None else [best])
        checked += 1
        return placements

    policy.choose = watched
    random = np.random.default_rng(seed)
    for _ in range(engines):
        d.engine(tasks_capacity=tasks_capacity, tokens_capacity=int(random.integers(500, 2500)))
    sessions = [d.open(tenant="t") for _ in range(40)]
    for number in range(400):
        d.now += float(random.exponential(1.0))
        if random.random() < 0.6 or not d.dispatches:
            session = sessions[int(random.integers(40))]
            system = int(random.integers(3))
            segments: list[Any] = [text(f"system{system}", 100 * (system + 1))]
            for depth in range(int(random.integers(3))):
                segments.append(value(f"p{depth}", f"{session % 8}.{depth}", 50))
            ask(d, session, *segments, value("q", f"q{number}", int(random.integers(1, 60))))
        else:
            dispatch = d.dispatches[int(random.integers(len(d.dispatches)))]
            d.first(dispatch)
            if random.random() < 0.7:
                d.finish(dispatch)
    assert not d.faults
    assert checked > 100
