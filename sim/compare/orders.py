"""The order of the choices under each condition, by each statistic: how alike the real and the simulated one are, and what it
costs to choose by simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sim.compare import statistics
from sim.compare.document import Choice, Pair, Ranking, number
from sim.compare.measured import MEASURES, Measure, Measured
from sim.compare.resampling import Bootstrap, interval
from sim.compare.statistics import Array


def rankings_of(measured: Sequence[Measured], bootstrap: Bootstrap) -> list[Ranking]:
    """Of every condition under which there is more than one choice."""
    by_condition: dict[str, list[Measured]] = {}
    for one in measured:
        by_condition.setdefault(one.cell.condition, []).append(one)
    return [
        ranking
        for condition, choices in by_condition.items()
        for column in range(len(MEASURES))
        if (ranking := _ranking(condition, choices, column, bootstrap)) is not None
    ]


def _ranking(condition: str, measured: Sequence[Measured], column: int, bootstrap: Bootstrap) -> Ranking | None:
    """None where fewer than two choices have this statistic on both sides."""
    chosen = [one for one in measured if np.isfinite(one.real[column]) and np.isfinite(one.simulated[column])]
    if len(chosen) < 2:
        return None
    measure = MEASURES[column]
    real, simulated = (np.array([getattr(one, side)[column] for one in chosen]) for side in ("real", "simulated"))
    order = np.argsort(-real if measure.higher_is_better else real, kind="stable")
    chosen, real, simulated = [chosen[i] for i in order], real[order], simulated[order]
    real_draws, simulated_draws = (
        np.stack([getattr(one, side)[:, column] for one in chosen], axis=1) for side in ("real_draws", "simulated_draws")
    )
    names = [one.cell.choice for one in chosen]
    pairs = [_pair(chosen, i, j, column) for i, j in statistics.pairs_of(len(chosen))]
    picked, best = (statistics.best_of(values, measure.higher_is_better) for values in (simulated, real))
    with np.errstate(all="ignore"):
        taus = statistics.kendall_taus(real_draws, simulated_draws)
        costs = statistics.regret(real_draws, simulated_draws, measure.higher_is_better)
    floor = _floor(chosen, column, measure.higher_is_better)
    return Ranking(
        condition=condition,
        metric=measure.metric,
        statistic=measure.statistic,
        choices=_choices(chosen, real, simulated, real_draws, measure, bootstrap),
        pairs=pairs,
        tau=number(statistics.kendall_tau(list(real), list(simulated))),
        tau_interval=interval(taus, bootstrap.confidence),
        clear_pairs=_clear_pairs(pairs),
        clear_tau=_clear_tau(real, simulated, pairs),
        floor_tau=number(floor.tau),
        picked=[name for name, is_picked in zip(names, picked, strict=True) if is_picked],
        best=[name for name, is_best in zip(names, best, strict=True) if is_best],
        agrees=float(best[picked].mean()),
        agrees_in_draws=number(_agreement(real_draws, simulated_draws, measure.higher_is_better)),
        picked_is_tied_with_best=_is_tied(picked, best, pairs, names),
        regret=number(statistics.regret(real, simulated, measure.higher_is_better)),
        regret_interval=interval(costs, bootstrap.confidence),
        floor_regret=number(floor.regret),
        regret_at_random=number(float(np.mean(statistics.regrets(real, measure.higher_is_better)))),
    )


def _choices(
    chosen: Sequence[Measured], real: Array, simulated: Array, draws: Array, measure: Measure, bootstrap: Bootstrap
) -> list[Choice]:
    ranks = [statistics.ranks(values, measure.higher_is_better) for values in (real, simulated)]
    return [
        Choice(
            one.cell.choice,
            float(real[i]),
            interval(draws[:, i], bootstrap.confidence),
            float(simulated[i]),
            float(ranks[0][i]),
            float(ranks[1][i]),
        )
        for i, one in enumerate(chosen)
    ]


def _pair(chosen: Sequence[Measured], i: int, j: int, column: int) -> Pair:
    a, b = chosen[i], chosen[j]
    real = float(a.real[column] - b.real[column])
    simulated = float(a.simulated[column] - b.simulated[column])
    varies = statistics.difference_spread(a.runs("real", column), b.runs("real", column))
    if math.isnan(varies) and a.resampled == b.resampled == "programs":
        varies = float(np.std(a.real_draws[:, column] - b.real_draws[:, column]))
    return Pair(
        a=a.cell.choice,
        b=b.cell.choice,
        real_difference=statistics.relative_error(a.real[column], b.real[column]),
        simulated_difference=statistics.relative_error(a.simulated[column], b.simulated[column]),
        tied=None if math.isnan(varies) else abs(real) <= varies,
        same_order=bool(np.sign(real) == np.sign(simulated)),
    )


def _clear_pairs(pairs: Sequence[Pair]) -> int | None:
    """How many are not tied; None where that is not known of one."""
    tied = [pair.tied for pair in pairs]
    return None if None in tied else tied.count(False)


def _clear_tau(real: Array, simulated: Array, pairs: Sequence[Pair]) -> float | None:
    tied = [pair.tied for pair in pairs if pair.tied is not None]
    return number(statistics.clear_tau(list(real), list(simulated), tied)) if len(tied) == len(pairs) else None


def _is_tied(picked: Any, best: Any, pairs: Sequence[Pair], names: Sequence[str]) -> bool | None:
    """Whether every choice that simulation puts first is the best one, or tied with it."""
    tied = {frozenset((pair.a, pair.b)): pair.tied for pair in pairs}
    first = names[int(np.argmax(best))]
    chosen = [name for name, is_picked, is_best in zip(names, picked, best, strict=True) if is_picked and not is_best]
    found = [tied[frozenset((name, first))] for name in chosen]
    return None if None in found and False not in found else all(found)


def _agreement(real: Array, simulated: Array, higher_is_better: bool) -> float:
    """The mean share, over draws, of what simulation puts first that is best."""
    whole = np.isfinite(real).all(axis=1) & np.isfinite(simulated).all(axis=1)
    if not whole.any():
        return math.nan
    picked, best = (statistics.best_of(values[whole], higher_is_better) for values in (simulated, real))
    return float(np.mean((picked & best).sum(axis=1) / picked.sum(axis=1)))


def _floor(chosen: Sequence[Measured], column: int, higher_is_better: bool) -> statistics.Floor:
    """Mean over seeds of the floor of each, where all choices have repeats of it."""
    floors = []
    for seed in sorted(set.intersection(*(set(one.cell.real) for one in chosen))):
        runs = [one.runs("real", column)[sorted(one.cell.real).index(seed)] for one in chosen]
        repeats = min(len(values) for values in runs)
        if repeats > 1:
            floors.append(statistics.floor_of_order(np.array([values[:repeats] for values in runs]).T, higher_is_better))
    if not floors:
        return statistics.Floor(math.nan, math.nan)
    return statistics.Floor(float(np.mean([f.tau for f in floors])), float(np.mean([f.regret for f in floors])))
