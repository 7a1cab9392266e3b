"""Derived tables against definitions written out the slow way, and figures of merit against cases worked by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.metrics import TaskRow
from sim.tables import engine_load, fairness, jain_index, knee, pareto_front, queue_over_time


def task_table(rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """A tasks table of which only the columns that matter are given."""
    plain: dict[str, object] = dict.fromkeys(TaskRow._fields, 0)
    plain |= {"state": "finished", "engine": "e0", "criteria": None}
    table = pd.DataFrame([{**plain, **row} for row in rows], columns=list(TaskRow._fields))
    stamps = [name for name in TaskRow._fields if name.endswith("_s")]
    return table.astype(dict.fromkeys(stamps, "float64") | {"engine": "string", "state": "string"})


def one_task(engine: str, ready: float, waits: list[float], cached: int, prompt: int, output: int) -> dict[str, object]:
    stamps = np.cumsum([ready, *waits]).tolist()
    names = ("ready_s", "dispatched_s", "started_s", "first_token_s", "finished_s")
    lengths = {"cached_tokens": cached, "prompt_tokens": cached + prompt, "output_tokens": output}
    return {"engine": engine, **dict(zip(names, stamps, strict=True)), **lengths}


TASKS = st.lists(
    st.builds(
        one_task,
        st.sampled_from(["e0", "e1", "e2"]),
        st.floats(0.0, 50.0),
        st.lists(st.sampled_from([0.0, 0.25, 1.0, 7.5]), min_size=4, max_size=4),
        st.integers(0, 50),
        st.integers(0, 500),
        st.integers(1, 300),
    ),
    min_size=1,
    max_size=12,
)


def overlap(begin: float, end: float, low: float, high: float) -> float:
    return max(0.0, min(end, high) - max(begin, low))


def held(row: pd.Series, at: float) -> float:
    """Tokens of a running task at a time, as `engine_load` says it."""
    if not row["started_s"] <= at < row["finished_s"]:
        return 0.0
    if at < row["first_token_s"]:
        return float(np.interp(at, [row["started_s"], row["first_token_s"]], [row["cached_tokens"], row["prompt_tokens"]]))
    grown = np.interp(at, [row["first_token_s"], row["finished_s"]], [0, row["output_tokens"]])
    return float(row["prompt_tokens"] + grown)


@settings(max_examples=30, deadline=None)
@given(TASKS, st.integers(1, 9))
def test_load_and_queue_are_the_averages_over_bins_of_what_each_task_did(rows: list[dict[str, object]], bins: int) -> None:
    tasks = task_table(rows)
    load, queue = engine_load(tasks, bins), queue_over_time(tasks, bins)
    assert load["engine"].drop_duplicates().tolist() == sorted(set(tasks["engine"]))
    for number, row in load.iterrows():
        low, high = row["time_s"], row["time_s"] + row["bin_s"]
        mine = tasks[tasks["engine"] == row["engine"]]
        waiting = sum(overlap(t["dispatched_s"], t["started_s"], low, high) for _, t in mine.iterrows())
        running = sum(overlap(t["started_s"], t["finished_s"], low, high) for _, t in mine.iterrows())
        assert row["waiting"] * row["bin_s"] == pytest.approx(waiting, abs=1e-4)
        assert row["running"] * row["bin_s"] == pytest.approx(running, abs=1e-4)
        if number < bins:
            queued = sum(overlap(t["ready_s"], t["dispatched_s"], low, high) for _, t in tasks.iterrows())
            assert queue["queued"][number] * row["bin_s"] == pytest.approx(queued, abs=1e-4)


def test_tokens_held_grow_from_cached_to_prompt_to_prompt_and_output() -> None:
    rows = [one_task("e0", 0.5, [0.5, 1.0, 3.0, 10.0], 20, 100, 60), one_task("e0", 2.0, [0.0, 0.0, 0.0, 4.0], 0, 64, 8)]
    tasks = task_table(rows)
    load = engine_load(tasks, bins=7)
    for _, row in load.iterrows():
        fine = row["time_s"] + (np.arange(400) + 0.5) / 400 * row["bin_s"]
        expected = np.mean([sum(held(task, at) for _, task in tasks.iterrows()) for at in fine])
        assert row["kv_tokens"] == pytest.approx(expected, rel=2e-2)


def test_a_task_without_an_end_counts_until_its_last_stamp_and_one_never_placed_on_no_engine() -> None:
    stamps = ("ready_s", "dispatched_s", "started_s", "first_token_s", "finished_s")
    stopped = dict(zip(stamps, (0.0, 1.0, 2.0, 4.0, None), strict=True)) | {"state": "running"}
    refused = dict(zip(stamps, (0.0, None, None, None, 8.0), strict=True)) | {"state": "failed", "engine": None}
    tasks = task_table([stopped, refused])
    load = engine_load(tasks, bins=8)
    assert load["running"].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert load["waiting"].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert queue_over_time(tasks, bins=8)["queued"].tolist() == [2, 1, 1, 1, 1, 1, 1, 1]


def test_without_tasks_the_tables_are_empty_or_zero() -> None:
    assert len(engine_load(task_table([]))) == 0
    assert not queue_over_time(task_table([]))["queued"].any()
    with pytest.raises(ValueError, match="bins 0"):
        engine_load(task_table([]), bins=0)


# ------------------------------------------------------------------------------------------------------ figures of merit


def test_jains_index_is_one_when_all_are_alike_and_one_nth_when_one_has_all() -> None:
    assert jain_index([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain_index([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain_index([0.0, 0.0]) is None


def tenants(*rows: tuple[str, float | None, int, int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Programs of one call each: (tenant, jct, prompt tokens, output tokens)."""
    programs = pd.DataFrame(
        {
            "program": range(len(rows)),
            "tenant": pd.Series([r[0] for r in rows], dtype="string"),
            "state": ["failed" if r[1] is None else "finished" for r in rows],
            "jct_s": pd.Series([r[1] for r in rows], dtype="float64"),
        }
    )
    calls = pd.DataFrame(
        {"program": range(len(rows)), "prompt_tokens": [r[2] for r in rows], "output_tokens": [r[3] for r in rows]}
    )
    return programs, calls


def test_fairness_compares_jct_by_output_token_and_tokens_served() -> None:
    found = fairness(*tenants(("a", 10.0, 90, 10), ("a", 30.0, 70, 30), ("b", 40.0, 80, 20)))
    assert found.tenants["tenant"].tolist() == ["a", "b"]
    assert found.tenants["service_tokens"].tolist() == [200, 100]
    assert found.tenants["jct_s"].tolist() == [20.0, 40.0]
    assert found.tenants["normalized_jct_s"].tolist() == [1.0, 2.0]
    assert (found.jct_ratio, found.service_ratio) == (2.0, 2.0)
    assert found.jct_index == pytest.approx(9 / (2 * 5))
    assert found.service_index == pytest.approx(300**2 / (2 * (200**2 + 100**2)))


def test_one_tenant_has_no_fairness_and_one_that_finished_nothing_hides_no_unfairness() -> None:
    assert fairness(*tenants(("", 10.0, 1, 1), ("", 20.0, 1, 1)))[1:] == (None, None, None, None)
    starved = fairness(*tenants(("a", 10.0, 90, 10), ("b", None, 0, 0)))
    assert (starved.jct_index, starved.jct_ratio) == (None, None)
    assert starved.service_index == pytest.approx(0.5)
    assert starved.service_ratio is None
    assert starved.tenants["finished"].tolist() == [1, 0]


def test_the_knee_is_where_latency_has_doubled_between_the_rates_around_it() -> None:
    assert knee([1, 2, 3, 4], [10.0, 12.0, 16.0, 32.0]) == pytest.approx(3.25)
    assert knee([4, 3, 2, 1], [32.0, 16.0, 12.0, 10.0]) == pytest.approx(3.25)
    assert knee([1, 2, 3], [10.0, float("nan"), 30.0]) == pytest.approx(2.0)
    assert knee([1, 2, 3], [10.0, 11.0, 12.0]) is None
    assert knee([1], [10.0]) is None


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_front_holds_exactly_the_points_that_no_other_beats(points: list[tuple[int, int]]) -> None:
    front = pareto_front([x for x, _ in points], [y for _, y in points])
    for (x, y), on_it in zip(points, front, strict=True):
        beaten = any((a >= x and b < y) or (a > x and b <= y) for a, b in points)
        assert on_it != beaten


def test_a_point_with_a_null_is_on_no_front() -> None:
    assert pareto_front([1.0, float("nan"), 2.0], [float("nan"), 1.0, 5.0]).tolist() == [False, False, True]
