"""The command `python -m sim.report OUT`: writes OUT/report.html again, from what a sweep left in OUT.

Exit status: 0 done, 1 refused (one line on stderr says why), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from parrot.configuration import ConfigurationError
from sim.report.page import write_report
from sim.results import ResultsError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m sim.report", description="Write report.html of a folder of results.")
    p.add_argument("folder", metavar="OUT", help="what sim.run --out named")
    p.add_argument(
        "--objectives",
        metavar="NAME=SECONDS,…",
        help="goodput under these: ttft_s, tpot_s, jct_s (those of the specification)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = parser().parse_args(argv)
    try:
        objectives = _objectives(arguments.objectives) if arguments.objectives is not None else None
        path = write_report(arguments.folder, objectives)
    except (ConfigurationError, ResultsError) as error:
        print(f"sim.report: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"sim.report: {arguments.folder}: cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(path)
    return 0


def _objectives(text: str) -> dict[str, float]:
    found = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise ConfigurationError(f"--objectives {item}: expected NAME=SECONDS") from None
    return found


if __name__ == "__main__":
    sys.exit(main())
