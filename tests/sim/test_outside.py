"""The farthest that engines of several runs went beyond their profiles."""

from __future__ import annotations

from sim.outside import farthest

RANGE = (10.0, 64.0)


def test_the_farthest_of_all_runs_is_named_for_each_profile_and_feature() -> None:
    runs = [{"b": {"rows": (72.0, *RANGE)}}, {}, {"b": {"rows": (70.0, *RANGE)}, "a": {"rows": (65.0, *RANGE)}}]
    assert farthest(runs) == [("a", "rows", (65.0, *RANGE)), ("b", "rows", (72.0, *RANGE))]


def test_what_lies_below_a_range_may_be_farther_than_what_lies_above_it() -> None:
    below, above = (1.0, *RANGE), (66.0, *RANGE)
    for runs in ([below, above], [above, below]):
        assert farthest({"p": {"rows": seen}} for seen in runs) == [("p", "rows", below)]
