"""The bootstrap behind every interval: what is drawn again, and the statistics of each draw.

With n units (seeds, repeats or programs) drawn from n with replacement, the plain percentile interval is too narrow when n is
small: it lacks Student's factor and √(n/(n − 1)). So each draw's deviation from the point estimate is widened, as a ratio:

    widened = point · (draw / point) ^ c,   c = t(n − 1) · √(n/(n − 1)) / z

with the quantiles of Student's and the normal distribution at the confidence that is asked for (n = 3: 2.69, n = 5: 1.58,
n = 30: 1.06, at 95 %). For the mean of normal values this is close to Student's interval, and unlike that it carries over to an
order of choices and its cost. Draws come from named streams of the seed, so that equal input gives equal intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from sim.compare.statistics import Array
from sim.workloads.arrivals import stream

PERCENTILES = (50, 90, 99)


class Bootstrap(NamedTuple):
    """How intervals are made: `draws` of each, under `seed`, at a two-sided `confidence`."""

    draws: int = 1000
    seed: int = 0
    confidence: float = 0.95

    def indices(self, name: str, units: int) -> npt.NDArray[np.int64]:
        """Units of each draw, shape (draws, units). The same name and number give the same draws, whoever asks: what shares
        its units (choices that ran the same seeds) shares its draws."""
        return stream(self.seed, f"{name}:{units}").integers(units, size=(self.draws, units))

    def counts(self, name: str, units: int) -> Iterator[npt.NDArray[np.int64]]:
        """Draw by draw, how often each unit was drawn; for many units."""
        generator = stream(self.seed, f"{name}:{units}")
        for _ in range(self.draws):
            yield np.bincount(generator.integers(units, size=units), minlength=units)


def widening(units: int, confidence: float) -> float:
    """The exponent c of the module's formula; 1 where nothing is drawn."""
    if units < 2:
        return 1.0
    upper = (1.0 + confidence) / 2.0
    return float(stats.t.ppf(upper, units - 1) * math.sqrt(units / (units - 1)) / stats.norm.ppf(upper))


def widened(point: Array, draws: Array, units: int, confidence: float) -> Array:
    """`draws` (draws, statistics) of `units` about `point` (statistics), their deviations widened. Positive values alone."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(point * (draws / point) ** widening(units, confidence))


def interval(draws: npt.ArrayLike, confidence: float) -> tuple[float, float] | None:
    """The percentile interval of what is finite in `draws`; None when that is nothing."""
    array = np.asarray(draws, dtype=float)
    array = array[np.isfinite(array)]
    if not len(array):
        return None
    low, high = np.quantile(array, ((1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0)).tolist()
    return low, high


# ----------------------------------------------------------------------------------------------- programs within a run


class Samples(NamedTuple):
    """The values of a metric in one run, sorted, and the program that each belongs to (0 … programs − 1)."""

    values: Array
    programs: npt.NDArray[np.int64]


def samples(values: npt.ArrayLike, programs: npt.ArrayLike) -> Samples:
    """Of values in any order; those that are NaN are left out."""
    given = np.asarray(values, dtype=float)
    owners = np.asarray(programs, dtype=np.int64)
    kept = np.isfinite(given)
    given, owners = given[kept], owners[kept]
    order = np.argsort(given, kind="stable")
    return Samples(given[order], owners[order])


def statistics_of(values: Array, weights: npt.NDArray[np.int64]) -> list[float]:
    """Mean, p50, p90, p99 of sorted `values`, each there `weights` times: numpy's, with linear interpolation."""
    reach = np.cumsum(weights)
    total = int(reach[-1]) if len(reach) else 0
    if total == 0:
        return [math.nan] * (1 + len(PERCENTILES))
    found = [float(values @ weights) / total]
    for percent in PERCENTILES:
        place = (total - 1) * (percent / 100.0)
        low = math.floor(place)
        below, above = np.searchsorted(reach, (low, min(low + 1, total - 1)), side="right")
        found.append(float(values[below] + (values[above] - values[below]) * (place - low)))
    return found


def program_draws(
    sides: Sequence[Mapping[str, Samples]], metrics: Sequence[str], programs: int, bootstrap: Bootstrap, name: str
) -> list[Array]:
    """Statistics of runs whose programs are drawn again, calls and tasks along with their program, the same programs on all
    sides: for each side, shape (draws, 4 · metrics), mean, p50, p90, p99 of each of `metrics`."""
    results = [np.empty((bootstrap.draws, (1 + len(PERCENTILES)) * len(metrics))) for _ in sides]
    for draw, counts in enumerate(bootstrap.counts(name, programs)):
        for side, result in zip(sides, results, strict=True):
            row: list[float] = []
            for metric in metrics:
                row += statistics_of(side[metric].values, counts[side[metric].programs])
            result[draw] = row
    return results
