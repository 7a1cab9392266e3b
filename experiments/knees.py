"""`python -m experiments.knees DIR`: at which rate each series of a sweep is full, and the rates that are parts of that.

The knee is the rate at which the metric first reaches twice its value at the lowest rate (`sim.tables.knee`), by seed, then
averaged. An experiment that compares policies takes the same parts of it for every workload.
"""

from __future__ import annotations

import argparse
import sys

from parrot.configuration import ConfigurationError
from sim.metrics import METRICS
from sim.report.study import open_study
from sim.results import ResultsError

METRIC = "normalized_latency_s.mean"  #: latency of a call over its output tokens: without the time in which users think
PARTS = (0.7, 1.0)


def main(argv: list[str] | None = None) -> int:
    """Prints a Markdown table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.knees", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", metavar="DIR", help="what sim.run --out named: a sweep over rates")
    parser.add_argument("--metric", default=METRIC, help=f"a latency ({METRIC})")
    arguments = parser.parse_args(argv)
    try:
        if arguments.metric not in METRICS:
            raise ConfigurationError(f"--metric {arguments.metric}: expected one of sim.run's, such as {METRIC}")
        study = open_study(arguments.folder)
        if not study.is_rate:
            raise ConfigurationError(f"{arguments.folder}: a sweep over rates is needed")
    except (ConfigurationError, ResultsError) as error:
        print(f"experiments.knees: {error}", file=sys.stderr)
        return 1
    knees = study.knees(arguments.metric).set_index("series")["x"]
    print("| series | knee (programs/s) | " + " | ".join(f"{part:.0%} of it" for part in PARTS) + " |")
    print("|---|---:|" + "---:|" * len(PARTS))
    for name in study.series:
        if name in knees.index:
            print(f"| {name} | {knees[name]:.3g} | " + " | ".join(f"{part * knees[name]:.3g}" for part in PARTS) + " |")
        else:
            print(f"| {name} | none seen | " + " | ".join("–" for _ in PARTS) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
