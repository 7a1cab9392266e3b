"""How long an engine's iteration takes: one model for emulated engines, the simulator and policies that look ahead.

A profile belongs to model × device × attention function. The duration of an iteration is

    fixed(batch size, path) + Σ_j slope_j · max(0, n − knot_j) + pair · P + kv · K + reread · R + sharing · [R > 0]

with n the tokens computed (prefill and decode together; the hinges let a small chunk ride free on the reading of the
weights), P the query·key pairs of prefill, K the KV tokens that decoding rows read, shared ones once, and R those that they
read again; without a cost of its own, reading again costs what reading does, or nothing (shared_kv_once). Where an engine
replays a captured graph for an iteration with prefill, that graph's cost stands for the first two terms (it computes as many
tokens as it was captured for), and pairs have a cost of their own. Coefficients are non-negative seconds, found by
`sim.calibrate` with non-negative least squares on iterations that a real engine recorded.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from mypy_extensions import mypyc_attr

from parrot.latency_profile import FillGraph, FixedCost, Hinge, LatencyProfile

__all__ = [
    "BatchShape", "Coverage", "DecodeRun", "FillGraph", "FixedCost", "Hinge", "LatencyModel", "LatencyProfile", "OutOfRange",
    "Outside",
    "seen_ranges",
]  # fmt: skip


@mypyc_attr(acyclic=True)
class BatchShape:
    """What the duration of an iteration depends on; counts only, no token values.

    A row is a task's part of the iteration: a decode row computes one token and samples, a prefill row computes a
    chunk. `prefill_pairs`: Σ over prefilled tokens of the positions that they attend to (own one included).
    `decode_kv`: Σ over decode rows of the KV tokens read; `decode_kv_unique`: the same with each shared context
    counted once. `graph`: whether the runner replays a captured graph for it.
    """

    FIELDS: ClassVar[tuple[str, ...]] = (
        "decode_rows", "prefill_rows", "prefill_tokens", "prefill_pairs", "decode_kv", "decode_kv_unique", "graph",
    )  # fmt: skip
    __slots__ = (
        "decode_kv", "decode_kv_unique", "decode_rows", "graph", "prefill_pairs", "prefill_rows", "prefill_tokens",
    )  # fmt: skip

    def __init__(
        self,
        decode_rows: int = 0,
        prefill_rows: int = 0,
        prefill_tokens: int = 0,
        prefill_pairs: int = 0,
        decode_kv: int = 0,
        decode_kv_unique: int = 0,
        graph: bool = False,
    ) -> None:
        self.decode_rows = decode_rows
        self.prefill_rows = prefill_rows
        self.prefill_tokens = prefill_tokens
        self.prefill_pairs = prefill_pairs
        self.decode_kv = decode_kv
        self.decode_kv_unique = decode_kv_unique
        self.graph = graph

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BatchShape) and self.fields() == other.fields()

    def __hash__(self) -> int:
        return hash(tuple(self.fields().values()))

    def __repr__(self) -> str:
        return f"BatchShape({', '.join(f'{name}={value}' for name, value in self.fields().items() if value)})"

    def fields(self) -> dict[str, int]:
        """Its fields by name, in order."""
        return {name: getattr(self, name) for name in self.FIELDS}

    def after(self, iterations: int) -> BatchShape:
        """What it is so many iterations later, when only the same rows decode."""
        more = iterations * self.decode_rows
        return BatchShape(
            self.decode_rows,
            self.prefill_rows,
            self.prefill_tokens,
            self.prefill_pairs,
            self.decode_kv + more,
            self.decode_kv_unique + more,
            self.graph,
        )

    @property
    def rows(self) -> int:
        return self.decode_rows + self.prefill_rows

    @property
    def tokens(self) -> int:
        return self.decode_rows + self.prefill_tokens


class LatencyModel:
    """A profile made ready to evaluate. Pure: the same shape gives the same seconds.

    `factor` multiplies every duration: one engine's deviation from the profile in one run (drawn from `spread`), 1 without.
    """

    def __init__(self, profile: LatencyProfile, factor: float = 1.0) -> None:
        self.profile = profile
        self.task_overhead_s = profile.task_overhead_s
        #: The most rows of an iteration that only decodes and replays a captured graph.
        self.graph_rows = max((cost.max_rows for cost in profile.fixed if cost.graph), default=0)
        self._fixed = {
            path: tuple(sorted((c.max_rows, c.seconds * factor) for c in profile.fixed if c.graph is path))
            for path in (False, True)
        }
        self._fixed_of: tuple[list[float], list[float]] = ([], [])  # by rows, without and with a graph: as asked for
        self._shared_kv_once = profile.shared_kv_once
        self._hinges = tuple((h.knot, h.slope * factor) for h in profile.hinges)
        self._fill_graph_s: list[float] = []  # by tokens
        for one in sorted(profile.fill_graphs, key=lambda one: one.tokens):
            self._fill_graph_s += [one.seconds * factor] * (one.tokens + 1 - len(self._fill_graph_s))
        # Without a cost of iterations that are launched anew, the engine is one that has no larger ones with prefill.
        self._fills_by_graph = not any(not cost.graph for cost in profile.fixed)
        self._graph_pair_s = profile.graph_pair_s * factor
        self._sharing_s = profile.sharing_s * factor
        self._pair_s = profile.pair_s * factor
        self._kv_s = profile.kv_s * factor
        self._reread_s = -1.0 if profile.reread_s is None else profile.reread_s * factor  # below 0: no cost of its own

    def fixed_s(self, rows: int, graph: bool = False) -> float:
        """The fixed cost of an iteration of `rows` rows; beyond the largest bucket, the largest bucket's."""
        known = self._fixed_of[1] if graph else self._fixed_of[0]
        while rows >= len(known):
            buckets = self._fixed[graph] or self._fixed[not graph]
            least = len(known)
            known.append(next((seconds for most, seconds in buckets if least <= most), buckets[-1][1] if buckets else 0.0))
        return known[rows]

    def tokens_s(self, tokens: int) -> float:
        """The cost of computing `tokens` tokens in one iteration."""
        seconds = 0.0
        for knot, slope in self._hinges:
            if tokens > knot:
                seconds += slope * (tokens - knot)
        return seconds

    def prefill_s(self, tokens: int) -> float:
        """The cost of filling `tokens` tokens: in one iteration, or by as many of the largest graph as it takes."""
        if not self._fill_graph_s:
            return self.tokens_s(tokens)
        most = len(self._fill_graph_s) - 1
        if tokens <= most:
            return self._fill_graph_s[tokens]
        whole, rest = divmod(tokens, most)
        return whole * self._fill_graph_s[most] + (self._fill_graph_s[rest] if rest else 0.0)

    def duration(self, shape: BatchShape, graph: bool = False) -> float:
        """Seconds that an iteration of `shape` takes; with `graph`, if it replays a captured graph. One with prefill replays
        one where the profile has one that is large enough."""
        decode_rows = shape.decode_rows
        tokens = decode_rows + shape.prefill_tokens
        if shape.prefill_rows and self._fill_graph_s and (tokens < len(self._fill_graph_s) or self._fills_by_graph):
            seconds = self.prefill_s(tokens) + self._graph_pair_s * shape.prefill_pairs
        else:
            seconds = (
                self.fixed_s(decode_rows + shape.prefill_rows, graph or shape.graph)
                + self.tokens_s(tokens)
                + self._pair_s * shape.prefill_pairs
            )
        if self._sharing_s and shape.decode_kv > shape.decode_kv_unique:
            seconds += self._sharing_s
        if self._reread_s >= 0.0:
            again = shape.decode_kv - shape.decode_kv_unique
            return seconds + self._kv_s * shape.decode_kv_unique + self._reread_s * again
        return seconds + self._kv_s * (shape.decode_kv_unique if self._shared_kv_once else shape.decode_kv)

    def decode_run(self, shape: BatchShape, graph: bool = False) -> DecodeRun:
        """The run of iterations that begins with `shape`, all of whose rows decode (`prefill_rows` 0)."""
        return DecodeRun(self.duration(shape, graph), self._kv_s * shape.decode_rows)


class OutOfRange(Exception):
    """Something lies outside the range that its profile was fitted in. The message says which, and how far."""


class Outside:
    """How far a profile was left. `outside`: input of the model -> (furthest that was asked for, least seen, most seen)."""

    def __init__(self, profile: str, of: str, strict: bool) -> None:
        """profile: its name. of: what it was fitted to. strict: the first step outside raises OutOfRange."""
        self.outside: dict[str, tuple[float, float, float]] = {}
        self._profile = profile
        self._of = of
        self._strict = strict

    def beyond(self, name: str, value: float, least: float, most: float) -> None:
        """`value` of the input `name` does not lie between what was seen. Raises OutOfRange (strict)."""
        if self._strict:
            raise OutOfRange(
                f"profile {self._profile!r} was fitted to {self._of} with {name} from {least:g} to {most:g}; "
                f"this run asks for {value:g}"
            )
        known = self.outside.get(name)
        if known is None or max(value - most, least - value) > max(known[0] - most, least - known[0]):
            self.outside[name] = (float(value), least, most)


class Coverage(Outside):
    """How far iterations went beyond the range that a profile was fitted in. One for all engines of a profile.

    An input whose range the profile does not state is not looked at.
    """

    INPUTS = ("rows", "tokens", "prefill_pairs", "decode_kv")

    def __init__(self, profile: LatencyProfile, strict: bool = False) -> None:
        """strict: the first iteration outside raises OutOfRange."""
        super().__init__(profile.name, "iterations", strict)
        self._shared_kv_once = profile.shared_kv_once
        self._kv = "decode_kv_unique" if profile.shared_kv_once else "decode_kv"
        ranges = [profile.seen.get(self._kv if name == "decode_kv" else name, (0.0, math.inf)) for name in self.INPUTS]
        (self._rows, self._most_rows), (self._tokens, self._most_tokens) = ranges[:2]
        (_, self._most_pairs), (_, self._most_kv) = ranges[2:]  # both can be 0: an iteration may only decode, or only fill

    def note(self, shape: BatchShape, later: int = 0) -> None:
        """An iteration of `shape`, and `later` more in which the same rows decode. Raises OutOfRange (strict)."""
        decode_rows, pairs = shape.decode_rows, shape.prefill_pairs
        rows, tokens = decode_rows + shape.prefill_rows, decode_rows + shape.prefill_tokens
        kv = (shape.decode_kv_unique if self._shared_kv_once else shape.decode_kv) + later * decode_rows
        if not self._rows <= rows <= self._most_rows:
            self.beyond("rows", rows, self._rows, self._most_rows)
        if not self._tokens <= tokens <= self._most_tokens:
            self.beyond("tokens", tokens, self._tokens, self._most_tokens)
        if pairs > self._most_pairs:
            self.beyond("prefill_pairs", pairs, 0.0, self._most_pairs)
        if kv > self._most_kv:
            self.beyond(self._kv, kv, 0.0, self._most_kv)


@mypyc_attr(acyclic=True)
class DecodeRun:
    """Iterations of an unchanged decoding batch: each reads one KV token a row more than the one before.

    Edge k lies at t0 + at(k). Stepping and jumping both ask this one function, so that they agree to the last bit.
    """

    __slots__ = ("first_s", "growth_s")

    def __init__(self, first_s: float, growth_s: float) -> None:
        self.first_s = first_s
        self.growth_s = growth_s

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
    columns: dict[str, list[Any]] = {name: [getattr(s, name) for s in shapes] for name in BatchShape.FIELDS if name != "graph"}
    columns["rows"] = [s.rows for s in shapes]
    columns["tokens"] = [s.tokens for s in shapes]
    return {name: (float(min(values)), float(max(values))) for name, values in columns.items()}
