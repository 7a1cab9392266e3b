"""Invariant 10: an emulated engine that jumps gives the events of one that steps, at the same times, to the last bit."""

from __future__ import annotations

from typing import Any, NamedTuple

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings

from parrot.engine.core import EngineLimits, EngineTask, Link
from parrot.engine.emulated.engine import EmulatedEngine, EmulatedEvent, Iterations
from parrot.latency import FixedCost, Hinge, LatencyModel, LatencyProfile

LIMITS = st.builds(
    EngineLimits,
    num_blocks=st.integers(6, 40),
    block_size=st.sampled_from([1, 2, 4, 16]),
    max_batch_size=st.integers(1, 6),
    max_num_batched_tokens=st.integers(2, 40),
    max_total_tokens=st.integers(12, 200),
    tasks_capacity=st.integers(2, 10),
    max_seq_len=st.integers(16, 200),
    fill_chunk_size=st.sampled_from([-1, 1, 5]),
    pipeline_depth=st.integers(0, 2),
)
# Costs in eighths of a second make edges and arrivals fall together; the other ones round in every sum.
SECONDS = st.sampled_from([0.0, 0.125, 0.25, 0.1, 0.3, 1 / 3, 0.017])


def model(fixed: float, graph: float, slope: float, pair: float, kv: float, overhead: float, shared: bool) -> LatencyModel:
    costs = (FixedCost(2, fixed), FixedCost(99, 2 * fixed), FixedCost(2, graph, True))
    profile = LatencyProfile(
        name="test", model="m", device="d", attn_func="a", fixed=costs, hinges=(Hinge(0, slope),), pair_s=pair / 64,
        kv_s=kv / 8, shared_kv_once=shared, task_overhead_s=overhead,
    )  # fmt: skip
    return LatencyModel(profile)


MODELS = st.builds(model, SECONDS, SECONDS, SECONDS, SECONDS, SECONDS, st.sampled_from([0.0, 0.0, 0.5, 0.3]), st.booleans())


class Op(NamedTuple):
    """Something that a script does `gap` seconds after what came before it."""

    gap: float
    kind: str
    what: int
    sizes: tuple[int, ...]
    output: int
    most: int


OPS = st.lists(
    st.builds(
        Op,
        gap=st.one_of(st.sampled_from([0.0, 0.125, 0.25, 1.0, 2.5, 7.0]), st.floats(0, 6)),
        kind=st.sampled_from(["submit", "submit", "submit", "submit", "stream", "fill", "abort", "free"]),
        what=st.integers(0, 12),
        sizes=st.lists(st.integers(0, 14), max_size=3).map(tuple),
        output=st.integers(1, 40),
        most=st.integers(1, 40),
    ),
    max_size=24,
)


def play(engine: EmulatedEngine, ops: list[Op]) -> tuple[list[EmulatedEvent], list[Any]]:
    """Runs a script; what the engine told, and what else could be seen of it."""
    told: list[EmulatedEvent] = []
    seen: list[Any] = []
    chains: list[tuple[Link, ...]] = [()]
    now, next_id = 0.0, 1
    for number, op in enumerate(ops):
        now += op.gap
        while (edge := engine.next_edge()) is not None and edge < now:
            told += engine.advance(edge)
        if op.kind in ("submit", "stream", "fill"):
            base = chains[op.what % len(chains)]
            links = (*base, *(Link(next_id + i, size) for i, size in enumerate(op.sizes)))
            next_id += len(op.sizes) + 1
            output = None if op.kind == "fill" else next_id - 1
            engine.submit(EngineTask(number, links, output, op.most), op.output, now, stream=op.kind == "stream")
            chains.append(links)
        elif op.kind == "abort":
            seen.append(engine.abort(op.what, now))
        else:
            seen.append(engine.free_contexts([link.context_id for link in chains[op.what % len(chains)]], now))
        seen.append(engine.generated(op.what, now))
    for _ in range(20000):
        if (edge := engine.next_edge()) is None:
            break
        told += engine.advance(edge)
    assert engine.next_edge() is None, "the engine does not come to rest"
    core = engine.core
    assert not core.has_work
    seen.append((core.pool.free, core.cached_tokens, core.take_evicted()))
    return told, seen


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LIMITS, MODELS, OPS)
def test_jumping_equals_stepping(limits: EngineLimits, latency: LatencyModel, ops: list[Op]) -> None:
    jumped: list[Iterations] = []
    stepped: list[Iterations] = []
    jump = play(EmulatedEngine(limits, latency, jump=True, observe=jumped.append), ops)
    step = play(EmulatedEngine(limits, latency, jump=False, observe=stepped.append), ops)
    assert jump == step
    assert sum(run.iterations for run in jumped) == len(stepped)
    assert {run.end for run in jumped} <= {run.end for run in stepped}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LIMITS, MODELS, OPS)
def test_every_task_is_told_in_order_and_ends_once(limits: EngineLimits, latency: LatencyModel, ops: list[Op]) -> None:
    told, _ = play(EmulatedEngine(limits, latency), ops)
    assert [event.at for event in told] == sorted(event.at for event in told)
    lives: dict[Any, list[EmulatedEvent]] = {}
    for event in told:
        lives.setdefault(event.key, []).append(event)
    aborted = {op.what for op in ops if op.kind == "abort"}
    for number, op in enumerate(ops):
        if op.kind not in ("submit", "stream", "fill") or number in aborted:
            continue
        *before, last = lives[number]
        kinds = [event.kind for event in before if event.kind != "progressed"]
        if last.kind == "finished":
            assert kinds == (["started"] if op.kind == "fill" else ["started", "first_token"])
            room = limits.largest_task - last.prompt_tokens
            assert last.output_tokens == (0 if op.kind == "fill" else min(op.output, op.most, room))
            assert last.cached_tokens == before[0].cached_tokens < last.prompt_tokens
            assert 0 <= last.max_gap_s <= last.decode_s + 1e-9
            if op.kind == "stream":
                assert sum(event.tokens for event in before) == last.output_tokens
        else:
            assert last.kind in ("rejected", "failed")
            assert last.code in ("engine_rejected", "task_too_large", "bad_request", "conflict")
