"""A latency profile as data: the coefficients of the model in `parrot.latency`, where they come from, and how far they hold."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

NonNegative = Annotated[float, Meta(ge=0.0)]


class FixedCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cost of an iteration with at most `max_rows` rows (and more than the bucket below)."""

    max_rows: int
    seconds: NonNegative
    graph: bool = False


class Hinge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`slope` seconds for every token above `knot`."""

    knot: NonNegative
    slope: NonNegative


class FillGraph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cost of an iteration with prefill that replays the graph of so many tokens, whichever of them it needs."""

    tokens: int
    seconds: NonNegative


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
    #: per KV token that another row of the iteration reads too, after the first (a cache may have it); None: kv_s, or
    #: nothing where shared_kv_once
    reread_s: NonNegative | None = None
    sharing_s: NonNegative = 0.0  #: of an iteration in which anything is read for several rows: the kernel that does that
    #: iterations with prefill that have at most the last one's tokens replay the next of these; all others are launched anew
    fill_graphs: tuple[FillGraph, ...] = ()
    graph_pair_s: NonNegative = 0.0  #: `pair_s` of those iterations
    task_overhead_s: NonNegative = 0.0  #: HTTP and tokenization, per task, before it can be admitted
    versions: dict[str, str] = {}
    trace: str = ""
    seen: dict[str, tuple[float, float]] = {}  #: BatchShape field (and rows, tokens) -> least, most in the trace
    spread: NonNegative = 0.0  #: standard deviation of log(measured / predicted) of the total time of a whole held-out run
    error: dict[str, float] = {}  #: on held-out iterations: mean and p99 of |predicted / measured − 1|, and their number
    notes: str = ""
