"""`python -m sim.workloads from-journal JOURNAL OUT`: turns what a core recorded into a file of programs."""

from __future__ import annotations

import argparse
import sys

from sim.workloads.journal import read_journal
from sim.workloads.program import WorkloadError, write_programs


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; what it says goes to stderr."""
    parser = argparse.ArgumentParser(prog="python -m sim.workloads", description="Prepare workloads.")
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("from-journal", help="turn the journal of a core (mode record) into a file of programs")
    convert.add_argument("journal", metavar="JOURNAL", help='a journal written with "journal_mode": "record"')
    convert.add_argument("out", metavar="OUT", help="where to write the programs, as JSONL")
    convert.add_argument("--tokenizer", help="whose lengths to use (default: the first engine's of the journal)")
    arguments = parser.parse_args(argv)
    try:
        recorded = read_journal(arguments.journal, arguments.tokenizer)
        for reason in recorded.skipped:
            print(f"skipped {reason}", file=sys.stderr)
        written = write_programs(arguments.out, recorded.programs)
    except WorkloadError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{arguments.out}: cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{written} programs written to {arguments.out}, {len(recorded.skipped)} sessions skipped", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
