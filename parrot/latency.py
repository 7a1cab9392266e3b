"""How long an engine's iteration takes: one model for emulated engines, the simulator and policies that look ahead.

A profile belongs to model × device × attention function. The duration of an iteration is

    fixed(batch size, path) + Σ_j slope_j · max(0, n − knot_j) + pair · P + kv · K

with n the tokens computed (prefill and decode together; the hinges let a small chunk ride free on the reading of the
weights), P the query·key pairs of prefill, K the KV tokens that decoding rows read. Coefficients are non-negative
seconds, found by `sim.calibrate` with non-negative least squares on iterations that a real engine recorded.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

NonNegative = Annotated[float, Meta(ge=0.0)]


class BatchShape(NamedTuple):
    """What the duration of an iteration depends on; counts only, no token values.

    A row is a task's part of the iteration: a decode row computes one token and samples, a prefill row computes a
    chunk. `prefill_pairs`: Σ over prefilled tokens of the positions that they attend to (own one included).
    `decode_kv`: Σ over decode rows of the KV tokens read; `decode_kv_unique`: the same with each shared context
    counted once. `graph`: whether the runner replays a captured graph for it.
    """

    decode_rows: int = 0
    prefill_rows: int = 0
    prefill_tokens: int = 0
    prefill_pairs: int = 0
    decode_kv: int = 0
    decode_kv_unique: int = 0
    graph: bool = False

    @property
    def rows(self) -> int:
        return self.decode_rows + self.prefill_rows

    @property
    def tokens(self) -> int:
        return self.decode_rows + self.prefill_tokens


class FixedCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cost of an iteration with at most `max_rows` rows (and more than the bucket below)."""

    max_rows: int
    seconds: NonNegative
    graph: bool = False


class Hinge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`slope` seconds for every token above `knot`."""

    knot: NonNegative
    slope: NonNegative


class LatencyProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fitted latency model and where it came from. Written as JSON by `sim.calibrate`."""

    name: str
    model: str
    device: str
    attn_func: str
    fixed: tuple[FixedCost, ...]
    hinges: tuple[Hinge, ...]
    pair_s: NonNegative
    kv_s: NonNegative
    shared_kv_once: bool = False  #: the attention function reads a shared prefix once for all rows
    task_overhead_s: NonNegative = 0.0  #: HTTP and tokenization, per task, before it can be admitted
    versions: dict[str, str] = {}
    trace: str = ""
    seen: dict[str, tuple[float, float]] = {}  #: BatchShape field (and rows, tokens) -> least, most in the trace
    spread: NonNegative = 0.0  #: standard deviation of log(measured / predicted) of the total time of a whole held-out run
    error: dict[str, float] = {}  #: on held-out iterations: mean and p99 of |predicted / measured − 1|, and their number
    notes: str = ""


class LatencyModel:
    """A profile made ready to evaluate. Pure: the same shape gives the same seconds.

    `factor` multiplies every duration: one engine's deviation from the profile in one run (drawn from `spread`), 1 without.
    """

    def __init__(self, profile: LatencyProfile, factor: float = 1.0) -> None:
        self.profile = profile
        self._fixed = {
            path: tuple(sorted((c.max_rows, c.seconds * factor) for c in profile.fixed if c.graph is path))
            for path in (False, True)
        }
        self._hinges = tuple((h.knot, h.slope * factor) for h in profile.hinges)
        self._pair_s = profile.pair_s * factor
        self._kv_s = profile.kv_s * factor

    def fixed_s(self, rows: int, graph: bool = False) -> float:
        """The fixed cost of an iteration of `rows` rows; beyond the largest bucket, the largest bucket's."""
        buckets = self._fixed[graph] or self._fixed[not graph]
        seconds = 0.0
        for max_rows, seconds in buckets:
            if rows <= max_rows:
                return seconds
        return seconds

    def tokens_s(self, tokens: int) -> float:
        """The cost of computing `tokens` tokens in one iteration."""
        return sum(slope * (tokens - knot) for knot, slope in self._hinges if tokens > knot)

    def duration(self, shape: BatchShape) -> float:
        """Seconds that an iteration of `shape` takes."""
        profile = self.profile
        kv = shape.decode_kv_unique if profile.shared_kv_once else shape.decode_kv
        return (
            self.fixed_s(shape.rows, shape.graph)
            + self.tokens_s(shape.tokens)
            + self._pair_s * shape.prefill_pairs
            + self._kv_s * kv
        )

    def decode_run(self, shape: BatchShape) -> DecodeRun:
        """The run of iterations that begins with `shape`, all of whose rows decode (`prefill_rows` 0)."""
        return DecodeRun(self.duration(shape), self._kv_s * shape.decode_rows)


class DecodeRun(NamedTuple):
    """Iterations of an unchanged decoding batch: each reads one KV token a row more than the one before.

    Edge k lies at t0 + at(k). Stepping and jumping both ask this one function, so that they agree to the last bit.
    """

    first_s: float
    growth_s: float

    def at(self, k: int) -> float:
        """Seconds from the start of the run to the end of its k-th iteration (k ≥ 0)."""
        return k * self.first_s + self.growth_s * (k * (k - 1) // 2)

    def after(self, seconds: float) -> int:
        """About how many iterations `seconds` hold: to begin a search from, `at` decides."""
        first, growth = self.first_s, self.growth_s
        if growth <= 0.0:
            return int(seconds / first) if first > 0.0 else 0
        slope = first - growth / 2
        return int((math.sqrt(slope * slope + 2.0 * growth * seconds) - slope) / growth)


def seen_ranges(shapes: list[BatchShape]) -> dict[str, tuple[float, float]]:
    """For `LatencyProfile.seen`: the least and most of each feature in `shapes`."""
    if not shapes:
        return {}
    columns: dict[str, list[Any]] = {name: [getattr(s, name) for s in shapes] for name in BatchShape._fields if name != "graph"}
    columns["rows"] = [s.rows for s in shapes]
    columns["tokens"] = [s.tokens for s in shapes]
    return {name: (float(min(values)), float(max(values))) for name, values in columns.items()}
