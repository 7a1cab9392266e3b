"""A workload before its arrivals are settled: rows in order, and what makes a program of one; and the settling.

A reader gives rows that it has checked; nothing of a program is built where only its time is asked for. Rows are read as
they are needed and never kept, so that a long trace needs no more memory than a short one; where all times must be known
first (a rate to scale to), the rows are read twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import msgspec

from sim.workloads.arrivals import Arrivals, draw_arrivals, scale_to_rate, stream
from sim.workloads.program import Program, WorkloadError

Kind = TypeVar("Kind", bound=msgspec.Struct)

#: the time in seconds at which it arrived (0 where nothing is recorded), then whatever the reader needs to build it
Row = tuple[Any, ...]

#: `rate` and `count` of what has none of its own, when they are not given
DEFAULT_RATE = 1.0
DEFAULT_COUNT = 100


@dataclass(frozen=True)
class Source:
    """`where`: what messages call it. `rows` may be called again and begins anew. `build(index, arrival_s, row)`.

    recorded: whether rows carry times. paced: whether these are at the rate already that was asked for. endless: whether
    rows never end. notes: what was left out or estimated in the rows read so far, for a person to read.
    """

    where: str
    rows: Callable[[], Iterator[Row]]
    build: Callable[[int, float, Row], Program]
    recorded: bool = True
    paced: bool = False
    endless: bool = False
    notes: Callable[[], Sequence[str]] = tuple


def settle(
    source: Source, *, rate: float | None, arrivals: Arrivals | None, seed: int, count: int | None, label: str = ""
) -> Iterator[Program]:
    """The programs of `source`, at most `count`, with their arrivals.

    arrivals: None keeps recorded times, scaled to `rate` when there is one, and draws a Poisson process where none are
    recorded. A process without a rate has that of the recorded times. label: in front of the names of the streams drawn from.

    Raises WorkloadError at once for what cannot be had, and while reading for what is wrong with a file.
    """
    if count is None and source.endless:
        count = DEFAULT_COUNT
    if arrivals is None and not source.recorded:
        arrivals = Arrivals("poisson")
    if arrivals is None:
        return _recorded(source, 1.0, count) if rate is None or source.paced else _scaled(source, rate, count)
    if arrivals.kind == "recorded":
        if not source.recorded:
            raise WorkloadError(f"{source.where}: has no recorded arrivals; ask for another kind")
        if rate is not None:
            raise WorkloadError(f"{source.where}: recorded arrivals have their own rate; leave out {rate:g}, or `recorded`")
        return _recorded(source, arrivals.value, count)
    if rate is None and not source.recorded:
        rate = DEFAULT_RATE
    return _drawn(source, arrivals, rate, stream_name=f"{label}arrivals", seed=seed, count=count)


def _recorded(source: Source, factor: float, count: int | None) -> Iterator[Program]:
    for index, row in enumerate(islice(source.rows(), count)):
        yield source.build(index, row[0] * factor, row)


def _scaled(source: Source, rate: float, count: int | None) -> Iterator[Program]:
    total, first_s, last_s = _span(source, count)
    factor = scale_to_rate(total, first_s, last_s, rate, source.where)
    for index, row in enumerate(islice(source.rows(), count)):
        yield source.build(index, (row[0] - first_s) * factor, row)


def _drawn(
    source: Source, arrivals: Arrivals, rate: float | None, *, stream_name: str, seed: int, count: int | None
) -> Iterator[Program]:
    if rate is None:
        total, first_s, last_s = _span(source, count)
        if total > 1 and last_s <= first_s:
            raise WorkloadError(f"{source.where}: its {total} programs arrive at one time, which is no rate; give one")
        rate = (total - 1) / (last_s - first_s) if total > 1 else DEFAULT_RATE
    times = draw_arrivals(arrivals, rate, stream(seed, stream_name))
    for index, (row, arrival_s) in enumerate(zip(islice(source.rows(), count), times, strict=False)):
        yield source.build(index, arrival_s, row)


def _span(source: Source, count: int | None) -> tuple[int, float, float]:
    """How many rows there are, and the times of the first and the last."""
    total, first_s, last_s = 0, 0.0, 0.0
    for row in islice(source.rows(), count):
        last_s = row[0]
        if total == 0:
            first_s = last_s
        total += 1
    return total, first_s, last_s


def parameters_of(where: str, kind: type[Kind], options: dict[str, Any]) -> Kind:
    """`options` (values may be texts) as a `kind`. Raises WorkloadError, which names the parameters that there are."""
    fields = msgspec.structs.fields(kind)
    try:
        parameters = msgspec.convert(options, kind, strict=False)
        for field in fields:
            value = getattr(parameters, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.encode_name} is {value}; a finite number is needed")
    except (msgspec.ValidationError, ValueError) as error:
        known = ", ".join(f"{f.encode_name}={_shown(f.default)}" for f in fields)
        raise WorkloadError(f"workload {where}: {error}; its parameters and defaults: {known or 'none'}") from None
    return parameters


def _shown(default: Any) -> Any:
    return "(none)" if default is None or default is msgspec.NODEFAULT else default
