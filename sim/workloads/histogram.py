"""Distributions of numbers that are seen once, in bounded memory whatever their number.

A number below 128 has a bucket of its own; above, buckets are 1 % wide, so that a percentile is right within 0.5 %. Count,
sum, least and most are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

EXACT_BELOW = 128
_LOG_WIDTH = math.log(1.01)


class Histogram:
    """Of whole numbers from 0."""

    def __init__(self) -> None:
        self.count = self.sum = self.most = 0
        self.least: int | None = None
        self._buckets: dict[int, int] = {}

    def add(self, value: int) -> None:
        self.count += 1
        self.sum += value
        if value > self.most:
            self.most = value
        if self.least is None or value < self.least:
            self.least = value
        bucket = value if value < EXACT_BELOW else EXACT_BELOW + int(math.log(value / EXACT_BELOW) / _LOG_WIDTH)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    def steps(self) -> Iterator[tuple[float, int]]:
        """(value, how many there are of about that value), in order."""
        for bucket in sorted(self._buckets):
            value = float(bucket)
            if bucket >= EXACT_BELOW:
                value = EXACT_BELOW * math.exp((bucket - EXACT_BELOW + 0.5) * _LOG_WIDTH)
            yield min(max(value, self.least or 0), self.most), self._buckets[bucket]

    def percentile(self, percent: float) -> float:
        """The least value that `percent` of all do not exceed; 0 when there is none."""
        wanted, seen = percent / 100.0 * self.count, 0
        for value, count in self.steps():
            seen += count
            if seen >= wanted:
                return value
        return 0.0

    def numbers(self) -> dict[str, float]:
        """Mean, least, percentiles, most."""
        mean = self.sum / self.count if self.count else 0.0
        percentiles = {f"p{percent}": round(self.percentile(percent), 1) for percent in (50, 90, 99)}
        return {"mean": round(mean, 3), "min": self.least or 0, **percentiles, "max": self.most}


class TimeBins:
    """Sums over time of several series at once: at most `most` bins, which double their width when time goes beyond them."""

    def __init__(self, series: int, most: int = 120) -> None:
        self.width_s = 2.0**-10
        self._most = most
        self._sums: list[list[float]] = [[] for _ in range(series)]

    def add(self, time_s: float, *values: float) -> None:
        """Adds one value to each series at `time_s` from 0."""
        while time_s >= self.width_s * self._most:
            self.width_s *= 2.0
            self._sums = [[sum(series[i : i + 2]) for i in range(0, len(series), 2)] for series in self._sums]
        place = int(time_s / self.width_s)
        for series, value in zip(self._sums, values, strict=True):
            if place >= len(series):
                series.extend([0.0] * (place + 1 - len(series)))
            series[place] += value

    def sums(self) -> list[list[float]]:
        return [list(series) for series in self._sums]
