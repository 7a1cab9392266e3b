"""The latency model: what each term adds, and that runs of iterations are their sums."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from parrot.latency import BatchShape, DecodeRun, FillGraph, FixedCost, Hinge, LatencyModel, LatencyProfile, seen_ranges

COUNTS = st.integers(0, 5000)
SHAPES = st.builds(BatchShape, st.integers(0, 64), st.integers(0, 8), COUNTS, COUNTS, COUNTS, COUNTS, st.booleans())


def profile(**changes: Any) -> LatencyProfile:
    usual: dict[str, Any] = {
        "name": "p", "model": "m", "device": "d", "attn_func": "a",
        "fixed": (FixedCost(16, 0.5), FixedCost(4, 0.25), FixedCost(4, 0.125, True)),
        "hinges": (Hinge(0, 0.001), Hinge(64, 0.01)), "pair_s": 1e-6, "kv_s": 1e-5,
    }  # fmt: skip
    return LatencyProfile(**(usual | changes))


def test_the_fixed_cost_is_that_of_the_smallest_bucket_that_holds_the_rows() -> None:
    model = LatencyModel(profile())
    assert [model.fixed_s(rows) for rows in (1, 4, 5, 16, 400)] == [0.25, 0.25, 0.5, 0.5, 0.5]
    assert model.fixed_s(3, graph=True) == 0.125


def test_hinges_let_tokens_below_their_knot_ride_free() -> None:
    model = LatencyModel(profile())
    assert model.tokens_s(64) == pytest.approx(0.064)
    assert model.tokens_s(74) == pytest.approx(0.074 + 0.1)


def test_a_shared_prefix_counts_once_where_it_is_read_once() -> None:
    shape = BatchShape(decode_rows=2, decode_kv=1000, decode_kv_unique=600)
    every, once = LatencyModel(profile()), LatencyModel(profile(shared_kv_once=True))
    assert every.duration(shape) - once.duration(shape) == pytest.approx(400e-5)


GRAPHS = (FillGraph(64, 2.0), FillGraph(128, 3.0))


def test_a_fill_replays_the_next_graph_and_computes_as_many_tokens_as_that() -> None:
    model = LatencyModel(profile(fill_graphs=GRAPHS, graph_pair_s=0.5))
    for tokens, seconds in ((1, 2.0), (64, 2.0), (65, 3.0), (128, 3.0)):
        shape = BatchShape(1, 1, tokens - 1, prefill_pairs=4, decode_kv=1000, decode_kv_unique=1000)
        assert model.duration(shape) == pytest.approx(seconds + 4 * 0.5 + 1000 * 1e-5)
    launched = BatchShape(0, 1, 129)
    assert model.duration(launched) == LatencyModel(profile()).duration(launched)
    decodes = BatchShape(decode_rows=4, decode_kv=100, decode_kv_unique=100)
    assert model.duration(decodes, graph=True) == LatencyModel(profile()).duration(decodes, graph=True)


def test_what_no_graph_holds_takes_several_where_nothing_is_launched_anew() -> None:
    model = LatencyModel(profile(fill_graphs=GRAPHS, fixed=(FixedCost(4, 0.125, True),)))
    assert [model.prefill_s(tokens) for tokens in (128, 256, 300)] == [3.0, 6.0, 8.0]
    assert model.duration(BatchShape(0, 1, 300)) == 8.0
    assert LatencyModel(profile()).prefill_s(64) == LatencyModel(profile()).tokens_s(64)


def test_an_iteration_that_shares_costs_the_kernel_that_does_it() -> None:
    alone, shared = (BatchShape(decode_rows=2, decode_kv=1000, decode_kv_unique=unique) for unique in (1000, 600))
    costs, free = LatencyModel(profile(sharing_s=0.25)), LatencyModel(profile())
    assert costs.duration(alone) == free.duration(alone)
    assert costs.duration(shared) == pytest.approx(free.duration(shared) + 0.25)


@given(SHAPES, SHAPES)
def test_more_work_never_takes_less_time(a: BatchShape, b: BatchShape) -> None:
    model = LatencyModel(profile(fixed=(FixedCost(16, 0.25), FixedCost(64, 0.5))))
    more = BatchShape(*(getattr(a, name) + getattr(b, name) for name in BatchShape.FIELDS[:-1]), a.graph)
    assert model.duration(more) >= model.duration(a) >= 0


@given(st.integers(1, 64), COUNTS, st.integers(1, 60))
def test_a_run_is_the_sum_of_its_iterations(rows: int, kv: int, k: int) -> None:
    model = LatencyModel(profile())
    shapes = [BatchShape(decode_rows=rows, decode_kv=kv + i * rows, decode_kv_unique=kv) for i in range(k)]
    run = model.decode_run(shapes[0])
    assert run.at(0) == 0
    assert run.at(k) == pytest.approx(sum(model.duration(shape) for shape in shapes))


@given(st.floats(1e-6, 1), st.floats(0, 1e-2), st.integers(1, 500))
def test_edges_do_not_go_back(first_s: float, growth_s: float, k: int) -> None:
    run = DecodeRun(first_s, growth_s)
    assert run.at(k) >= run.at(k - 1)


def test_a_profile_survives_its_file() -> None:
    before = profile(seen={"rows": (1.0, 8.0)}, error={"mean": 0.02})
    assert msgspec.json.decode(msgspec.json.encode(before), type=LatencyProfile) == before


@pytest.mark.parametrize("bad", [b'{"fixed":[]}', b'{"slope":-1,"knot":0}'])
def test_a_profile_that_is_none_is_refused(bad: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(bad, type=LatencyProfile if b"fixed" in bad else Hinge)


@given(st.lists(SHAPES, max_size=5))
def test_seen_ranges_hold_every_shape(shapes: list[BatchShape]) -> None:
    seen = seen_ranges(shapes)
    assert bool(seen) == bool(shapes)
    for shape in shapes:
        for name, (least, most) in seen.items():
            assert least <= getattr(shape, name) <= most


def test_a_token_that_is_read_again_costs_what_the_profile_says_or_what_reading_does() -> None:
    shape = BatchShape(decode_rows=4, decode_kv=1000, decode_kv_unique=400)
    seconds = [
        LatencyModel(profile(pair_s=0.0, kv_s=2.0, fixed=(), hinges=(), **changes)).duration(shape)
        for changes in ({}, {"shared_kv_once": True}, {"reread_s": 0.5}, {"reread_s": 0.5, "shared_kv_once": True})
    ]
    assert seconds == [2000.0, 800.0, 1100.0, 1100.0]
