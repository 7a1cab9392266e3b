"""The fit: non-negative least squares on relative errors, and what the fitted profile is worth.

Rows are weighted by 1/duration, first the measured one, then the fitted one, because the measured one alone pulls the fit
below the mean of iterations that are noisy; one that is far off (its end was seen late: requests came in a burst) counts less.
Reads no files and chooses no runs.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from parrot.engine.profiles import AnyProfile
from parrot.latency import BatchShape, FillGraph, FixedCost, Hinge, LatencyModel, LatencyProfile, seen_ranges
from sim.calibrate.logs import CalibrationError, Header, Iteration, Run
from sim.calibrate.split import HOLD_OUT, folds, levels, not_apart, tails

Array = NDArray[np.float64]

KNOTS = (0, 16, 64, 256, 512, 1024, 2048, 4096)
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LEAST_ITERATIONS = 40  #: of a fit: fewer cannot tell the coefficients apart
LEAST_IN_BUCKET = 10  #: iterations above a knot or in a batch-size bucket, for it to get a coefficient of its own
#: An iteration that takes so many times what the fit says, and the median, is a machine that stood still; one that takes less
#: than this part of what the fit says, one whose beginning was seen late.
STALL = 10.0
#: An iteration that is further off than so many times the median one, and than this part of what the fit says, pulls no harder
#: (Huber's loss).
FAR_OFF, LEAST_FAR_OFF = 5.0, 0.1
PASSES = 4
MOST_STALLS = 0.01  #: part of all iterations; with more, the machine was not the engine's own


def fit(
    runs: Sequence[Run],
    name: str,
    *,
    held: Sequence[Run] = (),
    trace: str = "",
    knots: Sequence[int] = KNOTS,
    shared_kv_once: bool = False,
) -> LatencyProfile:
    """The profile that fits `runs` best; its error is that on `held`, runs that are not among them.

    Without `held` the last fifth of each run is not fitted and tells an error, which the profile marks as one at loads that
    were fitted (`error["runs"]` is 0). Raises CalibrationError when there are too few iterations.
    """
    where = trace or "the logs"
    if held and not any(run.iterations for run in runs):
        raise CalibrationError(f"{where}: every run is held out: none is left to fit")
    runs, held, stalls = without_stalls(runs, held, knots=knots, shared_kv_once=shared_kv_once, where=where)
    if held:
        fitted, apart = _iterations(runs), _iterations(held)
        if not apart:
            raise CalibrationError(f"{', '.join(run.name for run in held)}: held out, but without a single iteration")
    else:
        fitted, apart = tails(runs)
    everything = [*runs, *held]
    if len(fitted) < LEAST_ITERATIONS:
        raise CalibrationError(
            f"{where}: {len(fitted)} iterations to fit ({len(apart)} are held out); at least {LEAST_ITERATIONS} are needed"
        )
    overheads = [task.overhead_s for run in runs for task in run.tasks]
    profile = _solved(
        fitted,
        knots,
        shared_kv_once,
        name=name,
        header=everything[0].header,
        trace=trace,
        seen=seen_ranges([iteration.shape for iteration in fitted]),
        task_overhead_s=float(np.mean(overheads)) if overheads else 0.0,
    )
    ratios = _cross_validated(everything, knots, shared_kv_once)
    return msgspec.structs.replace(
        profile,
        spread=float(np.sqrt(np.mean(np.square(ratios)))) if len(ratios) else 0.0,
        error=_error(profile, apart, held),
        notes=_notes(runs, held, fitted, apart, len(ratios), stalls),
    )


def _iterations(runs: Sequence[Run]) -> list[Iteration]:
    return list(itertools.chain.from_iterable(run.iterations for run in runs))


def without_stalls(
    runs: Sequence[Run], held: Sequence[Run], *, knots: Sequence[int] = KNOTS, shared_kv_once: bool = False, where: str = ""
) -> tuple[list[Run], list[Run], int]:
    """The runs without iterations in which the machine stood still (suspended, swapping) and those of next to no time, whose
    beginning was seen together with their end; and how many those were. One of them can outweigh all others of its batch size,
    or of its run. Raises CalibrationError when they are many."""
    fitted, apart, count = list(runs), list(held), 0
    while len(iterations := _iterations(fitted)) >= LEAST_ITERATIONS:
        model = LatencyModel(_solved(iterations, knots, shared_kv_once, header=fitted[0].header, name="steady"))
        usual_s = float(np.median([i.duration_s for i in iterations]))  # a fit that is bent may say 0
        judged = [(i, model.duration(i.shape)) for i in _iterations([*fitted, *apart])]
        ratios = {id(i): i.duration_s / max(told_s, usual_s) for i, told_s in judged}
        limit = max(STALL, max(ratios.values()) / 3)  # the worst first: they bend the fit that judges the others
        found = {key for key, ratio in ratios.items() if ratio > limit}
        found = found or {id(i) for i, told_s in judged if STALL * i.duration_s < told_s}
        if not found:
            break
        count += len(found)
        for part in (fitted, apart):
            for place, run in enumerate(part):
                steady = [i for i in run.iterations if id(i) not in found]
                part[place] = msgspec.structs.replace(run, iterations=steady)
    total = sum(len(run.iterations) for run in (*runs, *held))
    if count > max(1, MOST_STALLS * total):
        raise CalibrationError(
            f"{where}: {count} of {total} iterations took more than {STALL:g} times what the others say, or less than "
            f"1/{STALL:g} of it: the machine was busy with something else; record the logs on a quiet one"
        )
    return fitted, apart, count


def _solved(
    iterations: Sequence[Iteration], knots: Sequence[int], shared_kv_once: bool, *, header: Header, **fields: Any
) -> LatencyProfile:
    shapes = [iteration.shape for iteration in iterations]
    terms = _Terms(shapes, knots, shared_kv_once, header.fill_graphs)
    coefficients = _solve(terms.columns(shapes), np.array([iteration.duration_s for iteration in iterations]))
    return terms.profile(coefficients, header=header, **fields)


def _cross_validated(runs: Sequence[Run], knots: Sequence[int], shared_kv_once: bool) -> list[float]:
    """log(measured / predicted) of the total time of every run (or block), by a fit that has not seen its load."""
    parts = folds(runs)
    ratios = []
    for number, fold in enumerate(parts):
        others = [i for k, other in enumerate(parts) if k != number for member in other for i in member]
        if len(others) < LEAST_ITERATIONS:
            continue
        model = LatencyModel(_solved(others, knots, shared_kv_once, header=runs[0].header, name="fold"))
        for member in fold:
            predicted = sum(model.duration(iteration.shape) for iteration in member)
            if predicted > 0:
                ratios.append(float(np.log(sum(iteration.duration_s for iteration in member) / predicted)))
    return ratios


def predictions(profile: LatencyProfile, iterations: Sequence[Iteration]) -> tuple[Array, Array]:
    """Predicted and measured seconds of each iteration."""
    model = LatencyModel(profile)
    predicted = np.array([model.duration(iteration.shape) for iteration in iterations])
    return predicted, np.array([iteration.duration_s for iteration in iterations])


class _Terms:
    """Which coefficients the model gets from these shapes, and what each of them is multiplied with."""

    def __init__(
        self, shapes: Sequence[BatchShape], knots: Sequence[int], shared_kv_once: bool, fill_graphs: Sequence[int] = ()
    ) -> None:
        self.largest_fill_graph = max(fill_graphs, default=-1)
        replayed = self._fill_replays(shapes)
        rest = [s for s, replays in zip(shapes, replayed, strict=True) if not replays]
        self.fill_graphs = _buckets([s.tokens for s, replays in zip(shapes, replayed, strict=True) if replays], fill_graphs)
        if self.fill_graphs:  # what is above the largest that occurs costs what that does, but replays too
            self.fill_graphs[-1] = self.largest_fill_graph
        tokens = np.array([s.tokens for s in rest])
        self.knots = [k for k in sorted(set(knots)) if k == 0 or int((tokens > k).sum()) >= LEAST_IN_BUCKET]
        self.buckets = {graph: _buckets([s.rows for s in rest if s.graph is graph]) for graph in (False, True)}
        self.shared_kv_once = shared_kv_once
        # With sharing in the logs, what reading a token again costs is measured and need not be said.
        self.rereads = sum(s.decode_kv > s.decode_kv_unique for s in shapes) >= LEAST_IN_BUCKET

    def _fill_replays(self, shapes: Sequence[BatchShape]) -> NDArray[np.bool_]:
        """Which of them replay a graph of iterations with prefill."""
        return np.array([s.prefill_rows > 0 and s.tokens <= self.largest_fill_graph for s in shapes], dtype=bool)

    def columns(self, shapes: Sequence[BatchShape]) -> Array:
        """One row a shape. A bucket's column is 1 for all larger ones of its path too: its coefficient is what it adds to
        the bucket below, so that a larger batch never gets a smaller fixed cost."""
        rows = np.array([s.rows for s in shapes])
        tokens = np.array([s.tokens for s in shapes], dtype=float)
        pairs = np.array([s.prefill_pairs for s in shapes], dtype=float)
        graph = np.array([s.graph for s in shapes])
        replayed = self._fill_replays(shapes)
        columns = []
        for path, buckets in self.buckets.items():
            for below in [0, *buckets[:-1]] if buckets else []:
                columns.append(((rows > below) & (graph == path) & ~replayed).astype(float))
        columns += [np.where(replayed, 0.0, np.maximum(0.0, tokens - knot)) for knot in self.knots]
        columns.append(np.where(replayed, 0.0, pairs))
        if self.fill_graphs:
            columns += [(replayed & (tokens > below)).astype(float) for below in [0, *self.fill_graphs[:-1]]]
            columns.append(np.where(replayed, pairs, 0.0))
        once = self.shared_kv_once or self.rereads
        columns.append(np.array([s.decode_kv_unique if once else s.decode_kv for s in shapes], dtype=float))
        if self.rereads:
            again = np.array([s.decode_kv - s.decode_kv_unique for s in shapes], dtype=float)
            columns.append(again)
            if self.shared_kv_once:
                columns.append((again > 0).astype(float))
        return np.column_stack(columns)

    def profile(self, coefficients: Array, *, header: Header, **fields: Any) -> LatencyProfile:
        values = iter(coefficients.tolist())
        fixed = []
        for path, buckets in self.buckets.items():
            seconds = 0.0
            for max_rows in buckets:
                seconds += next(values)
                fixed.append(FixedCost(max_rows, seconds, path))
        hinges = tuple(Hinge(knot, next(values)) for knot in self.knots)
        pair_s = next(values)
        fill_graphs, seconds = [], 0.0
        for tokens in self.fill_graphs:
            seconds += next(values)
            fill_graphs.append(FillGraph(tokens, seconds))
        return LatencyProfile(
            model=header.model,
            device=header.device,
            attn_func=header.attn_func,
            fixed=tuple(fixed),
            hinges=tuple(hinge for hinge in hinges if hinge.slope > 0),
            pair_s=pair_s,
            fill_graphs=tuple(fill_graphs),
            graph_pair_s=next(values) if fill_graphs else 0.0,
            kv_s=next(values),
            reread_s=next(values) if self.rereads else None,
            sharing_s=next(values) if self.rereads and self.shared_kv_once else 0.0,
            shared_kv_once=self.shared_kv_once,
            versions=header.versions,
            **fields,
        )


def _buckets(rows: Sequence[int], bounds: Sequence[int] = BUCKETS) -> list[int]:
    """Upper bounds of the batch sizes that occur often enough; a rare one shares the bucket of the next."""
    found, below = [], 0
    for bound in bounds:
        inside = sum(below < r <= bound for r in rows)
        if inside >= LEAST_IN_BUCKET:
            found.append(bound)
            below = bound
    if rows and (not found or max(rows) > found[-1]):
        top = next((b for b in bounds if b >= max(rows)), max(rows))
        found = [*found[:-1], top]
    return found


def _solve(columns: Array, measured: Array) -> Array:
    weights = 1.0 / measured
    coefficients: Array = np.zeros(columns.shape[1])
    for _ in range(PASSES):
        weighted = columns * weights[:, None]
        scale = np.linalg.norm(weighted, axis=0)
        scale[scale == 0] = 1.0  # a column of zeros keeps the coefficient 0
        coefficients = nnls(weighted / scale, measured * weights)[0] / scale
        predicted = np.maximum(columns @ coefficients, 1e-9)
        off = np.abs(measured / predicted - 1.0)
        limit = max(LEAST_FAR_OFF, FAR_OFF * float(np.median(off)))
        weights = np.sqrt(limit / np.maximum(off, limit)) / predicted
    return coefficients


def error_on(profile: LatencyProfile, runs: Sequence[Run]) -> dict[str, float]:
    """What the profile is worth on runs that it was not fitted to: `LatencyProfile.error` as docs/calibration.md has it. Raises
    CalibrationError when the machine stood still too often."""
    steady, _, _ = without_stalls(runs, (), shared_kv_once=profile.shared_kv_once, where="the logs")
    return _error(profile, _iterations(steady), steady)


def _error(profile: LatencyProfile, apart: Sequence[Iteration], held: Sequence[Run]) -> dict[str, float]:
    if not apart:
        return {}
    predicted, measured = predictions(profile, apart)
    relative = np.abs(predicted / measured - 1.0)
    error = {
        "mean": float(relative.mean()),
        "p99": float(np.percentile(relative, 99)),
        "total": float(predicted.sum() / measured.sum() - 1.0),
        "iterations": float(len(apart)),
        "runs": float(len(held)),
    }
    for run in held:
        if run.iterations:
            predicted, measured = predictions(profile, run.iterations)
            error[f"total of {run.name}"] = float(predicted.sum() / measured.sum() - 1.0)
    return error


def _notes(
    runs: Sequence[Run],
    held: Sequence[Run],
    fitted: Sequence[Iteration],
    apart: Sequence[Iteration],
    ratios: int,
    stalls: int,
) -> str:
    header = runs[0].header
    threads = f", {header.num_threads} thread(s)" if header.num_threads else ""
    dummy = ", dummy weights" if header.dummy_weights else ""
    notes = f"{header.engine_type} engine, {header.dtype or 'dtype unknown'}{threads}{dummy}. "
    notes += f"Fitted to {len(fitted)} iterations of {len(runs)} run(s), mean rows {_loads(runs)}. "
    if held:
        notes += (
            f"Held out: {len(held)} whole run(s), mean rows {_loads(held)}, {len(apart)} iterations; `error` is "
            "|predicted/measured - 1| on them (mean, p99), and `total` the error of their summed durations. "
        )
        if alike := [run.name for run in not_apart(runs, held)]:
            notes += f"Not at a load of its own: {', '.join(alike)}. "
    else:
        notes += (
            f"NO RUN WAS HELD OUT: there is one load only. `error` is that on the last {HOLD_OUT:.0%} of each run, "
            f"{len(apart)} iterations, which were not fitted but are of a load that was: it says nothing of other loads. "
        )
    if stalls:
        notes += (
            f"Left out: {stalls} iteration(s) of more than {STALL:g} times what the fit says, or less than 1/{STALL:g} of it "
            "(the machine stood still, or the end of the one before was seen late). "
        )
    if len(levels([*runs, *held])) > 1:
        notes += f"`spread`: {ratios} run(s), each predicted by a fit without the runs of its load."
    else:
        notes += f"`spread`: {ratios} contiguous blocks of the run(s), each predicted by a fit without it."
    return notes


def _loads(runs: Sequence[Run]) -> str:
    return ", ".join(f"{run.load:.1f}" for run in sorted(runs, key=lambda run: run.load))


def describe(profile: LatencyProfile) -> str:
    """The profile in a few lines for a reader at a terminal."""
    error = profile.error
    what = "held-out runs" if error.get("runs") else "the runs' ends (no run was held out: one load only)"
    held = f"mean {error['mean']:.1%}, p99 {error['p99']:.1%}, of the sum {error['total']:+.1%}" if error else "none held out"
    fixed = ", ".join(f"≤{c.max_rows} rows {c.seconds * 1e3:.2f} ms" for c in profile.fixed)
    hinges = ", ".join(f"{h.slope * 1e6:.1f} µs above {h.knot:g}" for h in profile.hinges)
    graphs = ", ".join(f"≤{g.tokens} tokens {g.seconds * 1e3:.2f} ms" for g in profile.fill_graphs)
    graphs = f"\n  fills by graph: {graphs}, per pair {profile.graph_pair_s * 1e9:.3f} ns" if graphs else ""
    again = "" if profile.reread_s is None else f", per one read again {profile.reread_s * 1e9:.3f} ns"
    return (
        f"{profile.name}: {profile.model} on {profile.device} ({profile.attn_func})\n"
        f"  fixed: {fixed}\n  per token: {hinges or '0'}{graphs}\n"
        f"  per prefill pair {profile.pair_s * 1e9:.3f} ns, per decoded KV token {profile.kv_s * 1e9:.3f} ns{again}, "
        f"per task {profile.task_overhead_s * 1e3:.2f} ms\n"
        f"  error on {what}: {held}; spread of whole runs {profile.spread:.1%}"
    )


def write_profile(profile: AnyProfile, path: str | Path) -> None:
    """Writes the profile as JSON that a person can read; the file is there whole or as it was. Raises OSError."""
    whole = Path(path).with_name(f".{Path(path).name}.part")
    whole.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
    os.replace(whole, path)
