"""Parrot: serving LLM applications by their semantic variables, on real engines and in simulation.

Importing this package loads nothing; `from parrot import P` loads the frontend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parrot.frontend import pfunc as P

__all__ = ["P"]


def __getattr__(name: str) -> Any:
    if name != "P":
        raise AttributeError(f"module 'parrot' has no attribute {name!r}")
    import parrot.frontend.pfunc

    return parrot.frontend.pfunc
