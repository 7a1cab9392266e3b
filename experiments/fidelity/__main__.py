"""The command. The table by figure goes to stdout, the rest into --out, progress and complaints to stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd

from experiments.fidelity import __doc__ as about
from experiments.fidelity.fitting import KINDS, fit
from experiments.fidelity.hardware import Efficiency, own_time_of
from experiments.fidelity.measured import PAGED, Experiment, MeasuredError, Row, experiments_of, read_measured
from experiments.fidelity.report import as_text, by_figure, table_of, write
from experiments.fidelity.scenarios import Outcome, Setting, modelled, simulated
from parrot.configuration import ConfigurationError
from parrot.engine.profiles import find_profile
from parrot.latency import LatencyProfile
from sim.calibrate import write_profile
from sim.workloads.paper import read_paper
from sim.workloads.program import WorkloadError

#: rows that are the time of work; the others hold waiting too, which grows without bound where an engine is overloaded
WORK = ("run_s", "jct_s", "chat_decode_ms_per_token")
LIGHT = [f"request_rate_per_s={rate}" for rate in ("0.25", "0.5", "1.0")]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.fidelity", description=(about or "").split("\n\n", 1)[0])
    parser.add_argument("--measured", required=True, metavar="FILE", help="the paper's measurements (CSV)")
    parser.add_argument("--workloads", metavar="FILE", help="the paper's workloads (JSON; default: beside FILE)")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the tables and the picture go")
    parser.add_argument("--fit", action="store_true", help="fit the profiles anew, into DIR/profiles; else the shipped ones")
    arguments = parser.parse_args(argv)
    workloads = Path(arguments.workloads) if arguments.workloads else Path(arguments.measured).parent / "workloads.json"
    out = Path(arguments.out)
    try:
        rows = read_measured(arguments.measured)
        read_paper(workloads)
        (out / "profiles" if arguments.fit else out).mkdir(parents=True, exist_ok=True)
        if arguments.fit:
            print("fitting", file=sys.stderr)
            profiles, efficiencies = fit(rows, workloads)
        else:
            profiles, efficiencies = {name: find_profile(name) for name in KINDS}, {}
        table = table_of(rows, simulate_all(rows, profiles, workloads))
        summary = by_figure(table)
        write(table, summary, out)
        if arguments.fit:
            for name, efficiency in efficiencies.items():
                write_profile(with_error(profiles[name], efficiency, table), out / "profiles" / f"{name}.json")
    except (MeasuredError, WorkloadError, ConfigurationError) as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename or out}: cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(as_text(summary))
    return 0


def simulate_all(rows: Sequence[Row], profiles: Mapping[str, LatencyProfile], workloads: Path) -> dict[Experiment, Outcome]:
    """Every run that is modelled."""
    setting = Setting(str(workloads), *own_time_of(profiles[PAGED]))  # one engine, one own time
    outcomes = {}
    for experiment in experiments_of(rows):
        if not modelled(experiment):
            outcomes[experiment] = simulated(experiment, profiles[experiment.profile], setting)
            print(f"figure {experiment.figure} {experiment.system} {experiment.params}", file=sys.stderr)
    return outcomes


def with_error(profile: LatencyProfile, efficiency: Efficiency, table: pd.DataFrame) -> LatencyProfile:
    """The profile with its error on the rows that it was not fitted to, and how it was made."""
    held = table[(table["profile"] == profile.name) & (table["part"] == "held out")].dropna(subset=["error"])
    fitted = table[(table["profile"] == profile.name) & (table["part"] == "fitted")]
    magnitude = held["error"].abs()
    error = {}
    if len(held):
        error = {"mean": float(magnitude.mean()), "p99": float(np.percentile(magnitude, 99)), "rows": float(len(held))}
    for figure, group in held.groupby("figure"):
        error[f"mean of figure {figure}"] = float(group["error"].abs().mean())
    work = held[held["metric"].isin(WORK) | held["params"].isin(LIGHT)]["error"]
    spread = float(np.sqrt(np.mean(np.log1p(work) ** 2))) if len(work) else 0.0
    parts = ", ".join(f"{name} {getattr(efficiency, name):.4g}" for name in Efficiency.__struct_fields__)
    source = (
        f"Fitted to {len(set(fitted['params'] + fitted['system']))} runs of the paper ({len(fitted)} rows)"
        if len(fitted)
        else "Nothing fitted: the A100's efficiencies on this device's peaks"
    )
    notes = (
        f"{source}; made by experiments.fidelity --fit, explained in docs/fidelity.md. Efficiencies: {parts}. `error`: "
        "|predicted/measured - 1| of end-to-end rows that were not fitted, by figure too; `spread`: over those of them that "
        "are times of work; `seen`: iterations of the fitted runs."
    )
    return msgspec.structs.replace(profile, error=error, spread=spread, notes=notes)


if __name__ == "__main__":
    sys.exit(main())
