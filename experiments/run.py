"""The command `python -m experiments.run NAME [flags of sim.run]`: a named specification, run through the simulator's sweep.

A specification is a file of this folder, experiments/NAME.json, in the one format there is (`sim.spec.Specification`). Paths in
it are relative to the repository, where the command is to be run. Without a name it lists them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import calibrate
from parrot.configuration import ConfigurationError
from sim import run
from sim.spec import load_specification

FOLDER = Path(__file__).parent
USAGE = "usage: python -m experiments.run NAME [flags of sim.run, which stand above it]"


def names() -> dict[str, Path]:
    """The specifications of this folder by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.json"))}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status, as `sim.run` has it. Results go to results/NAME unless --out says otherwise."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = names()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        try:
            for name, path in known.items():
                print(f"  {name:<16} {load_specification(str(path)).about}")
            print(f"  {'calibrate':<16} {calibrate.ABOUT} (calibrate --help)")
        except ConfigurationError as error:
            print(f"experiments.run: {error}", file=sys.stderr)
            return 1
        return 0
    name, *flags = arguments
    if name == "calibrate":
        return calibrate.main(flags)
    if name not in known:
        print(f"experiments.run: no experiment {name!r}; there are {', '.join([*known, 'calibrate'])}", file=sys.stderr)
        return 2
    return run.main(["--spec", str(known[name]), "--out", f"results/{name}", *flags], "experiments.run")


if __name__ == "__main__":
    sys.exit(main())
