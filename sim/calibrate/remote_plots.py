"""Residuals of a remote profile, as one picture: of the time to the first token and of the rest, and the total of each run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from parrot.remote_profile import RemoteProfile
from sim.calibrate.plots import Points, draw_residuals, draw_totals
from sim.calibrate.remote_fitting import Predicted, parts_of, predictions
from sim.calibrate.remote_laws import whole
from sim.calibrate.request_logs import RemoteRun


def write_remote_residuals(
    path: str | Path, profile: RemoteProfile, fitted: Sequence[RemoteRun], held: Sequence[RemoteRun]
) -> None:
    """Writes the picture (PNG). `held`: runs not fitted; without any, the ends of `fitted`. Raises OSError."""
    known, apart = (predictions(profile, parts) for parts in parts_of(fitted, held))
    figure = Figure(figsize=(13, 7.6), dpi=110, layout="constrained")
    axes = figure.subplots(2, 3)
    for place, (label, points) in zip(axes.flat, _inputs(known).items(), strict=False):
        draw_residuals(place, label, points, _inputs(apart)[label])
    totals = []
    names = {run.name for run in held}
    for run in (*fitted, *held):
        own = predictions(profile, [whole(run)])
        if len(own.ttft):
            measured = own.ttft_measured.sum() + own.decode_measured.sum()
            totals.append((run.load, float((own.ttft.sum() + own.decode.sum()) / measured - 1.0), run.name in names))
    draw_totals(axes.flat[-1], "load: mean requests in flight", totals, profile.spread)
    figure.suptitle(f"{profile.name}: {profile.model} at {profile.endpoint}, residuals of the fit", fontsize=12)
    figure.savefig(path, format="png", metadata={"Software": None})


def _inputs(of: Predicted) -> dict[str, Points]:
    first, rest = (of.ttft, of.ttft_measured), (of.decode, of.decode_measured)
    return {
        "first token: prompt tokens": (np.array([float(r.prompt_tokens) for r in of.requests]), *first),
        "first token: requests in flight": (np.array([float(r.running) for r in of.requests]), *first),
        "first token: predicted (ms)": (1e3 * of.ttft, *first),
        "the rest: mean requests in flight": (of.load, *rest),
        "the rest: output tokens": (np.array([float(r.output_tokens) for r in of.decoders]), *rest),
    }
