"""The network between a client and the core: one round trip a request, half of it each way.

Decides how long a request is under way, from a constant or from measured samples; it never decides what is sent. Samples
are drawn from the run's own named generator, so that the same seed gives the same delays. Zero means the same instant.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from parrot.configuration import ConfigurationError, read_json


class Network(Protocol):
    """`is_local`: requests take no time at all, now and always."""

    is_local: bool

    def round_trip_s(self) -> float:
        """Seconds that the next request spends under way, there and back."""


class Constant:
    """Every round trip takes `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.is_local = seconds == 0.0

    def round_trip_s(self) -> float:
        return self._seconds


class Measured:
    """Round trips drawn with replacement from samples in seconds."""

    is_local = False

    def __init__(self, samples_s: Sequence[float], generator: np.random.Generator) -> None:
        self._samples = np.asarray(samples_s, dtype=float)
        self._generator = generator
        self._drawn: list[float] = []

    def round_trip_s(self) -> float:
        if not self._drawn:  # a draw at a time costs more than the simulation of a request
            self._drawn = self._generator.choice(self._samples, size=1024).tolist()
        return self._drawn.pop()


def stream(seed: int, name: str) -> np.random.Generator:
    """The generator of the stream `name` of a run: its draws depend on nothing but `seed` and `name`."""
    return np.random.default_rng([seed, *name.encode()])


def read_round_trips(rtt_ms: str | float) -> float | tuple[float, ...]:
    """`rtt_ms` as milliseconds, or the samples (ms) of the file that it names.

    A file is a JSON list, `{"samples": [...]}`, or an object that has one of these as `client_round_trip_ms`.
    Raises ConfigurationError for a file that is none of these and for a negative time.
    """
    try:
        constant = float(rtt_ms)
    except ValueError:
        return _samples_of(read_json(str(rtt_ms)), str(rtt_ms))
    if not 0.0 <= constant < float("inf"):
        raise ConfigurationError(f"--rtt-ms {rtt_ms}: a round trip is 0 ms or more")
    return constant


def open_network(rtt_ms: str | float, seed: int) -> Network:
    """The network that `--rtt-ms` describes: a number of milliseconds, or a file of measured ones."""
    times = read_round_trips(rtt_ms)
    if isinstance(times, float):
        return Constant(times / 1000.0)
    return Measured([t / 1000.0 for t in times], stream(seed, "network"))


def _samples_of(data: Any, path: str | Path) -> tuple[float, ...]:
    if isinstance(data, dict):
        data = data.get("client_round_trip_ms", data)
    if isinstance(data, dict):
        data = data.get("samples")
    if not isinstance(data, list) or not data:
        raise ConfigurationError(f'{path}: expected a list of round trips in ms, or {{"samples": [...]}}')
    for sample in data:
        if isinstance(sample, bool) or not isinstance(sample, int | float) or sample < 0:
            raise ConfigurationError(f"{path}: round trip {sample!r} is not a number of milliseconds, 0 or more")
    return tuple(float(sample) for sample in data)
