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
    found = []
    single: list[int] = []  # of neighbouring rows of one token: an array for each would take longer than all the rest
    for row in rows:
        if row.stop - row.start == 1:
            single.append(row.pages[row.start // page_tokens] * page_tokens + row.start % page_tokens)
            continue
        if single:
            found.append(np.array(single, dtype=np.int64))
            single = []
        found.append(slots(row.pages, row.start, row.stop, page_tokens))
    return np.concatenate([*found, np.array(single, dtype=np.int64)])
