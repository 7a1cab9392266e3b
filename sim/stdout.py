"""What a command does when nobody reads its standard output any more, as behind `| head`: it ends, and says nothing of it."""

from __future__ import annotations

import os
import sys


def leave_stdout() -> int:
    """After a BrokenPipeError: what is still buffered goes nowhere, else the interpreter complains of it at its end. Returns
    the exit status."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return 1
