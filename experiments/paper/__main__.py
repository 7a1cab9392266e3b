"""The command. The table by pair goes to stdout, the rest into --out, progress and complaints to stderr."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from experiments.fidelity.fitting import KINDS
from experiments.fidelity.measured import MeasuredError, read_measured
from experiments.fidelity.scenarios import Setting
from experiments.paper import __doc__ as about
from experiments.paper.pairs import compared
from experiments.paper.ratios import RunError, by_pair, jobs_of, simulate_all, table_of
from experiments.paper.report import as_text, write
from parrot.configuration import ConfigurationError
from parrot.engine.profiles import find_profile
from parrot.protocol.errors import ParrotError
from parrot.serve.config import GlobalSchedulerConfig
from parrot.serve.policies import parse_policy
from sim.workloads.azure import lengths_of
from sim.workloads.paper import read_paper
from sim.workloads.program import WorkloadError


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.paper", description=(about or "").split("\n\n", 1)[0])
    parser.add_argument("--measured", required=True, metavar="FILE", help="the paper's measurements (CSV)")
    parser.add_argument("--workloads", metavar="FILE", help="the paper's workloads (JSON; default: beside FILE)")
    parser.add_argument("--azure", required=True, metavar="FILE", help="an Azure conversation trace, for the lengths of chats")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the tables and the picture go")
    parser.add_argument("--policy", default="parrot:all", help="Parrot's policy (parrot:all)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="of what is random (5)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (one a core)")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1 or arguments.workers < 1:
        parser.error("--seeds and --workers are at least 1")
    workloads = Path(arguments.workloads) if arguments.workloads else Path(arguments.measured).parent / "workloads.json"
    out = Path(arguments.out)
    try:
        articles = list(read_paper(workloads).chain_summary_and_map_reduce.articles)
        rows = compared(read_measured(arguments.measured), articles)
        next(lengths_of(arguments.azure))
        switches = parse_policy(arguments.policy, GlobalSchedulerConfig())
        out.mkdir(parents=True, exist_ok=True)
        setting = Setting(str(workloads), switches=switches, chats=arguments.azure)
        profiles = {name: find_profile(name) for name in KINDS}
        jobs = jobs_of(rows, arguments.seeds)
        outcomes = simulate_all(jobs, profiles, setting, arguments.workers, lambda text: print(text, file=sys.stderr))
        table = table_of(rows, outcomes, arguments.seeds)
        summary = by_pair(table)
        write(table, summary, out)
    except (MeasuredError, WorkloadError, ConfigurationError, ParrotError, RunError) as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename or out}: cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(as_text(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
