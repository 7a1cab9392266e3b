"""The command line that the examples share: runs a program at a core and prints its texts and its times."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from parrot import P


def run(main: Callable[[P.VirtualMachine], dict[str, str]], description: str | None) -> None:
    """Runs `main` in a session of its own. What the core refuses is one line on stderr and exit status 1."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", default="http://localhost:9000", help="address of the core (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="print every call")
    flags = parser.parse_args()
    try:
        vm = P.VirtualMachine(flags.core, mode="debug" if flags.debug else "release")
        with vm.running_scope():
            for title, text in main(vm).items():
                print(f"{title}\n    {text.strip()}\n")
            print(P.timing_table(P.timings(vm.report()), vm.jct_s))
    except P.ParrotError as error:
        sys.exit(f"{error.code}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
