"""Cells: what the runs that differ only in seed, repeat and draw say together, with the uncertainty of each number.

Decides the intervals, with confidence c (docs/sweeps.md derives them). Of a metric, y_s is its value under seed s, the mean
of the seed's repeats; a percentile's is the percentile of each run.

    confidence interval   of the mean over S ≥ 2 seeds:  ȳ ± t(S − 1) · sd(y_s) / √S;  of one seed over its repeats, likewise
    prediction interval   of one run more, from D draws of the profiles' spread under each of S seeds: with V the variance of
                          the seeds' means and W the pooled variance of the draws within a seed,
                          ȳ ± √(t(S − 1)² V (1 + 1/S) + t(S (D − 1))² W (1 − 1/D));
                          of one seed alone ȳ ± t(D − 1) · √(W (1 + 1/D)); on logarithms when every value is above 0

Half widths are added by their squares (Howe 1974), which covers at least as often as promised. One quantile of Welch's and
Satterthwaite's degrees of freedom for both does not: of two seeds whose means happen to lie close it is far too small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from scipy.special import stdtrit  # scipy.stats takes as long to import as a small sweep

from sim.metrics import METRICS, Summary, metrics_of
from sim.spec import Run, cell_of

Interval = tuple[float, float]


class Estimate(msgspec.Struct, frozen=True):
    """A metric of a cell. Null where the runs have no such value, or too few of them for an interval."""

    mean: float | None
    confidence_interval: Interval | None
    prediction_interval: Interval | None


class Cell(msgspec.Struct, frozen=True, kw_only=True, tag="cell", tag_field="kind"):
    """Runs alike but for seed, repeat and draw. runs: without draws. over: what the confidence intervals are over; null for a
    single run, and for simulations that all came to the same numbers, which are one run."""

    policy: str
    workload: str
    cluster: tuple[str, ...]
    engines: int
    rate: float | None
    clients: int | None
    arrivals: str | None
    client: str
    backend: str
    rtt_ms: float | str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    runs: int
    draws: int
    over: Literal["seeds", "repeats"] | None
    confidence: float
    metrics: dict[str, Estimate]


def cells_of(results: Iterable[tuple[Run, Summary]], confidence: float) -> list[Cell]:
    """The cells of a sweep, in the order of their first runs."""
    groups: dict[bytes, list[tuple[Run, Summary]]] = {}
    for run, summary in results:
        groups.setdefault(msgspec.json.encode(cell_of(run)), []).append((run, summary))
    return [_cell(group, confidence) for group in groups.values()]


def _cell(group: Sequence[tuple[Run, Summary]], confidence: float) -> Cell:
    first = group[0][1]
    plain: dict[int, list[dict[str, float | None]]] = {}
    drawn: dict[int, list[dict[str, float | None]]] = {}
    for run, summary in group:
        if run.draw is not None:
            drawn.setdefault(run.seed, []).append(metrics_of(summary))
        elif run.backend != "sim" or run.seed not in plain:  # a simulation of the same seed is the same run
            plain.setdefault(run.seed, []).append(metrics_of(summary))
    over: Literal["seeds", "repeats"] | None = None
    seeds = tuple(sorted(plain))
    if len(plain) > 1 and first.backend == "sim" and _alike(plain.values()):
        plain = {seeds[0]: plain[seeds[0]]}  # without chance in it, every seed is the same run
    elif len(plain) > 1:
        over = "seeds"
    elif any(len(repeats) > 1 for repeats in plain.values()):
        over = "repeats"
    return Cell(
        **{name: getattr(first, name) for name in Cell.__struct_fields__ if name in Summary.__struct_fields__},
        seeds=seeds,
        runs=sum(run.draw is None for run, _ in group),
        draws=sum(run.draw is not None for run, _ in group),
        over=over,
        confidence=confidence,
        metrics={name: _estimate(_values(plain, name), _values(drawn, name), confidence) for name in METRICS},
    )


def _alike(seeds: Iterable[list[dict[str, float | None]]]) -> bool:
    """Whether every run came to the same numbers, as of a recorded trace under a policy without chance."""
    first, *others = (metrics for repeats in seeds for metrics in repeats)
    return all(metrics == first for metrics in others)


def _values(runs: dict[int, list[dict[str, float | None]]], metric: str) -> list[list[float]]:
    """The metric's values, a list a seed, without the runs that have none."""
    found = [[value for run in repeats if (value := run[metric]) is not None] for repeats in runs.values()]
    return [values for values in found if values]


def _estimate(plain: list[list[float]], drawn: list[list[float]], confidence: float) -> Estimate:
    if not plain:
        return Estimate(None, None, None)
    means = [float(np.mean(values)) for values in plain]
    return Estimate(float(np.mean(means)), confidence_interval(plain, confidence), prediction_interval(drawn, confidence))


def confidence_interval(seeds: Sequence[Sequence[float]], confidence: float) -> Interval | None:
    """Of the mean of a metric, from its values: a list of repeats for each seed. None with a single value."""
    values = np.array([np.mean(repeats) for repeats in seeds]) if len(seeds) > 1 else np.array(seeds[0] if seeds else [])
    if len(values) < 2:
        return None
    half = _quantile(confidence, len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) - half, float(values.mean()) + half


def prediction_interval(seeds: Sequence[Sequence[float]], confidence: float) -> Interval | None:
    """Of a metric in one run more, from its values: a list of draws for each seed. None unless a seed has two draws."""
    if not seeds or min(len(draws) for draws in seeds) < 2:
        return None
    logarithmic = min(min(draws) for draws in seeds) > 0.0
    rows = [np.log(draws) if logarithmic else np.asarray(draws, dtype=float) for draws in seeds]
    means = np.array([row.mean() for row in rows])
    freedom_within = sum(len(row) - 1 for row in rows)
    within = sum(float(((row - row.mean()) ** 2).sum()) for row in rows) / freedom_within
    number, draws = len(rows), len(rows) / sum(1 / len(row) for row in rows)
    if number == 1:
        terms = [(within * (1 + 1 / draws), freedom_within)]
    else:
        between = float(means.var(ddof=1))
        terms = [(between * (1 + 1 / number), number - 1), (within * (1 - 1 / draws), freedom_within)]
    half = math.sqrt(sum(_quantile(confidence, freedom) ** 2 * part for part, freedom in terms))
    low, high = float(means.mean()) - half, float(means.mean()) + half
    return (math.exp(low), math.exp(high)) if logarithmic else (low, high)


def _quantile(confidence: float, freedom: float) -> float:
    return float(stdtrit(freedom, (1 + confidence) / 2))
