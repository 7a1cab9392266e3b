"""`python -m sim.calibrate TRACE… --out PROFILE`: fits a latency profile to the iteration logs of real engines.

Decides the coefficients of parrot.latency's model, and nothing else: no number of a profile comes from anywhere but the
logs (docs/iteration-log.md). Non-negative least squares on relative errors: rows are weighted by 1/duration, first the
measured one, then once more the fitted one, because the measured one alone pulls the fit below the mean of iterations
that are noisy. The last part of every run is held out and tells the error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from parrot.latency import BatchShape, FixedCost, Hinge, LatencyModel, LatencyProfile, seen_ranges

Array = NDArray[np.float64]

KNOTS = (0, 16, 64, 256, 1024, 4096)
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
HOLD_OUT = 0.2
LEAST_ITERATIONS = 40  #: of a fit: fewer cannot tell the coefficients apart
LEAST_IN_BUCKET = 10  #: iterations above a knot or in a batch-size bucket, for it to get a coefficient of its own


class CalibrationError(Exception):
    """Logs that no profile can be fitted to. The message names file, line and reason."""


class Header(msgspec.Struct, frozen=True, tag="header", tag_field="kind"):
    """The first line of a start of an engine."""

    iteration_log: int
    model: str
    device: str
    attn_func: str = ""
    engine: str = ""
    engine_type: str = ""
    dtype: str = ""
    num_threads: int | None = None
    dummy_weights: bool = False
    versions: dict[str, str] = {}


class Iteration(msgspec.Struct, frozen=True, tag="iteration", tag_field="kind"):
    """One iteration: the fields of BatchShape, and how long it took."""

    t: float
    duration_s: float
    decode_rows: int
    prefill_rows: int
    prefill_tokens: int
    prefill_pairs: int
    decode_kv: int
    decode_kv_unique: int
    graph: bool = False
    failed: bool = False

    @property
    def shape(self) -> BatchShape:
        return BatchShape(*(getattr(self, name) for name in BatchShape._fields))


class TaskLine(msgspec.Struct, frozen=True, tag="task", tag_field="kind"):
    """A task that was handed to the engine's scheduler."""

    t: float
    overhead_s: float
    task: str = ""


class Run(msgspec.Struct):
    """One start of one engine."""

    header: Header
    iterations: list[Iteration] = []
    tasks: list[TaskLine] = []


def read_log(path: str | Path) -> list[Run]:
    """The runs of one iteration log. Raises CalibrationError when it is empty, or no such log."""
    decoder = msgspec.json.Decoder(Header | Iteration | TaskLine)
    runs: list[Run] = []
    for number, line in _lines(path):
        try:
            entry = decoder.decode(line)
        except msgspec.DecodeError as error:
            what = "not an iteration log" if not runs else "not a line of an iteration log"
            raise CalibrationError(f"{path}:{number}: {what}: {error}") from None
        if isinstance(entry, Header):
            if entry.iteration_log != 1:
                raise CalibrationError(f"{path}:{number}: iteration log of format {entry.iteration_log}; this reader knows 1")
            runs.append(Run(entry))
        elif not runs:
            raise CalibrationError(f"{path}:{number}: an iteration log begins with a header line; this is another file")
        elif isinstance(entry, TaskLine):
            runs[-1].tasks.append(entry)
        elif not entry.failed:
            if entry.duration_s <= 0:
                raise CalibrationError(f"{path}:{number}: duration_s is {entry.duration_s}; it must be above 0")
            runs[-1].iterations.append(entry)
    if not runs:
        raise CalibrationError(f"{path}: empty: an iteration log begins with a header line")
    return runs


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):  # a last line without it was cut when the engine was killed
                    yield number, line
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror}") from error


def read_logs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs of several logs. Raises CalibrationError unless all are of one model, device and attention function."""
    runs: list[Run] = []
    for path in paths:
        for run in read_log(path):
            for name in ("model", "device", "attn_func", "dtype", "num_threads", "dummy_weights"):
                first, this = getattr((runs[0] if runs else run).header, name), getattr(run.header, name)
                if first != this:
                    raise CalibrationError(f"{path}: mixed logs: its {name} is {this!r}, but {paths[0]} has {first!r}")
            runs.append(run)
    return runs


def fit(runs: Sequence[Run], name: str, *, trace: str = "", hold_out: float = HOLD_OUT, knots: Sequence[int] = KNOTS,
        shared_kv_once: bool = False) -> LatencyProfile:  # fmt: skip
    """The profile that fits `runs` best. The last `hold_out` of each run is not fitted, and tells the error.

    Raises CalibrationError when there are too few iterations.
    """
    fitted: list[Iteration] = []
    held: list[Iteration] = []
    for run in runs:
        cut = len(run.iterations) - int(len(run.iterations) * hold_out)
        fitted += run.iterations[:cut]
        held += run.iterations[cut:]
    if len(fitted) < LEAST_ITERATIONS:
        raise CalibrationError(
            f"{trace or 'the logs'}: {len(fitted)} iterations to fit ({len(held)} are held out); "
            f"at least {LEAST_ITERATIONS} are needed"
        )
    shapes = [iteration.shape for iteration in fitted]
    terms = _Terms(shapes, knots, shared_kv_once)
    measured = np.array([iteration.duration_s for iteration in fitted])
    coefficients = _solve(terms.columns(shapes), measured)
    overheads = [task.overhead_s for run in runs for task in run.tasks]
    profile = terms.profile(
        coefficients,
        name=name,
        header=runs[0].header,
        trace=trace,
        seen=seen_ranges(shapes),
        task_overhead_s=float(np.mean(overheads)) if overheads else 0.0,
    )
    return msgspec.structs.replace(profile, error=_error(profile, held), notes=_notes(runs, fitted, held, hold_out))


class _Terms:
    """Which coefficients the model gets from these shapes, and what each of them is multiplied with."""

    def __init__(self, shapes: Sequence[BatchShape], knots: Sequence[int], shared_kv_once: bool) -> None:
        tokens = np.array([s.tokens for s in shapes])
        self.knots = [k for k in sorted(set(knots)) if k == 0 or int((tokens > k).sum()) >= LEAST_IN_BUCKET]
        self.buckets = {graph: _buckets([s.rows for s in shapes if s.graph is graph]) for graph in (False, True)}
        self.shared_kv_once = shared_kv_once

    def columns(self, shapes: Sequence[BatchShape]) -> Array:
        """One row a shape. A bucket's column is 1 for all larger ones of its path too: its coefficient is what it adds to
        the bucket below, so that a larger batch never gets a smaller fixed cost."""
        rows = np.array([s.rows for s in shapes])
        tokens = np.array([s.tokens for s in shapes], dtype=float)
        graph = np.array([s.graph for s in shapes])
        columns = []
        for path, buckets in self.buckets.items():
            for below in [0, *buckets[:-1]] if buckets else []:
                columns.append(((rows > below) & (graph == path)).astype(float))
        columns += [np.maximum(0.0, tokens - knot) for knot in self.knots]
        columns.append(np.array([s.prefill_pairs for s in shapes], dtype=float))
        columns.append(np.array([s.decode_kv_unique if self.shared_kv_once else s.decode_kv for s in shapes], dtype=float))
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
        return LatencyProfile(
            model=header.model,
            device=header.device,
            attn_func=header.attn_func,
            fixed=tuple(fixed),
            hinges=tuple(hinge for hinge in hinges if hinge.slope > 0),
            pair_s=next(values),
            kv_s=next(values),
            shared_kv_once=self.shared_kv_once,
            versions=header.versions,
            **fields,
        )


def _buckets(rows: Sequence[int]) -> list[int]:
    """Upper bounds of the batch sizes that occur often enough; a rare one shares the bucket of the next."""
    found, below = [], 0
    for bound in BUCKETS:
        inside = sum(below < r <= bound for r in rows)
        if inside >= LEAST_IN_BUCKET:
            found.append(bound)
            below = bound
    if rows and (not found or max(rows) > found[-1]):
        top = next((b for b in BUCKETS if b >= max(rows)), max(rows))
        found = [*found[:-1], top]
    return found


def _solve(columns: Array, measured: Array) -> Array:
    weights = 1.0 / measured
    coefficients: Array = np.zeros(columns.shape[1])
    for _ in range(2):
        weighted = columns * weights[:, None]
        scale = np.linalg.norm(weighted, axis=0)
        scale[scale == 0] = 1.0  # a column of zeros keeps the coefficient 0
        coefficients = nnls(weighted / scale, measured * weights)[0] / scale
        predicted = columns @ coefficients
        weights = 1.0 / np.maximum(predicted, 1e-9)
    return coefficients


def _error(profile: LatencyProfile, held: Sequence[Iteration]) -> dict[str, float]:
    if not held:
        return {}
    model = LatencyModel(profile)
    predicted = np.array([model.duration(iteration.shape) for iteration in held])
    measured = np.array([iteration.duration_s for iteration in held])
    relative = np.abs(predicted / measured - 1.0)
    return {
        "mean": float(relative.mean()),
        "p99": float(np.percentile(relative, 99)),
        "total": float(predicted.sum() / measured.sum() - 1.0),
        "iterations": float(len(held)),
    }


def _notes(runs: Sequence[Run], fitted: Sequence[Iteration], held: Sequence[Iteration], hold_out: float) -> str:
    header = runs[0].header
    threads = f", {header.num_threads} thread(s)" if header.num_threads else ""
    dummy = ", dummy weights" if header.dummy_weights else ""
    return (
        f"{header.engine_type} engine, {header.dtype or 'dtype unknown'}{threads}{dummy}. "
        f"Fitted to {len(fitted)} iterations of {len(runs)} run(s). "
        f"Held out: the last {hold_out:.0%} of each run, {len(held)} iterations; `error` is |predicted/measured - 1| "
        "on them (mean, p99), and `total` the error of their summed durations."
    )


def describe(profile: LatencyProfile) -> str:
    """The profile in a few lines for a reader at a terminal."""
    error = profile.error
    held = f"mean {error['mean']:.1%}, p99 {error['p99']:.1%}, of the sum {error['total']:+.1%}" if error else "none held out"
    fixed = ", ".join(f"≤{c.max_rows} rows {c.seconds * 1e3:.2f} ms" for c in profile.fixed)
    hinges = ", ".join(f"{h.slope * 1e6:.1f} µs above {h.knot:g}" for h in profile.hinges)
    return (
        f"{profile.name}: {profile.model} on {profile.device} ({profile.attn_func})\n"
        f"  fixed: {fixed}\n  per token: {hinges or '0'}\n"
        f"  per prefill pair {profile.pair_s * 1e9:.3f} ns, per decoded KV token {profile.kv_s * 1e9:.3f} ns, "
        f"per task {profile.task_overhead_s * 1e3:.2f} ms\n  error on what was held out: {held}"
    )


def write_profile(profile: LatencyProfile, path: str | Path) -> None:
    """Writes the profile as JSON that a person can read."""
    Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status. What it found goes to stderr, the profile to its file."""
    parser = argparse.ArgumentParser(prog="python -m sim.calibrate", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("traces", metavar="TRACE", nargs="+", help="iteration logs of one model, device and attention function")
    parser.add_argument("--out", required=True, metavar="PROFILE", help="the profile to write (JSON)")
    parser.add_argument("--name", help="the profile's name (default: the stem of PROFILE)")
    parser.add_argument(
        "--hold-out", type=float, default=HOLD_OUT, help="part of each run's end that is not fitted (%(default)s)"
    )
    parser.add_argument("--note", default="", help="what a reader of the profile should know too, e.g. the processor's name")
    parser.add_argument("--shared-kv-once", action="store_true", help="the attention reads a shared prefix once for all rows")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.hold_out < 1:
        parser.error(f"--hold-out {arguments.hold_out}: must be at least 0 and below 1")
    try:
        profile = fit(
            read_logs(arguments.traces),
            arguments.name or Path(arguments.out).stem,
            trace=", ".join(Path(trace).name for trace in arguments.traces),
            hold_out=arguments.hold_out,
            shared_kv_once=arguments.shared_kv_once,
        )
        if arguments.note:
            profile = msgspec.structs.replace(profile, notes=f"{profile.notes} {arguments.note}")
        write_profile(profile, arguments.out)
    except CalibrationError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{arguments.out}: cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(describe(profile), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
