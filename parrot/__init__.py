"""Parrot: serving LLM applications by their semantic variables, on real engines and in simulation.

Importing this package loads nothing; `from parrot import P` loads the frontend (types: `__init__.pyi`).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["P"]


def __getattr__(name: str) -> Any:
    """`P`, the frontend. Loaded by name, because servers import this package too and must not depend on it."""
    if name == "P":
        return import_module("parrot.frontend.pfunc")
    raise AttributeError(f"module 'parrot' has no attribute {name!r}")
