"""When programs arrive, and where random numbers come from: named streams, so that what one part draws never moves another.

Never reads a clock and never touches numpy's global generator.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np

from sim.workloads.program import WorkloadError


def stream(seed: int, name: str) -> np.random.Generator:
    """The generator named `name` under `seed`. Streams with different names are independent of each other."""
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]
    return np.random.default_rng(np.random.SeedSequence([seed, *words]))


def check_rate(rate: float) -> float:
    """`rate` in programs per second. Raises WorkloadError unless it is a finite number above 0."""
    if not math.isfinite(rate) or rate <= 0:
        raise WorkloadError(f"rate {rate:g}: must be a number of programs per second above 0")
    return float(rate)


def poisson(rate: float, generator: np.random.Generator) -> Iterator[float]:
    """Arrival times in seconds of a Poisson process of `rate` programs per second, the first one a gap after 0."""
    mean_gap = 1.0 / check_rate(rate)
    now = 0.0
    while True:
        for gap in generator.exponential(mean_gap, 1024).tolist():
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
