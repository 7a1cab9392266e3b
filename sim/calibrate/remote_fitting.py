"""The fit of a remote profile and what it is worth: the laws of `remote_laws`, how far single requests deviate from them, what
limited the requests, and the error on runs that were not fitted. Reads no files and chooses no runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from parrot.latency_profile import Hinge
from parrot.remote_latency import RemoteModel
from parrot.remote_profile import RemoteProfile
from sim.calibrate.logs import CalibrationError
from sim.calibrate.rate_limits import limits_in
from sim.calibrate.remote_laws import Loads, Part, part_of, solved, tpot_of, whole
from sim.calibrate.request_logs import Array, RemoteRun, Request
from sim.calibrate.split import HOLD_OUT, levels, not_apart

QUANTILES = 101


class Predicted(NamedTuple):
    """Requests with what was measured and what a profile says, seconds. `load`: mean while tokens came (0: none did)."""

    requests: list[Request]
    ttft: Array
    ttft_measured: Array
    decoders: list[Request]
    load: Array
    decode: Array
    decode_measured: Array


def fit_remote(runs: Sequence[RemoteRun], name: str, *, held: Sequence[RemoteRun] = (), trace: str = "") -> RemoteProfile:
    """The profile that fits `runs` best; its error is that on `held`, runs that are not among them.

    Without `held` the last fifth of each run is not fitted and tells an error, which the profile marks as one at loads that
    were fitted (`error["runs"]` is 0). Raises CalibrationError when there are too few requests.
    """
    where = trace or "the logs"
    if held and not any(run.requests for run in runs):
        raise CalibrationError(f"{where}: every run is held out: none is left to fit")
    fitted, apart = parts_of(runs, held)
    everything = [*runs, *held]
    header = everything[0].header
    law = solved(fitted, where)
    limits = limits_in(everything)
    profile = RemoteProfile(
        name=name,
        model=header.model,
        endpoint=header.endpoint,
        api_endpoint=header.api_endpoint,
        versions=header.versions,
        trace=trace,
        requests_per_minute=limits.requests,
        tokens_per_minute=limits.tokens,
        limits_from=limits.source,
        task_overhead_s=_overhead_s(runs),
        seen=_seen(fitted),
        **law,
    )
    known = predictions(profile, fitted)
    ratios = _cross_validated(everything, where, profile)
    return msgspec.structs.replace(
        profile,
        ttft_residuals=_quantiles(known.ttft_measured, known.ttft),
        tpot_residuals=_quantiles(known.decode_measured, known.decode),
        spread=float(np.sqrt(np.mean(np.square(ratios)))) if ratios else 0.0,
        error=_error(profile, apart, held),
        notes=_notes(runs, held, fitted, apart, len(ratios), limits.note),
    )


# --------------------------------------------------------------------------------------- what the fit is worth


def predictions(profile: RemoteProfile, parts: Sequence[Part]) -> Predicted:
    """What the profile says of the requests, at the loads that they met."""
    model = RemoteModel(profile)
    firsts = [request for part in parts for request in part.requests if request.ttft_s is not None]
    loads = Loads(parts)
    tpot = tpot_of({"tpot_s": profile.tpot_s, "tpot_load": profile.tpot_load})
    tokens = np.array([float(request.output_tokens - 1) for request in loads.requests])
    return Predicted(
        firsts,
        np.maximum(np.array([model.ttft(request.prompt_tokens, request.running) for request in firsts], dtype=float), 1e-9),
        np.array([request.ttft_s for request in firsts], dtype=float),
        loads.requests,
        loads.mean(lambda n: n, tpot),
        tokens * loads.mean(tpot, tpot) + profile.end_s,
        np.array([request.decode_s for request in loads.requests], dtype=float),
    )


def parts_of(fitted: Sequence[RemoteRun], held: Sequence[RemoteRun]) -> tuple[list[Part], list[Part]]:
    """What was fitted and what was held out: runs, or the beginnings and the ends of runs when no run is held out."""
    if held:
        return [whole(run) for run in fitted], [whole(run) for run in held]
    return [part_of(run, 0.0, 1.0 - HOLD_OUT) for run in fitted], [part_of(run, 1.0 - HOLD_OUT, 1.0) for run in fitted]


def _total_ratio(predicted: Predicted) -> float:
    """measured / predicted of the sum of all durations."""
    measured = predicted.ttft_measured.sum() + predicted.decode_measured.sum()
    return float(measured / max(predicted.ttft.sum() + predicted.decode.sum(), 1e-9))


def _cross_validated(runs: Sequence[RemoteRun], where: str, profile: RemoteProfile) -> list[float]:
    """log(measured / predicted) of the total time of every run, by a fit that has not seen its load; () with one load only."""
    by_load = levels(runs)
    ratios: list[float] = []
    if len(by_load) < 2:
        return ratios
    for number, level in enumerate(by_load):
        others = [whole(run) for k, other in enumerate(by_load) if k != number for run in other]
        try:
            law = solved(others, where)
        except CalibrationError:
            continue  # too few are left
        fold = msgspec.structs.replace(profile, **law)
        for run in level:
            predicted = predictions(fold, [whole(run)])
            if len(predicted.ttft):
                ratios.append(float(np.log(_total_ratio(predicted))))
    return ratios


def _quantiles(measured: Array, predicted: Array) -> tuple[float, ...]:
    levels_of = np.linspace(0.0, 1.0, QUANTILES)
    return tuple(round(float(value), 6) for value in np.quantile(np.log(measured / predicted), levels_of))


def _error(profile: RemoteProfile, apart: Sequence[Part], held: Sequence[RemoteRun]) -> dict[str, float]:
    predicted = predictions(profile, apart)
    if not len(predicted.ttft) or not len(predicted.decode):
        return {}
    first = np.abs(predicted.ttft / predicted.ttft_measured - 1.0)
    rest = np.abs(predicted.decode / predicted.decode_measured - 1.0)
    error = {
        "ttft_mean": float(first.mean()),
        "ttft_p99": float(np.percentile(first, 99)),
        "ttft_total": float(predicted.ttft.sum() / predicted.ttft_measured.sum() - 1.0),
        "decode_mean": float(rest.mean()),
        "decode_p99": float(np.percentile(rest, 99)),
        "decode_total": float(predicted.decode.sum() / predicted.decode_measured.sum() - 1.0),
        "total": 1.0 / _total_ratio(predicted) - 1.0,
        "requests": float(len(first)),
        "runs": float(len(held)),
    }
    for run in held:
        own = predictions(profile, [whole(run)])
        if len(own.ttft):
            error[f"total of {run.name}"] = 1.0 / _total_ratio(own) - 1.0
    return error


def _overhead_s(runs: Sequence[RemoteRun]) -> float:
    """Mean time of our own side before a request is sent, of runs without limits, in which nothing else makes one wait."""
    waits = [
        request.wait_s
        for run in runs
        if run.header.requests_per_minute is None and run.header.tokens_per_minute is None
        and all(request.reason != "engine_rejected" for request in run.requests)
        for request in run.requests
        if request.tries == 1
    ]  # fmt: skip
    return float(np.mean(waits)) if waits else 0.0


def _seen(parts: Sequence[Part]) -> dict[str, tuple[float, float]]:
    requests = [request for part in parts for request in part.requests if request.ttft_s is not None]
    columns = {
        "prompt_tokens": [request.prompt_tokens for request in requests],
        "load": [request.running for request in requests],
        "output_tokens": [request.output_tokens for request in requests if request.decodes],
    }
    return {name: (float(min(values)), float(max(values))) for name, values in columns.items() if values}


def _notes(
    runs: Sequence[RemoteRun],
    held: Sequence[RemoteRun],
    fitted: Sequence[Part],
    apart: Sequence[Part],
    ratios: int,
    limits_note: str,
) -> str:
    count = sum(len(part.requests) for part in fitted)
    others = sum(len(part.requests) for part in apart)
    notes = f"Fitted to {count} requests of {len(runs)} run(s), mean load {_loads(runs)}. "
    if held:
        notes += f"Held out: {len(held)} whole run(s), mean load {_loads(held)}, {others} requests, which tell `error`. "
        if alike := [run.name for run in not_apart(runs, held)]:
            notes += f"Not at a load of its own: {', '.join(alike)}. "
    else:
        notes += (
            f"NO RUN WAS HELD OUT: there is one load only. `error` is that on the last {HOLD_OUT:.0%} of each run, {others} "
            "requests, which were not fitted but are of a load that was: it says nothing of other loads. "
        )
    broken = sum(r.ttft_s is None for part in itertools.chain(fitted, apart) for r in part.requests)
    if broken:
        notes += f"Without a first token, and not fitted: {broken} request(s). "
    notes += limits_note
    notes += f"`spread`: {ratios} run(s), each predicted by a fit without the runs of its load." if ratios else ""
    return notes.strip()


def _loads(runs: Sequence[RemoteRun]) -> str:
    return ", ".join(f"{run.load:.1f}" for run in sorted(runs, key=lambda run: run.load))


def describe_remote(profile: RemoteProfile) -> str:
    """The profile in a few lines for a reader at a terminal."""
    error = profile.error
    what = "held-out runs" if error.get("runs") else "the runs' ends (no run was held out: one load only)"
    held = "none held out"
    if error:
        held = (
            f"first token mean {error['ttft_mean']:.1%}, p99 {error['ttft_p99']:.1%}; the rest mean "
            f"{error['decode_mean']:.1%}, p99 {error['decode_p99']:.1%}; of the sum {error['total']:+.1%}"
        )
    limits = [
        f"{limit} {name} a minute"
        for limit, name in ((profile.requests_per_minute, "requests"), (profile.tokens_per_minute, "tokens"))
        if limit is not None
    ]
    return (
        f"{profile.name}: {profile.model} at {profile.endpoint}\n"
        f"  first token: {profile.ttft_s * 1e3:.1f} ms, per prompt token {_shown(profile.ttft_prompt, 1e6, 'µs')}, "
        f"per request in flight {_shown(profile.ttft_load, 1e3, 'ms')}\n"
        f"  each token after it: {profile.tpot_s * 1e3:.2f} ms, per request in flight {_shown(profile.tpot_load, 1e3, 'ms')}; "
        f"the end {profile.end_s * 1e3:.2f} ms; per task {profile.task_overhead_s * 1e3:.2f} ms\n"
        f"  limits: {', '.join(limits) or 'none seen'}{f' (from {profile.limits_from})' if limits else ''}\n"
        f"  error on {what}: {held}; spread of whole runs {profile.spread:.1%}"
    )


def _shown(hinges: Sequence[Hinge], unit: float, name: str) -> str:
    return ", ".join(f"{h.slope * unit:.2f} {name}{f' above {h.knot:g}' if h.knot else ''}" for h in hinges) or "0"
