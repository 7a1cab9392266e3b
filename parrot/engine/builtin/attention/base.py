"""The interface of attention functions: how new tokens are written to the paged cache and read all before them.

One iteration is planned once and attended to in every layer. A function may keep what helps it from one iteration to
the next; it must give the same values without.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class AttentionRow(NamedTuple):
    """A sequence's part of the iteration: positions [start, stop), whose tokens are the next stop − start of the packed
    ones. `pages`: its pages from position 0 on. `key`: whose it is, the same from iteration to iteration."""

    key: Hashable
    start: int
    stop: int
    pages: Sequence[int]


class Attention(Protocol):
    """Made for one KV cache and one model's heads."""

    def plan(self, rows: Sequence[AttentionRow]) -> Any:
        """What `attend` needs in this iteration. Called once an iteration, in the order in which they are computed."""

    def attend(self, plan: Any, layer: int, heads: Tensor) -> Tensor:
        """Writes the new keys and values, then attends causally.

        heads: [tokens, num_heads + 2 × num_kv_heads, head_dim], positions applied. Gives [tokens, num_heads × head_dim].
        """
