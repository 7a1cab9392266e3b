"""The laws of a remote profile, fitted: seconds to the first token against prompt and load, seconds a token against load.

Each by non-negative least squares over relative errors, as iterations are fitted. A hinge is taken only where the log has
strong evidence for it. The time a token is fitted against the load while the tokens came: its mean counts every token once,
which depends on the law, so that the fit is repeated with its own result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from parrot.latency_profile import Hinge
from sim.calibrate.logs import CalibrationError
from sim.calibrate.request_logs import Array, InFlight, RemoteRun, Request

LEAST_REQUESTS = 40  #: of a fit: fewer cannot tell the coefficients apart
LEAST_BESIDE_KNOT = 20  #: requests on either side of a knot
EVIDENCE = 10.0  #: by how much a hinge lowers the Bayesian information criterion, at least
VARIES = 0.02  #: an input with a smaller coefficient of variation tells nothing
PROMPT_KNOTS = (256.0, 1024.0, 4096.0, 16384.0, 65536.0)
LOAD_KNOTS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
REPEATS = 3


class Part(NamedTuple):
    """Some requests of a run; the whole run says what was in flight beside them."""

    run: RemoteRun
    requests: list[Request]


def whole(run: RemoteRun) -> Part:
    """All requests of the run."""
    return Part(run, run.requests)


def part_of(run: RemoteRun, begin: float, end: float) -> Part:
    """The requests of a part of the run, in the order in which they were sent."""
    ordered = sorted(run.requests, key=lambda request: request.t)
    return Part(run, ordered[round(len(ordered) * begin) : round(len(ordered) * end)])


class Loads:
    """Of requests that decoded: when, and what was in flight meanwhile."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.requests: list[Request] = []
        self._pieces: list[tuple[InFlight, Array, Array]] = []
        for part in parts:
            chosen = [request for request in part.requests if request.decodes]
            if chosen:
                begins = np.array([r.t + (r.ttft_s or 0.0) for r in chosen])
                self._pieces.append((part.run.in_flight(), begins, begins + np.array([r.decode_s for r in chosen])))
                self.requests += chosen

    def mean(self, value: Callable[[Array], Array], tpot: Callable[[Array], Array]) -> Array:
        """The mean over each one's tokens of `value` of the number in flight, when a token takes `tpot` of that number."""
        found = []
        for in_flight, begins, ends in self._pieces:
            weighted = in_flight.integral(lambda n: value(n) / tpot(n), begins, ends)
            found.append(weighted / in_flight.integral(lambda n: 1.0 / tpot(n), begins, ends))
        return np.concatenate(found) if found else np.zeros(0)


def solved(parts: Sequence[Part], where: str) -> dict[str, Any]:
    """The fields of both laws. Raises CalibrationError."""
    firsts = [request for part in parts for request in part.requests if request.ttft_s is not None]
    loads = Loads(parts)
    if len(firsts) < LEAST_REQUESTS or len(loads.requests) < LEAST_REQUESTS:
        raise CalibrationError(
            f"{where}: {len(firsts)} requests with a first token and {len(loads.requests)} with a whole output of two or more "
            f"to fit; at least {LEAST_REQUESTS} of each are needed"
        )
    return {**_ttft_law(firsts), **_tpot_law(loads)}


def _ttft_law(firsts: Sequence[Request]) -> dict[str, Any]:
    prompt = np.array([float(request.prompt_tokens) for request in firsts])
    load = np.array([float(request.running) for request in firsts])
    measured = np.array([request.ttft_s for request in firsts], dtype=float)
    terms: list[tuple[str, float, Array]] = [("fixed", 0.0, np.ones(len(firsts)))]
    optional: list[tuple[str, float, Array]] = []
    for kind, values, knots in (("prompt", prompt, PROMPT_KNOTS), ("load", load, LOAD_KNOTS)):
        if _varies(values):
            terms.append((kind, 0.0, values))
            optional += [(kind, knot, np.maximum(0.0, values - knot)) for knot in knots if _beside(values, knot)]
    found = _selected(terms, optional, measured)
    return {
        "ttft_s": sum(slope for kind, _, slope in found if kind == "fixed"),
        "ttft_prompt": _hinges(found, "prompt"),
        "ttft_load": _hinges(found, "load"),
    }


def _tpot_law(loads: Loads) -> dict[str, Any]:
    measured = np.array([request.decode_s for request in loads.requests])
    tokens = np.array([float(request.output_tokens - 1) for request in loads.requests])
    tpot: Callable[[Array], Array] = np.ones_like
    knots: tuple[float, ...] | None = None  # chosen once
    law: dict[str, Any] = {}
    for _ in range(REPEATS):
        mean = loads.mean(lambda n: n, tpot)
        terms = [("fixed", 0.0, tokens)]
        if _varies(tokens):  # else an end that takes a time of its own looks like slower tokens
            terms.append(("end", 0.0, np.ones(len(tokens))))
        optional = []
        if _varies(mean):
            terms.append(("load", 0.0, tokens * mean))
            candidates = [knot for knot in LOAD_KNOTS if _beside(mean, knot)] if knots is None else knots
            optional = [
                ("load", knot, tokens * loads.mean(lambda n, k=knot: np.maximum(0.0, n - k), tpot))  # type: ignore[misc]
                for knot in candidates
            ]
        found = _selected(terms, optional, measured) if knots is None else _kept([*terms, *optional], measured)
        knots = tuple(knot for kind, knot, _ in found if kind == "load" and knot > 0.0)
        law = {
            "tpot_s": sum(slope for kind, _, slope in found if kind == "fixed"),
            "tpot_load": _hinges(found, "load"),
            "end_s": sum(slope for kind, _, slope in found if kind == "end"),
        }
        tpot = tpot_of(law)
    return law


def tpot_of(law: dict[str, Any]) -> Callable[[Array], Array]:
    def tpot(in_flight: Array) -> Array:
        seconds = law["tpot_s"] + sum(hinge.slope * np.maximum(0.0, in_flight - hinge.knot) for hinge in law["tpot_load"])
        return np.asarray(np.maximum(np.broadcast_to(seconds, in_flight.shape), 1e-9))

    return tpot


def _varies(values: Array) -> bool:
    return bool(len(values) and values.std() > VARIES * abs(values.mean()))


def _beside(values: Array, knot: float) -> bool:
    return int((values > knot).sum()) >= LEAST_BESIDE_KNOT and int((values <= knot).sum()) >= LEAST_BESIDE_KNOT


Term = tuple[str, float, Array]  # what it is, its knot, its column
Found = tuple[str, float, float]  # what it is, its knot, its coefficient


def _selected(terms: Sequence[Term], optional: Sequence[Term], measured: Array) -> list[Found]:
    """The fit with `terms` and those of `optional` that the log has strong evidence for, the strongest first."""
    chosen, left = list(terms), list(optional)
    best = _criterion(chosen, measured)
    while left:
        criteria = [_criterion([*chosen, term], measured) for term in left]
        place = int(np.argmin(criteria))
        if best - criteria[place] < EVIDENCE:
            break
        best = criteria[place]
        chosen.append(left.pop(place))
    return _kept(chosen, measured)


def _kept(terms: Sequence[Term], measured: Array) -> list[Found]:
    coefficients, _ = _solve(terms, measured)
    return [(kind, knot, float(slope)) for (kind, knot, _), slope in zip(terms, coefficients, strict=True) if slope > 0.0]


def _criterion(terms: Sequence[Term], measured: Array) -> float:
    """The Bayesian information criterion of a fit's relative errors (Schwarz, Estimating the dimension of a model, 1978)."""
    coefficients, predicted = _solve(terms, measured)
    relative = measured / predicted - 1.0
    n = len(measured)
    return n * float(np.log(max(float(np.mean(relative**2)), 1e-18))) + int((coefficients > 0).sum()) * float(np.log(n))


def _solve(terms: Sequence[Term], measured: Array) -> tuple[Array, Array]:
    """Coefficients and fitted values. Weights are those of the fit before, at last: weights of what was measured would pull the
    fit below the mean of requests that vary."""
    columns = np.column_stack([column for _, _, column in terms])
    weights = 1.0 / measured
    coefficients: Array = np.zeros(columns.shape[1])
    for _ in range(4):
        weighted = columns * weights[:, None]
        scale = np.linalg.norm(weighted, axis=0)
        scale[scale == 0] = 1.0
        coefficients = nnls(weighted / scale, measured * weights)[0] / scale
        weights = 1.0 / np.maximum(columns @ coefficients, 1e-9)
    return coefficients, np.maximum(columns @ coefficients, 1e-9)


def _hinges(found: Sequence[Found], kind: str) -> tuple[Hinge, ...]:
    return tuple(sorted((Hinge(knot, slope) for which, knot, slope in found if which == kind), key=lambda hinge: hinge.knot))
