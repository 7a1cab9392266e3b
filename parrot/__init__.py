"""Parrot: serving LLM applications by their semantic variables, on real engines and in simulation.

Importing this package loads nothing; `from parrot import P` loads the frontend (types: `__init__.pyi`). Where the hot modules
are compiled (`parrot.compiled`), they are loaded in place of their sources.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from parrot.compiled import use

__all__ = ["P"]

use()
del use


def __getattr__(name: str) -> Any:
    """`P`, the frontend. Loaded by name, because servers import this package too and must not depend on it."""
    if name == "P":
        return import_module("parrot.frontend.pfunc")
    raise AttributeError(f"module 'parrot' has no attribute {name!r}")
