"""Several coroutines at once, of which one failure ends the others. Shared by the core's server and the engine's."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any


async def all_of(works: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results of all, in order. The first error is raised, and the others are given up and have ended by then."""
    tasks = list(works)
    if len(tasks) == 1:
        return [await tasks[0]]
    futures = [asyncio.ensure_future(work) for work in tasks]
    try:
        return list(await asyncio.gather(*futures))
    finally:
        for future in futures:
            future.cancel()
        await asyncio.gather(*futures, return_exceptions=True)
