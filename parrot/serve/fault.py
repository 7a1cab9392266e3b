"""A failure inside the core, kept for the shell to log."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """Something that went wrong inside and was contained."""

    what: str
    error: Exception


class PolicyFault(Fault):
    """The policy's, not the core's: `least_loaded` placed in its stead, and all went on."""
