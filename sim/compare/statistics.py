"""The statistics of a comparison, as functions of numbers: errors and the spread beside them, orders and what they cost.

Never reads a file or draws a random number (`resampling` does the latter). What is not defined (no run, a division by zero,
one choice) is NaN, which the document prints as null. Seconds or tokens per second in, ratios out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]

#: the values of one statistic in repeated runs: for each seed, a number a repeat
Runs = Sequence[Sequence[float]]

NAN = math.nan


def relative_error(simulated: Any, real: Any) -> Any:
    """simulated / real − 1, of numbers or arrays."""
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.asarray(simulated, dtype=float) / np.asarray(real, dtype=float) - 1.0
    error = np.where(np.isfinite(error), error, NAN)
    return error if error.ndim else float(error)


def mean_of_seeds(runs: Runs) -> float:
    """The mean over seeds of the mean over the repeats of a seed: what a cell of these runs is."""
    return float(np.mean([np.mean(repeats) for repeats in runs])) if runs else NAN


# ------------------------------------------------------------------------------------- the spread of repeated real runs


class Spread(NamedTuple):
    """`variation`: standard deviation / mean. over: "repeats" (of the same programs), "seeds" (other programs too), ""."""

    variation: float
    over: str


def spread(runs: Runs) -> Spread:
    """The coefficient of variation: between repeats of the same seed, pooled over seeds; else between seeds; else none."""
    mean = mean_of_seeds(runs)
    if not mean:
        return Spread(NAN, "")
    freedom = sum(len(repeats) - 1 for repeats in runs)
    if freedom > 0:
        squares = sum(float(np.sum((np.asarray(repeats) - np.mean(repeats)) ** 2)) for repeats in runs)
        return Spread(math.sqrt(squares / freedom) / mean, "repeats")
    if len(runs) > 1:
        return Spread(float(np.std([np.mean(repeats) for repeats in runs], ddof=1)) / mean, "seeds")
    return Spread(NAN, "")


def error_of_real_runs(runs: Runs) -> float:
    """The floor: mean |a/b − 1| over all ordered pairs of real runs of the same seed, one as the prediction of the other."""
    pairs = [abs(relative_error(a, b)) for repeats in runs for a, b in itertools.permutations(repeats, 2)]
    return float(np.mean(pairs)) if pairs else NAN


def error_against_real_runs(simulated: Sequence[float], runs: Runs) -> float:
    """Mean |simulated/b − 1| over all real runs b: the same for the simulation, whose value for each seed is given."""
    errors = [abs(relative_error(value, b)) for value, repeats in zip(simulated, runs, strict=True) for b in repeats]
    return float(np.mean(errors)) if errors else NAN


def difference_spread(a: Runs, b: Runs) -> float:
    """The standard deviation by which a difference of two choices, one run of each, varies from run to run.

    With several seeds, that of the seeds' differences, whose programs both choices shared; with one seed, √(s_a² + s_b²).
    """
    if len(a) > 1 and len(a) == len(b):
        differences = [np.mean(x) - np.mean(y) for x, y in zip(a, b, strict=True)]
        return float(np.std(differences, ddof=1))
    if len(a) == len(b) == 1 and min(len(a[0]), len(b[0])) > 1:
        return float(np.sqrt(np.var(a[0], ddof=1) + np.var(b[0], ddof=1)))
    return NAN


# -------------------------------------------------------------------------------------------------- errors by program


class ErrorSummary(NamedTuple):
    """Of relative errors: their mean with the sign, and the mean, median, p90 and p99 without it; how many lie within 10 %."""

    bias: float
    mean: float
    p50: float
    p90: float
    p99: float
    within_10_percent: float


def summary_of_errors(errors: npt.ArrayLike) -> ErrorSummary:
    """Of all that are numbers."""
    given = np.asarray(errors, dtype=float)
    given = given[np.isfinite(given)]
    if not len(given):
        return ErrorSummary(NAN, NAN, NAN, NAN, NAN, NAN)
    sizes = np.abs(given)
    p50, p90, p99 = np.percentile(sizes, (50, 90, 99)).tolist()
    return ErrorSummary(float(given.mean()), float(sizes.mean()), p50, p90, p99, float(np.mean(sizes <= 0.1)))


# ---------------------------------------------------------------------------------------------------- orders of choices


def kendall_tau(real: Sequence[float], simulated: Sequence[float]) -> float:
    """Kendall's τ-b of two orders of the same choices; NaN for fewer than two, or where one side has all alike."""
    if len(real) < 2:
        return NAN
    return float(stats.kendalltau(real, simulated).statistic)


def kendall_taus(real: Array, simulated: Array) -> Array:
    """τ-b of each row: arrays of shape (draws, choices). `kendall_tau`, for all draws at once."""
    first, second = _pairs(real.shape[1])
    a = np.sign(real[:, first] - real[:, second])
    b = np.sign(simulated[:, first] - simulated[:, second])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1)))


def clear_tau(real: Sequence[float], simulated: Sequence[float], tied: Sequence[bool]) -> float:
    """(agreeing − disagreeing) / pairs, over the pairs that the real runs tell apart. `tied`: one a pair, as in `pairs_of`."""
    signs = [
        float(np.sign(real[i] - real[j]) * np.sign(simulated[i] - simulated[j]))
        for (i, j), is_tied in zip(pairs_of(len(real)), tied, strict=True)
        if not is_tied
    ]
    return float(np.mean(signs)) if signs else NAN


def pairs_of(choices: int) -> list[tuple[int, int]]:
    """All pairs of choices, as numbers, the first below the second."""
    return list(itertools.combinations(range(choices), 2))


def _pairs(choices: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    first, second = np.triu_indices(choices, 1)
    return first, second


def best_of(values: npt.ArrayLike, higher_is_better: bool) -> npt.NDArray[np.bool_]:
    """Which are the best, along the last axis: more than one where they are exactly alike."""
    array = np.asarray(values, dtype=float)
    best = array.max(axis=-1, keepdims=True) if higher_is_better else array.min(axis=-1, keepdims=True)
    return np.asarray(array == best)


def ranks(values: npt.ArrayLike, higher_is_better: bool) -> Array:
    """From 1, the best; equal values share the mean of their ranks."""
    array = np.asarray(values, dtype=float)
    return np.asarray(stats.rankdata(-array if higher_is_better else array), dtype=float)


def regrets(real: npt.ArrayLike, higher_is_better: bool) -> Array:
    """What each choice costs: |real value − best real value| / best real value, along the last axis."""
    array = np.asarray(real, dtype=float)
    best = array.max(axis=-1, keepdims=True) if higher_is_better else array.min(axis=-1, keepdims=True)
    return np.asarray(np.abs(relative_error(array, best)))


def regret(real: npt.ArrayLike, chosen_by: npt.ArrayLike, higher_is_better: bool) -> Any:
    """What it costs to take the choice that `chosen_by` puts first, along the last axis; where it puts several first, exactly
    alike, the mean of theirs. Arrays of shape (choices) or (draws, choices)."""
    picked = best_of(chosen_by, higher_is_better)
    costs = (regrets(real, higher_is_better) * picked).sum(axis=-1) / picked.sum(axis=-1)
    return costs if costs.ndim else float(costs)


class Floor(NamedTuple):
    """How well one real run serves as the simulation: mean over the runs, each held against the mean of the others."""

    tau: float
    regret: float


def floor_of_order(repeats: Array, higher_is_better: bool) -> Floor:
    """`repeats`: shape (repeats, choices), real runs of the same programs. NaN for fewer than two repeats."""
    if len(repeats) < 2:
        return Floor(NAN, NAN)
    taus, costs = [], []
    for index in range(len(repeats)):
        others = np.delete(repeats, index, axis=0).mean(axis=0)
        taus.append(kendall_tau(list(others), list(repeats[index])))
        costs.append(regret(others, repeats[index], higher_is_better))
    return Floor(float(np.mean(taus)), float(np.mean(costs)))
