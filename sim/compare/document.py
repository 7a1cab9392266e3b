"""The document that `python -m sim.compare` prints, as data.

What is not defined is null: an interval where nothing can be drawn again, a spread without repeats.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from sim.compare.matching import Unmatched

Interval = tuple[float, float] | None


class Side(msgspec.Struct, frozen=True):
    """One of the two folders. runs: those that are in a matched cell."""

    folder: str
    backend: str
    runs: int


class ErrorRow(msgspec.Struct, frozen=True, kw_only=True):
    """A statistic of a metric in a cell. real, simulated: means over runs, in seconds, or per second.

    error: simulated/real − 1. real_spread: coefficient of variation of real runs, over repeats or seeds (spread_over).
    off_one_run: mean |simulated/x − 1| over real runs x; floor: the same of one real run as the prediction of another of its
    seed. few: too few programs for this percentile. predicted: the simulation's prediction interval, with --intervals.
    """

    metric: str
    statistic: str
    real: float | None
    simulated: float | None
    error: float | None
    error_interval: Interval
    real_spread: float | None
    spread_over: str
    off_one_run: float | None
    floor: float | None
    few: bool
    predicted: Interval
    real_is_predicted: bool | None


class ProgramErrors(msgspec.Struct, frozen=True, kw_only=True):
    """Relative errors of single programs' JCT against each real run of them: mean with its sign, and of the sizes. floor: sizes
    of the errors of one real run as the prediction of another. `application` null: all together."""

    application: str | None
    programs: int
    bias: float | None
    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    within_10_percent: float | None
    floor_mean: float | None
    floor_p90: float | None


class CellComparison(msgspec.Struct, frozen=True, kw_only=True):
    """A cell that both sides ran. programs: that finished in a real run, the least; failed: in all runs. resampled: what
    intervals draw again. program_errors: empty unless both sides ran the same programs and kept their tables; left_out: those
    programs of such runs that did not finish on both sides."""

    choice: str
    condition: str
    cell: dict[str, Any]
    paired: bool
    seeds: list[int]
    left_over_seeds: dict[str, list[int]]
    real_runs: int
    simulated_runs: int
    programs: int
    failed_real: int
    failed_simulated: int
    resampled: str | None
    errors: list[ErrorRow]
    program_errors: list[ProgramErrors]
    left_out: int


class Overall(msgspec.Struct, frozen=True, kw_only=True):
    """A statistic over all cells: sizes of the errors, and in how many cells the error's interval contains 0 (of those that
    have one)."""

    metric: str
    statistic: str
    cells: int
    mean_error: float | None
    worst_error: float | None
    worst_in: str | None
    mean_floor: float | None
    with_interval: int
    interval_contains_0: int
    predicted: int | None


class Choice(msgspec.Struct, frozen=True):
    """Ranks count from 1, the best; equal values share the mean of their ranks."""

    choice: str
    real: float
    real_interval: Interval
    simulated: float
    real_rank: float
    simulated_rank: float


class Pair(msgspec.Struct, frozen=True):
    """Differences are a/b − 1. tied: the real difference is within the spread of real runs; null: that is not known."""

    a: str
    b: str
    real_difference: float
    simulated_difference: float
    tied: bool | None
    same_order: bool


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """The choices under one condition by one statistic, in their real order. The floors are of one real run in the simulation's
    place.

    picked: what simulation puts first; best: what reality does. regret: what picking it costs, over the best. agrees: the share
    of `picked` that is best. regret_at_random: the mean cost of all choices. clear_pairs: not tied; clear_tau: over these.
    """

    condition: str
    metric: str
    statistic: str
    choices: list[Choice]
    pairs: list[Pair]
    tau: float | None
    tau_interval: Interval
    clear_pairs: int | None
    clear_tau: float | None
    floor_tau: float | None
    picked: list[str]
    best: list[str]
    agrees: float
    agrees_in_draws: float | None
    picked_is_tied_with_best: bool | None
    regret: float | None
    regret_interval: Interval
    floor_regret: float | None
    regret_at_random: float | None


class Comparison(msgspec.Struct, frozen=True, kw_only=True, tag="comparison", tag_field="kind"):
    """What `python -m sim.compare` prints."""

    real: Side
    simulated: Side
    confidence: float
    draws: int
    seed: int
    warnings: list[str]
    unmatched: list[Unmatched]
    overall: list[Overall]
    cells: list[CellComparison]
    rankings: list[Ranking]


def encode(document: Comparison) -> str:
    """The document as one line of JSON."""
    return msgspec.json.encode(document).decode()


def number(value: float) -> float | None:
    """None for what is no number."""
    return value if math.isfinite(value) else None
