"""Where the tokens of rows lie in the cache, as numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from parrot.engine.builtin.attention.base import AttentionRow


def slots(pages: Sequence[int], start: int, stop: int, page_tokens: int) -> NDArray[np.int64]:
    """The slot of each position in [start, stop) of a sequence on `pages`."""
    positions = np.arange(start, stop)
    if page_tokens == 1:
        return np.asarray(pages, dtype=np.int64)[positions]
    return np.asarray(pages, dtype=np.int64)[positions // page_tokens] * page_tokens + positions % page_tokens


def new_slots(rows: Sequence[AttentionRow], page_tokens: int) -> NDArray[np.int64]:
    """The slots of all tokens that `rows` compute, in their order."""
    if not rows:
        return np.zeros(0, dtype=np.int64)
    return np.concatenate([slots(row.pages, row.start, row.stop, page_tokens) for row in rows])
