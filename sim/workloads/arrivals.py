"""When programs arrive, and where random numbers come from: named streams, so that what one part draws never moves another.

Never reads a clock and never touches numpy's global generator.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from sim.workloads.program import WorkloadError

#: what messages and the documentation call the ways to arrive
FORMS = "poisson, gamma:CV, constant, recorded[:TIME_SCALE]"


#: what a rate and a time scale may be: beyond, times in floating point would run together, or out of its range
LEAST, MOST = 1e-9, 1e9

#: coefficients of variation of gamma gaps: below, they are as good as equal; above, all but a few are 0
LEAST_CV, MOST_CV = 0.001, 100.0


def stream(seed: int, name: str) -> np.random.Generator:
    """The generator named `name` under `seed`, 0 or more. Streams with different names are independent of each other."""
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]
    return np.random.default_rng(np.random.SeedSequence([seed, *words]))


def check_rate(rate: float) -> float:
    """`rate` in programs per second. Raises WorkloadError unless it is a number above 0, from LEAST to MOST."""
    if not LEAST <= rate <= MOST:
        bounds = "" if rate <= 0 or math.isnan(rate) else f", from {LEAST:g} to {MOST:g}"
        raise WorkloadError(f"rate {rate:g}: must be a number of programs per second above 0{bounds}")
    return float(rate)


class Arrivals(NamedTuple):
    """How programs arrive. `value`: of gamma the coefficient of variation of the gaps, of recorded what times are
    multiplied with."""

    kind: Literal["poisson", "gamma", "constant", "recorded"]
    value: float = 1.0


def parse_arrivals(text: str) -> Arrivals:
    """What `text` (one of FORMS) asks for. Raises WorkloadError."""
    kind, colon, value = text.partition(":")
    if kind in ("poisson", "constant") and not colon:
        return Arrivals(kind)  # type: ignore[arg-type]
    if kind == "recorded" and not colon:
        return Arrivals("recorded")
    if kind in ("gamma", "recorded") and colon:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        what, least, most = "a time scale", LEAST, MOST
        if kind == "gamma":
            what, least, most = "a coefficient of variation", LEAST_CV, MOST_CV
        if not least <= number <= most:
            raise WorkloadError(f"arrivals {text!r}: {value!r} is not {what} above 0, from {least:g} to {most:g}")
        return Arrivals(kind, number)  # type: ignore[arg-type]
    raise WorkloadError(f"arrivals {text!r}: must be one of {FORMS}")


def draw_arrivals(arrivals: Arrivals, rate: float, generator: np.random.Generator) -> Iterator[float]:
    """Arrival times in seconds at `rate` programs per second, the first one a gap after 0, without end."""
    mean_gap = 1.0 / check_rate(rate)
    if arrivals.kind == "constant":
        return _constant(mean_gap)
    if arrivals.kind == "gamma":
        variance = arrivals.value * arrivals.value
        return _sums(lambda: generator.gamma(1.0 / variance, mean_gap * variance, 1024))
    assert arrivals.kind == "poisson"
    return poisson(rate, generator)


def poisson(rate: float, generator: np.random.Generator) -> Iterator[float]:
    """Arrival times in seconds of a Poisson process of `rate` programs per second, the first one a gap after 0."""
    mean_gap = 1.0 / check_rate(rate)
    return _sums(lambda: generator.exponential(mean_gap, 1024))


def _constant(gap_s: float) -> Iterator[float]:
    number = 0
    while True:
        number += 1
        yield number * gap_s


def _sums(gaps: Callable[[], np.ndarray]) -> Iterator[float]:
    now = 0.0
    while True:
        for gap in gaps().tolist():
            now += gap
            yield now


def scale_to_rate(count: int, first_s: float, last_s: float, rate: float, where: str) -> float:
    """The factor that recorded gaps are multiplied with, so that `count` arrivals from `first_s` to `last_s` come at `rate`.

    Raises WorkloadError when there is no gap to scale.
    """
    check_rate(rate)
    if count <= 1:
        return 1.0
    if last_s <= first_s:
        raise WorkloadError(f"{where}: its {count} programs arrive at one time: no gaps to scale to a rate; leave the rate out")
    return (count - 1) / (last_s - first_s) / rate
